"""The command line: one program with verbs. Nothing heavy is imported before a verb runs.

Exit codes: 0 ok, 1 failed, 2 bad spec or usage, 3 a quality or parity gate missed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import click
import typer

from lrc.cli_adapters import extract_lora, merge
from lrc.cli_base import AllowCode, Json, Model, show

INTERRUPTED = 130  # what typer returns after Ctrl-C

app = typer.Typer(
    help="A compiler for low-rank structure in neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Spec = Annotated[Path, typer.Argument(help="The spec: a YAML or JSON file.", show_default=False)]
Rest = Annotated[
    Optional[list[str]],  # noqa: UP045  typer reads this form
    typer.Argument(help="[MODEL] [section.key=value ...]", metavar="[MODEL] [KEY=VALUE ...]", show_default=False),
]
Cache = Annotated[Path | None, typer.Option(help="Where statistics are kept (default: .lrc-cache beside the output).")]
Output = Annotated[Optional[Path], typer.Option("--output", "-o", help="The output folder (default: the spec's).")]  # noqa: UP045
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def split_rest(rest: list[str] | None) -> tuple[str | None, list[str]]:
    """Tell the optional MODEL from the overrides `key=value` that may follow it."""
    words = list(rest or [])
    model = words.pop(0) if words and "=" not in words[0].split("/")[0] else None
    return model, words


@app.command()
def init(model: Model, output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("spec.yaml"),
         as_json: Json = False, allow_code: AllowCode = False) -> None:  # fmt: skip
    """Write a commented spec for MODEL."""
    from lrc.run.prepare import capture
    from lrc.run.starter import write_starter

    path = write_starter(capture(model, allow_code=allow_code), model, output)
    show({"spec": str(path)}, as_json, f"wrote {path}")


@app.command()
def validate(spec: Spec, rest: Rest = None, as_json: Json = False, allow_code: AllowCode = False) -> None:
    """Check a spec, and its patterns against MODEL (or the spec's model); nothing is measured or changed."""
    from lrc.run.validate import validate as check

    model, overrides = split_rest(rest)
    found = check(spec, model, overrides=overrides, allow_code=allow_code)
    sites = f", {found['sites']} sites selected" if found["sites"] is not None else ""
    show(found, as_json, f"{spec}: valid{sites}")


@app.command()
def inspect(model: Model, as_json: Json = False, graph: Annotated[bool, typer.Option(help="Print the graph as text.")] = False,
            allow_code: AllowCode = False) -> None:  # fmt: skip
    """List the sites of MODEL: name, type, shape, share of the parameters, stable rank."""
    from lrc.report.tables import rows_table
    from lrc.run.prepare import capture
    from lrc.run.site_rows import site_rows

    program = capture(model, allow_code=allow_code)
    if graph:
        show(str(program), as_json, str(program))
        return
    rows = site_rows(program)
    show(rows, as_json, rows_table(rows))


@app.command()
def plan(spec: Spec, rest: Rest = None, output: Output = None, as_json: Json = False, cache: Cache = None,
         write: Annotated[Optional[Path], typer.Option(help="Write the plan as JSON, for `lrc diff`.")] = None,  # noqa: UP045
         pareto: Annotated[Optional[str], typer.Option(  # noqa: UP045
             help="Other amounts of the spec's budget to compare, as 0.9,0.8,0.6 (the same as pareto.budgets=[…]).")] = None,
         allow_code: AllowCode = False, quiet: Quiet = False) -> None:  # fmt: skip
    """Say what `compile` would do: per site the rule, rank, size, predicted loss, FLOPs and bytes."""
    from lrc import api
    from lrc.report.progress import bars
    from lrc.report.tables import plan_table

    model, overrides = split_rest(rest)
    if pareto is not None:
        overrides.append(f"pareto.budgets=[{pareto}]")
    with bars(quiet or as_json) as progress:
        made = api.plan(
            model, spec, overrides=overrides, output=output, cache=cache, allow_code=allow_code, progress=progress
        )  # fmt: skip
    if write is not None:
        write.write_text(made.to_json(), encoding="utf-8")
    show(json.loads(made.to_json()), as_json, plan_table(made))


@app.command("compile")
def compile_(spec: Spec, rest: Rest = None, output: Output = None, as_json: Json = False, cache: Cache = None,
             overwrite: Annotated[bool, typer.Option(help="Replace a finished output of lrc.")] = False,
             dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as `plan`.")] = False,
             resume: Annotated[bool, typer.Option(help="Take over what a killed run finished.")] = True,
             allow_code: AllowCode = False, quiet: Quiet = False) -> None:  # fmt: skip
    """Compile MODEL as SPEC says, check the result, and leave it in the output folder."""
    if dry_run:
        plan(spec, rest, output, as_json, cache, None, None, allow_code, quiet)
        return
    from lrc import api
    from lrc.report.progress import bars
    from lrc.report.tables import result_table
    from lrc.train.distributed import world

    model, overrides = split_rest(rest)
    first = world().first
    with bars(quiet or as_json or not first) as progress:
        done = api.compile_to_folder(
            model, spec, overrides=overrides, output=output, cache=cache, overwrite=overwrite, resume=resume,
            allow_code=allow_code, progress=progress,
        )  # fmt: skip
    if not first:
        return
    show(done.summary(), as_json, result_table(done.summary()))
    done.raise_on_failure()


@app.command()
def evaluate(spec: Spec, artifact: Annotated[str, typer.Argument(help="An output folder, a model, or a .onnx or .pt2 file.")],
             rest: Rest = None, as_json: Json = False, allow_code: AllowCode = False) -> None:  # fmt: skip
    """Measure the metrics of SPEC on ARTIFACT, beside the original MODEL if one is given."""
    from lrc.report.tables import rows_table
    from lrc.run.artifact import evaluate_artifact
    from lrc.run.prepare import capture, read_spec
    from lrc.verify.evaluate import raise_on_missed

    model, overrides = split_rest(rest)
    document, file = read_spec(spec, overrides)
    base = file.parent if file else Path()
    original = capture(model, document=document, allow_code=allow_code) if model else None
    scores, gates = evaluate_artifact(artifact, document, base, original, allow_code=allow_code)
    rows, checked = [score.row() for score in scores], [gate.row() for gate in gates]
    show({"metrics": rows, "gates": checked}, as_json, rows_table(rows))
    raise_on_missed(checked, artifact)


@app.command()
def benchmark(folder: Annotated[Path, typer.Argument(help="A finished output folder.")], rest: Rest = None,
              batch: Annotated[list[int], typer.Option(help="Batch sizes.")] = [1, 8],  # noqa: B006  typer wants a list
              length: Annotated[list[int], typer.Option(help="Sequence lengths.")] = [16, 128],  # noqa: B006
              rounds: Annotated[int, typer.Option(help="Timed runs of each.", min=1)] = 15,
              compiled: Annotated[bool, typer.Option("--torch-compile", help="Time torch.compile too.")] = False,
              as_json: Json = False, allow_code: AllowCode = False) -> None:  # fmt: skip
    """Time every artifact of FOLDER against the dense MODEL, interleaved, as ratios."""
    from rich.console import Group

    from lrc.report.tables import rows_table
    from lrc.run.benchmark import benchmark_folder, machine

    model, _ = split_rest(rest)
    found = benchmark_folder(
        folder, model, batches=batch, lengths=length, compile_modules=compiled, rounds=rounds, allow_code=allow_code
    )
    show({"machine": machine(), **found}, as_json, Group(*(rows_table(rows) for rows in found.values() if rows)))


@app.command()
def export(folder: Annotated[Path, typer.Argument(help="A finished output folder.")],
           to: Annotated[str, typer.Option("--format", help="hf, onnx, aoti, torch_compile, pt2.")],
           settings: Annotated[Optional[list[str]], typer.Argument(help="Options of the format: key=value.")] = None,  # noqa: UP045
           output: Output = None, as_json: Json = False) -> None:  # fmt: skip
    """Lower a finished folder to another format, without compiling again."""
    from lrc.run.reexport import export_folder

    made = export_folder(folder, to, output, settings or ())
    show({"files": [str(f) for f in made]}, as_json, "\n".join(f"wrote {f}" for f in made))


app.command()(merge)
app.command("extract-lora")(extract_lora)


@app.command()
def diff(a: Path, b: Path, as_json: Json = False) -> None:
    """Show what is different between two specs, plans or output folders."""
    from lrc.report.diff import diff as differences
    from lrc.report.tables import rows_table

    rows = differences(a, b)
    show(rows, as_json, rows_table(rows) if rows else "no difference")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A finished output folder.")], output: Output = None,
           as_json: Json = False) -> None:  # fmt: skip
    """Write one self-contained HTML page about a finished run."""
    from lrc.report.html import report_of

    path = output or folder / "lrc" / "report.html"
    path.write_text(report_of(folder), encoding="utf-8")
    show({"report": str(path)}, as_json, f"wrote {path}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the spec."""
    from lrc.spec.schema import schema_text

    sys.stdout.write(schema_text())


@app.command("list")
def list_(kind: Annotated[Optional[str], typer.Argument(help="One kind; all without it.")] = None,  # noqa: UP045
          name: Annotated[Optional[str], typer.Argument(help="One of the kind: its options.")] = None,  # noqa: UP045
          as_json: Json = False) -> None:  # fmt: skip
    """List what a spec may use; with a kind, what each does; with a name, its options and their defaults."""
    from lrc.report.tables import rows_table
    from lrc.run.catalogue import names, options_of, preset_text, summaries

    if kind == "presets" and name is not None:
        text = preset_text(name)
        show({"preset": name, "text": text}, as_json, text.rstrip())
    elif kind is not None and name is not None:
        rows = options_of(kind, name)
        show(rows, as_json, rows_table(rows) if rows else "no options")
    elif kind is not None:
        show(names(kind), as_json, rows_table(summaries(kind)))
    else:
        found = names()
        show(found, as_json, "\n".join(f"{k}: {', '.join(v) or '-'}" for k, v in found.items()))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check the environment: packages, the C++ compiler for Inductor, CPU features, disk."""
    from lrc.report.tables import rows_table
    from lrc.run.doctor import examine

    rows = examine()
    show(rows, as_json, rows_table(rows))
    if not all(row["ok"] for row in rows if row["needed"]):
        raise SystemExit(1)


def main() -> None:
    """Run the command line; turn every error that a user can meet into one line and the documented exit code."""
    from lrc.errors import LrcError

    debug = "LRC_DEBUG" in os.environ
    try:
        code = app(prog_name="lrc", standalone_mode=False) or 0
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "lrc"
        _fail(f"{command}: {error.format_message().rstrip('.')}. `{command} --help` says what there is.", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted: nothing was half-written; the same command takes over what was finished", 1)
    except LrcError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except OSError as error:
        if debug:
            raise
        _fail(f"{error.filename or 'system'}: {error.strerror or error}", 1)


def _fail(text: str, code: int) -> None:
    sys.stderr.write(f"error: {text}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()

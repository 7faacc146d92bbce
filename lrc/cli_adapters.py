"""The verbs about adapters: `merge` and `extract-lora`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from lrc.cli_base import AllowCode, Json, Model, show


def merge(base: Model, adapters: Annotated[list[Path], typer.Argument(help="PEFT folders.")],
          output: Annotated[Path, typer.Option("--output", "-o", help="The output folder.")],
          method: Annotated[str, typer.Option(help="linear, cat, svd, ties, dare, dare_ties, factor_swap.")] = "linear",
          weights: Annotated[Optional[str], typer.Option(help="A factor for each adapter: 0.7,0.3 (default: 1 each).")] = None,  # noqa: UP045
          density: Annotated[float, typer.Option(help="The share of entries that TIES and DARE keep.")] = 0.5,
          rank: Annotated[Optional[int], typer.Option(help="Cut the combined change at this rank.")] = None,  # noqa: UP045
          seed: Annotated[int, typer.Option(help="Of DARE.")] = 0,
          as_adapter: Annotated[bool, typer.Option("--as-adapter", help="Write one PEFT folder, not the model.")] = False,
          as_json: Json = False, allow_code: AllowCode = False) -> None:  # fmt: skip
    """Merge adapters into the model BASE, or several adapters into one."""
    from lrc.errors import UsageError
    from lrc.run.adapter_jobs import Combination, merge_adapters
    from lrc.run.prepare import capture

    try:
        factors = tuple(float(word) for word in weights.split(",")) if weights else ()
    except ValueError as error:
        raise UsageError("--weights", expected="numbers with commas between them", got=str(weights)) from error
    how = Combination(method, factors, density, rank, seed)  # type: ignore[arg-type]  # checked there
    how.check(len(adapters))
    done = merge_adapters(capture(base, allow_code=allow_code), adapters, output, how, as_adapter=as_adapter)
    show(done, as_json, f"{done['adapters']} adapters at {done['sites']} sites, {method}: wrote {output}")


def extract_lora(base: Model, tuned: Annotated[str, typer.Argument(help="The model that was trained from BASE.")],
                  output: Annotated[Path, typer.Option("--output", "-o", help="The PEFT folder.")],
                  rank: Annotated[int, typer.Option(help="Of the adapter.")] = 16,
                  targets: Annotated[Optional[list[str]], typer.Option(help="Patterns of sites (default: linears).")] = None,  # noqa: UP045
                  ignore: Annotated[Optional[list[str]], typer.Option(help="Patterns of sites to leave out.")] = None,  # noqa: UP045
                  as_json: Json = False, allow_code: AllowCode = False) -> None:  # fmt: skip
    """Write what fine-tuning changed, TUNED - BASE, as a LoRA adapter that PEFT loads."""
    from lrc.report.tables import rows_table
    from lrc.run import adapter_jobs
    from lrc.run.prepare import capture

    before, after = (capture(name, allow_code=allow_code) for name in (base, tuned))
    done = adapter_jobs.extract_lora(before, after, output, rank, targets or ("**",), ignore or ())
    rows = [{"site": fqn, "relative error": f"{error:.3g}"} for fqn, error in done["errors"].items()]
    show(done, as_json, rows_table(rows))
    lost = done["not_in_the_adapter"]
    if lost and not as_json:
        show(None, False, f"{len(lost)} changed tensors are not in the adapter, first {lost[0]}")

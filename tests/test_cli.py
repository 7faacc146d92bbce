"""Every verb of the command line, on tiny models."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lrc
from lrc.api import Finished
from lrc.spec.registry import ALLOCATORS, EXPORTERS, RANKS, SOLVERS

Run = tiny.Run
VERBS = [
    "init", "validate", "inspect", "plan", "compile", "evaluate", "benchmark", "export", "diff", "report", "schema", "list",
    "doctor",
]  # fmt: skip
MLP = ["tiny:mlp_with_inputs", "--allow-code"]


@pytest.fixture
def mlp_spec(in_tmp: Path) -> Path:
    """A spec of the perceptron in the current folder."""
    tiny.write_data(in_tmp)
    document = tiny.factorize(solver="kfac", rank={"params_kept": 0.6})
    document |= {"calibration": {"dataset": "arrays.npz"}, "export": [{"format": "pt2"}]}
    path = in_tmp / "spec.json"
    path.write_text(json.dumps(document))
    return path


# Help and usage.


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_help(verb: str, cli: Run) -> None:
    for flag in ("--help", "-h"):
        made = cli(verb, flag)
        assert (made.code, made.err) == (0, "")
        assert f"Usage: lrc {verb}" in made.out
        options = re.findall(r"--\w[\w-]*", made.out)
        assert all(re.fullmatch(r"--[a-z]+(-[a-z]+)*", option) for option in options)


def test_the_program_lists_its_verbs(cli: Run) -> None:
    made = cli("--help")
    assert made.code == 0
    assert [verb for verb in VERBS if f" {verb} " not in made.out] == []
    nothing = cli()
    assert nothing.code == 2
    assert "Usage: lrc" in nothing.out + nothing.err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nosuch"], "lrc: No such command 'nosuch'. `lrc --help` says what there is."),
        (["compile"], "lrc compile: Missing argument 'SPEC'. `lrc compile --help` says what there is."),
        (["plan", "a.yaml", "--foo"], "lrc plan: No such option '--foo'. `lrc plan --help` says what there is."),
        (["benchmark", "a", "--rounds", "0"], "lrc benchmark: Invalid value for '--rounds': 0 is not in the range x>=1."),
        (["validate", "nowhere.yaml"], "nowhere.yaml: no such file. `lrc init MODEL` writes one."),
        (["inspect", "./nowhere"], "./nowhere: expected a Hugging Face folder, a hub id, pkg://package/dir, module:factory"),
        (["list", "nosuch"], "list nosuch: expected one of passes, solvers, "),
        (["list", "solvers", "kfca"], "list solvers kfca: unknown solver 'kfca'; known: "),
        (["list", "presets", "kfca"], "preset:kfca: there is no preset 'kfca'. Did you mean 'kfac'?"),
        (["diff", "a", "b"], "a: expected a spec, a plan.json or an output folder, got no such file."),
        (["export", ".", "--format", "gguf"], "--format: unknown export format 'gguf'; known: aoti, hf, onnx, peft, pt2"),
        (["export", ".", "--format", "onnx"], ".: expected a finished output folder of lrc, got neither config.json nor"),
        (["benchmark", "."], ".: expected a finished output folder of lrc"),
        (["report", "."], ".: expected a finished output folder of lrc"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], wanted: str, cli: Run) -> None:
    made = cli(*arguments)
    assert made.code in ((1, 2) if arguments[0] == "inspect" else (2,))
    assert made.error.startswith(wanted)
    assert made.out == ""


# Before anything is done.


def test_init_writes_a_spec_that_validates_and_compiles(llama: Path, cli: Run, in_tmp: Path, data: Path) -> None:
    made = cli("init", llama, "-o", "llama.yaml", "--json")
    assert (made.code, made.json) == (0, {"spec": "llama.yaml"})
    text = (in_tmp / "llama.yaml").read_text()
    assert text.count("#") > 5
    assert "task: text-generation" in text
    assert "model.layers.*.self_attn.q_proj" in text
    assert "calibration.dataset" in cli("validate", "llama.yaml").error  # the data that it asks for is not there yet
    for name in ("calibration.txt", "test.txt"):
        shutil.copy(data / "stream.txt", in_tmp / name)
    assert cli("validate", "llama.yaml").out == "llama.yaml: valid, 7 sites selected\n"
    small = ["calibration.max_length=16", "calibration.samples=8", "evaluate.max_length=16", "evaluate.gates={}"]
    done = cli("compile", "llama.yaml", *small, "export=[hf]", "--json")
    assert done.code == 0, done.err
    assert done.json["metrics"][0]["metric"] == "perplexity"
    assert done.json["parameters"][1] < done.json["parameters"][0]


def test_init_asks_for_text_or_arrays_as_the_model_takes_them(bert: Path, cli: Run, in_tmp: Path) -> None:
    cli("init", bert, "-o", "bert.yaml")
    assert "calibration: {dataset: texts.txt" in (in_tmp / "bert.yaml").read_text()
    cli("init", *MLP, "-o", "mlp.yaml")
    text = (in_tmp / "mlp.yaml").read_text()
    assert "calibration: {dataset: calibration.npz" in text
    assert "export: [{format: pt2}, {format: onnx}]" in text


def test_init_names_every_solver_budget_allocator_and_export(bert: Path, cli: Run, in_tmp: Path) -> None:
    cli("init", bert, "-o", "bert.yaml")
    text = (in_tmp / "bert.yaml").read_text()
    for rule in (*SOLVERS, *ALLOCATORS):
        assert f"#   {rule.name}: " in text or f"solver: {rule.name}  #" in text
    assert all(f"{{{rule.name}: " in text for rule in RANKS if rule.name != "rank")
    assert all(rule.name in text for rule in EXPORTERS)
    assert max(map(len, text.splitlines())) < 160


def test_init_never_overwrites(cli: Run, in_tmp: Path) -> None:
    (in_tmp / "spec.yaml").write_text("mine")
    made = cli("init", *MLP)
    assert made.code == 2
    assert made.error == "spec.yaml: expected a new file, got one that exists. Choose another name with `-o`."
    assert (in_tmp / "spec.yaml").read_text() == "mine"


def test_validate_reads_no_weights(bert: Path, spec: Path, cli: Run, in_tmp: Path) -> None:
    folder = tiny.copy_of(bert, in_tmp / "model")
    (folder / "model.safetensors").unlink()
    made = cli("validate", spec, folder, "--json")
    assert (made.code, made.json) == (0, {"valid": True, "passes": ["factorize"], "sites": 6})


def test_validate_without_a_model_looks_at_the_spec_alone(mlp_spec: Path, cli: Run) -> None:
    assert cli("validate", mlp_spec).out == f"{mlp_spec}: valid\n"
    assert cli("validate", mlp_spec, *MLP).out == f"{mlp_spec}: valid, 3 sites selected\n"


def test_inspect_lists_the_sites(gpt2: Path, cli: Run) -> None:
    rows = {row["site"]: row for row in cli("inspect", gpt2, "--json").json}
    assert list(rows) == [
        "transformer.wpe",
        "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj",
        "lm_head",
    ]  # fmt: skip
    row = rows["transformer.h.0.attn.c_attn"]
    assert (row["type"], row["map"], row["parameters"]) == ("Conv1D", "Dense[96,32]*", 96 * 32 + 96)
    assert 1 <= row["stable_rank"] <= 32
    assert row["note"] == "stored transposed"
    assert rows["lm_head"]["note"] == "tied to embedding, no bias"
    assert sum(r["share"] for r in rows.values()) < 1
    text = cli("inspect", gpt2)
    assert (text.code, text.err) == (0, "")
    assert "transformer.h.0.mlp.c_fc" in text.out
    assert "tied to embedding" in text.out


def test_inspect_prints_the_graph_as_text(cli: Run) -> None:
    made = cli("inspect", *MLP, "--graph")
    wanted = str(tiny.captured_mlp())
    assert made.out.rstrip("\n") == wanted.rstrip("\n")
    assert cli("inspect", *MLP, "--graph", "--json").json == wanted


def test_plan_prints_and_writes_what_would_be_done(mlp_spec: Path, cli: Run, in_tmp: Path) -> None:
    before = sorted(path.name for path in in_tmp.iterdir())
    made = cli("plan", mlp_spec, *MLP, "--write", "plan.json", "--json")
    assert made.json == json.loads((in_tmp / "plan.json").read_text())
    assert [d["sites"] for d in made.json["decisions"]] == [["up", "middle"], ["down"]]  # two linears as one narrower module
    assert sorted(path.name for path in in_tmp.iterdir()) == sorted([*before, ".lrc-cache", "plan.json"])
    text = cli("plan", mlp_spec, *MLP).out
    kept = made.json["parameters"]
    assert "predicted loss, all sites:" in text
    assert kept[1] < kept[0]
    assert cli("compile", mlp_spec, *MLP, "--dry-run").out == text
    assert not (in_tmp / "out").exists()


def test_overrides_on_the_command_line_win(mlp_spec: Path, cli: Run) -> None:
    made = cli("plan", mlp_spec, *MLP, "passes.0.rank=2", "passes.0.form=two_factor", "passes.0.solver=svd", "--json")
    assert [d["rank"] for d in made.json["decisions"]] == [2, 2, 2]
    wrong = cli("plan", mlp_spec, *MLP, "passes.1.rank=2")
    assert (wrong.code, wrong.error) == (2, "override 'passes.1.rank=2': expected an index below 1 in `passes`, got 1.")


# Compiling, and what comes after it.


@pytest.fixture
def compiled(mlp_spec: Path, cli: Run, in_tmp: Path) -> Path:
    """A finished output of the perceptron in the current folder."""
    assert cli("compile", mlp_spec, *MLP, "-o", "out").code == 0
    return in_tmp / "out"


def test_compile_prints_what_it_made(mlp_spec: Path, cli: Run, in_tmp: Path) -> None:
    made = cli("compile", mlp_spec, *MLP, "-o", "first")
    assert (made.code, made.err) == (0, "")
    assert re.search(r"first: 750 → \d+ parameters", made.out)
    assert re.search(r"pt2: \S*first/program\.pt2 \(largest difference \S+\)", made.out)
    data = cli("compile", mlp_spec, *MLP, "-o", "second", "--json").json
    assert data["artifacts"] == {"pt2": str(in_tmp / "second" / "program.pt2")}
    assert data["failures"] == []
    assert all(row["ok"] for row in data["parity"])


def test_compile_refuses_a_finished_output_and_replaces_it_when_asked(compiled: Path, mlp_spec: Path, cli: Run) -> None:
    made = cli("compile", mlp_spec, *MLP)
    assert made.code == 2
    assert made.error.endswith("expected an empty or absent output folder, got files in it. Add `--overwrite` to replace it.")
    assert cli("compile", mlp_spec, *MLP, "--overwrite", "passes.0.rank=2").code == 0


@pytest.mark.parametrize("artifact", ["", "onnx/model.onnx", "program.pt2"])
def test_evaluate_measures_every_kind_of_artifact(artifact: str, finished: Finished, spec: Path, cli: Run) -> None:
    made = cli("evaluate", spec, finished.path / artifact, "--json")
    assert made.code == 0, made.err
    (row,) = made.json["metrics"]
    assert row["metric"] == "spearman"
    assert row["value"] == pytest.approx(finished.record.metrics[0]["value"], abs=1e-6)
    assert row["original"] is None
    assert made.json["gates"] == []


def test_evaluate_beside_the_original_judges_the_gates(finished: Finished, bert: Path, spec: Path, cli: Run) -> None:
    made = cli("evaluate", spec, finished.path, bert, "--json")
    assert made.json["metrics"] == [pytest.approx(row) for row in finished.record.metrics]
    missed = cli("evaluate", spec, finished.path, bert, "evaluate.gates={at_least: {spearman: 1.5}}")
    assert missed.code == 3
    assert "at_least spearman expected >= 1.5, got " in missed.error
    assert "spearman" in missed.out


def test_benchmark_times_every_artifact_against_the_dense_model(finished: Finished, bert: Path, cli: Run) -> None:
    small = ["--batch", "1", "--length", "8", "--rounds", "1"]
    made = cli("benchmark", finished.path, bert, *small, "--json")
    assert made.code == 0, made.err
    rows = made.json["rows"]
    assert [(row["runtime"], row["batch"], row["length"]) for row in rows] == [("eager", 1, 8), ("onnx", 1, 8)]
    for row in rows:
        dense, compressed, rounding = row["dense_ms"], row["compressed_ms"], 0.0051
        assert (dense - rounding) / (compressed + rounding) <= row["ratio"] + 1e-3
        assert row["ratio"] * (compressed - rounding) <= dense + rounding + 1e-3
        assert row["flop_ratio"] > 1
        assert row["share"] == pytest.approx(row["ratio"] / row["flop_ratio"], abs=2e-3)
    assert made.json["machine"]["versions"]["torch"] == torch.__version__
    assert made.json["decode"] == []
    nameless = cli("benchmark", finished.path, *small)
    assert nameless.code == 2
    assert nameless.error == (
        f"MODEL: the folder was made from {bert.name!r} and does not say where that is. Name the dense MODEL."
    )


def test_benchmark_times_a_decoder_one_token_after_the_other(finished_decoder: Finished, llama: Path, cli: Run) -> None:
    """No text is longer than the model's positions leave room for."""
    small = ["--batch", "2", "--length", "8", "--length", "99", "--rounds", "1"]
    made = cli("benchmark", finished_decoder.path, llama, *small, "--json")
    assert made.code == 0, made.err
    assert [row["runtime"] for row in made.json["rows"]] == ["eager", "onnx", "eager", "onnx"]
    rows = made.json["decode"]
    assert [(row["runtime"], row["batch"], row["past"]) for row in rows] == [("onnx", 2, 8), ("onnx", 2, tiny.POSITIONS - 16)]
    for row in rows:
        assert row["dense_tokens_per_s"] == pytest.approx(2e3 / row["dense_ms"], rel=0.02)
        assert 1 < row["flop_ratio"] < 1 / 0.7
        assert row["share"] == pytest.approx(row["ratio"] / row["flop_ratio"], abs=2e-3)


def test_evaluate_scores_a_decoder_by_what_it_generates_with_its_cache(
    finished_decoder: Finished, decoder_spec: Path, llama: Path, cli: Run
) -> None:
    made = cli("evaluate", decoder_spec, finished_decoder.path / "onnx/model.onnx", llama, "--json")
    assert made.code == 0, made.err
    known = {row["metric"]: row for row in finished_decoder.record.metrics}
    assert {row["metric"] for row in made.json["metrics"]} == {"perplexity", "generation"}
    for row in made.json["metrics"]:
        assert row["value"] == pytest.approx(known[row["metric"]]["value"], rel=1e-5)


def test_export_takes_options_of_the_format(finished_decoder: Finished, cli: Run, in_tmp: Path) -> None:
    made = cli("export", finished_decoder.path, "--format", "onnx", "cache=false", "-o", "whole")
    assert (made.code, made.out) == (0, "wrote whole/onnx/model.onnx\n")
    from lrc.lower.ort import OrtRunner

    assert OrtRunner(in_tmp / "whole" / "onnx" / "model.onnx").outputs == ("logits",)
    wrong = cli("export", finished_decoder.path, "--format", "onnx", "cash=false", "-o", "other")
    assert wrong.code == 2
    assert "did you mean `cache`?" in wrong.error


def test_export_lowers_a_finished_folder_without_compiling_again(compiled: Path, cli: Run, in_tmp: Path) -> None:
    made = cli("export", compiled, "--format", "onnx", "--json")
    assert made.code == 0, made.err
    assert made.json == {"files": [str(compiled / "onnx" / "model.onnx")]}
    from lrc.lower.ort import OrtRunner

    x = tiny.mlp_inputs(5, seed=7)
    found = torch.from_numpy(OrtRunner(compiled / "onnx" / "model.onnx")(x=x)["output"])
    assert torch.allclose(found, lrc.load(compiled)(x=x)["output"], atol=1e-5)
    again = cli("export", compiled, "--format", "onnx")
    assert (again.code, again.error) == (
        2, f"{compiled / 'onnx' / 'model.onnx'}: the file exists. Choose another folder with `-o`."
    )  # fmt: skip
    other = cli("export", compiled, "--format", "pt2", "-o", "other")
    assert (other.code, other.out) == (0, "wrote other/program.pt2\n")
    assert sorted(path.name for path in (in_tmp / "other").iterdir()) == ["program.pt2"]


def test_diff_compares_specs_plans_and_outputs(compiled: Path, mlp_spec: Path, cli: Run, in_tmp: Path) -> None:
    cli("compile", mlp_spec, *MLP, "passes.0.rank=2", "passes.0.form=two_factor", "-o", "two")
    specs = cli("diff", compiled / "lrc" / "spec.resolved.yaml", "two/lrc/spec.resolved.yaml", "--json").json
    assert {row["where"] for row in specs} == {"passes.0.form", "passes.0.rank", "passes.0.rank.params_kept"}
    outputs = cli("diff", compiled, "two", "--json").json
    plans = cli("diff", compiled / "lrc" / "plan.json", "two/lrc/plan.json", "--json").json
    assert outputs == plans
    by_place = {row["where"]: row for row in plans}
    places = {"factorize @ up", "factorize @ middle", "factorize @ down", "factorize @ up+middle"}  # kfac alone makes modules
    assert set(by_place) == {"parameters", "bytes", *places}
    assert by_place["factorize @ middle"]["b"] == "Chain[16,2,20]"
    assert "Chain[16,2,20]" in cli("diff", compiled, "two").out
    assert cli("diff", compiled, compiled).out == "no difference\n"
    assert cli("diff", compiled, compiled, "--json").json == []
    mixed = cli("diff", compiled, mlp_spec)
    assert mixed.code == 2
    assert mixed.error.endswith("expected two specs, two plans or two output folders, got output folder and spec.")


def test_plan_compares_other_budgets(mlp_spec: Path, cli: Run) -> None:
    made = cli("plan", mlp_spec, *MLP, "--pareto", "0.9,0.7", "--json")
    assert made.code == 0
    own = made.json["points"][1 if made.json["points"][1]["chosen"] else 2]
    assert own["chosen"]
    assert {point["amount"] for point in made.json["points"]} == {0.9, 0.7, own["amount"]}
    assert "budgets that were tried" in cli("plan", mlp_spec, *MLP, "--pareto", "0.9,0.7").out
    wrong = cli("plan", mlp_spec, *MLP, "--pareto", "0.9,much")
    assert (wrong.code, "pareto.budgets.1" in wrong.error) == (2, True)


def test_report_writes_one_page_that_loads_nothing(finished: Finished, cli: Run, in_tmp: Path) -> None:
    made = cli("report", finished.path, "-o", "page.html", "--json")
    assert (made.code, made.json) == (0, {"report": "page.html"})
    page = (in_tmp / "page.html").read_text()
    assert page == (finished.path / "lrc" / "report.html").read_text()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    for word in ("encoder.layer.0.output.dense", "spearman", "max_degradation", "params_kept: 0.6", "<svg"):
        assert word in page


# What there is.


def test_list_names_everything_that_a_spec_may_use(cli: Run) -> None:
    found = cli("list", "--json").json
    assert {"adapt", "factorize", "load_adapter", "merge", "quantize", "slice", "split", "train"} <= set(found["passes"])
    assert {"kfac", "whitened", "svd", "afm", "lord", "gram"} <= set(found["solvers"])
    assert {"params_kept", "energy", "fraction", "breakeven", "rank"} <= set(found["ranks"])
    assert found["metrics"] == ["accuracy", "generation", "kl", "perplexity", "python", "spearman"]
    assert found["exports"] == ["aoti", "hf", "onnx", "peft", "pt2", "torch_compile"]
    assert "kfac" in found["presets"]
    for kind in ("adapters", "initialisers", "recipes"):
        assert isinstance(found[kind], list)
    assert {"adamw", "fira", "galore", "proximal_adamw", "riemannian_adamw"} <= set(found["optimizers"])
    assert {"causal_lm", "classification", "cosine", "distillation", "reconstruction"} <= set(found["objectives"])


def test_list_tells_what_each_of_a_kind_does_and_the_options_of_one(cli: Run) -> None:
    for kind, known in cli("list", "--json").json.items():
        told = cli("list", kind).out.splitlines()[1:]
        assert [line.split()[0] for line in told if not line.startswith(" ")] == known
        assert all(len(line.split()) > 1 for line in told if not line.startswith(" ")), f"{kind}: one has no description"
        assert cli("list", kind, known[0]).out
    rows = {row["option"]: row for row in cli("list", "optimizers", "fira", "--json").json}
    assert rows["scale"] | {"about": ""} == {"option": "scale", "takes": "number > 0", "default": "0.25", "about": ""}
    assert rows["proj_type"]["takes"] == "std | reverse_std | left | right | full"
    rows = {row["option"]: row for row in cli("list", "passes", "train", "--json").json}
    assert (rows["accumulate"]["default"], rows["dropout"]["default"], rows["data"]["default"]) == ("1", "true", "null")
    assert rows["objective"]["default"] == "(required)"
    assert "distillation | " in rows["objective"]["takes"]
    assert cli("list", "presets", "kfac").out.startswith("# ")


def test_schema_prints_the_schema_of_the_spec(cli: Run) -> None:
    made = cli("schema")
    schema = made.json
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert {"version", "model", "calibration", "passes", "evaluate", "export", "output"} <= set(schema["properties"])


def test_doctor_examines_the_machine(cli: Run) -> None:
    made = cli("doctor", "--json")
    rows = {row["what"]: row for row in made.json}
    assert made.code == (0 if all(row["ok"] for row in rows.values() if row["needed"]) else 1)
    assert rows["torch"]["found"] == torch.__version__
    assert {"C++ compiler for Inductor", "CPU features", "GPU", "free disk here"} <= set(rows)
    assert all(row["remedy"] == "" for row in rows.values() if row["ok"])
    assert "C++ compiler for Inductor" in cli("doctor").out


def test_doctor_fails_where_the_main_job_would(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    import lrc.run.doctor as doctor

    def missing(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(doctor.importlib.metadata, "version", missing)
    made = cli("doctor", "--json")
    row = next(row for row in made.json if row["what"] == "onnxruntime")
    assert made.code == 1
    assert (row["ok"], row["found"], row["remedy"]) == (False, "not installed", "pip install onnxruntime")


# As a program.


def test_the_installed_program_answers_with_the_documented_codes(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("lrc")
    command: list[str] = [str(program)] if program.is_file() else [sys.executable, "-m", "lrc.cli"]
    (tmp_path / "bad.yaml").write_text("version: 1\npasses: [{type: factorize, rank: 4, target: [a]}]\n")

    def run(*arguments: str) -> Any:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))

    assert run("--help").returncode == 0
    bad = run("validate", "bad.yaml")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: bad.yaml:2: passes.0.target: unknown key `target`; did you mean `targets`?\n"


def test_a_run_that_is_not_in_a_terminal_shows_no_progress_and_no_escape_codes(compiled: Path, cli: Run) -> None:
    made = cli("inspect", *MLP)
    assert "\x1b" not in made.out + made.err


def test_errors_show_the_traceback_when_debugging(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lrc.cli import main
    from lrc.errors import SpecError

    monkeypatch.setenv("LRC_DEBUG", "1")
    monkeypatch.setattr("sys.argv", ["lrc", "validate", "nowhere.yaml"])
    with pytest.raises(SpecError):
        main()

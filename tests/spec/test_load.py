"""From files, presets, imports and overrides to a document; every mistake with its file, line and the nearest key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lrc.errors import SpecError
from lrc.ranks import FixedRank, ParamsKept
from lrc.solvers import KfacSolver, SvdSolver
from lrc.spec.document import Document
from lrc.spec.load import load_document, to_yaml

FULL = """\
version: 1
model: {path: somewhere, task: feature-extraction, dtype: float32}
calibration:
  dataset: calib.txt
  samples: 8
passes:
  - type: factorize
    targets: ["encoder.**", "re:.*dense"]
    ignore: ["**.pooler"]
    solver: {type: kfac, damping_in: 1e-6, center: false}
    rank: {params_kept: 0.5}
    allocate: global
  - merge
evaluate:
  metrics: [spearman, {type: perplexity, dataset: test.txt}]
  gates: {max_degradation: 0.03, at_least: {spearman: 0.8}}
export: [{format: hf}, onnx]
output: there
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Return a function that writes a text to `s.yaml` and loads it with overrides."""

    def call(text: str, *overrides: str) -> Document:
        (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
        return load_document(tmp_path / "s.yaml", overrides)[0]

    return call


@pytest.fixture
def refused(load: Any, tmp_path: Path) -> Any:
    """Return a function that gives the text of the error, with the folder's name cut off."""

    def call(text: str, *overrides: str) -> str:
        with pytest.raises(SpecError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        return str(caught.value).replace(f"{tmp_path}/", "")

    return call


def one_pass(options: str = "rank: 3", *, more: str = "") -> str:
    return f"version: 1\npasses:\n  - type: factorize\n    {options}\n{more}"


def test_a_whole_spec_is_read(load: Any) -> None:
    made = load(FULL)
    assert made.model.path == "somewhere"
    assert made.calibration.samples == 8
    factorize, merge = made.passes
    assert factorize.targets == ["encoder.**", "re:.*dense"]
    assert factorize.solver == KfacSolver(damping_in=1e-6, center=False)
    assert factorize.rank == ParamsKept(params_kept=0.5)
    assert merge.type == "merge"
    assert [metric.type for metric in made.evaluate.metrics] == ["spearman", "perplexity"]
    assert made.evaluate.gates.at_least == {"spearman": 0.8}
    assert [export.format for export in made.export] == ["hf", "onnx"]
    assert made.output == "there"


def test_defaults_work_and_are_written_out(load: Any) -> None:
    made = load("version: 1\n")
    assert made == Document(version=1)
    written = yaml.safe_load(to_yaml(load(FULL)))
    assert written["passes"][0]["solver"]["damping_out"] == "auto"
    assert written["passes"][0]["rank"] == {"params_kept": 0.5}
    assert written["export"][1]["format"] == "onnx"
    assert "$schema" not in written


def test_what_is_written_out_reads_back_as_the_same_document(load: Any) -> None:
    made = load(FULL)
    assert load(to_yaml(made)) == made
    fixed = load(one_pass("rank: 3"))
    assert load(to_yaml(fixed)) == fixed


def test_a_mapping_is_a_spec_and_is_left_as_it_was() -> None:
    spec: dict[str, Any] = {"version": 1, "passes": [{"type": "factorize", "rank": 3}]}
    made, file = load_document(spec, ["passes.0.rank=4", "passes.0.solver=svd", "model.path=x"])
    assert file is None
    assert made.passes[0].rank == FixedRank(rank=4)
    assert spec == {"version": 1, "passes": [{"type": "factorize", "rank": 3}]}


def test_mistakes_in_a_mapping_name_the_spec() -> None:
    with pytest.raises(SpecError, match=r"^spec: passes.0.rnk: unknown key `rnk`; did you mean `rank`\?"):
        load_document({"version": 1, "passes": [{"type": "factorize", "rnk": 3}]})


def test_options_objects_are_taken_as_they_are() -> None:
    made, _ = load_document({"version": 1, "passes": [{"type": "factorize", "rank": 3, "solver": SvdSolver()}]})
    assert made.passes[0].solver == SvdSolver()


def test_a_bare_word_is_an_object_with_that_type_alone(load: Any) -> None:
    words = load(one_pass("{solver: svd, rank: 3}".strip("{}").replace(", ", "\n    "), more="export: [onnx]\n"))
    objects = load(one_pass("solver: {type: svd}\n    rank: 3", more="export: [{format: onnx}]\n"))
    assert words == objects
    assert load("version: 1\npasses: [merge]\n") == load("version: 1\npasses: [{type: merge}]\n")


@pytest.mark.parametrize(
    ("rank", "written"),
    [("3", 3), ("010", 10), ("{rank: 3}", 3), ("{energy: .9}", {"energy": 0.9}), ("{fraction: 1e-1}", {"fraction": 0.1})],
)
def test_ranks_are_numbers_or_one_amount(load: Any, rank: str, written: Any) -> None:
    assert load(one_pass(f"rank: {rank}")).resolved()["passes"][0]["rank"] == written


@pytest.mark.parametrize(
    ("rank", "got"),
    [
        ("0.5", "a bare fraction"),
        ("{params_kept: .5, energy: .9}", "{'params_kept': 0.5, 'energy': 0.9}"),
        ("{}", "{}"),
        ("yes", "'yes'"),
        ("true", "True"),
        ("[3]", "[3]"),
    ],
)
def test_an_ambiguous_rank_is_refused_with_the_forms_there_are(refused: Any, rank: str, got: str) -> None:
    text = refused(one_pass(f"rank: {rank}"))
    assert text.startswith("s.yaml:4: passes.0.rank: expected a whole number or exactly one of {params_kept: …}, {energy: …}")
    assert "{fraction: …}, {breakeven: …}" in text
    assert text.endswith(f", got {got}.")


@pytest.mark.parametrize(
    ("text", "line", "path", "near"),
    [
        ("version: 1\nmodle: {path: x}\n", 2, "modle", "model"),
        ("version: 1\nmodel: {paht: x}\n", 2, "model.paht", "path"),
        ("version: 1\nmodel:\n  path: x\n  dtpye: auto\n", 4, "model.dtpye", "dtype"),
        ("version: 1\ncalibration:\n  dataset: x\n  sampels: 3\n", 4, "calibration.sampels", "samples"),
        ("version: 1\nevaluate:\n  metric: [spearman]\n", 3, "evaluate.metric", "metrics"),
        ("version: 1\nevaluate:\n  gates:\n    max_degradatoin: 1\n", 4, "evaluate.gates.max_degradatoin", "max_degradation"),
        (one_pass("rank: 3\n    target: [x]"), 5, "passes.0.target", "targets"),
        (one_pass("rnak: 3"), 4, "passes.0.rnak", "rank"),
        (one_pass("rank: {parms_kept: .5}"), 4, "passes.0.rank.parms_kept", "params_kept"),
        (one_pass("rank:\n      enrgy: .5"), 5, "passes.0.rank.enrgy", "energy"),
        (one_pass("rank: 3\n    solver:\n      type: kfac\n      dampin_in: 1"), 7, "passes.0.solver.dampin_in", "damping_in"),
        (one_pass("rank: 3\n    solver: {type: whitened, updat: lstsq}"), 5, "passes.0.solver.updat", "update"),
        ("version: 1\npasses:\n  - merge\n  - type: merge\n    dens: true\n", 5, "passes.1.dens", "dense"),
        ("version: 1\nexport:\n  - hf\n  - format: onnx\n    opsett: 18\n", 5, "export.1.opsett", "opset"),
        (
            "version: 1\nevaluate:\n  metrics:\n    - type: spearman\n      datset: x\n",
            5,
            "evaluate.metrics.0.datset",
            "dataset",
        ),
    ],
)
def test_a_misspelt_key_is_refused_with_line_and_nearest_key(refused: Any, text: str, line: int, path: str, near: str) -> None:
    key = path.rpartition(".")[2]
    assert refused(text) == f"s.yaml:{line}: {path}: unknown key `{key}`; did you mean `{near}`?"


def test_a_key_that_is_near_to_none_lists_those_there_are(refused: Any) -> None:
    assert refused("version: 1\npasses: [{type: merge, qqq: 1}]\n") == (
        "s.yaml:2: passes.0.qqq: unknown key `qqq`; known: type, targets, ignore, optional, dense."
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("version: 1\npasses:\n  - type: factorise\n", "s.yaml:3: passes.0: unknown pass 'factorise'; known: .* 'factorize'?"),
        (one_pass("rank: 3\n    solver: kfacc"), "s.yaml:5: passes.0.solver: unknown solver 'kfacc'; known: .* 'kfac'?"),
        (one_pass("rank: 3\n    solver: {type: svdd}"), "s.yaml:5: passes.0.solver: unknown solver 'svdd'; known: .* 'svd'?"),
        ("version: 1\nexport: [onxx]\n", "s.yaml:2: export.0: unknown export format 'onxx'; known: .* 'onnx'?"),
        ("version: 1\nexport: [{format: onxx}]\n", "s.yaml:2: export.0: unknown export format 'onxx'; known: .* 'onnx'?"),
        ("version: 1\nevaluate: {metrics: [spaerman]}\n", "s.yaml:2: evaluate.metrics.0: unknown metric .* 'spearman'?"),
    ],
)
def test_an_unknown_type_is_refused_with_the_known_ones_and_the_nearest(refused: Any, text: str, wanted: str) -> None:
    start, end = wanted.split(".* ")
    found = refused(text)
    assert found.startswith(start)
    assert found.endswith(f"Did you mean {end}")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("version: 1\noutput: 4\n", "s.yaml:2: output: input should be a valid string, got 4."),
        ("version: 1\npasses: merge\n", "s.yaml:2: passes: input should be a valid list, got 'merge'."),
        ("version: 1\npasses:\n  - 3\n", "s.yaml:3: passes.0: expected a pass: a name, or a mapping with `type`; known:"),
        ("version: 1\npasses:\n  - rank: 3\n", "s.yaml:3: passes.0: expected a pass: a name, or a mapping with `type`;"),
        ("version: 1\nexport: [{opset: 3}]\n", "s.yaml:2: export.0: expected an export format: a name, or a mapping with"),
        ("version: 1\nmodel: x\n", "s.yaml:2: model: input should be"),
        ("version: 1\nmodel: {dtype: float8}\n", "s.yaml:2: model.dtype: input should be 'auto', 'float32', 'bfloat16' or"),
        ("version: 1\ncalibration: {dataset: x, samples: '3'}\n", "s.yaml:2: calibration.samples: input should be a valid int"),
        ("version: 1\ncalibration: {dataset: x, samples: 1e2}\n", "s.yaml:2: calibration.samples: input should be a valid int"),
        (
            "version: 1\ncalibration:\n  dataset: x\n  samples: 0\n",
            "s.yaml:4: calibration.samples: input should be greater than",
        ),
        ("version: 1\ncalibration: {}\n", "s.yaml:2: calibration: the key `dataset` is missing."),
        (one_pass("optional: yes\n    rank: 3"), "s.yaml:4: passes.0.optional: input should be a valid boolean, got 'yes'."),
        (one_pass("targets: x\n    rank: 3"), "s.yaml:4: passes.0.targets: input should be a valid list, got 'x'."),
        (one_pass("targets: []\n    rank: 3"), "s.yaml:4: passes.0.targets: list should have at least 1 item"),
        (one_pass("targets: ['{a']\n    rank: 3"), "s.yaml:4: passes.0.targets: '{a' has an unclosed or nested brace."),
        (one_pass("ignore: ['re:(']\n    rank: 3"), "s.yaml:4: passes.0.ignore: 're:(' is no regular expression:"),
        (one_pass("ignore: ['layers:1']\n    rank: 3"), "s.yaml:4: passes.0.ignore: expected `layers:[first-last]`"),
        (one_pass("solver: svd"), "s.yaml:3: passes.0: the key `rank` is missing."),
        (one_pass("rank: 0"), "s.yaml:4: passes.0.rank: input should be greater than or equal to 1, got 0."),
        (one_pass("rank: {energy: 1.5}"), "s.yaml:4: passes.0.rank.energy: input should be less than or equal to 1, got 1.5."),
        (one_pass("rank: {energy: .nan}"), "s.yaml:4: passes.0.rank.energy: input should be"),
        (
            one_pass("rank: {params_kept: half}"),
            "s.yaml:4: passes.0.rank.params_kept: input should be a valid number, got 'half'",
        ),
        (
            one_pass("rank: 3\n    allocate: globally"),
            "s.yaml:5: passes.0.allocate: unknown allocator 'globally'; known: auto, block_influence, exact, global, learned, "
            "loss_log_inverse, sensitivity_bisect, uniform. Did you mean 'global'?",
        ),
        (
            one_pass("rank: 3\n    solver: {type: kfac, damping_in: -1}"),
            "s.yaml:5: passes.0.solver.damping_in: input should be",
        ),
    ],
)
def test_wrong_values_are_refused_with_line_path_and_what_was_found(refused: Any, text: str, wanted: str) -> None:
    assert refused(text).startswith(wanted)


def test_every_mistake_is_told_each_with_its_place(refused: Any) -> None:
    found = refused("version: 1\nmodel: {path: 3}\ncalibration: {sampels: 3}\noutput: 4\n")
    assert [line.split(": ")[:2] for line in found.splitlines()] == [
        ["s.yaml:2", "model.path"],
        ["s.yaml:3", "calibration.sampels"],
        ["s.yaml:4", "output"],
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("model: {path: x}\n", "s.yaml:1: the key `version` is missing. Start the file with `version: 1`."),
        ("version:\n", "s.yaml:1: the key `version` is missing. Start the file with `version: 1`."),
        ("version: 2\n", "s.yaml:1: version: input should be 1, got 2."),
        ("version: '1'\n", "s.yaml:1: version: input should be 1, got '1'."),
        ("# only this\n", "s.yaml:1: expected a mapping of keys, got an empty file. Start the file with `version: 1`."),
        ("- version: 1\n", "s.yaml:1: expected a mapping of keys, got list. Start the file with `version: 1`."),
        ("just words\n", "s.yaml:1: expected a mapping of keys, got str. Start the file with `version: 1`."),
        ("version: 1\nversion: 1\n", "s.yaml:2: the key `version` is given twice. Remove one."),
        ("version: 1\na: [\n", "s.yaml:3: expected YAML, got expected the node content, but found '<stream end>'."),
    ],
)
def test_a_file_that_is_no_spec_is_refused(refused: Any, text: str, wanted: str) -> None:
    assert refused(text) == wanted


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none.yaml: no such file. `lrc init MODEL` writes one"):
        load_document(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="the file cannot be read"):
        load_document(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("output: é\n".encode("latin-1"))
    with pytest.raises(SpecError, match="the file cannot be read: 'utf-8' codec"):
        load_document(tmp_path / "latin.yaml")


def test_overrides_are_applied_last_and_in_order(load: Any) -> None:
    made = load(
        FULL, "passes.0.rank.params_kept=0.4", "passes.0.solver=svd", "passes.0.targets.1=**.head", "output=here",
        "calibration.samples=2", "calibration.samples=3", "evaluate.gates.at_least.spearman=0.5", "export=[pt2]",
        "model.revision=yes",
    )  # fmt: skip
    assert made.passes[0].rank == ParamsKept(params_kept=0.4)
    assert made.passes[0].solver == SvdSolver()
    assert made.passes[0].targets == ["encoder.**", "**.head"]
    assert made.output == "here"
    assert made.calibration.samples == 3
    assert made.evaluate.gates.at_least == {"spearman": 0.5}
    assert [export.format for export in made.export] == ["pt2"]
    assert made.model.revision == "yes"


def test_an_override_makes_the_sections_that_are_missing(load: Any) -> None:
    made = load(one_pass(), "calibration.dataset=x.txt", "passes.0.solver.type=svd", "passes.0.rank.energy=0.9")
    assert made.calibration.dataset == "x.txt"
    assert made.passes[0].solver == SvdSolver()
    assert made.resolved()["passes"][0]["rank"] == {"energy": 0.9}


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("passes.1.rank=3", "expected an index below 1 in `passes`, got 1."),
        ("passes.-1.rank=3", "expected an index below 1 in `passes`, got -1."),
        ("passes.first.rank=3", "expected an index below 1 in `passes`, got first."),
        ("passes.².rank=3", "expected an index below 1 in `passes`, got ²."),
        ("export.0=onnx", "`export` is no list."),
        ("passes.0.targets=x", "passes.0.targets: input should be a valid list, got 'x'."),
        ("passes.0.rnk=3", "passes.0.rnk: unknown key `rnk`; did you mean `rank`?"),
        ("passes.0.rank=0.5", "passes.0.rank: expected a whole number or exactly one of"),
        ("output.folder=x", "output: input should be a valid string, got {'folder': 'x'}."),
        ("modle.path=x", "modle: unknown key `modle`; did you mean `model`?"),
    ],
)
def test_a_wrong_override_is_refused_by_itself(refused: Any, override: str, wanted: str) -> None:
    assert refused(one_pass(), override).startswith(f"override {override!r}: {wanted}")


def test_an_override_can_take_the_version_away(refused: Any) -> None:
    assert refused(one_pass(), "version=").startswith("s.yaml:1: the key `version` is missing")


@pytest.mark.parametrize("override", ["rank", "=3", "passes..rank=3", ".=3", ""])
def test_what_is_no_override_is_refused(refused: Any, override: str) -> None:
    assert refused(one_pass(), override) == f"override {override!r}: expected section.key=value, got {override or 'nothing'}."


def test_an_override_in_a_bare_word_is_refused(refused: Any) -> None:
    text = one_pass(more="export: [onnx]\n")
    assert refused(text, "export.0.opset=18") == "override 'export.0.opset=18': `export.0` has no keys."


def test_imports_are_merged_key_by_key_and_the_file_itself_wins(load: Any, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "a.yaml").write_text("version: 1\nmodel: {path: a, task: t}\nimports: b.yaml\noutput: a\n")
    (tmp_path / "base" / "b.yaml").write_text("model: {path: b, device: cuda}\npasses: [merge, merge]\n")
    made = load("imports: [base/a.yaml]\nmodel: {task: own}\npasses: [merge]\n")
    assert (made.model.path, made.model.task, made.model.device) == ("a", "own", "cuda")
    assert len(made.passes) == 1
    assert made.output == "a"


def test_a_mistake_is_told_in_the_file_that_made_it(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("version: 1\n\nmodel:\n  paht: x\ncalibration:\n  dataset: x\n  samples: 0\n")
    found = refused("imports: base.yaml\noutput: 4\ncalibration:\n  seed: -1\n")
    assert [line.split(": ")[:2] for line in found.splitlines()] == [
        ["base.yaml:4", "model.paht"],
        ["base.yaml:7", "calibration.samples"],
        ["s.yaml:4", "calibration.seed"],
        ["s.yaml:2", "output"],
    ]


def test_a_list_that_is_replaced_takes_its_lines_with_it(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("version: 1\npasses:\n  - merge\n  - merge\n")
    assert refused("imports: base.yaml\n\npasses:\n\n  - type: mergee\n").startswith(
        "s.yaml:5: passes.0: unknown pass 'mergee'"
    )


def test_the_version_may_stand_in_an_import_and_is_missed_at_the_file_itself(load: Any, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("version: 1\n")
    assert load("imports: base.yaml\n").version == 1
    (tmp_path / "base.yaml").write_text("output: x\n")
    assert refused("\n# a comment\nimports: base.yaml\n").startswith("s.yaml:3: the key `version` is missing")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("version: 1\nimports: none.yaml\n", "s.yaml:2: there is no file none.yaml. `imports` start at the spec's own folder."),
        ("version: 1\nimports:\n  - ok.yaml\n  - none.yaml\n", "s.yaml:4: there is no file none.yaml."),
        ("version: 1\nimports: s.yaml\n", "s.yaml:2: `s.yaml` imports itself, directly or through another file."),
        ("version: 1\nimports: loop.yaml\n", "loop.yaml:1: `s.yaml` imports itself, directly or through another file."),
        ("version: 1\nimports: {a: b}\n", "s.yaml:2: expected a name or a list of names as `imports`, got {'a': 'b'}."),
        ("version: 1\nimports: [3]\n", "s.yaml:2: expected a name or a list of names as `imports`, got [3]."),
        ("version: 1\nimports: bad.yaml\n", "bad.yaml:2: expected YAML"),
    ],
)
def test_wrong_imports_are_refused(refused: Any, tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "ok.yaml").write_text("output: x\n")
    (tmp_path / "loop.yaml").write_text("imports: s.yaml\n")
    (tmp_path / "bad.yaml").write_text("a: 1\n b: 1\n")
    assert refused(text).startswith(wanted)


def test_one_file_may_be_imported_twice_where_it_is_no_loop(load: Any, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("imports: c.yaml\n")
    (tmp_path / "b.yaml").write_text("imports: c.yaml\n")
    (tmp_path / "c.yaml").write_text("version: 1\noutput: c\n")
    assert load("imports: [a.yaml, b.yaml]\n").output == "c"


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of made-up presets in place of ours."""
    folder = tmp_path / "made_up_presets"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "half.yaml").write_text("version: 1\npasses:\n  - {type: factorize, rank: {params_kept: 0.5}}\noutput: half\n")
    (folder / "wrong.yaml").write_text("version: 1\nouput: x\n")
    (folder / "loop.yaml").write_text("version: 1\npreset: loop\n")
    (folder / "readme.txt").write_text("no preset")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("lrc.spec.load.PRESETS", folder.name)
    return folder


@pytest.mark.usefixtures("presets")
def test_a_preset_is_a_spec_and_a_ground_to_build_on(load: Any) -> None:
    made, file = load_document("preset:half")
    assert file is None
    assert made.passes[0].rank == ParamsKept(params_kept=0.5)
    built = load("preset: half\npasses: [merge]\n", "calibration.dataset=x")
    assert (built.version, len(built.passes), built.output) == (1, 1, "half")


@pytest.mark.usefixtures("presets")
def test_an_unknown_preset_is_refused_with_the_nearest(refused: Any) -> None:
    wanted = "there is no preset 'hafl'. Did you mean 'half'?"
    assert refused("version: 1\npreset: hafl\n") == f"s.yaml:2: {wanted}"
    assert refused("version: 1\npreset: [half,\n hafl]\n") == f"s.yaml:3: {wanted}"
    assert refused("version: 1\npreset: zzz\n") == "s.yaml:2: there is no preset 'zzz'. Known: half, loop, wrong."
    with pytest.raises(SpecError, match=r"^preset:hafl: there is no preset 'hafl'. Did you mean 'half'\?$"):
        load_document("preset:hafl")


@pytest.mark.usefixtures("presets")
def test_a_mistake_in_a_preset_is_told_in_the_preset(refused: Any) -> None:
    assert refused("preset: wrong\n") == "preset:wrong:2: ouput: unknown key `ouput`; did you mean `output`?"
    assert refused("preset: loop\n") == "preset:loop:2: the preset 'loop' builds on itself."


def test_without_the_package_of_presets_there_are_none(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrc.spec.load.PRESETS", "no_such_package_of_presets")
    assert refused("version: 1\npreset: half\n") == "s.yaml:2: there is no preset 'half'. Known: none."


def test_the_key_of_editors_is_allowed_and_not_part_of_the_document(load: Any) -> None:
    made = load("$schema: ./lrc.schema.json\nversion: 1\n")
    assert "$schema" not in made.resolved()
    assert "schema_" not in made.resolved()

"""Groups of sites: one decision and one rank, shared factors stored once, narrower modules, in every form of a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import lrc
from lrc.api import compile_to_folder
from lrc.errors import SpecError, UsageError
from lrc.maps import Chain, Dense
from lrc.ranks import Candidates, Offer
from lrc.ranks.mixed import hull, ladder

pytestmark = pytest.mark.usefixtures("checked_here")
Build = Callable[..., lrc.Compiled]


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of three layers."""
    return tiny.write_llama(tmp_path_factory.mktemp("deep") / "llama", num_hidden_layers=3)


@pytest.fixture(scope="session")
def deep_program(deep: Path) -> Any:
    return lrc.capture(deep)


def spec(data: Path, solver: Any, rank: Any, **more: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "calibration": {"dataset": str(data / "stream.txt"), "samples": 8, "max_length": 16},
        "passes": [{"type": "factorize", "targets": [tiny.LAYERS], "solver": solver, "rank": rank, **more}],
    }


@pytest.fixture
def build(deep_program: Any, data: Path, tmp_path: Path) -> Build:
    """A function that compiles the decoder."""

    def run(solver: Any, rank: Any, **more: Any) -> lrc.Compiled:
        return lrc.compile(deep_program, spec(data, solver, rank, **more), cache=tmp_path / "cache")

    return run


IDS = torch.tensor([[5, 6, 7, 8, 9]])


def assert_generates(done: lrc.Compiled, tokens: int) -> None:
    """The grafted model computes what the program does, and generates the same with its cache and without."""
    model = done.graft()
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, done.program(input_ids=IDS)["logits"], atol=1e-5)
    kept, plain = (model.generate(IDS, max_new_tokens=tokens, do_sample=False, use_cache=cache) for cache in (True, False))
    assert torch.equal(kept, plain)


@pytest.mark.parametrize("solver", ["basis_sharing", "modular"])
@pytest.mark.parametrize("rank", [{"params_kept": 0.6}, {"flops_kept": 0.7}, {"size_mb": 0.075}])
def test_a_budget_is_kept_and_both_views_agree(solver: str, rank: dict[str, float], build: Build) -> None:
    done = build(solver, rank)
    decided = done.plan.decisions
    assert done.plan.parameters[1] == done.program.size()[0]
    assert done.plan.bytes[1] == done.program.size()[1]
    (unit,) = rank
    if unit == "params_kept":
        assert sum(d.after.parameters for d in decided) <= 0.6 * sum(d.before.parameters for d in decided)
    if unit == "size_mb":
        assert done.program.size()[1] <= 75_000
    assert_generates(done, 8)


def test_a_basis_is_stored_once_in_every_file_and_shared_when_it_is_loaded(deep: Path, data: Path, tmp_path: Path) -> None:
    asked = spec(data, "basis_sharing", {"params_kept": 0.6}) | {"export": [{"format": "hf"}, {"format": "onnx"}]}
    file = tmp_path / "spec.yaml"
    file.write_text(json.dumps(asked))
    done = compile_to_folder(str(deep), file, output=tmp_path / "out")
    assert done.record.failures == []
    names = "model.layers.0.self_attn.q_proj.A", "model.layers.1.self_attn.q_proj.A"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(name in stored for name in names) == 1
    numbers = done.record.plan.parameters[1]
    assert sum(t.numel() for t in stored.values()) <= numbers
    import onnx

    graph = onnx.load(tmp_path / "out" / "onnx" / "model.onnx").graph
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert sum(torch.Size(t.dims).numel() for t in floats) <= numbers
    model = lrc.load(tmp_path / "out")
    assert model.get_parameter(names[0]) is model.get_parameter(names[1])
    model.save_pretrained(tmp_path / "again")
    again = lrc.load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_layers_of_two_blocks_share_and_those_that_are_added_back_do_not(build: Build) -> None:
    done = build("basis_sharing", {"params_kept": 0.6})
    groups = {d.sites[0]: len(d.sites) for d in done.plan.decisions}
    assert groups["model.layers.0.mlp.up_proj"] == 2
    assert groups["model.layers.2.mlp.up_proj"] == groups["model.layers.0.mlp.down_proj"] == 1
    everywhere = build({"type": "basis_sharing", "share": "all", "group_size": 3}, {"params_kept": 0.6})
    assert {len(d.sites) for d in everywhere.plan.decisions} == {3}


def test_an_mlp_gets_narrower_and_heads_keep_their_size(build: Build) -> None:
    done = build("modular", {"params_kept": 0.5})
    (mlp,) = [d for d in done.plan.decisions if "layers.2.mlp" in d.name]
    assert mlp.rank < 48
    for name, shape in zip(mlp.sites, [(mlp.rank, 32), (mlp.rank, 32), (32, mlp.rank)], strict=True):
        made = done.program.map_of(name)
        assert isinstance(made, Dense)
        assert tuple(made.weight.shape) == done.program.sites[name].shape == shape
    pairs = [d for d in done.plan.decisions if "self_attn" in d.name and d.rank]
    assert pairs
    for d in pairs:
        assert isinstance(done.program.map_of(d.sites[0]), Chain)
        assert done.program.sites[d.sites[0]].shape[0] in (16, 32)


def test_a_narrower_module_is_decomposed_further(build: Build, data: Path, tmp_path: Path) -> None:
    done = build("modular", {"params_kept": 0.6})
    again = lrc.compile(done.program, spec(data, "svd", {"params_kept": 0.7}), cache=tmp_path / "cache")
    assert again.program.size()[0] < done.program.size()[0]
    assert torch.isfinite(again.program(input_ids=IDS)["logits"]).all()


def test_what_was_solved_is_not_solved_again(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build("modular", {"params_kept": 0.6})
    monkeypatch.setattr("lrc.run.groups.GroupStore._solve", lambda *_: pytest.fail("solved again"))
    other = build("modular", {"params_kept": 0.8})
    assert other.program.size()[0] > first.program.size()[0]


def test_kfac_takes_the_better_of_both_ways(build: Build) -> None:
    found = {}
    for modules in (True, False):
        done = build({"type": "kfac", "modules": modules, "modules_factor": 1}, {"params_kept": 0.5})
        found[modules] = sum(d.predicted or 0 for d in done.plan.decisions)
        before, after = (sum(getattr(d, when).parameters for d in done.plan.decisions) for when in ("before", "after"))
        assert after <= 0.5 * before
        names = [name for d in done.plan.decisions for name in d.sites]
        assert len(names) == len(set(names)) == 21
    modular = build("modular", {"params_kept": 0.5})
    assert found[True] < min(found[False], sum(d.predicted or 0 for d in modular.plan.decisions))


def test_modules_whose_loss_counts_for_more_are_chosen_less(build: Build) -> None:
    joint = {}
    for factor in (0.1, 1.5, 1e6):
        done = build({"type": "kfac", "modules_factor": factor}, {"params_kept": 0.5})
        joint[factor] = sum(len(d.sites) > 1 for d in done.plan.decisions)
    assert joint[0.1] >= joint[1.5] >= joint[1e6] == 0
    assert joint[0.1] > 0


def test_rounding_and_a_whole_number_are_those_of_groups(build: Build) -> None:
    done = build("modular", {"params_kept": 0.6}, round_to=4)
    assert all(d.rank % 4 == 0 for d in done.plan.decisions if d.rank)
    fixed = build({"type": "basis_sharing"}, 5)
    assert {d.rank for d in fixed.plan.decisions} == {5}


@pytest.mark.parametrize(
    ("rank", "more", "said"),
    [(4, {"form": "two_factor"}, "has a form of its own"), ({"breakeven": 0.5}, {}, "no one breakeven rank")],
)
def test_what_has_no_meaning_for_groups_is_refused(rank: Any, more: dict[str, str], said: str, build: Build) -> None:
    with pytest.raises(SpecError, match=said):
        build("basis_sharing", rank, **more)


def test_a_fused_attention_loses_features_and_goes_on_generating(gpt2: Path, data: Path, tmp_path: Path) -> None:
    done = lrc.compile(gpt2, spec(data, "modular", {"params_kept": 0.6}), cache=tmp_path / "cache")
    (attention,) = [d for d in done.plan.decisions if "c_attn" in d.name]
    assert attention.sites == ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj")
    assert attention.rank
    assert 0 < attention.rank < 63
    assert attention.after.parameters < attention.before.parameters
    assert done.plan.parameters[1] == done.program.size()[0]
    assert_generates(done, 6)


def test_one_factorisation_for_queries_keys_and_values_is_noted(gpt2: Path, data: Path, tmp_path: Path) -> None:
    program, noted = lrc.capture(gpt2), {}
    for solver in ("lord", "svd", "kfac"):
        done = lrc.compile(program, spec(data, solver, 4), cache=tmp_path / "cache")
        noted[solver] = [d.name for d in done.plan.decisions if any("`modular` takes" in note for note in d.notes)]
    assert noted == {"lord": ["transformer.h.0.attn.c_attn"], "svd": ["transformer.h.0.attn.c_attn"], "kfac": []}


@pytest.mark.slow
def test_a_fused_attention_is_exported_in_every_format(gpt2: Path, data: Path, tmp_path: Path) -> None:
    formats = {"export": [{"format": "hf"}, {"format": "onnx"}, {"format": "pt2"}]}
    file = tmp_path / "spec.yaml"
    file.write_text(json.dumps(spec(data, "modular", {"params_kept": 0.6}) | formats))
    done = compile_to_folder(str(gpt2), file, output=tmp_path / "out")
    assert done.record.failures == []
    assert all(line["ok"] for line in done.record.parity)
    assert {line["format"] for line in done.record.parity} >= {"hf", "onnx"}


def test_a_rank_that_no_group_has_is_refused(build: Build) -> None:
    with pytest.raises(UsageError, match=r"q_proj: expected rank <= 32, got 40"):
        build("basis_sharing", 40)


def test_a_site_of_no_module_stays_with_the_reason(deep_program: Any, data: Path, tmp_path: Path) -> None:
    asked = spec(data, "modular", {"params_kept": 0.9})
    asked["passes"][0]["targets"] = [tiny.LAYERS, "lm_head"]
    done = lrc.compile(deep_program, asked, cache=tmp_path / "cache")
    (head,) = [d for d in done.plan.decisions if d.name == "lm_head"]
    assert head.keep == "the solver `modular` finds no group that it belongs to"


def test_a_ladder_climbs_where_most_is_saved() -> None:
    def member(losses: list[float]) -> Candidates:
        values = torch.tensor(losses, dtype=torch.float64)
        return Candidates.of("x", [Offer("f", torch.arange(3), torch.tensor([1.0, 2, 3]).double(), values)], 4.0)

    a, b = member([9, 5, 4]), member([20, 18, 3])
    assert hull(b.costs, b.losses) == [0, 2, 3]
    assert ladder([a, b]) == [(0, 0), (0, 2), (1, 2), (1, 3), (3, 3)]

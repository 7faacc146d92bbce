"""slice: the residual stream gets fewer features, in the graph, in the model's own modules, and in what is exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from models import block
from torch import Tensor, nn

import lrc
from lrc.api import compile_to_folder
from lrc.errors import LowerError, SpecError, UsageError
from lrc.run.plan import totals

bases = pytest.mark.parametrize("bases", ["shared", "block"])
models = pytest.mark.parametrize("model", ["llama", "tied_llama", "gpt2"])


@pytest.fixture(scope="module")
def folder(llama: Path, gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    tied = tiny.write_llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True, num_hidden_layers=2)
    return {"llama": llama, "gpt2": gpt2, "tied_llama": tied}.__getitem__


@pytest.fixture(scope="module")
def program(folder: Callable[[str], Path]) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(model: str) -> Any:
        if model not in made:
            made[model] = lrc.capture(str(folder(model)))
        return made[model]

    return get


def spec(data: Path, **options: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "calibration": {"dataset": str(data / "calib.txt"), "samples": 8, "max_length": 16},
        "passes": [{"type": "slice", "targets": [tiny.LAYERS], "round_to": 4, **options}],
    }


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(4, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def rounding(wanted: Tensor) -> float:
    """What rounding the weights anew and two products in place of one may change."""
    return 64 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())


@models
@bases
@pytest.mark.parametrize("tied", ["keep", "untie"])
def test_at_full_width_the_outputs_are_what_they_were(
    model: str, bases: str, tied: str, program: Callable[[str], Any], data: Path, in_tmp: Path
) -> None:
    dense = program(model)
    done = lrc.compile(dense, spec(data, rank=32, bases=bases, tied=tied))
    wanted, found = (p(**inputs())["logits"].detach() for p in (dense, done.program))
    assert float((found - wanted).abs().max()) <= rounding(wanted)
    assert not any("layernorm" in name or "ln_" in name for name in done.program.tensors())


@models
@bases
@pytest.mark.parametrize("kept", [0.8, 0.6])
def test_the_budget_is_met_with_the_matrices_between_bases_counted(
    model: str, bases: str, kept: float, program: Callable[[str], Any], data: Path, in_tmp: Path
) -> None:
    done = lrc.compile(program(model), spec(data, rank={"params_kept": kept}, bases=bases))
    layers = [d for d in done.plan.decisions if d.rule != "the residual stream"]
    before, after = totals(layers)
    assert after <= kept * before
    stored = sum(p.numel() for name, p in done.program.tensors().items() if ".layers." in name or ".h." in name)
    stored += sum(p.numel() for name, p in done.program.tensors().items() if "shortcut" in name)
    assert stored == after
    (width,) = {d.rank for d in done.plan.decisions}
    assert width is not None
    assert width % 4 == 0
    larger = lrc.plan(program(model), spec(data, rank=width + 4, bases=bases))
    assert totals([d for d in larger.decisions if d.rule != "the residual stream"])[1] > kept * before


@models
def test_in_one_basis_the_model_s_own_modules_give_the_same_and_generate(
    model: str, program: Callable[[str], Any], data: Path, in_tmp: Path
) -> None:
    dense = program(model)
    done = lrc.compile(dense, spec(data, rank=20))
    grafted: Any = done.graft(dense.origin.model)
    given = inputs()
    with torch.no_grad():
        found, wanted = grafted(**given).logits, done.program(**given)["logits"]
        assert float((found - wanted).abs().max()) <= rounding(wanted)
        with_cache, without = (
            grafted.generate(**given, max_new_tokens=5, do_sample=False, use_cache=cached, pad_token_id=0)
            for cached in (True, False)
        )
    assert torch.equal(with_cache, without)


def test_with_a_basis_for_every_block_the_graft_is_refused_with_the_reason(
    program: Callable[[str], Any], data: Path, in_tmp: Path
) -> None:
    done = lrc.compile(program("llama"), spec(data, rank=20, bases="block"))
    with pytest.raises(LowerError, match="slice_shortcut_0: the residual connections hold matrices of their own"):
        done.graft(program("llama").origin.model)
    found = done.module(**inputs()).logits
    assert torch.equal(found, done.program(**inputs())["logits"])


@pytest.mark.slow
@models
def test_a_folder_and_an_onnx_file_of_one_basis_are_written_and_checked(
    model: str, folder: Callable[[str], Path], data: Path, in_tmp: Path, checked_here: None
) -> None:
    job = {**spec(data, rank={"params_kept": 0.7}), "export": [{"format": "hf"}, {"format": "onnx"}]}
    done = compile_to_folder(str(folder(model)), job, output=in_tmp / "out")
    assert done.record.failures == []
    assert {row["format"] for row in done.record.parity} >= {"hf", "onnx"}


@pytest.mark.slow
def test_an_onnx_file_of_many_bases_is_written_without_a_cache_and_checked(
    folder: Callable[[str], Path], data: Path, in_tmp: Path, checked_here: None
) -> None:
    job = {**spec(data, rank={"params_kept": 0.7}, bases="block"), "export": [{"format": "onnx"}]}
    done = compile_to_folder(str(folder("llama")), job, output=in_tmp / "out")
    assert done.record.failures == []
    assert {row["format"] for row in done.record.parity} >= {"pt2", "onnx"}


def test_a_folder_of_many_bases_is_refused_before_any_work(folder: Callable[[str], Path], data: Path, in_tmp: Path) -> None:
    job = {**spec(data, rank=20, bases="block"), "export": [{"format": "hf"}]}
    with pytest.raises(UsageError, match=r"export\.hf: what the pass `slice` makes has no place"):
        compile_to_folder(str(folder("llama")), job, output=in_tmp / "out")


# The decisions.


def test_the_plan_is_what_is_carried_out(program: Callable[[str], Any], data: Path, in_tmp: Path) -> None:
    asked = spec(data, rank={"params_kept": 0.7}, bases="block")
    planned, done = lrc.plan(program("llama"), asked), lrc.compile(program("llama"), asked)
    assert planned.decisions == done.plan.decisions
    assert planned.parameters == done.plan.parameters == (planned.parameters[0], done.program.size()[0])
    (note,) = planned.notes
    assert "2 sites beside the targets lie on the stream" in note


def test_the_predicted_loss_is_the_share_of_the_stream_that_is_dropped(data: Path, in_tmp: Path) -> None:
    """By hand: a block whose stream is the table's rows, then those and what is added to them."""
    ids = torch.arange(10).reshape(1, 10)
    model = block(nn.RMSNorm(8, eps=1e-6))
    done = lrc.compile(
        model, {"version": 1, "passes": [{"type": "slice", "rank": 5, "round_to": 1, "bases": "block", "signals": "residual"}]},
        inputs={"ids": ids}, calibration=[{"ids": ids}],
    )  # fmt: skip
    X = model.table.weight.detach().double()
    energies = torch.linalg.svdvals(X).square()
    (up,) = [d for d in done.plan.decisions if d.name == "up"]
    assert up.predicted == pytest.approx(float(energies[5:].sum() / energies.sum()), rel=1e-5)
    assert up.unit == "share of the stream's energy"


def test_a_stream_of_few_directions_is_cut_without_a_loss(in_tmp: Path) -> None:
    """Everything is written into four directions of eight; those are all that is kept."""
    model = block(nn.RMSNorm(8, eps=1e-6)).double()
    basis = torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    with torch.no_grad():
        model.table.weight.copy_(model.table.weight @ basis @ basis.T)
        model.down.weight.copy_(basis @ basis.T @ model.down.weight)
        model.down.bias.copy_(basis @ basis.T @ model.down.bias)
    ids = torch.arange(10).reshape(2, 5)
    for kind in ("shared", "block"):
        done = lrc.compile(
            model, {"version": 1, "passes": [{"type": "slice", "rank": 4, "bases": kind}]}, inputs={"ids": ids},
            calibration=[{"ids": ids}],
        )  # fmt: skip
        found, wanted = done.module(ids).detach(), model(ids).detach()
        assert float((found - wanted).abs().max()) <= 1e-10
        assert {d.rank for d in done.plan.decisions} == {4}


def test_the_graph_before_and_after(golden: Callable[[str, str], None], in_tmp: Path) -> None:
    ids = torch.arange(6).reshape(2, 3)
    model = block(nn.LayerNorm(8))
    texts = [str(lrc.capture(model, {"ids": ids}))]
    for kind in ("shared", "block"):
        asked = {"version": 1, "passes": [{"type": "slice", "rank": 4, "bases": kind}]}
        texts.append(str(lrc.compile(model, asked, inputs={"ids": ids}, calibration=[{"ids": ids}]).program))
    golden("slice", "\n".join(texts))


def test_what_is_cut_can_be_factorized_afterwards(program: Callable[[str], Any], data: Path, in_tmp: Path) -> None:
    asked = spec(data, rank=24)
    asked["passes"].append({"type": "factorize", "targets": [tiny.LAYERS], "rank": {"params_kept": 0.7}})
    done = lrc.compile(program("llama"), asked)
    (query,) = [d for d in done.plan.decisions if d.type == "factorize" and d.name.endswith("gate_proj")]
    assert query.full_rank == 24
    given = inputs()
    grafted: Any = done.graft(program("llama").origin.model)
    with torch.no_grad():
        wanted = done.program(**given)["logits"]
        assert float((grafted(**given).logits - wanted).abs().max()) <= rounding(wanted)


# Refusals.


def test_what_was_factorized_is_not_cut(program: Callable[[str], Any], data: Path, in_tmp: Path) -> None:
    asked = spec(data, rank=24)
    asked["passes"].insert(0, {"type": "factorize", "targets": [tiny.LAYERS], "solver": "svd", "rank": 4})
    with pytest.raises(UsageError, match="Put `slice` before the passes that factorize"):
        lrc.compile(program("llama"), asked)


def test_more_features_than_there_are_a_budget_too_small_and_an_ignored_site_are_refused(
    program: Callable[[str], Any], data: Path, in_tmp: Path
) -> None:
    for options, message in (
        ({"rank": 33}, "expected rank <= 32"),
        ({"rank": {"params_kept": 0.01}}, "rank.params_kept: expected at least"),
        ({"rank": 8, "ignore": ["**.o_proj"]}, "o_proj: the residual stream runs through it"),
    ):
        with pytest.raises(UsageError, match=message):
            lrc.plan(program("llama"), spec(data, **options))  # type: ignore[arg-type]


def test_a_budget_that_the_stream_knows_nothing_of_is_refused(program: Callable[[str], Any], data: Path, in_tmp: Path) -> None:
    with pytest.raises(SpecError, match="`slice` takes a whole number"):
        lrc.plan(program("llama"), spec(data, rank={"latency_kept": 0.5}))


def test_an_encoder_with_norms_behind_its_blocks_is_refused(bert: Path, data: Path, in_tmp: Path) -> None:
    with pytest.raises(UsageError, match="post-norm"):
        lrc.plan(str(bert), spec(data, rank=8))

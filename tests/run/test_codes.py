"""factorize with a solver in codes: LR2VQ from the spec to the files."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.errors import SpecError
from lrc.maps import Chain, Codebook, Segments


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 512), nn.ReLU(), nn.Linear(512, 60, bias=False)).eval()


def inputs(count: int = 8) -> Tensor:
    return torch.randn(count, 96, generator=torch.Generator().manual_seed(1))


def step(rank: Any = 4, **solver: Any) -> dict[str, Any]:
    return {"type": "factorize", "solver": {"type": "lr2vq", "m": 8, "k": 16, **solver}, "rank": rank}


def compiled(*passes: dict[str, Any], model: nn.Module | None = None, given: Any = None) -> lrc.Compiled:
    spec = {"version": 1, "passes": list(passes)}
    examples = {"input": inputs()} if given is None else given
    return lrc.compile(net() if model is None else model, spec, inputs=examples, cache="cache")


def test_the_ratio_follows_from_k_m_and_d() -> None:
    done = compiled(step(k=16))
    for d, (out, columns) in zip(done.plan.decisions, [(512, 96), (60, 512)], strict=True):
        pieces = out * columns // 8
        bits = pieces * 4 + 16 * (16 * 4 + 4 * 8)
        bias = 512 if out == 512 else 0
        assert d.after.bytes == bits // 8 + 4 * bias
        assert d.rank == 4
        assert f"{bits / (out * columns):.3f} bits a weight, {32 * out * columns / bits:.1f}x smaller" in d.notes[0]
    made = done.program.sites["0"].map
    assert repr(made) == "Chain(Codebook[512,48; 16x4], Segments[12x4,8])"
    (stored,) = [sum(t.nbytes for t in module.state_dict().values()) for module in [made]]
    assert stored == done.plan.decisions[0].after.bytes


def test_the_plan_is_what_the_output_is(golden: Any) -> None:
    done = compiled(step(k=4, dtype="model", m=48))
    golden("codes", str(done.program))


def test_codes_stay_codes_in_the_files() -> None:
    large = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)).eval()  # the exporter folds small weights
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    done = compiled(step(m=4, k=256, rank=3), model=large, given={"input": x})
    done.save("out")
    loaded = lrc.load("out")(input=x)
    assert torch.equal(next(iter(loaded.values())), done.module(x))
    file = Path(done.to_onnx("model.onnx"))
    ops = [node.op_type for node in onnx.load(file).graph.node]
    assert ops.count("Gather") >= 1
    found = onnxruntime.InferenceSession(str(file)).run(None, {"input": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), done.module(x).detach(), atol=1e-5, rtol=1e-4)


def test_merge_leaves_codes_and_makes_the_same_dense_weight_where_it_is_told_to() -> None:
    plain, dense = compiled(step(), {"type": "merge"}), compiled(step(), {"type": "merge", "dense": True})
    assert isinstance(plain.program.sites["0"].map, Chain)
    assert repr(dense.program.sites["0"].map) == "Dense[512,96]"
    torch.testing.assert_close(plain.module(inputs()), dense.module(inputs()), atol=1e-5, rtol=1e-5)


def test_convolutions_are_clustered_by_whole_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 72, 1), nn.Conv2d(72, 72, 3, groups=72), nn.Conv2d(72, 30, (3, 1))
    ).eval()
    x = torch.randn(2, 8, 15, 15)
    done = compiled(step(m=18, rank=5), model=model, given=(x,))
    kept = {d.name: d.keep for d in done.plan.decisions}
    assert kept["0"] is None
    assert kept["2"] == "pieces of 18 numbers do not divide rows of 64"
    assert "72 groups" in str(kept["3"])
    assert kept["4"] is None
    exact = compiled(step(m=18, rank=5), {"type": "merge", "dense": True}, model=model, given=(x,))
    torch.testing.assert_close(done.module(x), exact.module(x), atol=1e-5, rtol=1e-5)
    twice = compiled(
        step(m=8, rank=5) | {"targets": ["2"]}, step(m=8, rank=3) | {"targets": ["0", "2"]}, model=model, given=(x,)
    )
    reasons = {(d.index, d.name): d.keep for d in twice.plan.decisions}
    assert reasons[0, "2"] is None
    assert reasons[1, "0"] == "pieces of 8 numbers are no whole channels of 9 numbers each"
    assert "only dense" in str(reasons[1, "2"])


@pytest.mark.parametrize("shape", [(6, 8), (6, 2, 3, 3), (6, 18, 1, 1)])
def test_cutting_into_pieces_and_back_is_the_identity(shape: tuple[int, ...]) -> None:
    """Every piece its own codeword, in all its dimensions: what comes back is the weight, for every m that is accepted."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6) if len(shape) == 2 else nn.Conv2d(shape[1], 6, shape[2])
    x = torch.randn(3, 8) if len(shape) == 2 else torch.randn(1, shape[1], 5, 5)
    row = layer.weight[0].numel()
    taps = shape[2] * shape[3] if len(shape) == 4 else 1
    model = nn.Sequential(layer).eval()
    for m in (m for m in range(1, row + 1) if row % m == 0 and m % taps == 0):
        done = compiled(step(m=m, k=None, rank={"fraction": 1.0}), model=model, given=(x,))
        made = done.program.sites["0"].map
        assert isinstance(made, Chain)
        assert isinstance(made.A, Segments)
        torch.testing.assert_close(made.dense().weight, layer.weight.detach().flatten(1), atol=1e-5, rtol=0)


def test_more_codewords_than_pieces_save_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 24)).eval()
    done = compiled(step(k=1024, rank=8), model=model, given={"input": torch.randn(4, 64)})
    assert "1024 codewords for 192 pieces need no fewer bytes" in str(done.plan.decisions[0].keep)


@pytest.mark.parametrize("wrong", [
    step(rank=9), step(rank={"params_kept": 0.5}), step(rank={"breakeven": 0.5}), step() | {"form": "pivoted"},
    step() | {"tied": "joint"}, step(k=1), step(k=1 << 17),
])  # fmt: skip
def test_what_has_no_meaning_in_codes_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        compiled(wrong)
    assert "passes.0" in str(caught.value)


def test_a_table_is_left_alone() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 256)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    done = compiled(step() | {"targets": ["table", "head"]}, model=Looked().eval(), given={"x": torch.arange(6)[None]})
    assert "only dense linears and convolutions" in str(done.plan.decisions[0].keep)
    assert isinstance(done.program.sites["head"].map.slots[0], Codebook)  # type: ignore[attr-defined]  # a chain

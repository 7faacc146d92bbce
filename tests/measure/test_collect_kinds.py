"""Moments of convolutions and embeddings: of patches, and of how often a row is read."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.measure import Cache, collect
from lrc.measure import taps as measured_taps
from lrc.measure.lockstep import Lockstep
from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.solvers import Moments, Need
from tests.models import batches, low_rank

ALL = frozenset({Need.INPUTS, Need.GRADIENTS})
F64 = torch.float64


class Images(nn.Module):
    """Two convolutions of one value, and one behind a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 5, 3, padding=1)
        self.right = nn.Conv2d(3, 5, 1, bias=False)
        self.down = nn.Conv2d(5, 4, (3, 2), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.left(x) + self.right(x))).flatten(1)


class Words(nn.Module):
    """A table that is read at every position, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.fc = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.table(input_ids))) * attention_mask[..., None]


def images() -> tuple[Images, Program, list[Tensor]]:
    torch.manual_seed(0)
    model = Images().double().eval()
    return (
        model,
        capture_module(model, torch.randn(3, 3, 7, 6, dtype=F64)),
        [torch.randn(n, 3, 7, 6, dtype=F64) for n in (3, 5)],
    )


def patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    unfolded = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    return unfolded.transpose(1, 2).flatten(0, 1)


def test_moments_of_convolutions_are_those_of_their_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, program, xs = images()
    whole = collect(program, batches(*({"x": x} for x in xs)), list(program.sites), ALL)
    monkeypatch.setattr(measured_taps, "PIECE", 1)  # one sample at a time
    found = collect(program, batches(*({"x": x} for x in xs)), list(program.sites), ALL)
    reads: dict[str, list[Tensor]] = {"left": [], "right": [], "down": []}
    for x in xs:
        middle = torch.tanh(model.left(x) + model.right(x)).detach()
        for name, value in (("left", x), ("right", x), ("down", middle)):
            reads[name].append(patches(getattr(model, name), value))
    for name, rows in reads.items():
        every = torch.cat(rows)
        assert found[name].tokens == len(every)
        assert torch.allclose(found[name].gram, every.T @ every / len(every))  # type: ignore[arg-type]
        assert torch.allclose(found[name].mean, every.mean(0))  # type: ignore[arg-type]
        for part in ("gram", "mean", "fisher", "weighted_gram", "weighted_mean"):
            assert torch.allclose(getattr(found[name], part), getattr(whole[name], part))


def test_gradients_of_a_convolution_are_added_over_positions() -> None:
    model, program, xs = images()
    found = collect(program, batches({"x": xs[0]}), ["down"], ALL, fisher="outputs", seed=3)["down"]
    x = torch.tanh(model.left(xs[0]) + model.right(xs[0])).detach()
    y = model.down(x)
    sent = torch.randn(y.flatten(1).shape, generator=torch.Generator().manual_seed(3 * 1_000_003), dtype=torch.float32).double()
    rows = sent.reshape(y.shape).movedim(1, -1).flatten(0, 2)
    most = 3 * 7 * 6  # positions of the largest site
    assert torch.allclose(found.fisher, rows.T @ rows / most)  # type: ignore[arg-type]
    weight, read = rows.float().square().sum(1).double(), patches(model.down, x)
    assert torch.allclose(found.weighted_gram, (read * weight[:, None]).T @ read / weight.sum(), rtol=1e-6)  # type: ignore[arg-type]


def words() -> tuple[Words, Program, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Words().eval()
    ids = torch.randint(1, 11, (4, 5))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    ids[0, 3:] = 0
    return model, capture_module(model, {"input_ids": ids, "attention_mask": mask}), {"input_ids": ids, "attention_mask": mask}


def test_a_table_has_counts_for_a_second_moment(tmp_path: Any) -> None:
    _, program, item = words()
    cache = Cache(tmp_path)
    found = collect(program, batches(item), list(program.sites), ALL, cache=cache, key="a")
    read = item["input_ids"][item["attention_mask"].bool()]
    counts = torch.bincount(read, minlength=11).double() / len(read)
    moments = found["table"]
    assert moments.tokens == len(read) == 18
    assert torch.equal(moments.gram, counts)  # type: ignore[arg-type]
    assert torch.equal(moments.mean, counts)  # type: ignore[arg-type]
    assert moments.fisher.shape == (6, 6)  # type: ignore[union-attr]
    assert moments.weighted_gram.sum() == pytest.approx(1)  # type: ignore[union-attr]
    again = collect(program, batches(), list(program.sites), ALL, cache=cache, key="a")
    for fqn, kept in found.items():
        for part in ("gram", "mean", "fisher", "weighted_gram", "weighted_mean"):
            assert torch.equal(getattr(kept, part), getattr(again[fqn], part))


def test_behind_compressed_sites_patches_are_those_of_both_programs() -> None:
    model, program, xs = images()
    compressed = program.clone()
    compressed.replace("left", low_rank(compressed.sites["left"], 2))
    walk = Lockstep(program, compressed, batches({"x": xs[0]}))
    found = walk.advance_to("down", Moments())
    dense = patches(model.down, torch.tanh(model.left(xs[0]) + model.right(xs[0])))
    changed = patches(model.down, torch.tanh(compressed.maps["left"](xs[0]) + model.right(xs[0])))
    assert torch.allclose(found.gram, changed.T @ changed / len(changed))  # type: ignore[arg-type]
    assert torch.allclose(found.cross, dense.T @ changed / len(dense))  # type: ignore[arg-type]
    assert torch.allclose(found.dense_mean, dense.mean(0))  # type: ignore[arg-type]


def test_compression_before_a_table_changes_no_index() -> None:
    _, program, item = words()
    dense = collect(program, batches(item), ["table"], ALL)["table"]
    assert Lockstep(program, program.clone(), batches(item)).advance_to("table", dense) is dense


def test_every_group_has_moments_of_its_own_channels_also_from_the_cache(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 1)).double().eval()
    program = capture_module(model, torch.randn(2, 6, 5, 5, dtype=F64))
    x = torch.randn(4, 6, 5, 5, dtype=F64)
    cache = Cache(tmp_path)
    first = collect(program, batches({"input": x}), ["0"], ALL, cache=cache, key="k")["0"]
    again = collect(program, batches({"input": x}), ["0"], ALL, cache=cache, key="k")["0"]
    rows = patches(model[0], x).unflatten(-1, (2, 27))  # type: ignore[arg-type]
    assert first.gram is not None
    assert first.mean is not None
    assert torch.allclose(first.gram, torch.einsum("tgi,tgj->gij", rows, rows) / len(rows), rtol=0, atol=1e-12)
    assert torch.allclose(first.mean, rows.mean(0), rtol=0, atol=1e-12)
    assert first.fisher is not None
    assert first.fisher.shape == (4, 4)
    for name in ("gram", "mean", "fisher", "weighted_gram", "weighted_mean"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    walk = Lockstep(program, program.clone(), batches({"input": x})).advance_to("0", first)
    assert walk.gram is not None
    assert walk.cross is not None
    assert torch.allclose(walk.gram, first.gram, rtol=0, atol=1e-12)
    assert torch.allclose(walk.cross, first.gram, rtol=0, atol=1e-12)

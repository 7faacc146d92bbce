"""Convolutions of one, two and three dimensions, and weights of one row or column: every method and every start at each."""

from typing import Any

import pytest
import torch
from adapted import ALL, Case, adapted, case, distance, merged, train
from torch import Tensor, nn

import lrc
from lrc.maps import Conv


class Convs(nn.Module):
    """A convolution of every dimension, each with a stride, a dilation or a padding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, stride=2, padding=2)
        self.image = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2)
        self.volume = nn.Conv3d(4, 5, (2, 1, 3), stride=(1, 2, 1), padding=(1, 0, 1), bias=False)

    def forward(self, line: Tensor, image: Tensor, volume: Tensor) -> tuple[Tensor]:
        made = self.line(line), self.image(image), self.volume(volume)
        return (torch.cat([y.flatten(1) for y in made], 1),)


CONVS = ["{line,image,volume}"]
CONV_METHODS: dict[str, Any] = {
    "lora": {}, "rslora": {}, "dora": {}, "hydra": {}, "colora": {}, "sora": {}, "loldu": {}, "flora": {},
    "lora_xs": {"init": {"type": "svd_weight", "core_std": 0.0}},
}  # fmt: skip
STARTS: dict[str, Any] = {
    name: name for name in ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "corda", "lora_ga", "lora_ga_hf")
} | {"eva": {"type": "eva", "rho": 1.0}}


def convs(dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(0)
    model = Convs().eval().to(dtype)
    sizes = {"line": (9,), "image": (9, 8), "volume": (4, 5, 6)}
    return Case(model, {name: torch.randn(2, 4, *size, dtype=dtype) for name, size in sizes.items()})


def compiled(it: Case, calibration: Any = None, **options: Any) -> Any:
    spec = {"version": 1, "passes": [{"type": "adapt", **options}]}
    return lrc.compile(it.model, spec, inputs=it.inputs, calibration=calibration)


def unchanged_then_merged(made: Any, it: Case, tolerance: float = 1e-5) -> None:
    """Nothing moves at the start; after training, merging gives a plain layer everywhere, and the same outputs."""
    assert distance(made.module(**it.inputs), it.model(**it.inputs)) < tolerance
    train(made.program)
    trained = made.module(**it.inputs)
    assert distance(trained, it.model(**it.inputs)) > 1e-3
    after = merged(made, it)
    assert {type(held).__name__ for held in after.program.maps.values()} <= {"Dense", "Conv", "Lookup"}
    assert distance(after.module(**it.inputs), trained) < tolerance


@pytest.mark.parametrize("method", CONV_METHODS)
def test_convolutions_of_every_dimension_start_unchanged_and_merge(method: str) -> None:
    it = convs()
    made = adapted(it, targets=CONVS, method=method, rank=2, **CONV_METHODS[method])
    assert set(made.program.maps) == {"line", "image", "volume"}
    unchanged_then_merged(made, it)


@pytest.mark.parametrize("init", STARTS)
def test_convolutions_start_as_every_initialiser_says(init: str) -> None:
    it = convs()
    made = compiled(it, [it.inputs], targets=CONVS, rank=2, alpha=2.0, init=STARTS[init])
    assert set(made.program.maps) == {"line", "image", "volume"}
    unchanged_then_merged(made, it)


def test_the_product_on_a_convolution_is_the_card_s_formula() -> None:
    it = convs(torch.float64)
    made = adapted(it, targets=CONVS, rank=2, alpha=3.0)
    train(made.program, 0.3)
    expected = made.program.module()(**it.inputs)
    for name in it.inputs:
        layer, branch = it.model.get_submodule(name), made.program.maps[name].adapter.inner
        B, A = (kernel.detach() for kernel in branch.kernels)
        change = torch.einsum("or,ri...->oi...", B.flatten(1), A)
        with torch.no_grad():
            layer.weight.copy_(layer.weight + 1.5 * change)
    assert distance(it.model(**it.inputs), expected) < 1e-12


@pytest.mark.parametrize("init", [*STARTS, "random", "loftq"])
def test_every_start_serves_weights_of_every_shape_or_says_why_not(init: str) -> None:
    it = case()
    made = compiled(it, [it.inputs], targets=ALL, rank=1, init=STARTS.get(init, init))
    reasons = {d.sites[0]: d.keep for d in made.plan.decisions if d.keep}
    for reason in reasons.values():
        assert "singular vectors" in reason or "even rank" in reason or "knows no" in reason, reason
    if init in ("kaiming", "gaussian", "random"):
        assert not reasons
    if init in ("kaiming", "gaussian", "pissa", "olora", "eva", "corda"):
        assert {"row", "column", "tall", "wide"} <= set(made.program.maps)
    if init.startswith("lora_ga"):
        (notes,) = (d.notes for d in made.plan.decisions if d.sites == ("conv",))
        assert "no gradient on the calibration data" in notes[0]  # the loss reads the other output alone
    if made.program.maps and init not in ("random", "loftq"):
        unchanged_then_merged(made, it)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "vera"])
def test_the_peers_of_lora_merge_exactly_on_every_shape_and_kind(method: str, dtype: torch.dtype) -> None:
    it = case(dtype)
    made = adapted(it, method=method, rank=3)
    assert len(made.program.maps) == (5 if method == "vera" else 7)
    start = distance(made.module(**it.inputs), it.model(**it.inputs))
    assert start <= (1e-6 if dtype == torch.float32 else 0.02 if method == "dora" else 0.0)
    train(made.program)
    expected = {name: held.exact() for name, held in made.program.maps.items()}
    for name, held in merged(made, it).program.maps.items():
        weight, bias = expected[name]
        stored = held.exact().weight
        assert torch.equal(stored, weight.to(dtype).double()), name
        assert (bias is None) == (held.bias is None)


def test_a_convolution_that_pads_with_its_own_values_is_merged_into_one_that_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=2, padding_mode="circular")).eval()
    it = Case(model, {"input": torch.randn(2, 4, 9)})
    made = adapted(it, targets=["**"], method="flora", rank=2)
    (name,) = made.program.maps
    train(made.program, 0.3)
    after = merged(made, it)
    assert isinstance(after.program.maps[name], Conv)
    assert distance([after.module(**it.inputs)], [made.module(**it.inputs)]) < 1e-5
    assert distance([made.module(**it.inputs)], [model(**it.inputs)]) > 1e-2

"""Ways: what they offer has the sizes they say, and losses are those of what is really stored."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.maps import LinearMap, restore
from lrc.solvers import KfacSolver, Moments, kfac
from lrc.spec.registry import WAYS
from lrc.ways import WAYS_BY_DEFAULT, FactorizeWay, Target, Variant, WayOptions, find

SHAPE = (48, 80)


def moments(rows: int, columns: int) -> Moments:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, columns, dtype=torch.float64, generator=generator) * torch.linspace(0.1, 2, columns) + 0.3
    g = torch.randn(400, rows, dtype=torch.float64, generator=generator) * torch.linspace(0.5, 2, rows)
    return Moments(gram=x.T @ x / 400, mean=x.mean(0), fisher=g.T @ g / 400, tokens=400)


def target(rows: int = SHAPE[0], columns: int = SHAPE[1], *, bias: bool = True, **options: Any) -> Target:
    generator = torch.Generator().manual_seed(4)
    weight, seen, solver = torch.randn(rows, columns, generator=generator), moments(rows, columns), KfacSolver(**options)
    offset = torch.randn(rows, generator=generator) if bias else None
    solver = solver.settled(logits=False).at("linear")
    terms = kfac(weight, offset, seen, min(rows, columns), solver, generator)
    return Target(terms, torch.float32)


def offered() -> list[tuple[WayOptions, Variant]]:
    return [(of_way, variant) for of_way in WAYS_BY_DEFAULT for variant in of_way.variants(*SHAPE)]


def made(of_way: WayOptions, variant: Variant, of: Target) -> LinearMap:
    found = WAYS.for_options(of_way)(of, variant)
    assert isinstance(found, LinearMap)
    return found


def test_every_option_has_a_name_of_its_own() -> None:
    names = [variant.name for _, variant in offered()]
    assert len(set(names)) == len(names)
    for of_way, variant in offered():
        assert find(WAYS_BY_DEFAULT, variant.name, *SHAPE) == (WAYS.for_options(of_way), variant)


@pytest.mark.parametrize("kind", [type(of_way) for of_way in WAYS_BY_DEFAULT])
def test_an_option_is_a_map_that_is_stored_as_its_structure_says(kind: type[WayOptions]) -> None:
    of = target()
    for of_way, variant in offered():
        if type(of_way) is kind:
            done = of.finished(made(of_way, variant, of))
            assert (done.out_features, done.in_features) == SHAPE
            assert done.bias is not None
            again = restore(done.structure())
            assert {k: (v.shape, v.dtype) for k, v in again.state_dict().items()} == {
                k: (v.shape, v.dtype) for k, v in done.state_dict().items()
            }
            assert again.cost() == done.cost()


def test_a_weight_of_zeros_has_every_packed_product() -> None:
    seen, solver = moments(*SHAPE), KfacSolver().settled(logits=False).at("linear")
    of = Target(kfac(torch.zeros(SHAPE), None, seen, min(SHAPE), solver, torch.Generator()), torch.float32)
    for of_way, variant in offered():
        if of_way.type in ("quantized_factors", "split"):
            assert not made(of_way, variant, of).exact().weight.any()


@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_is_that_of_the_error_on_the_samples(bias: bool) -> None:
    of, seen = target(bias=bias, focus=0.0, damping_in=0.0, damping_out=0.0), moments(*SHAPE)
    found = of.finished(made(*offered()[-1], of))
    weight, offset = found.exact()
    error = weight - of.weight
    shift = offset - of.terms.bias.double() if bias else torch.zeros(SHAPE[0])  # type: ignore[operator,union-attr]
    assert seen.gram is not None
    assert seen.mean is not None
    second = error @ seen.gram @ error.T + torch.outer(error @ seen.mean, shift) * 2 + torch.outer(shift, shift)
    assert of.loss(weight) == pytest.approx(0.5 * float((seen.fisher * second).sum()), rel=1e-5)  # type: ignore[operator]


def test_the_loss_of_a_product_falls_with_its_rank_and_nothing_costs_nothing() -> None:
    of = target()
    losses = [
        of.loss(made(FactorizeWay(), variant, of).exact().weight)
        for variant in FactorizeWay(forms=["two_factor"]).variants(*SHAPE)
    ]
    assert losses == sorted(losses, reverse=True)
    assert of.loss(of.weight) == 0


def test_losses_are_in_one_unit() -> None:
    """Ten times the gradients are a hundred times the loss, whatever the option."""
    seen, generator = moments(*SHAPE), torch.Generator().manual_seed(0)
    weight, solver = torch.randn(SHAPE, generator=generator), KfacSolver(fisher="outputs").settled(logits=False).at("linear")
    found: list[Tensor] = []
    for factor in (1.0, 10.0):
        assert seen.fisher is not None
        scaled = Moments(gram=seen.gram, mean=seen.mean, fisher=factor**2 * seen.fisher, tokens=400)
        terms = kfac(weight, None, scaled, 48, solver, generator)
        of = Target(terms, torch.float32)
        found.append(torch.tensor([of.loss(made(w, v, of).exact().weight) for w, v in offered()[::4]]))
    torch.testing.assert_close(found[1], 100 * found[0], rtol=1e-3, atol=0)


def test_a_name_that_nothing_has_is_an_error() -> None:
    with pytest.raises(KeyError, match="nf5"):
        find(WAYS_BY_DEFAULT, "nf5", *SHAPE)

"""hydra: the invariants of two branches around one weight."""

from typing import Any

import pytest
import torch
from adapted import adapted, case, distance, train, trained
from torch import Tensor

from lrc.maps import Chain, LinearMap, Scalar, Sum, simplify

F64 = torch.float64


def hydra(fqn: str = "tall", **options: Any) -> LinearMap:
    it = case(F64)
    rank, dropout = options.pop("rank", 3), options.pop("dropout", 0.0)
    made = adapted(it, targets=[fqn], method={"type": "hydra", **options}, rank=rank, dropout=dropout, alpha=6.0)
    train(made.program, 0.5)
    return made.program.maps[fqn]


def parts(made: LinearMap) -> dict[str, Tensor]:
    named = {name: p.detach() for name, p in made.named_parameters()}
    places = {"W": "base.inner.weight", "b": "base.inner.bias"}
    for branch, (outer, inner) in {"base.after.adapter.inner": ("D", "C"), "adapter.inner": ("B", "A")}.items():
        places |= {outer: f"{branch}.B.weight", inner: f"{branch}.A.weight"}
        places |= {f"{outer}0": f"{branch}.B.bias", f"{inner}0": f"{branch}.A.bias"}
    return {short: named[name] for short, name in places.items()}


def test_the_output_is_that_of_the_formula_without_a_cross_term() -> None:
    made, s, x = hydra(sequential=2), 6.0 / 3, torch.randn(5, 8, dtype=F64)
    p = parts(made)
    h = x @ p["W"].T + p["b"]
    beside = (x @ p["A"].T + p["A0"]) @ p["B"].T + p["B0"]
    after = (h @ p["C"].T + p["C0"]) @ p["D"].T + p["D0"]
    assert torch.allclose(made(x), h + s * beside + s * after, rtol=0, atol=1e-12)


def test_merging_gives_the_closed_form_of_weight_and_bias() -> None:
    made, s = hydra(sequential=2), 2.0
    p = parts(made)
    folded, _ = simplify(made)
    weight, bias = folded.exact()
    W, b = p["W"], p["b"]
    assert torch.allclose(weight, W + s * (p["B"] @ p["A"] + p["D"] @ p["C"] @ W), rtol=0, atol=1e-12)
    expected = b + s * (p["B"] @ p["A0"] + p["B0"]) + s * (p["D"] @ p["C"] @ b + p["D"] @ p["C0"] + p["D0"])
    assert torch.allclose(bias, expected, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(weight - W) <= 3 + 2


def test_a_weight_without_a_bias_gains_one_where_branches_have_some() -> None:
    folded, _ = simplify(hydra("wide", sequential=2))
    assert folded.bias is not None
    folded, _ = simplify(hydra("wide", sequential=2, branch_bias=False))
    assert folded.bias is None


def test_without_a_sequential_branch_and_biases_it_is_lora_bit_for_bit() -> None:
    it = case()
    for fqn in ("tall", "conv", "column"):
        ours = adapted(it, targets=[fqn], method={"type": "hydra", "sequential": 0, "branch_bias": False}, rank=2, alpha=3.0)
        theirs = adapted(it, targets=[fqn], method="lora", rank=2, alpha=3.0)
        for made in (ours, theirs):
            train(made.program)
        assert all(torch.equal(a, b) for a, b in zip(ours.module(**it.inputs), theirs.module(**it.inputs), strict=True))


def test_the_sequential_branch_sees_the_bias_of_the_weight() -> None:
    made = hydra(sequential=2, parallel=False, branch_bias=False)
    assert isinstance(made, Chain)
    named = dict(made.named_parameters())
    with torch.no_grad():
        named["inner.weight"].zero_()
    b, C, D = named["inner.bias"], named["after.adapter.inner.A"], named["after.adapter.inner.B"]
    y = made(torch.randn(4, 8, dtype=F64))
    assert torch.allclose(y, b + 2.0 * (D @ (C @ b)), rtol=0, atol=1e-12)


def test_alone_the_sequential_branch_stays_in_the_spaces_of_its_factors() -> None:
    made = hydra(sequential=2, parallel=False, branch_bias=False)
    named = {name: p.detach() for name, p in made.named_parameters()}
    W, D = named["inner.weight"], named["after.adapter.inner.B"]
    delta = made.exact().weight - W
    assert torch.linalg.matrix_rank(torch.cat([D, delta], 1)) == 2
    assert torch.linalg.matrix_rank(torch.cat([W, delta])) == torch.linalg.matrix_rank(W)


def test_twice_the_scale_is_twice_the_change() -> None:
    changes = []
    for alpha in (3.0, 6.0):
        it = case(F64)
        made = adapted(it, targets=["tall"], method={"type": "hydra", "sequential": 2}, rank=3, alpha=alpha)
        train(made.program, 0.5)
        weight, bias = made.program.maps["tall"].exact()
        changes.append((weight - it.model.tall.weight, bias - it.model.tall.bias))
    for once, twice in zip(*changes, strict=True):
        assert torch.allclose(2 * once, twice, rtol=0, atol=1e-13)


def test_nothing_at_all_moves_at_the_start_and_the_original_weight_can_be_solved_for() -> None:
    for alpha in (None, 0.5, 40.0):
        it = case()
        made = adapted(it, method={"type": "hydra", "sequential": 3}, rank=2, alpha=alpha)
        assert distance(made.module(**it.inputs), it.model(**it.inputs)) == 0.0
    moved, s = hydra(sequential=2), 2.0
    p = parts(moved)
    weight, _ = moved.exact()
    eye = torch.eye(20, dtype=F64)
    back = torch.linalg.solve(eye + s * p["D"] @ p["C"], weight - s * p["B"] @ p["A"])
    assert torch.allclose(back, p["W"], rtol=0, atol=1e-10)


def test_merging_again_is_another_map() -> None:
    """The branch after the weight would now act on the merged weight: what is merged must be kept apart from the original."""
    made = hydra(sequential=2, parallel=False, branch_bias=False)
    after, _ = made.slots
    once, _ = simplify(made)
    twice, _ = simplify(Chain(after, once))
    assert not torch.allclose(once.exact().weight, twice.exact().weight)


@pytest.mark.parametrize(("bias", "numbers"), [(False, 331_776), (True, 12 * (4 * 3840 + 8 * 1536 + 4 + 8 + 2 * 768))])
def test_the_counts_of_roberta_base_are_the_papers(bias: bool, numbers: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3072, 768, device="meta")).to_empty(device="cpu")
    it = case()._replace(model=model, inputs={"input": torch.randn(1, 3072)})
    options = {"type": "hydra", "sequential": 8, "branch_bias": bias}
    made = adapted(it, targets=["**"], method=options, rank=4)
    (one,) = made.program.maps.values()
    assert 12 * trained(one) == numbers


def test_dropout_stands_between_the_factors() -> None:
    made = hydra(sequential=2, dropout=0.5)
    assert repr(made).count("Dropout") == 2
    assert "Chain(Dense[20,3], Dropout(0.5), Dense[3,8])" in repr(made)


def test_images_and_tables() -> None:
    it = case(F64)
    made = adapted(it, targets=["{conv,table}"], method="hydra", rank=2)
    train(made.program, 0.3)
    conv = made.program.maps["conv"]
    assert isinstance(conv, Sum)
    folded, _ = simplify(conv)
    x = it.inputs["image"]
    assert distance([folded(x)], [conv(x)]) < 1e-12
    (note,) = next(d.notes for d in made.plan.decisions if d.sites == ("table",))
    assert "alone" in note


def test_no_branch_at_all_is_no_adapter() -> None:
    it = case()
    made = adapted(it, targets=["tall"], method={"type": "hydra", "sequential": 0, "parallel": False})
    assert "no branch" in str(made.plan.decisions[0].keep)


def test_a_trained_scale_is_one_number_of_both_branches_and_multiplies_their_biases() -> None:
    it = case(F64)
    method = {"type": "hydra", "sequential": 2, "train_scale": True}
    made = adapted(it, targets=["tall"], method=method, rank=3, alpha=6.0).program.maps["tall"]
    plain = adapted(it, targets=["tall"], method={"type": "hydra", "sequential": 2}, rank=3, alpha=6.0).program.maps["tall"]
    assert trained(made) == trained(plain) + 1
    scales = [part.scalar for part in made.modules() if isinstance(part, Scalar)]
    assert len(scales) == 2
    assert scales[0] is scales[1]
    assert scales[0].tolist() == [2.0]
    generator = torch.Generator().manual_seed(2)
    numbers = [p for p in made.parameters() if p.requires_grad and p is not scales[0]]
    with torch.no_grad():
        for ours, theirs in zip(numbers, (p for p in plain.parameters() if p.requires_grad), strict=True):
            ours.copy_(torch.randn(ours.shape, generator=generator))
            theirs.copy_(ours)
    x = torch.randn(4, 8, dtype=F64)
    assert torch.allclose(made(x), plain(x), rtol=0, atol=1e-12)
    h = it.model.tall(x)
    with torch.no_grad():
        scales[0].fill_(-4.0)
    assert torch.allclose(made(x) - h, -2.0 * (plain(x) - h), rtol=0, atol=1e-10)
    made(x).sum().backward()
    assert torch.allclose(scales[0].grad, ((plain(x) - h) / 2.0).sum(), rtol=0, atol=1e-8)
    assert torch.allclose(simplify(made).map(x), made(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("start", ["kaiming", "xavier", "normal"])
def test_the_second_branch_starts_as_one_of_the_authors_codes_says(start: str) -> None:
    model = torch.nn.Linear(4, 3000)
    it = case()._replace(model=model, inputs={"input": torch.randn(1, 4)})
    made = adapted(it, targets=["**"], method={"type": "hydra", "sequential": 8, "sequential_init": start}, rank=2)
    (one,) = made.program.maps.values()
    named = dict(one.named_parameters())
    C = named["base.after.adapter.inner.A.weight"].detach()
    if start == "normal":
        assert float(C.std()) == pytest.approx(0.02, rel=0.02)
    else:
        bound = {"kaiming": 3000**-0.5, "xavier": (6 / 3008) ** 0.5}[start]
        assert 0.99 * bound < float(C.abs().max()) <= bound
    assert torch.equal(made.module(**it.inputs), model(it.inputs["input"]))

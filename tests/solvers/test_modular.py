"""MoDeGPT: the invariants of its method card, for MLPs, values with outputs, and queries with keys."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from solver_cases import F64, generator, randn, samples
from torch import Tensor

from lrc.errors import SolverError
from lrc.maps import Chain
from lrc.run.groups import maps_of, summarize_all
from lrc.solvers import GroupTerms, Member, ModularSolver, Moments, WeightGroup, modular
from lrc.solvers.groups import fused_rows, multiplied, stored_size

TOKENS, WIDTH, IN, OUT = 60, 8, 5, 6
EXACT: dict[str, Any] = {"damping_in": 0.0, "damping_out": 0.0, "focus": 0.0}
PLAIN = {"rotary": 0, "interleaved": 0}


def options(**given: Any) -> ModularSolver:
    return ModularSolver(fisher="labels", **{**EXACT, **given})


def spd(size: int, seed: int) -> Tensor:
    x = randn(3 * size, size, seed=seed)
    return x.T @ x / len(x)


def moments(features: int, out_features: int, seed: int) -> Moments:
    x = samples(features, seed, tokens=TOKENS)
    return Moments(gram=x.T @ x / TOKENS, mean=x.mean(0), fisher=spd(out_features, seed + 1), tokens=TOKENS)


def member(out_features: int, in_features: int, seed: int, *, bias: bool = False) -> Member:
    added = randn(out_features, seed=seed + 7) if bias else None
    return Member(randn(out_features, in_features, seed=seed), added, moments(in_features, out_features, seed + 20))


def mlp(*, bias: bool = False) -> WeightGroup:
    return WeightGroup("mlp", (member(WIDTH, IN, 0, bias=bias), member(WIDTH, IN, 1), member(OUT, WIDTH, 2, bias=bias)))


def attention(kind: str, heads: int, kv_heads: int, size: int, **facts: int) -> WeightGroup:
    numbers = {"heads": heads, "kv_heads": kv_heads, "size": size, "together": 1, **facts}
    if kind == "vo":
        return WeightGroup(kind, (member(kv_heads * size, IN, 3), member(OUT, heads * size, 4)), numbers)
    return WeightGroup(kind, (member(heads * size, IN, 5, bias=True), member(kv_heads * size, IN, 6)), numbers)


def solve(group: WeightGroup, **given: Any) -> GroupTerms:
    return modular(group, None, options(**given), generator(0))


def error(group: WeightGroup, terms: GroupTerms, rank: int, metric: str) -> float:
    """What the reader's output loses when it reads the kept features alone, as they are placed."""
    reader = group.members[-1]
    made = maps_of(options().cut(terms, rank), F64)[-1]
    C, W = reader.moments.gram, reader.weight
    places = made.slots[-1].places()
    kept = torch.zeros(C.shape[0], dtype=F64)
    kept[places] = 1
    change = W - made.exact().weight * kept
    G = 0.5 * reader.moments.fisher if metric == "loss" else torch.eye(len(W), dtype=F64)
    return float((G @ change * (change @ C)).sum())


# MLPs.


@pytest.mark.parametrize("select", ["saliency", "leverage"])
@pytest.mark.parametrize("metric", ["loss", "outputs"])
def test_the_reader_of_an_mlp_is_the_least_squares_on_the_kept_neurons(metric: str, select: str) -> None:
    group = mlp()
    terms = solve(group, metric=metric, select=select)
    C, W = group.members[2].moments.gram, group.members[2].weight
    for rank in range(1, WIDTH + 1):
        made = maps_of(options().cut(terms, rank), F64)
        J = made[2].slots[-1].places()
        assert torch.allclose(made[2].slots[0], W @ C[:, J] @ torch.linalg.inv(C[J][:, J]), atol=1e-8)
        for writer, one in zip(made[:2], group.members, strict=False):
            assert torch.equal(writer.slots[0].places(), J)
            assert torch.equal(writer.exact().weight[J], one.weight[J])
        assert error(group, terms, rank, metric) == pytest.approx(float(terms.losses[rank]), rel=1e-7, abs=1e-10)
    assert bool((terms.losses.diff() <= 1e-12).all())


def test_all_neurons_leave_an_mlp_as_it_was_also_with_biases() -> None:
    group = mlp(bias=True)
    made = maps_of(options().cut(solve(group), WIDTH), F64)
    for new, one in zip(made, group.members, strict=True):
        weight, bias = new.exact()
        assert torch.allclose(weight, one.weight, atol=1e-9)
        assert bias is None if one.bias is None else torch.allclose(bias, one.bias, atol=1e-9)


def test_a_reader_with_a_bias_keeps_the_mean_of_what_is_dropped() -> None:
    group = mlp(bias=True)
    reader = group.members[2]
    mean = reader.moments.mean
    made = maps_of(options().cut(solve(group), 3), F64)[2]
    weight, bias = made.exact()
    assert torch.allclose(weight @ mean + bias, reader.weight @ mean + reader.bias)


def test_leverage_scores_are_those_of_the_paper() -> None:
    group = mlp()
    terms = solve(group, select="leverage", damping_in=0.3)
    C = group.members[2].moments.gram
    scores = (C @ torch.linalg.inv(C + 0.3 * C.diagonal().mean() * torch.eye(WIDTH, dtype=F64))).diagonal()
    assert torch.equal(terms.tensors["reads"], scores.argsort(descending=True))


def test_saliency_drops_first_the_neuron_that_costs_least() -> None:
    group = mlp()
    last = int(solve(group).tensors["reads"][-1])
    C, W, G = group.members[2].moments.gram, group.members[2].weight, group.members[2].moments.fisher
    costs = []
    for gone in range(WIDTH):
        J = torch.tensor([j for j in range(WIDTH) if j != gone])
        change = W.clone()
        change[:, J] -= W @ C[:, J] @ torch.linalg.inv(C[J][:, J])
        costs.append(float((G @ change * (change @ C)).sum()))
    assert last == costs.index(min(costs))


# Values and outputs.


def test_the_pair_error_of_one_head_is_the_tail_of_the_spectrum_of_its_product() -> None:
    group = attention("vo", 1, 1, 4)
    terms = solve(group, metric="outputs")
    reader = group.members[1]
    S = torch.linalg.svdvals(reader.weight @ torch.linalg.cholesky(reader.moments.gram))
    assert torch.allclose(terms.losses, torch.stack([S[r:].square().sum() for r in range(5)]), atol=1e-10)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_all_features_of_the_values_leave_the_product_as_it_was(heads: int, kv_heads: int) -> None:
    group = attention("vo", heads, kv_heads, 4)
    terms = solve(group)
    v, o = (made.exact().weight for made in maps_of(options().cut(terms, kv_heads * 4), F64))
    for h in range(heads):
        g = h // (heads // kv_heads)
        mine, theirs = slice(h * 4, h * 4 + 4), slice(g * 4, g * 4 + 4)
        before = group.members[1].weight[:, mine] @ group.members[0].weight[theirs]
        assert torch.allclose(o[:, mine] @ v[theirs], before, atol=1e-8)
    assert bool((terms.losses.diff() <= 1e-12).all())


def test_heads_that_share_values_read_what_the_values_write() -> None:
    v, o = maps_of(options().cut(solve(attention("vo", 4, 2, 4)), 5), F64)
    assert isinstance(v, Chain)
    assert isinstance(o, Chain)
    written = {(int(p) // 4, int(p) % 4) for p in v.slots[0].places()}
    read = {(int(p) // 4, int(p) % 4) for p in o.slots[-1].places()}
    assert read == {(h, j) for h in range(4) for g, j in written if h // 2 == g}


# Queries and keys.


@pytest.mark.parametrize("interleaved", [0, 1])
def test_features_that_are_turned_together_stay_together(interleaved: int) -> None:
    group = attention("qk", 4, 2, 8, rotary=8, interleaved=interleaved, together=2)
    terms = solve(group)
    for rank in range(1, 9):
        q, k = maps_of(options().cut(terms, rank), F64)
        kept = {(int(p) // 8, int(p) % 8) for p in k.slots[0].places()}
        assert len(kept) == 2 * rank
        partner = (lambda j: j ^ 1) if interleaved else (lambda j: (j + 4) % 8)
        assert {(h, partner(j)) for h, j in kept} == kept
        asked = {(int(p) // 8, int(p) % 8) for p in q.slots[0].places()}
        assert asked == {(h, j) for h in range(4) for g, j in kept if h // 2 == g}
    assert bool((terms.losses.diff() <= 0).all())
    assert float(terms.losses[-1]) == 0


def test_all_queries_and_keys_are_as_they_were_and_the_kept_ones_have_the_largest_scores() -> None:
    group = attention("qk", 2, 2, 3, rotary=0, interleaved=0)
    terms = solve(group, queries="features")
    for new, one in zip(maps_of(options().cut(terms, 6), F64), group.members, strict=True):
        assert torch.equal(new.exact().weight, one.weight)
    q, k = group.members
    C, mean = q.moments.gram, q.moments.mean
    squares = (q.weight @ C * q.weight).sum(1) + 2 * q.bias * (q.weight @ mean) + q.bias**2
    scores = squares.sqrt() * (k.weight @ k.moments.gram * k.weight).sum(1).sqrt()
    assert torch.equal(terms.tensors["places1"], scores.argsort(descending=True))


# One linear for queries, keys and values.


def fused(heads: int, kv_heads: int, size: int) -> WeightGroup:
    shared = heads // kv_heads
    width = (shared + 2) * size
    numbers = {"heads": heads, "kv_heads": kv_heads, "size": size, "together": 1, **PLAIN, "start_q": 0}
    numbers |= {"start_k": shared * size, "start_v": (shared + 1) * size} | {f"stride_{role}": width for role in "qkv"}
    return WeightGroup("qkvo", (member(kv_heads * width, IN, 3, bias=True), member(OUT, heads * size, 4, bias=True)), numbers)


def attended(group: WeightGroup, qkv: Any, o: Any) -> tuple[Tensor, Tensor]:
    """The matrices of scores (heads, IN + 1, IN + 1) and of what is read (heads, OUT, IN + 1), biases with them."""
    facts = group.facts
    rows = torch.cat([qkv.weight, qkv.bias[:, None]], 1)
    shared = facts["heads"] // facts["kv_heads"]
    q, k, v = (rows[fused_rows(facts, role)].view(-1, facts["size"], IN + 1) for role in "qkv")
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    return q.mT @ k, o.weight.view(OUT, facts["heads"], -1).transpose(0, 1) @ v


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_a_fused_linear_keeps_features_of_all_three_and_all_of_them_exactly(heads: int, kv_heads: int) -> None:
    group = fused(heads, kv_heads, 4)
    terms = solve(group)
    assert terms.full_rank == 2 * 4 * kv_heads - 1
    assert bool((terms.losses.diff() <= 1e-12).all())
    qkv, o = (made.exact() for made in maps_of(options().cut(terms, terms.full_rank), F64))
    for new, old in zip(attended(group, qkv, o), attended(group, *group.members), strict=True):
        assert torch.allclose(new, old, atol=1e-8)
    q_and_k, values = solve_halves(group)
    for rank in range(1, terms.full_rank + 1):
        first, second = maps_of(options().cut(terms, rank), F64)
        kept = {int(p) for p in first.slots[0].places()}
        counts = [len(kept & set(fused_rows(group.facts, role).tolist())) for role in "qkv"]
        assert counts[0] == heads // kv_heads * counts[1]
        assert counts[1] + counts[2] == rank + 1
        assert min(counts) >= 1
        assert second.slots[-1].places().shape[0] == heads // kv_heads * counts[2]
        assert float(terms.losses[rank]) == pytest.approx(float(q_and_k.losses[counts[1]] + values.losses[counts[2]]))


def solve_halves(group: WeightGroup) -> tuple[GroupTerms, GroupTerms]:
    """The pair of queries and keys, and that of values and output, as if they were linears of their own."""
    whole, reader = group.members

    def part(role: str) -> Member:
        rows = fused_rows(group.facts, role)
        fisher = whole.moments.fisher[rows][:, rows]
        return Member(whole.weight[rows], whole.bias[rows], replace(whole.moments, fisher=fisher))

    return (
        solve(WeightGroup("qk", (part("q"), part("k")), group.facts)),
        solve(WeightGroup("vo", (part("v"), reader), group.facts)),
    )


# What every kind of group says of its size.


@pytest.mark.parametrize(
    "group",
    [mlp(bias=True), attention("vo", 4, 2, 4), attention("qk", 4, 2, 4, rotary=4, interleaved=0, together=2), fused(4, 2, 4)],
)
def test_what_a_rank_costs_is_read_off_meta_tensors(group: WeightGroup) -> None:
    terms = solve(group)
    shapes = {name: tensor.to("meta") for name, tensor in terms.tensors.items()}
    outline = options().cut(GroupTerms(terms.losses, shapes, terms.facts), 3)
    numbers, places = stored_size(outline)
    made = summarize_all(maps_of(options().cut(terms, 3), F64))
    assert (made.parameters, made.bytes) == (numbers, 8 * numbers + 4 * places)
    assert made.flops == sum(multiplied(part) for part in outline)


def test_missing_gradients_are_refused() -> None:
    with pytest.raises(SolverError, match=r"moments\.fisher"):
        solve(WeightGroup("mlp", (Member(randn(4, 3, seed=0), None, Moments(gram=spd(3, 1))),)))

"""colora: ranks by contribution, biases trained."""

import copy
import json
from pathlib import Path

import torch
from adapted import adapted, case, distance, merged, train, trained

import lrc
from lrc.measure import contributions, site_scores, write_scores
from lrc.measure.contribution import Call
from lrc.spec.registry import ADAPTERS

SITES = ["{conv,tall,square,wide}"]


def test_ranks_follow_measured_contributions_within_the_budget(tmp_path: Path) -> None:
    it = case()
    tuned = copy.deepcopy(it.model)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            p.add_({"square": 0.3, "tall": 0.1}.get(name.split(".")[0], 0.01) * torch.randn_like(p))

    def loss(call: Call, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        h, image = call(**inputs)  # type: ignore[misc]  # the model's two outputs
        return (h - 0.5).square().sum() + image.square().sum()

    found = contributions(it.model, tuned, [it.inputs], loss, steps=10)
    plain = adapted(it, targets=SITES, method="colora", rank=1)
    scores = site_scores(plain.program, found)
    write_scores(tmp_path / "faig.json", scores)
    rank = {"contribution": {"budget": 0.3, "scores": str(tmp_path / "faig.json")}}
    for method in ("colora", "lora", "sora"):
        made = adapted(it, targets=SITES, method=method, rank=rank)
        ranks = {d.sites[0]: d.rank or 0 for d in made.plan.decisions}
        shapes = {fqn: made.program.sites[fqn].shape for fqn in ranks}
        assert sum(ranks[fqn] * sum(shape) for fqn, shape in shapes.items()) <= 0.3 * sum(m * n for m, n in shapes.values())
        assert ranks["square"] == max(ranks.values()) > 0
        assert set(made.program.maps) == {fqn for fqn, rank in ranks.items() if rank}
        reasons = [d.keep for d in made.plan.decisions if d.keep]
        assert all(reason == "it contributes too little for a rank of 1" for reason in reasons)


def test_biases_are_trained_and_the_models_own_stay() -> None:
    it = case()
    made = adapted(it, targets=SITES, method="colora", rank=2)
    tall = made.program.maps["tall"]
    assert trained(tall) == 2 * (20 + 8) + 20
    before = it.model.tall.bias.detach().clone()
    train(made.program)
    assert torch.equal(it.model.tall.bias, before)
    assert not torch.equal(tall.bias, before)
    fixed = adapted(it, targets=["tall"], method={"type": "colora", "train_bias": False}, rank=2)
    assert trained(fixed.program.maps["tall"]) == 2 * (20 + 8)


def test_the_merged_convolution_is_the_sum_with_stride_padding_and_dilation() -> None:
    it = case(torch.float64)
    made = adapted(it, targets=["conv"], method="colora", rank=3)
    train(made.program)
    assert distance(merged(made, it).module(**it.inputs), made.module(**it.inputs)) < 1e-12
    assert repr(made.program.maps["conv"]) == "Sum(Conv[6,3,3x2]*, Scale(1, ConvChain([6,3,1x1], [3,3,3x2])))"


def test_patterns_of_single_sites_come_first() -> None:
    scores = {"tall": 1.0, "square": 1.0, "conv": 1.0, "wide": 1.0}
    made = adapted(case(), targets=SITES, rank={"contribution": {"budget": 0.2, "scores": scores}}, rank_pattern={"square": 7})
    ranks = {d.sites[0]: d.rank for d in made.plan.decisions}
    assert ranks["square"] == 7


def test_every_method_takes_ranks_by_contribution() -> None:
    scores = {"tall": 0.2, "square": 1.0, "wide": 0.5}
    found = {}
    it = case()
    program = lrc.capture(it.model, it.inputs)
    for method in (name for name in ADAPTERS.names() if name != "compacter"):  # its rank is a width that n must divide
        rank = {"contribution": {"budget": 0.4, "scores": scores}}
        passes = [{"type": "adapt", "targets": ["{tall,square,wide}"], "method": method, "rank": rank}]
        made = lrc.compile(program.clone(), {"version": 1, "passes": passes})
        found[method] = {d.sites[0]: d.rank for d in made.plan.decisions if d.keep is None}
        assert set(made.program.maps) == set(found[method]), method
    assert {tuple(ranks.items()) for ranks in found.values()} == {tuple(found["lora"].items())}
    assert found["lora"]["square"] == max(found["lora"].values())
    even = adapted(
        case(),
        targets=["square"],
        method={"type": "compacter", "n": 1},
        rank={"contribution": {"budget": 0.4, "scores": scores}},
    )
    assert even.plan.decisions[0].rank == 4


def test_scores_are_plain_json(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.json", {"b": 1.0, "a": 0.5})
    assert json.loads((tmp_path / "scores.json").read_text()) == {"a": 0.5, "b": 1.0}

"""compacter: a PHM bottleneck after a site, with one slow rule for all; nothing to merge."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapted import MERGE, adapted, case, distance, train, trained
from torch import nn

import lrc
from lrc.errors import LrcError
from lrc.maps import Bottleneck, Chain, Kronecker

F64 = torch.float64


def compacter(**options: Any) -> dict[str, Any]:
    return {"method": {"type": "compacter", "n": 2, **options}, "rank": 4}


def test_the_output_is_h_plus_up_of_the_activation_of_down() -> None:
    it = case(F64)
    made = adapted(it, targets=["tall"], **compacter())
    train(made.program, 0.5)
    adapter = made.program.maps["tall"]
    assert repr(adapter) == "Chain(Bottleneck[20,4,20; Kronecker, gelu_new], Dense[20,8]*)"
    branch = adapter.adapter
    x = torch.randn(5, 8, dtype=F64)
    h = it.model.tall(x)

    def full(part: Kronecker) -> torch.Tensor:
        return sum(torch.kron(part.C[i], part.S[i] @ part.T[i]) for i in range(2))  # type: ignore[return-value]

    inner = h @ full(branch.down) + branch.down.bias
    bent = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    assert torch.allclose(adapter(x), h + bent @ full(branch.up) + branch.up.bias, rtol=0, atol=1e-12)


def test_it_starts_close_to_the_base_and_at_it_where_the_rule_is_zero() -> None:
    it = case(F64)
    made = adapted(it, targets=["tall", "square"], **compacter())
    before = it.model(**it.inputs)
    change = distance(made.module(**it.inputs), before)
    assert 0 < change < 1e-6
    with torch.no_grad():
        made.program.maps["tall"].adapter.down.C.zero_()
    assert distance(made.module(**it.inputs), before) == 0


def test_the_rule_is_one_parameter_of_all_sites_and_counted_once() -> None:
    it = case()
    made = adapted(it, targets=["tall", "square", "wide"], **compacter())
    parts = [part for adapter in made.program.maps.values() for part in adapter.modules() if isinstance(part, Kronecker)]
    assert len(parts) == 6
    assert len({id(part.C) for part in parts}) == 1
    plain = sum(p.numel() for p in it.model.parameters())
    assert made.program.size()[0] == plain + 3 * (20 + 4) + 3 * (20 + 4) + 3 * (8 + 4) + 2**3
    h, image = made.module(**it.inputs)
    h.square().sum().backward()
    together = parts[0].C.grad.clone()
    own = adapted(it, targets=["tall", "square", "wide"], **compacter(shared_rule=False))
    mine = [part for adapter in own.program.maps.values() for part in adapter.modules() if isinstance(part, Kronecker)]
    assert len({id(part.C) for part in mine}) == 3
    with torch.no_grad():
        for part, other in zip(mine, parts, strict=True):
            for name in ("C", "S", "T"):
                getattr(part, name).copy_(getattr(other, name))
    h, image = own.module(**it.inputs)
    h.square().sum().backward()
    assert image.ndim == 4
    apart = {id(part.C): part.C.grad for part in mine}
    assert torch.allclose(together, sum(apart.values()), rtol=1e-4, atol=1e-9)  # type: ignore[arg-type]


def test_the_counts_of_t5_base_are_the_papers() -> None:
    model = nn.Linear(768, 768)
    it = case()._replace(model=model, inputs={"input": torch.randn(1, 768)})
    made = adapted(it, targets=["**"], method="compacter")
    (adapter,) = made.program.maps.values()
    assert trained(adapter) == 2376 + 64
    norms = 62 * 768
    assert 48 * 2376 + 64 + norms == 161_728
    assert 24 * 2376 + 64 + norms == 104_704
    assert isinstance(adapter, Chain)
    assert repr(adapter.adapter) == "Bottleneck[768,24,768; Kronecker, gelu_new]"


def test_factors_start_by_glorot_and_the_rule_close_to_zero() -> None:
    model = nn.Linear(4, 4096)
    it = case()._replace(model=model, inputs={"input": torch.randn(1, 4)})
    made = adapted(it, targets=["**"], method={"type": "compacter", "n": 8}, rank=64)
    (adapter,) = made.program.maps.values()
    down = adapter.adapter.down
    bound = 2**0.5 * (6 / (512 + 1)) ** 0.5
    assert 0.98 * bound < float(down.S.detach().abs().max()) <= bound
    assert float(down.C.detach().std()) == pytest.approx(1e-4, rel=0.2)
    assert down.bias.abs().max() == 0
    own = adapted(it, targets=["**"], method={"type": "compacter", "n": 8, "shared_rule": False}, rank=64)
    (adapter,) = own.program.maps.values()
    assert float(adapter.adapter.down.C.detach().std()) == pytest.approx(0.01, rel=0.2)


def test_full_fast_factors_are_phm_adapters() -> None:
    made = adapted(case(), targets=["tall"], **compacter(phm_rank=None))
    adapter = made.program.maps["tall"]
    assert trained(adapter) == 2 * (20 * 4 // 2) + 2**3 + 20 + 4


def test_merging_refuses_it_with_the_reason() -> None:
    it = case()
    made = adapted(it, targets=["tall", "row"], **compacter())
    reason = "the activation `gelu_new` stands between the two projections of an adapter"
    done = lrc.compile(made.program, MERGE, inputs=it.inputs)
    kept = {d.sites[0]: d.keep for d in done.plan.decisions if d.keep}
    assert kept["tall"] == f"nothing to fold: {reason}"
    with pytest.raises(LrcError, match=reason):
        lrc.compile(made.program, {"version": 1, "passes": [{"type": "merge", "dense": True}]}, inputs=it.inputs)


def test_what_n_does_not_divide_is_kept_with_the_reason() -> None:
    made = adapted(case(), targets=["tall", "row", "conv"], method={"type": "compacter", "n": 3}, rank=3)
    kept = {d.sites[0]: d.keep for d in made.plan.decisions}
    assert kept["tall"] == "n = 3 does not divide 20 features and a bottleneck of 3"
    assert kept["row"] == "n = 3 does not divide 1 features and a bottleneck of 3"
    assert kept["conv"] == "`method: compacter` knows no conv"


def test_a_shared_rule_survives_a_folder(bert: Path, in_tmp: Path, checked_here: None) -> None:
    spec = in_tmp / "spec.yaml"
    spec.write_text(
        "version: 1\npasses: [{type: adapt, targets: ['layers:[0-9]'], method: {type: compacter, n: 2}, rank: 4}]\n"
        "export: [{format: hf}]\n"
    )
    done = tiny.compile_to_folder(bert, spec, output="out")
    done.raise_on_failure()
    assert any(isinstance(part, Bottleneck) for part in lrc.load(Path("out")).modules())


def test_fast_factors_are_one_pair_for_all_downs_and_one_for_all_ups_of_a_size() -> None:
    it = case()
    made = adapted(it, targets=["tall", "square", "wide"], **compacter(shared_fast=True))
    tall, square, wide = (made.program.maps[fqn].adapter for fqn in ("tall", "square", "wide"))
    for one, other, third in ((tall.down, square.down, wide.down), (tall.up, square.up, wide.up)):
        assert one.S is other.S
        assert one.T is other.T
        assert one.bias is not other.bias
        assert one.S is not third.S  # 8 features, not 20
    assert tall.down.S is not tall.up.S
    plain = sum(p.numel() for p in it.model.parameters())
    biases = (20 + 4) + (20 + 4) + (8 + 4)
    assert made.program.size()[0] == plain + 2 * (20 + 4) + 2 * (8 + 4) + biases + 2**3
    assert distance(made.module(**it.inputs), it.model(**it.inputs)) < 1e-6
    own = adapted(it, targets=["tall", "square"], **compacter(shared_fast=True, shared_rule=False, phm_rank=None))
    one, other = (own.program.maps[fqn].adapter.down for fqn in ("tall", "square"))
    assert one.S is other.S
    assert one.C is not other.C
    assert not one.T.requires_grad

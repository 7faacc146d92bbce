"""What holds for every adapter method: where it starts, that merging is exact, what it costs, and that it is exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import ALL, Case, adapted, case, distance, merged, train, trained

import lrc
from lrc.api import Compiled
from lrc.maps import restore, simplify
from lrc.spec.registry import ADAPTERS

METHODS: dict[str, Any] = {
    "hydra": {"method": "hydra", "rank": 2},
    "hydra with a trained scale": {"method": {"type": "hydra", "train_scale": True}, "rank": 2, "alpha": 3.0},
    "lora_xs": {"method": "lora_xs", "rank": 1, "init": {"type": "svd_weight", "core_std": 0.0}},
    "loldu": {"method": "loldu", "rank": 1},
    "loldu with a trained scale": {"method": {"type": "loldu", "train_scale": True}, "rank": 1, "alpha": 0.5},
    "sora": {"method": "sora", "rank": 3},
    "flora": {"method": "flora", "rank": 3, "alpha": 0.5},
    "colora": {"method": "colora", "rank": 2},
    "compacter": {"method": {"type": "compacter", "n": 2}, "rank": 4},
    "plp": {"method": {"type": "plp", "zero_init": True}, "rank": 4},
}
every = pytest.mark.parametrize("name", METHODS)
linear = {name: options for name, options in METHODS.items() if name != "compacter"}


def test_every_method_of_the_registry_is_tested_here_or_beside_its_peers() -> None:
    assert set(ADAPTERS.names()) == {name.split()[0] for name in METHODS} | {"lora", "rslora", "dora", "vera"}


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_is_unchanged_at_the_start(name: str, dtype: torch.dtype) -> None:
    it = case(dtype)
    made = adapted(it, **METHODS[name])
    before = it.model(**it.inputs)
    exact = name != "plp"  # of which the frozen weight is rounded once more
    tolerance = {"float32": 1e-6, "bfloat16": 0.0 if exact else 0.02}[str(dtype)[6:]]
    assert distance(made.module(**it.inputs), before) <= tolerance
    assert len(made.program.maps) >= (5 if name == "plp" else 4)
    for decision in made.plan.decisions:
        assert (
            decision.keep is None
            or "knows no" in decision.keep
            or "does not divide" in decision.keep
            or "basis" in decision.keep
        )


@pytest.mark.parametrize("name", linear)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_is_exact_to_rounding(name: str, dtype: torch.dtype) -> None:
    it = case(dtype)
    made = adapted(it, **METHODS[name])
    train(made.program)
    for fqn, adapter in made.program.maps.items():
        weight, bias = adapter.exact()
        folded, _ = simplify(adapter)
        assert type(folded).__name__ in ("Dense", "Conv", "Lookup"), (fqn, repr(folded))
        got, added = folded.exact()
        eps = torch.finfo(dtype).eps
        assert torch.allclose(got, weight, rtol=eps, atol=eps * 1e-3)
        assert (bias is None) == (added is None)
        assert bias is None or torch.allclose(added, bias, rtol=eps, atol=eps * 1e-3)
    trained_outputs = made.module(**it.inputs)
    assert distance(trained_outputs, it.model(**it.inputs)) > 1e-3
    assert distance(merged(made, it).module(**it.inputs), trained_outputs) < (2e-6 if dtype == torch.float32 else 0.06)


@every
def test_what_is_planned_is_what_is_made_and_it_is_stored_as_data(name: str) -> None:
    it = case()
    made = adapted(it, **METHODS[name])
    train(made.program)
    planned = {d.sites[0]: d for d in made.plan.decisions if d.keep is None}
    assert set(planned) == set(made.program.maps)
    for fqn, adapter in made.program.maps.items():
        assert planned[fqn].after.parameters == adapter.cost(1).parameters
        assert planned[fqn].after.text == repr(adapter)
        assert trained(adapter) > 0
        restored = restore(adapter.structure())
        restored.load_state_dict(adapter.state_dict())
        assert restored.structure() == adapter.structure()
        assert restored.cost(3) == adapter.cost(3)
    assert set(ALL[0].strip("{}").split(",")) >= set(planned)


MIXED = {
    "table": "hydra", "conv": "flora", "tall": "loldu", "square": "plp", "wide": "sora", "row": "lora_xs",
    "column": "compacter",
}  # fmt: skip


def mixed(it: Case) -> Compiled:
    """Every method in one model, each at a site of another kind."""
    passes = [{"type": "adapt", "targets": [site], **METHODS[name]} for site, name in MIXED.items()]
    made = lrc.compile(it.model, {"version": 1, "passes": passes}, inputs=it.inputs)
    assert len(made.program.maps) == len(MIXED), made.plan
    return made


def test_the_same_seed_gives_the_same_adapters_and_the_graph_reads_as_text() -> None:
    it = case()
    a, b = mixed(it), mixed(it)
    assert a.program.digest() == b.program.digest()
    text = str(a.program)
    assert all(f"# adapt @ {site}" in text for site in MIXED)


@pytest.mark.slow
def test_adapters_are_exported_to_onnx_unmerged(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="skipped: no ONNX Runtime to run the exported adapters with")
    it = case()
    made = mixed(it)
    train(made.program)
    expected = made.module(**it.inputs)
    session = ort.InferenceSession(str(made.to_onnx(tmp_path / "model.onnx")))
    got = session.run(None, {key: value.numpy() for key, value in it.inputs.items()})
    assert distance([torch.from_numpy(y) for y in got], expected) < 1e-5


def test_training_steps_move_every_trained_number_and_nothing_else() -> None:
    it = case()
    made = mixed(it)
    before = {name: p.detach().clone() for name, p in made.program.graph_module.named_parameters()}
    optimizer = torch.optim.Adam([p for p in made.program.graph_module.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        h, image = made.module(**it.inputs)
        ((h - 1) ** 2).mean().add(((image - 1) ** 2).mean()).backward()
        optimizer.step()
    for name, p in made.program.graph_module.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


@pytest.mark.parametrize("name", [n for n in linear if n not in ("hydra", "loldu")])
def test_dropout_acts_in_training_alone(name: str) -> None:
    it = case()
    made = adapted(it, targets=["tall"], dropout=0.5, **METHODS[name])
    train(made.program)
    tall, x = made.program.maps["tall"], torch.randn(4, 8)
    assert torch.equal(tall(x), tall(x))
    tall.train()
    assert not torch.equal(tall(x), tall(x))
    assert "Dropout" in repr(tall)
    assert repr(simplify(tall.eval()).map).startswith("Dense")

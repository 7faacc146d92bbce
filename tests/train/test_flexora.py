"""Flexora: gates, their hypergradient against finite differences, and the layers that they choose."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.errors import TrainError, UsageError
from lrc.program import Program
from lrc.spec.registry import RECIPES
from lrc.train.data import Examples
from lrc.train.recipes import Context, Own
from lrc.train.recipes.flexora import FlexoraRecipe, Gates, Positive, Threshold, TopK, layer_name

ADAPT = {"type": "adapt", "method": "lora", "targets": ["layers.*"], "rank": 2, "alpha": 4, "init": "kaiming"}
WIDTH, LAYERS = 6, 4


class Stack(nn.Module):
    """Four layers with a nonlinearity between them, and a head outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        y: Tensor = self.head(x)
        return y


class Beside(Stack):
    """The layers side by side, so that none can do the work of another."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(layer(x)) for layer in self.layers], -1)


@cache
def captured(kind: type[Stack] = Stack) -> Program:
    torch.manual_seed(0)
    return lrc.capture(kind().double(), {"x": torch.randn(2, WIDTH, dtype=torch.float64)})


def adapted(*, spread: bool = True) -> Program:
    """Return the stack with adapters; `spread`: with numbers in B too, small ones."""
    program = lrc.compile(captured(), {"version": 1, "passes": [ADAPT]}).program
    generator = torch.Generator().manual_seed(2)
    for name, p in program.graph_module.named_parameters():
        if spread and name.endswith(".B"):
            p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return program


def data(count: int, seed: int, kind: type[Stack] = Stack) -> list[dict[str, Tensor]]:
    """Return batches whose labels a change of layer 2 alone explains."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    teacher = kind().double()
    change = torch.Generator().manual_seed(77)
    with torch.no_grad():
        U, V = (torch.randn(WIDTH, 2, generator=change, dtype=torch.float64) for _ in range(2))
        teacher.layers[2].weight += U @ V.T
        return [{"x": x, "labels": teacher(x)}]


def training() -> list[dict[str, Tensor]]:
    return data(64, 1)


def judging() -> list[dict[str, Tensor]]:
    return data(32, 2)


def training_beside() -> list[dict[str, Tensor]]:
    """Return what `test_flexora:training_beside` names as data."""
    return data(64, 1, Beside)


def judging_beside() -> list[dict[str, Tensor]]:
    """Return what `test_flexora:judging_beside` names as data."""
    return data(32, 2, Beside)


def examples(batches: list[dict[str, Tensor]]) -> Examples:
    rows = [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(len(batch["x"]))]
    return Examples(tuple(rows), {}, True)


def recipe(program: Program, **options: Any) -> Gates:
    """Return the recipe over a program, with the mean squared error as its loss."""
    parameters = {n: p for n, p in program.graph_module.named_parameters() if p.requires_grad}
    module = program.graph_module

    def loss(batch: Any, generator: Any, *, judged: bool = False, values: Any = None) -> Tensor:
        given = dict(parameters) if values is None else dict(values)
        made = torch.func.functional_call(module, given, (), {"x": batch["x"]})["output"]
        return nn.functional.mse_loss(made, batch["labels"])

    own = Own(module, loss, examples(training()), 16, lambda _: examples(judging()))
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05)
    given = FlexoraRecipe(data={"dataset": "unread.npz"}, batches=2, **options)  # type: ignore[arg-type]  # as the spec has it
    made = RECIPES.get("flexora")(Context(program, list(program.sites), parameters, (), optimizer, 10, 4, 0, own), given)
    assert isinstance(made, Gates)
    return made


def test_at_the_start_the_gates_are_one_and_their_sum_stays() -> None:
    program = adapted()
    x = training()[0]["x"]
    before = program(x=x)["output"]
    made = recipe(program)
    assert torch.equal(made.gates(), torch.ones(LAYERS, dtype=torch.float64))
    assert torch.allclose(program(x=x)["output"], before, atol=1e-12)
    made.logits.data.copy_(torch.tensor([0.3, -1.0, 2.0, 0.1]))
    assert float(made.gates().sum()) == pytest.approx(LAYERS)
    assert not torch.allclose(program(x=x)["output"], before)
    gate = made.gates()[2]
    layer = program.maps["layers.2"]
    expected = layer.base(x) if isinstance(layer.base, nn.Module) else x @ layer.base.T
    expected = expected + layer.bias + gate * 2.0 * (x @ layer.adapter.inner.A.T) @ layer.adapter.inner.B.T
    assert torch.allclose(layer(x), expected, atol=1e-12)


@pytest.mark.parametrize("unroll", [0, 1, 3])
def test_the_hypergradient_is_that_of_finite_differences(unroll: int) -> None:
    made = recipe(adapted(), unroll=unroll, inner_lr=0.3)
    start = torch.tensor([0.2, -0.3, 0.4, 0.1], dtype=torch.float64)
    made.logits.data.copy_(start)
    found = made.hypergradient(0)

    def judged(logits: Tensor) -> float:
        """R_val(theta_T(alpha), alpha), by plain steps of SGD."""
        made.logits.data.copy_(logits)
        values = {n: p.detach().clone().requires_grad_() for n, p in made.parameters.items()}
        for t in range(unroll):
            loss = made.own.loss(made.trained.batch(t), torch.Generator(), values=values)
            grads = torch.autograd.grad(loss, list(values.values()))
            pairs = zip(values.items(), grads, strict=True)
            values = {n: (v - 0.3 * g).detach().requires_grad_() for (n, v), g in pairs}
        losses = [made.own.loss(made.judged.batch(i), torch.Generator(), values=values) for i in range(2)]
        return float(torch.stack(losses).mean().detach())

    h = 1e-5
    for i in range(LAYERS):
        step = h * torch.eye(LAYERS, dtype=torch.float64)[i]
        difference = (judged(start + step) - judged(start - step)) / (2 * h)
        assert float(found[i]) == pytest.approx(difference, rel=1e-4, abs=1e-9)
    assert float(found.sum()) == pytest.approx(0, abs=1e-6 * float(found.abs().max()))


def test_before_the_first_step_there_is_no_signal_of_first_order() -> None:
    assert bool((recipe(adapted(spread=False), unroll=0).hypergradient(0) == 0).all())
    assert bool((recipe(adapted(spread=False), unroll=2, inner_lr=0.1).hypergradient(0) != 0).any())


@pytest.mark.parametrize("unroll", [0, 1])
def test_a_step_of_the_gates_moves_no_parameter_and_one_of_the_parameters_no_gate(unroll: int) -> None:
    program = adapted()
    made = recipe(program, unroll=unroll)
    values = {n: p.detach().clone() for n, p in made.parameters.items()}
    made.after(0)
    assert all(torch.equal(p, values[n]) and p.grad is None for n, p in made.parameters.items())
    assert float(made.logits.detach().abs().max()) == pytest.approx(0.01)  # one step of Adam
    logits = made.logits.detach().clone()
    batch = training()[0]
    program.graph_module.train()
    nn.functional.mse_loss(program(x=batch["x"])["output"], batch["labels"]).backward()
    made.optimizer.step()
    assert made.logits.grad is None
    assert torch.equal(made.logits, logits)
    assert not torch.equal(made.parameters["layers.0.adapter.inner.B"], values["layers.0.adapter.inner.B"])
    twin = recipe(adapted())
    twin.load(made.state())
    assert torch.equal(twin.logits, logits)


def test_rules_select_by_logits_alone() -> None:
    logits = [0.2, -0.1, 0.0, 0.05, 0.3]
    assert Positive().chosen(logits) == [0, 3, 4]
    assert TopK(layers=2).chosen(logits) == [0, 4]
    assert TopK(layers=9).chosen(logits) == [0, 1, 2, 3, 4]
    assert Threshold(above=0.1).chosen(logits) == [0, 4]
    assert layer_name("model.layers.3.self_attn.q_proj") == "model.layers.3"
    assert layer_name("up") == "up"


def test_unselected_adapters_are_gone_and_the_others_start_again() -> None:
    program = adapted()
    made = recipe(program)
    values = {n: p.detach().clone() for n, p in made.parameters.items()}
    with torch.no_grad():
        for p in made.parameters.values():
            p.add_(0.1)
    made.logits.data.copy_(torch.tensor([0.1, -0.2, 0.3, -0.4]))
    size = program.size()[0]
    first, second = made.finish()
    assert first == "2 of 4 layers keep their adapters: layers.0, layers.2"
    assert second == "logits of the gates: layers.0 +0.100, layers.1 -0.200, layers.2 +0.300, layers.3 -0.400"
    assert size - program.size()[0] == 2 * 2 * (WIDTH + WIDTH)
    assert sorted(program.adapters) == ["layers.0", "layers.2"]
    kept = {n: p for n, p in program.graph_module.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in kept.values()) == 2 * 2 * (WIDTH + WIDTH)
    assert all(torch.equal(p, values[n]) for n, p in kept.items())
    x = training()[0]["x"]
    y = program(x=x)["output"]
    merged = lrc.compile(program, {"version": 1, "passes": [{"type": "merge"}]}).program
    assert torch.allclose(merged(x=x)["output"], y, atol=1e-10)
    made.logits.data.fill_(-1.0)
    with pytest.raises(TrainError, match=r"`select: positive` keeps no layer; logits: layers\.0 -1\.000"):
        made.finish()


@pytest.mark.parametrize("unroll", [0, 1])
def test_the_layer_that_explains_the_labels_is_found_by_a_spec_and_trained_alone(tmp_path: Path, unroll: int) -> None:
    search = {
        "type": "train", "data": "test_flexora:training_beside", "objective": "regression", "epochs": 10, "batch_size": 16,
        "optimizer": {"type": "adamw", "lr": 0.03}, "parameters": "adapters", "checkpoint_every": 15,
        "recipe": {
            "type": "flexora", "data": "test_flexora:judging_beside", "unroll": unroll, "inner_lr": 0.1, "lr": 0.05,
            "batches": 2,
        },
    }  # fmt: skip
    then = {k: v for k, v in search.items() if k != "recipe"} | {"epochs": 20}
    spec = {"version": 1, "passes": [ADAPT, search, then]}
    made = lrc.compile(captured(Beside), spec, cache=tmp_path, allow_code=True)
    assert any("1 of 4 layers keep their adapters: layers.2" in note for note in made.plan.notes), made.plan.notes
    assert list(made.program.adapters) == ["layers.2"]
    assert made.training[1]["parameters"] == 2 * 2 * WIDTH
    history = made.training[1]["history"]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    for path in tmp_path.rglob("step-00000040.pt"):  # of the search: it goes on from step 30
        path.unlink()
    again = lrc.compile(captured(Beside), spec, cache=tmp_path, allow_code=True)
    assert all(torch.equal(value, again.program.tensors()[name]) for name, value in made.program.tensors().items())


def test_the_recipe_refuses_what_it_cannot_gate() -> None:
    with pytest.raises(UsageError, match="expected adapters, got none"):
        recipe(captured().clone())
    dora = {**ADAPT, "method": "dora"}
    with pytest.raises(UsageError, match="no adapter that is added to the weight and starts at zero"):
        recipe(lrc.compile(captured(), {"version": 1, "passes": [dora]}).program)
    pissa = {**ADAPT, "init": "pissa"}
    with pytest.raises(UsageError, match="no adapter that is added to the weight and starts at zero"):
        recipe(lrc.compile(captured(), {"version": 1, "passes": [pissa]}).program)

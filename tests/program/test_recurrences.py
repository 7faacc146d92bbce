"""`nn.LSTM`, `nn.GRU` and `nn.RNN`: their weights as sites, the loops that stand for them, and both views."""

from typing import Any

import pytest
import torch
from models import assert_agree, exact_chain, low_rank
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lrc.data import batches_of
from lrc.measure import collect
from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.program.graft import graft, share
from lrc.program.loops import put_back, write_out
from lrc.program.modes import training_graph
from lrc.program.owners import place
from lrc.solvers import Need


class Reader(nn.Module):
    """A recurrent layer and a head on all that it gives."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(6, 8, **options)
        width = (options.get("proj_size") or 8) * (2 if options.get("bidirectional") else 1)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, ends = self.rnn(x)
        last = sum(end.sum(-1).sum(0) for end in (ends if isinstance(ends, tuple) else (ends,)))
        made: Tensor = self.fc(y).sum(1 if self.rnn.batch_first else 0) + last[:, None]
        return made


CASES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"batch_first": True}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.4}),
    ("LSTM", {"proj_size": 5, "bias": False, "batch_first": True}),
    ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("GRU", {"bias": False}),
    ("RNN", {"batch_first": True}),
    ("RNN", {"nonlinearity": "relu"}),
]


def made(kind: str, options: dict[str, Any]) -> tuple[Reader, Program, Tensor]:
    torch.manual_seed(0)
    model = Reader(kind, **options).double().eval()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    dim = 0 if options.get("batch_first") else 1
    return model, capture_module(model, {"x": x}, dynamic={"x": {dim: "batch"}}), x


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_a_loop_of_full_rank_is_torchs_own_layer_with_its_gradients(kind: str, options: dict[str, Any]) -> None:
    model, program, x = made(kind, options)
    text = str(program)
    assert not program.unsupported()
    names = [name for name, p in model.named_parameters() if p.ndim == 2 and ("_ih_" in name or "_hh_" in name)]
    assert set(program.sites) == {*names, "fc"}
    x.requires_grad_()
    expected = model(x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    twin = program.clone()
    write_out(twin)
    for step in ("written out", "rewritten"):
        found = twin(x)["output"]
        assert torch.allclose(found, expected, atol=1e-12), step
        assert torch.allclose(torch.autograd.grad(found.sum(), x)[0], wanted, atol=1e-12), step
        for fqn in twin.sites if step == "written out" else ():
            twin.replace(fqn, exact_chain(twin.sites[fqn]))
    grafted = graft(twin)
    assert torch.allclose(grafted(x), expected, atol=1e-12)
    assert torch.allclose(torch.autograd.grad(grafted(x).sum(), x)[0], wanted, atol=1e-12)
    assert {id(p) for p in grafted.parameters()} == {id(p) for p in twin.graph_module.parameters()}
    assert {name for name, _ in grafted.named_parameters()} == {name for name, _ in twin.graph_module.named_parameters()}
    assert str(program) == text
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("kind", "options"), [CASES[2], CASES[4]], ids=str)
def test_each_weight_alone_changes_both_views_alike(kind: str, options: dict[str, Any]) -> None:
    model, program, x = made(kind, options)
    for fqn in program.sites:
        twin = program.clone()
        twin.replace(fqn, low_rank(twin.sites[fqn], 2))
        with torch.no_grad():
            found = twin(x)["output"]
            assert_agree(graft(twin)(x), found)
            assert float((found - model(x)).abs().max()) > 1e-4


def test_an_operator_of_which_nothing_was_rewritten_is_put_back() -> None:
    for kind, options in (CASES[1], CASES[4]):
        _, program, _ = made(kind, options)
        text = str(program)
        write_out(program)
        assert "recur(" in str(program)
        put_back(program)
        assert str(program) == text
        put_back(program)
        assert str(program) == text


def test_a_layer_that_is_called_twice_is_one_site_a_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(6, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.rnn(self.rnn(x)[0])[0]
            return made

    model, x = Twice().eval(), torch.randn(3, 4, 6)
    program = capture_module(model, {"x": x})
    assert {fqn: len(site.uses) for fqn, site in program.sites.items()} == {"rnn.weight_ih_l0": 2, "rnn.weight_hh_l0": 2}
    for fqn in program.sites:
        program.replace(fqn, low_rank(program.sites[fqn], 3))
    with torch.no_grad():
        assert_agree(graft(program)(x), program(x)["output"])


@pytest.mark.parametrize(("kind", "options"), [CASES[0], CASES[4], CASES[5]], ids=str)
def test_calibration_sees_the_hidden_states_and_the_gradients_of_their_products(kind: str, options: dict[str, Any]) -> None:
    model, program, x = made(kind, options)
    needs = frozenset({Need.INPUTS, Need.GRADIENTS})
    found = collect(program, batches_of([{"x": x}], ["x"]), ["rnn.weight_hh_l0"], needs, fisher="outputs", seed=3)
    moments = found["rnn.weight_hh_l0"]
    assert moments.gram is not None
    assert moments.fisher is not None
    layer = model.rnn
    with torch.no_grad():
        y = layer(x)[0]
        y = y if layer.batch_first else y.transpose(0, 1)
        read = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1).flatten(0, 1)
    assert moments.tokens == len(read)
    assert torch.allclose(moments.gram, read.T @ read / len(read), atol=1e-6)
    # dL/dW of the weight is the sum over steps of g hᵀ: the trace of what was measured bounds it, and zero gradients are zero
    assert float(moments.fisher.trace()) > 0
    assert moments.fisher.shape == (len(layer.weight_hh_l0),) * 2


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_the_tap_has_the_gradient_of_the_hidden_product(kind: str) -> None:
    """The gradients at the tap times the states that were read are dL/dW, of the weight as torch computes it."""
    model, program, x = made(kind, {"batch_first": True})
    write_out(program)
    use = program.sites["rnn.weight_hh_l0"].uses[0]
    seen: dict[str, Tensor] = {}

    class Tapped(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.name == use.gives:
                value = value.detach().requires_grad_()
            if n.name in (use.gives, use.reads):
                seen[n.name] = value
            return value

    (output,) = Tapped(program.graph_module).run(x).values()
    (gradient,) = torch.autograd.grad(output.square().sum(), seen[use.gives])
    (expected,) = torch.autograd.grad(model(x).square().sum(), model.rnn.weight_hh_l0)
    assert torch.allclose(gradient.flatten(0, 1).T @ seen[use.reads].detach().flatten(0, 1), expected, atol=1e-10)


def test_dropout_between_layers_is_switched_on_in_training() -> None:
    """With time first, where torch draws the same numbers for both."""
    model, program, x = made("LSTM", {"num_layers": 2, "dropout": 0.4})
    with torch.no_grad():
        fused = training_graph(program).module
        program.replace("rnn.weight_hh_l0", exact_chain(program.sites["rnn.weight_hh_l0"]))
        opened = training_graph(program).module
        torch.manual_seed(1)
        expected = model.train()(x)
        for graph in (fused, opened):
            torch.manual_seed(1)
            assert torch.allclose(graph(x)["output"], expected, atol=1e-12)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_packed_sequences_and_single_ones_are_read_as_torch_reads_them(kind: str, options: dict[str, Any], given: bool) -> None:
    torch.manual_seed(0)
    layer = getattr(nn, kind)(6, 8, **options).double().eval()
    twin = nn.ModuleDict({"a": share(layer)})
    program = capture_module(layer, {"input": torch.randn(5, 3, 6, dtype=torch.float64)})
    for fqn, site in program.sites.items():
        place(twin, f"a.{fqn}", exact_chain(site))
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    start = torch.randn(count, 3, 8, dtype=torch.float64)
    hx: Any = None if not given else (start, start.tanh()) if kind == "LSTM" else start
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False)
    with torch.no_grad():
        for read in (x, packed):
            (y, ends), (expected, last) = twin["a"](read, hx), layer(read, hx)
            if read is packed:
                y, expected = pad_packed_sequence(y)[0], pad_packed_sequence(expected)[0]
            assert torch.allclose(y, expected, atol=1e-12)
            for one, other in zip(ends, last, strict=True):
                assert torch.allclose(one, other, atol=1e-12)
        one_start: Any = None if hx is None else tuple(h[:, 0] for h in hx) if kind == "LSTM" else hx[:, 0]
        assert torch.allclose(twin["a"](x[:, 0], one_start)[0], layer(x[:, 0], one_start)[0], atol=1e-12)

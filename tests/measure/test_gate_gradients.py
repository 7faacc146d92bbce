"""Gates of ones on what sites read: their gradients are those of autograd, row by row."""

import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrc
from lrc.measure.gates import gate_gradients


def sent_for(output: Tensor, place: int) -> Tensor:
    """Return what the loss `outputs` sends back for a batch."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(place))


def test_gradients_of_gates_on_linears_are_inputs_times_their_gradients() -> None:
    model = tiny.mlp()
    program = lrc.capture(model, {"x": tiny.mlp_inputs()})
    batches = tiny.calibration_of_mlp()
    parts = list(gate_gradients(program, batches, ["middle", "down"], loss="outputs"))
    found = {name: torch.cat([part[name] for part in parts]) for name in ("middle", "down")}
    read: dict[str, Tensor] = {}
    for name in found:
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: read.update({name: given[0]}))
    expected: dict[str, list[Tensor]] = {name: [] for name in found}
    for place, batch in enumerate(batches):
        output = model(batch["x"])
        gradients = torch.autograd.grad(output, [read[name] for name in found], sent_for(output, place))
        for name, gradient in zip(found, gradients, strict=True):
            expected[name].append((gradient * read[name]).detach().flatten(0, -2))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, torch.cat(expected[name]), rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """A convolution that is used twice, and a stream that goes on beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = x + F.relu(self.conv(x if gates is None else x * gates))
        return x.mean((2, 3))


def test_gates_are_on_the_edge_to_a_site_and_those_of_several_uses_add_up() -> None:
    model, x = Twice().eval(), torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    (found,) = gate_gradients(lrc.capture(model, inputs=[x]), [{"x": x}], ["conv"], loss="outputs")
    gates = torch.ones(4, 6, 1, 1, requires_grad=True)
    output = model(x, gates)
    (expected,) = torch.autograd.grad(output, [gates], sent_for(output, 0))
    torch.testing.assert_close(found["conv"], expected.flatten(1), rtol=1e-4, atol=1e-5)

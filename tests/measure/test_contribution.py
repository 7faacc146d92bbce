"""Contributions along the path between two networks: completeness, zeros, symmetry."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lrc.errors import UsageError
from lrc.measure.contribution import Call, contributions, path_contributions

Sample = tuple[Tensor, Tensor]


def squared(call: Call, sample: Sample) -> Tensor:
    y = call(sample[0])
    assert isinstance(y, Tensor)
    return (y - sample[1]).square().sum()


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()


def sample(seed: int = 0) -> Sample:
    torch.manual_seed(seed)
    return torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)


def moved(model: nn.Module, size: float) -> nn.Module:
    other = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * torch.randn_like(p))
    return other


def test_signed_contributions_add_up_to_the_difference_of_the_losses() -> None:
    tuned = network(0)
    baseline, one = moved(tuned, 0.1), sample()
    difference = (squared(baseline, one) - squared(tuned, one)).detach()
    errors = []
    for steps, offset in ((25, 0.0), (50, 0.0), (100, 0.5)):
        parts = path_contributions(baseline, tuned, one, squared, steps=steps, offset=offset)
        errors.append(float((sum(p.sum() for p in parts.values()) - difference).abs() / difference.abs()))
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 1e-4
    assert errors[2] < errors[1] / 20


def test_a_network_against_itself_contributes_nothing() -> None:
    model = network(0)
    assert set(contributions(model, copy.deepcopy(model), [sample()], squared, steps=3).values()) == {0.0}


def test_scores_do_not_depend_on_the_order_of_hidden_channels() -> None:
    tuned, order = network(0), torch.tensor([3, 0, 5, 1, 4, 2])
    baseline = moved(tuned, 0.2)

    def permuted(model: nn.Module) -> nn.Module:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin[0].weight.copy_(model[0].weight[order])
            twin[0].bias.copy_(model[0].bias[order])
            twin[2].weight.copy_(model[2].weight[:, order])
        return twin

    a = contributions(baseline, tuned, [sample(), sample(1)], squared, steps=8)
    b = contributions(permuted(baseline), permuted(tuned), [sample(), sample(1)], squared, steps=8)
    assert a == pytest.approx(b, rel=1e-10)
    assert min(a.values()) > 0


def test_the_absolute_value_is_taken_after_the_path_and_the_mean_over_entries() -> None:
    tuned = network(0)
    baseline, one = moved(tuned, 0.3), sample()
    parts = path_contributions(baseline, tuned, one, squared, steps=4)
    expected = {name: float(value.abs().mean()) for name, value in parts.items()}
    assert contributions(baseline, tuned, [one], squared, steps=4) == pytest.approx(expected)


def test_networks_of_two_architectures_are_refused() -> None:
    with pytest.raises(UsageError, match="different architectures"):
        contributions(nn.Linear(3, 2), nn.Linear(3, 4), [sample()], squared)

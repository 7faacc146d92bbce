"""What is measured sample by sample: the weight's elementwise Fisher, and the inputs' magnitudes."""

from collections.abc import Callable, Mapping
from dataclasses import fields

import pytest
import torch
from models import batches, inputs_for
from torch import Tensor, nn

from lrc.errors import SiteError
from lrc.measure import Cache, collect
from lrc.measure.cotangents import cotangent
from lrc.measure.stored import PARTS
from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.program.readout import readout
from lrc.solvers import Moments, Need

Get = Callable[[str], Program]
MAGNITUDES, WEIGHT_FISHER = frozenset({Need.MAGNITUDES}), frozenset({Need.WEIGHT_FISHER})
BOTH = MAGNITUDES | WEIGHT_FISHER
EPS = torch.finfo(torch.float64).eps
SEED = 3


def close(found: Tensor | None, expected: Tensor, terms: int) -> bool:
    """Whether two sums of `terms` products in float64 agree, whatever the order in which each was added up."""
    assert found is not None
    assert found.dtype == torch.float64
    return float((found - expected).abs().max()) <= 8 * terms * EPS * max(float(expected.abs().max()), 1e-300)


def sent_for(item: Mapping[str, Tensor], output: Tensor, place: int, task: str | None, fisher: str) -> Tensor:
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + place)
    return cotangent(output, item, fisher, task, generator)  # type: ignore[arg-type]  # one of the three words


def squares(weight: nn.Parameter, losses: list[Tensor]) -> Tensor:
    """The mean over samples of autograd's gradient, squared."""
    found = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses]
    return torch.stack([gradient.square() for gradient in found]).mean(0)


@pytest.mark.parametrize("fisher", ["sampled", "labels", "outputs"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_weight_fisher_is_the_mean_square_of_what_autograd_finds_for_each_sample(
    name: str, fisher: str, doubled: Get
) -> None:
    program = doubled(name)
    model = program.origin.model
    assert model is not None
    items = [inputs_for(name, 3, 9), inputs_for(name, 1, 4, seed=2)]  # the first one is padded
    assert not items[0]["attention_mask"].bool().all()
    losses = []
    for place, item in enumerate(items):
        output = readout(model(**item, use_cache=False), item, program.task)
        loss = output * sent_for(item, output.detach(), place, program.task, fisher)
        losses += list(loss.flatten(1).sum(1))
    sites = {fqn: site for fqn, site in program.sites.items() if site.kind == "linear" and not site.tied}
    found = collect(program, batches(*items), sites, WEIGHT_FISHER, fisher=fisher, seed=SEED)  # type: ignore[arg-type]
    for fqn, site in sites.items():
        expected = squares(model.get_parameter(site.weight_name), losses)
        assert float(expected.max()) > 0
        assert close(found[fqn].weight_fisher, expected.T if site.transposed else expected, 2000)


class Twice(nn.Module):
    """A linear that is called twice, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.end = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.fc(torch.tanh(self.fc(x))))


class Same(Twice):
    """A linear that is called twice on the same input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.sin(self.fc(x)) * torch.tanh(self.fc(x)))


def captured(model: nn.Module, x: Tensor) -> Program:
    return capture_module(model, x)


def twice(*size: int, kind: type[Twice] = Twice) -> tuple[Twice, Program, Tensor]:
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(*size, 6, dtype=torch.float64)
    return model, captured(model, x[:2]), x


@pytest.mark.parametrize("kind", [Twice, Same])
@pytest.mark.parametrize("size", [(5,), (3, 4), (3, 2, 4)], ids=str)
def test_gradients_of_the_uses_of_a_weight_add_up_before_they_are_squared(size: tuple[int, ...], kind: type[Twice]) -> None:
    model, program, x = twice(*size, kind=kind)
    assert len(program.sites["fc"].uses) == 2
    found = collect(program, batches({"x": x}), ["fc", "end"], WEIGHT_FISHER, fisher="outputs", seed=SEED)
    output = model(x)
    losses = list((output * sent_for({}, output.detach(), 0, None, "outputs")).flatten(1).sum(1))
    assert close(found["fc"].weight_fisher, squares(model.fc.weight, losses), 200)
    assert close(found["end"].weight_fisher, squares(model.end.weight, losses), 200)


def test_draws_of_the_gradients_are_averaged() -> None:
    model, program, x = twice(3, 4)
    found = collect(program, batches({"x": x}), ["fc"], WEIGHT_FISHER, fisher="outputs", draws=3, seed=SEED)["fc"]
    output = model(x)
    generator = torch.Generator().manual_seed(SEED * 1_000_003)
    losses = []
    for _ in range(3):
        losses += list((output * cotangent(output, {}, "outputs", None, generator)).flatten(1).sum(1))
    assert close(found.weight_fisher, squares(model.fc.weight, losses), 200)


def test_magnitudes_are_means_over_samples_of_means_over_their_tokens() -> None:
    model, program, x = twice(3, 4)
    other = 9 * torch.randn(2, 7, 6, dtype=torch.float64)
    # captured with 4 places: another length is another program
    longer = captured(model, other)
    none = {"x": x[:0]}
    found = collect(program, batches(none, {"x": x}), ["fc", "end"], MAGNITUDES)
    with torch.no_grad():
        second = torch.tanh(model.fc(x))
        third = model.fc(second)
    assert close(found["fc"].magnitudes, torch.cat([x, second], 1).abs().mean(1).mean(0), 60)  # both uses are its tokens
    assert close(found["end"].magnitudes, third.abs().mean((0, 1)), 60)
    assert (found["fc"].tokens, found["end"].tokens) == (24, 12)
    alone = collect(longer, batches({"x": other[:1]}, {"x": other[1:]}), ["fc"], MAGNITUDES)["fc"]
    assert torch.allclose(alone.magnitudes, collect(longer, batches({"x": other}), ["fc"], MAGNITUDES)["fc"].magnitudes)


@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_padding_counts_for_nothing_and_a_long_sample_for_no_more_than_a_short_one(name: str, doubled: Get) -> None:
    program = doubled(name)
    padded = inputs_for(name, 3, 9)
    padded["labels"] = padded["input_ids"].roll(1, 1).masked_fill(padded["attention_mask"] == 0, 7)
    if name == "llama":
        del padded["labels"]  # the next token
    alone = []
    for row, length in enumerate(padded["attention_mask"].sum(1).tolist()):
        alone.append({key: value[row : row + 1, :length] for key, value in padded.items()})
    fqns = [fqn for fqn, site in program.sites.items() if site.kind == "linear"]
    together = collect(program, batches(padded), fqns, BOTH, fisher="labels")
    each = [collect(program, batches(item), fqns, BOTH, fisher="labels") for item in alone]
    for fqn in fqns:
        for part in ("magnitudes", "weight_fisher"):
            mean = torch.stack([getattr(one[fqn], part) for one in each]).mean(0)
            assert close(getattr(together[fqn], part), mean, 2000)  # attention sums in another order


def test_a_pooled_value_is_one_token_a_sample_and_a_sample_that_is_all_padding_does_not_count(doubled: Get) -> None:
    program = doubled("bert")
    item = inputs_for("bert", 3, 5, padded=False)
    fqns = ["pooler.dense", "encoder.layer.0.output.dense"]
    full = collect(program, batches({key: value[:2] for key, value in item.items()}), fqns, MAGNITUDES)
    item["attention_mask"][2] = 0
    found = collect(program, batches(item), fqns, MAGNITUDES)
    assert {fqn: moments.tokens for fqn, moments in found.items()} == {fqns[0]: 3, fqns[1]: 10}
    assert close(found[fqns[1]].magnitudes, full[fqns[1]].magnitudes, 2000)  # type: ignore[arg-type]  # measured


class SequenceFirst(nn.Module):
    """A linear whose input has the batch in its second dimension, and one that reads it flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.flat = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.transpose(0, 1))).transpose(0, 1)
        return self.flat(h.reshape(-1, 6)).reshape(x.shape[0], -1)


def test_samples_are_found_where_the_batch_is_not_the_first_dimension_and_in_flattened_rows() -> None:
    torch.manual_seed(0)
    model, x = SequenceFirst().double(), torch.randn(3, 5, 6, dtype=torch.float64)
    program = captured(model, x)
    found = collect(program, batches({"x": x}), ["first", "flat"], BOTH, fisher="outputs", seed=SEED)
    output = model(x)
    losses = list((output * sent_for({}, output.detach(), 0, None, "outputs")).sum(1))
    assert close(found["first"].weight_fisher, squares(model.first.weight, losses), 200)
    assert close(found["flat"].weight_fisher, squares(model.flat.weight, losses), 200)
    assert close(found["first"].magnitudes, x.abs().mean((0, 1)), 60)


@pytest.mark.parametrize("needs", [MAGNITUDES, WEIGHT_FISHER, BOTH, frozenset({Need.INPUTS}), frozenset({Need.GRADIENTS})])
def test_only_what_is_needed_is_measured(needs: frozenset[Need]) -> None:
    _, program, x = twice(3, 4)
    found = collect(program, batches({"x": x}), ["fc"], needs)["fc"]
    given = {part.name for part in fields(found) if getattr(found, part.name) is not None} - {"tokens"}
    inputs, gradients = {"gram", "mean"}, {"fisher", "weighted_gram", "weighted_mean"}
    expected = {Need.INPUTS: inputs, Need.GRADIENTS: gradients}
    assert given == set().union(*(expected.get(need, {need.value}) for need in needs))


def test_what_is_needed_beside_does_not_change_what_is_measured() -> None:
    _, program, x = twice(3, 4)
    every = collect(program, batches({"x": x}), ["fc"], frozenset(Need))["fc"]
    for need in Need:
        one = collect(program, batches({"x": x}), ["fc"], frozenset({need}))["fc"]
        for part in fields(Moments):
            value = getattr(one, part.name)
            assert value is None or torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(every, part.name)))


def test_what_was_measured_is_read_from_the_cache(doubled: Get, tmp_path: object) -> None:
    program = doubled("llama")
    cache = Cache(str(tmp_path))
    fqns = [fqn for fqn, site in program.sites.items() if site.kind == "linear"]
    for needs in (MAGNITUDES, BOTH, frozenset(Need)):
        key = "-".join(sorted(needs))
        first = collect(program, batches(inputs_for("llama", 2, 5)), fqns, needs, cache=cache, key=key)
        read = collect(program, batches(), fqns, needs, cache=cache, key=key)  # no batch: nothing can be measured
        for fqn in fqns:
            for part in fields(Moments):
                one, other = getattr(first[fqn], part.name), getattr(read[fqn], part.name)
                assert (one is None) == (other is None)
                assert one is None or torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_what_was_measured_with_others_is_read_alone(doubled: Get, tmp_path: object) -> None:
    program, cache = doubled("llama"), Cache(str(tmp_path))
    fqns = [fqn for fqn, site in program.sites.items() if site.kind == "linear"]
    every = collect(program, batches(inputs_for("llama", 2, 5)), fqns, frozenset(Need), cache=cache, key="k")
    for need in Need:
        one = collect(program, batches(), fqns, frozenset({need}), cache=cache, key="k")  # no batch: nothing can be measured
        for fqn in fqns:
            for name in PARTS[need]:
                assert torch.equal(getattr(one[fqn], name), getattr(every[fqn], name))
            assert one[fqn].tokens == every[fqn].tokens
    walked: list[int] = []
    collect(
        program, batches(inputs_for("llama", 2, 5)), fqns, frozenset({Need.GRADIENTS}), draws=2, cache=cache, key="k",
        progress=lambda done, total: walked.append(done),
    )  # fmt: skip
    assert walked  # gradients of another number of draws are others


def test_half_precision_gradients_are_multiplied_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).bfloat16()
    x = (torch.randn(3, 64, 6) * 3).bfloat16()
    found = collect(capture_module(model, x), batches({"input": x}), ["0"], WEIGHT_FISHER, fisher="outputs", seed=SEED)["0"]
    sent = sent_for({}, model(x).detach(), 0, None, "outputs").double()
    exact = (sent.transpose(1, 2) @ x.double()).square().mean(0)
    products = (sent.abs().transpose(1, 2) @ x.double().abs()).square().mean(0)
    assert found.weight_fisher is not None
    assert bool(((found.weight_fisher - exact).abs() <= 3 * 64 * torch.finfo(torch.float32).eps * products).all())


def test_an_operation_in_place_does_not_change_what_is_seen() -> None:
    def net(inplace: bool) -> Program:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 4)).double()
        return capture_module(model, torch.randn(2, 6, dtype=torch.float64))

    item = {"input": torch.randn(9, 6, dtype=torch.float64)}
    plain, found = (collect(net(inplace), batches(item), ["0", "2"], BOTH, fisher="outputs") for inplace in (False, True))
    for fqn in ("0", "2"):
        for part in ("magnitudes", "weight_fisher"):
            assert torch.equal(getattr(found[fqn], part), getattr(plain[fqn], part))


# What is refused.


class Table(nn.Module):
    """A linear of a table that is the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(5, 6))
        self.fc, self.end = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x + self.fc(torch.tanh(self.positions)))


@pytest.mark.parametrize("needs", [MAGNITUDES, WEIGHT_FISHER])
def test_an_input_that_is_the_same_for_all_samples_is_refused_with_the_way_out(needs: frozenset[Need]) -> None:
    program = captured(Table(), torch.randn(2, 5, 6))
    item = batches({"x": torch.randn(3, 5, 6)})
    collect(program, item, ["end"], needs)
    wanted = r"^fc: expected an input with a dimension that counts samples, got shape \(5, 6\) for 3 samples. .*`ignore`"
    with pytest.raises(SiteError, match=wanted):
        collect(program, item, ["fc"], needs)


def test_values_that_are_not_finite_are_refused_with_their_site() -> None:
    _, program, x = twice(3, 4)
    x[1, 2, 3] = float("inf")
    with pytest.raises(SiteError, match=r"^fc: expected finite magnitudes on the calibration data, got NaN or infinite ones"):
        collect(program, batches({"x": x}), ["fc"], MAGNITUDES)
    with pytest.raises(SiteError, match=r"^fc: expected finite weight_fisher on the calibration data"):
        collect(program, batches({"x": x}), ["fc"], WEIGHT_FISHER)

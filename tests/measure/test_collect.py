"""Calibration sees on the graph what hooks see in the model: the same inputs, the same gradients, no padding."""

from collections.abc import Callable, Mapping

import pytest
import torch
from models import batches, inputs_for
from torch import Tensor, nn

from lrc.data.batches import IGNORED
from lrc.errors import DataError, SiteError, UsageError
from lrc.measure import Cache, collect
from lrc.measure.cotangents import cotangent, has_classes
from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.program.readout import readout
from lrc.solvers import Moments, Need

Get = Callable[[str], Program]
INPUTS = frozenset({Need.INPUTS})
ALL = frozenset({Need.INPUTS, Need.GRADIENTS})
EPS = torch.finfo(torch.float64).eps


def close(found: Tensor | None, expected: Tensor, terms: int) -> bool:
    """Whether two sums of `terms` products in float64 agree, whatever the order in which each was added up."""
    assert found is not None
    assert found.dtype == torch.float64
    return float((found - expected).abs().max()) <= 8 * terms * EPS * max(float(expected.abs().max()), 1e-300)


def hooked(
    model: nn.Module, fqns: list[str], items: list[Mapping[str, Tensor]], sent: Callable[[int, Tensor], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what hooks on the modules see: the inputs of every site and the gradients at its outputs, padding left out."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {fqn: ([], []) for fqn in fqns}
    mask = torch.ones(0)

    def rows(value: Tensor) -> Tensor:
        flat = value.detach().reshape(-1, value.shape[-1])
        return flat[mask.reshape(-1).bool()] if value.shape[:-1] == mask.shape else flat

    def forward(fqn: str) -> Callable[..., None]:
        return lambda module, args, output: seen[fqn][0].append(rows(args[0]))

    def backward(fqn: str) -> Callable[..., None]:
        return lambda module, into, out: seen[fqn][1].append(rows(out[0]))

    handles = [model.get_submodule(fqn).register_forward_hook(forward(fqn)) for fqn in fqns]
    handles += [model.get_submodule(fqn).register_full_backward_hook(backward(fqn)) for fqn in fqns]
    try:
        for i, item in enumerate(items):
            mask = item["attention_mask"]
            given = {key: value for key, value in item.items() if key != "labels"}
            outputs = model(**given, use_cache=False)
            found = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
            # a site without a gradient (a pooler that the readout does not see) gets a zero one
            total = found * sent(i, found.detach())
            zero = sum(value.sum() for value in outputs.values() if isinstance(value, Tensor))
            (total.sum() + 0 * zero).backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()
    return {fqn: (torch.cat(x), torch.cat(g)) for fqn, (x, g) in seen.items()}


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_moments_equal_those_of_module_hooks(name: str, doubled: Get) -> None:
    program = doubled(name)
    model = program.origin.model
    assert model is not None
    items = [inputs_for(name, 3, 9), inputs_for(name, 1, 4, seed=2)]
    fqns = [fqn for fqn, site in program.sites.items() if site.kind == "linear"]
    found = collect(program, batches(*items), fqns, ALL, fisher="sampled", seed=5)

    def sent(i: int, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(5 * 1_000_003 + i)
        return cotangent(output, items[i], "sampled", program.task, generator)

    seen = hooked(model, fqns, items, sent)
    tokens = sum(int(item["attention_mask"].sum()) for item in items)
    assert list(found) == fqns
    for fqn, (x, g) in seen.items():
        moments = found[fqn]
        assert moments.tokens == len(x) == (4 if "pooler" in fqn else tokens)
        assert close(moments.gram, x.T @ x / len(x), 40)
        assert close(moments.mean, x.mean(0), 40)
        assert close(moments.fisher, g.T @ g / tokens, 400)
        assert moments.cross is None
        assert torch.equal(moments.gram, moments.gram.T)
        if "pooler" not in fqn:
            assert float(moments.fisher.diagonal().min()) >= 0
            assert float(moments.fisher.trace()) > 0


def test_float32_products_are_added_up_in_float64() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    program = capture_module(model, torch.randn(4, 6))
    items = [{"input": torch.randn(7, 6) * 10.0**i} for i in range(-2, 3)]
    found = collect(program, batches(*items), ["linear" if "linear" in program.sites else next(iter(program.sites))], INPUTS)
    moments = next(iter(found.values()))
    x = torch.cat([item["input"] for item in items]).double()
    bound = 7 * torch.finfo(torch.float32).eps * float(x.abs().max()) ** 2
    assert moments.gram is not None
    assert float((moments.gram - x.T @ x / len(x)).abs().max()) <= bound
    assert moments.fisher is None


def test_half_precision_inputs_are_multiplied_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).bfloat16()
    x = (torch.randn(64, 6) * 3).bfloat16()
    found = collect(capture_module(model, x[:2]), batches({"input": x}), ["0"], INPUTS)["0"]
    exact = x.double().T @ x.double() / 64
    assert found.gram is not None
    assert float((found.gram - exact).abs().max()) <= 64 * torch.finfo(torch.float32).eps * float(exact.abs().max())


@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_padding_changes_neither_moment(name: str, doubled: Get) -> None:
    program = doubled(name)
    padded = inputs_for(name, 3, 9)
    padded["labels"] = padded["input_ids"].roll(1, 1).masked_fill(padded["attention_mask"] == 0, 7)
    if name == "llama":
        del padded["labels"]  # the next token
    alone = []
    for row, length in enumerate(padded["attention_mask"].sum(1).tolist()):
        alone.append({key: value[row : row + 1, :length] for key, value in padded.items()})
    fqns = list(program.sites)
    together = collect(program, batches(padded), fqns, ALL, fisher="labels")
    apart = collect(program, batches(*alone), fqns, ALL, fisher="labels")
    for fqn in fqns:
        assert together[fqn].tokens == apart[fqn].tokens == 9 + 7 + 5
        for part in ("gram", "mean", "fisher"):
            assert close(getattr(together[fqn], part), getattr(apart[fqn], part), 2000)  # attention sums in another order


def test_a_pooled_value_has_no_padding_even_where_sizes_agree_by_chance(doubled: Get) -> None:
    program = doubled("bert")
    item = inputs_for("bert", 3, 1, padded=False)
    item["attention_mask"][0, 0] = 0  # as many rows in the pooler as entries in the mask
    found = collect(program, batches(item), ["pooler.dense", "encoder.layer.0.output.dense"], INPUTS)
    assert {fqn: moments.tokens for fqn, moments in found.items()} == {"pooler.dense": 3, "encoder.layer.0.output.dense": 2}


def test_sites_that_read_the_same_value_share_one_gram(doubled: Get) -> None:
    program = doubled("llama")
    found = collect(program, batches(inputs_for("llama", 2, 5)), list(program.sites), INPUTS)
    layer = "model.layers.0.self_attn"
    q, k, v, o = (found[f"{layer}.{part}_proj"] for part in "qkvo")
    assert q.gram is k.gram is v.gram
    assert q.mean is v.mean
    assert o.gram is not q.gram
    assert found["model.layers.0.mlp.gate_proj"].gram is found["model.layers.0.mlp.up_proj"].gram


class Twice(nn.Module):
    """A linear that is called twice, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.end = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.fc(torch.tanh(self.fc(x))))


def twice() -> tuple[Twice, Program]:
    torch.manual_seed(0)
    model = Twice().double()
    return model, capture_module(model, torch.randn(2, 6, dtype=torch.float64))


def test_the_uses_of_a_shared_weight_are_summed() -> None:
    model, program = twice()
    x = torch.randn(5, 6, dtype=torch.float64)
    found = collect(program, batches({"x": x}), ["fc", "end"], ALL, fisher="outputs", seed=3)
    first = model.fc(x).detach().requires_grad_()
    reads = torch.tanh(first)
    second = model.fc(reads).detach().requires_grad_()
    output = model.end(second)
    sent = cotangent(output, {}, "outputs", None, torch.Generator().manual_seed(3 * 1_000_003))
    (into_second,) = torch.autograd.grad(output, second, sent)
    (into_first,) = torch.autograd.grad(model.fc(reads), first, into_second)
    rows = torch.cat([x, reads.detach()])
    assert (found["fc"].tokens, found["end"].tokens) == (10, 5)
    assert close(found["fc"].gram, rows.T @ rows / 10, 10)
    assert close(found["fc"].mean, rows.mean(0), 10)
    # every input of the two uses counts, every use adds its gradients: divided by the 5 tokens that the largest use sees
    assert close(found["fc"].fisher, (into_first.T @ into_first + into_second.T @ into_second) / 5, 50)


@pytest.mark.parametrize("grads", [True, False], ids=["trained", "frozen"])
def test_an_operation_in_place_does_not_change_what_is_seen(grads: bool) -> None:
    def net(inplace: bool) -> tuple[nn.Module, Program]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 4)).double()
        model.requires_grad_(grads)
        return model, capture_module(model, torch.randn(2, 6, dtype=torch.float64))

    item = {"input": torch.randn(9, 6, dtype=torch.float64)}
    plain, found = (collect(net(inplace)[1], batches(item), ["0", "2"], ALL, fisher="outputs") for inplace in (False, True))
    assert torch.ops.aten.relu_.default in {node.target for node in net(True)[1].graph_module.graph.nodes}
    for fqn in ("0", "2"):
        for part in ("gram", "mean", "fisher"):
            assert torch.equal(getattr(found[fqn], part), getattr(plain[fqn], part))


def test_the_scale_of_a_site_does_not_depend_on_what_else_is_asked_for(doubled: Get) -> None:
    program = doubled("bert")
    fqn = "encoder.layer.0.attention.self.query"
    item = batches(inputs_for("bert", 3, 9))
    alone = collect(program, item, [fqn], ALL)
    both = collect(program, item, [fqn, "pooler.dense"], ALL)
    assert torch.equal(alone[fqn].fisher, both[fqn].fisher)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).mean(1))

    pooled = capture_module(Pooled(), torch.randn(2, 5, 6))
    x = batches({"x": torch.randn(3, 5, 6)})
    alone, both = (collect(pooled, x, fqns, ALL) for fqns in (["head"], ["head", "body"]))
    assert torch.equal(alone["head"].fisher, both["head"].fisher)  # 3 rows, divided by the 15 tokens of the body
    assert both["head"].tokens == 3


def test_the_model_is_not_changed(doubled: Get) -> None:
    program = doubled("llama")
    model = program.origin.model
    assert model is not None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collect(program, batches(inputs_for("llama", 2, 5)), list(program.sites), ALL, draws=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(doubled: Get) -> None:
    program = doubled("gpt2")
    items = batches(inputs_for("gpt2", 2, 5), inputs_for("gpt2", 2, 6))
    fqn = "transformer.h.0.mlp.c_fc"
    one, same, other = (collect(program, items, [fqn], ALL, seed=seed)[fqn] for seed in (1, 1, 2))
    assert torch.equal(one.fisher, same.fisher)
    assert torch.equal(one.gram, other.gram)
    assert not torch.equal(one.fisher, other.fisher)


def test_draws_are_averaged(doubled: Get) -> None:
    program = doubled("gpt2")
    model = program.origin.model
    assert model is not None
    fqn = "lm_head"
    item = inputs_for("gpt2", 2, 5)
    found = collect(program, batches(item), [fqn], ALL, draws=3, seed=1)[fqn]
    with torch.no_grad():
        logits = model(**item, use_cache=False).logits
    generator = torch.Generator().manual_seed(1_000_003)
    mask = item["attention_mask"].bool()
    drawn = [cotangent(logits, item, "sampled", "text-generation", generator)[mask] for _ in range(3)]
    expected = sum((g.T @ g for g in drawn), torch.zeros(32, 32).double()) / 3 / int(mask.sum())
    assert close(found.fisher, expected, 100)
    assert found.tokens == int(mask.sum())


def test_progress_counts_batches(doubled: Get) -> None:
    program = doubled("gpt2")
    seen: list[tuple[int, int]] = []
    items = batches(*[inputs_for("gpt2", 1, 4, seed=i) for i in range(3)])
    collect(program, items, ["lm_head"], INPUTS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_what_was_measured_is_read_from_the_cache(doubled: Get, tmp_path: object) -> None:
    program = doubled("llama")
    cache = Cache(str(tmp_path))
    fqns = list(program.sites)
    item = batches(inputs_for("llama", 2, 5))
    first = collect(program, item, fqns[:3], ALL, cache=cache, key="k")
    read = collect(program, batches(), fqns[:3], ALL, cache=cache, key="k")  # no batch: nothing can be measured
    whole = collect(program, item, fqns, ALL, cache=cache, key="k")
    fresh = collect(program, item, fqns, ALL)
    for fqn in fqns[:3]:
        assert_same(read[fqn], first[fqn])
    for fqn in fqns:
        assert_same(whole[fqn], fresh[fqn])
    assert read[fqns[0]].gram is read[fqns[1]].gram
    with pytest.raises(SiteError, match="nowhere: the captured graph has no site of this name"):
        collect(program, item, ["nowhere"], ALL, cache=cache, key="k")


def assert_same(found: Moments, expected: Moments) -> None:
    assert found.tokens == expected.tokens
    for part in ("gram", "mean", "fisher"):
        assert torch.equal(getattr(found, part), getattr(expected, part))


# What is refused.


def test_an_unknown_site_is_refused(doubled: Get) -> None:
    program = doubled("gpt2")
    with pytest.raises(SiteError, match="nowhere: the captured graph has no site of this name"):
        collect(program, batches(inputs_for("gpt2", 2, 5)), ["nowhere"], INPUTS)


def test_activations_that_are_not_finite_are_refused_with_their_site() -> None:
    _, program = twice()
    x = torch.randn(5, 6, dtype=torch.float64)
    x[3, 2] = float("nan")
    with pytest.raises(SiteError, match=r"^end: expected finite inputs on the calibration data, got NaN or infinite ones"):
        collect(program, batches({"x": x}), ["end"], INPUTS)
    with pytest.raises(SiteError, match=r"^fc: expected finite inputs .*`model.dtype: float32`"):
        collect(program, batches({"x": x}), ["fc", "end"], INPUTS)


def test_gradients_that_are_not_finite_are_refused_with_their_site() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).abs().sqrt()

    program = capture_module(Root(), torch.randn(2, 6))
    zero = batches({"x": torch.zeros(3, 6)})
    assert torch.equal(collect(program, zero, ["fc"], INPUTS)["fc"].gram, torch.zeros(6, 6).double())
    with pytest.raises(SiteError, match=r"^fc: expected finite output gradients on the calibration data"):
        collect(program, zero, ["fc"], ALL)


# The three kinds of cotangents.


def test_sampled_labels_follow_the_softmax_of_the_model() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, -4.0, 0.0])
    p = logits.double().softmax(-1)
    n = 40_000
    output = logits.expand(n // 8, 8, 5).contiguous()
    sent = cotangent(output, {}, "sampled", "text-generation", torch.Generator().manual_seed(0)).double().reshape(n, 5)
    onehot = p - sent
    assert torch.allclose(onehot.sum(-1), torch.ones(n).double(), atol=1e-6)
    assert torch.equal(onehot.round().sum(-1), torch.ones(n).double())
    assert set(onehot.round().unique().tolist()) == {0.0, 1.0}
    frequency, deviation = onehot.round().mean(0), (p * (1 - p) / n).sqrt()
    assert bool(((frequency - p).abs() <= 5 * deviation).all())
    # and so the second moment is the true Fisher information of a softmax, diag(p) - p pᵀ
    fisher = torch.diag(p) - torch.outer(p, p)
    assert float((sent.T @ sent / n - fisher).abs().max()) <= 5 / n**0.5


def test_a_softmax_of_one_class_gives_no_gradient_and_certain_models_draw_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    one = cotangent(torch.randn(3, 4, 1), {}, "sampled", "text-generation", generator)
    assert torch.equal(one, torch.zeros(3, 4, 1))
    certain = torch.full((64, 6), -1e4)
    certain[:, 3] = 1e4
    assert torch.equal(cotangent(certain, {}, "sampled", "text-classification", generator), torch.zeros(64, 6))


def test_outputs_are_standard_normal_and_padding_gets_none() -> None:
    mask = torch.ones(100, 20, dtype=torch.int64)
    mask[:, 15:] = 0
    sent = cotangent(
        torch.zeros(100, 20, 30).double(), {"attention_mask": mask}, "outputs", None, torch.Generator().manual_seed(0)
    )
    kept = sent[mask.bool()]
    n = kept.numel()
    assert sent.dtype == torch.float64
    assert not sent[~mask.bool()].any()
    assert abs(float(kept.mean())) <= 5 / n**0.5
    assert abs(float(kept.square().mean()) - 1) <= 5 * (2 / n) ** 0.5


def test_a_task_without_a_softmax_samples_as_outputs_do() -> None:
    output = torch.randn(3, 4, 5)
    made = [
        cotangent(output, {}, kind, "feature-extraction", torch.Generator().manual_seed(1)) for kind in ("sampled", "outputs")
    ]
    assert torch.equal(*made)
    assert [has_classes(t) for t in ("text2text-generation", "image-classification", "sentence-similarity", None)] == [
        True, True, False, False,
    ]  # fmt: skip


def test_labels_are_the_next_tokens_and_padding_counts_for_nothing() -> None:
    ids = torch.tensor([[3, 1, 2, 0], [1, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    output = torch.randn(2, 4, 5, dtype=torch.float64)
    sent = cotangent(output, {"input_ids": ids, "attention_mask": mask}, "labels", "text-generation", torch.Generator())
    expected = torch.zeros_like(output)
    for row, place, label in ((0, 0, 1), (0, 1, 2), (0, 2, 0), (1, 0, 3)):
        expected[row, place] = output[row, place].softmax(-1)
        expected[row, place, label] -= 1
    assert torch.allclose(sent, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    assert torch.equal(sent == 0, expected == 0)


def test_labels_of_the_batch_are_used_and_ignored_ones_left_out() -> None:
    output = torch.randn(3, 4, 5)
    labels = torch.randint(5, (3, 4))
    labels[0] = IGNORED
    labels[1, 2] = IGNORED
    sent = cotangent(output, {"labels": labels}, "labels", "token-classification", torch.Generator())
    output.requires_grad_()
    loss = nn.functional.cross_entropy(output.reshape(-1, 5), labels.reshape(-1), reduction="sum", ignore_index=IGNORED)
    (expected,) = torch.autograd.grad(loss, output)
    assert torch.allclose(sent, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    assert not sent[0].any()
    # a language model's own labels are shifted by one, as its loss does
    shifted = cotangent(output, {"input_ids": labels, "labels": labels}, "labels", "text-generation", torch.Generator())
    loss = nn.functional.cross_entropy(output[:, :-1].reshape(-1, 5), labels[:, 1:].reshape(-1), reduction="sum")
    (expected,) = torch.autograd.grad(loss, output)
    assert torch.allclose(shifted, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps)


def test_labels_that_are_missing_or_of_another_shape_are_refused() -> None:
    output, generator = torch.randn(3, 5), torch.Generator()
    with pytest.raises(DataError, match="expected `labels` for `fisher: labels` and the task text-classification, got x"):
        cotangent(output, {"x": output}, "labels", "text-classification", generator)
    with pytest.raises(DataError, match=r"expected labels of shape \(3,\), got \(2,\)"):
        cotangent(output, {"labels": torch.zeros(2, dtype=torch.int64)}, "labels", "text-classification", generator)
    with pytest.raises(UsageError, match=r"solver.fisher: expected `outputs` or `sampled`: the task has no labels"):
        cotangent(output, {}, "labels", "feature-extraction", generator)


def test_the_mask_of_an_encoder_says_nothing_about_the_tokens_of_a_decoder() -> None:
    mask = torch.tensor([[1, 0, 0]])
    given = {"attention_mask": mask, "input_ids": mask, "decoder_input_ids": mask}
    sent = cotangent(torch.zeros(1, 3, 4), given, "outputs", "text2text-generation", torch.Generator().manual_seed(0))
    assert bool(sent.any(-1).all())
    given["decoder_attention_mask"] = torch.tensor([[1, 1, 0]])
    sent = cotangent(torch.zeros(1, 3, 4), given, "outputs", "text2text-generation", torch.Generator().manual_seed(0))
    assert sent.any(-1).tolist() == [[True, True, False]]


def test_the_readout_of_a_sentence_encoder_is_the_normalised_mean_of_its_tokens() -> None:
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = readout({"last_hidden_state": hidden}, {"attention_mask": mask}, "sentence-similarity")
    means = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    assert torch.allclose(found, means / means.norm(dim=-1, keepdim=True), atol=1e-6)
    outputs = {"mask": mask, "scores": hidden, "logits": hidden + 1}
    assert readout(outputs, {}, "text-generation") is outputs["logits"]
    assert readout({"mask": mask, "scores": hidden}, {}, None) is hidden

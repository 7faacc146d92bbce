"""factorize on the experts of transformers: `grouped_mm`, `batched_mm` and its loop over experts read the same maps."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import lrc
from lrc.api import compile_to_folder
from lrc.data import batches_of
from lrc.kernels import grouped_linear
from lrc.lower.ort_decoder import OnnxDecoder
from lrc.maps import Experts
from lrc.measure import collect
from lrc.program import Program
from lrc.program.capture import capture_module
from lrc.solvers import Need

transformers = pytest.importorskip("transformers", reason="skipped: needs transformers")
SIZES = {
    "vocab_size": 60, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 48, "num_experts_per_tok": 2, "use_cache": False, "pad_token_id": 0,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "moe_intermediate_size": 48, "n_shared_experts": 1, "q_lora_rank": None, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_hidden_layers": 1},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
    "Olmoe": {"num_experts": 4},
    "DeepseekV3": DEEPSEEK,
    "GptOss": {"num_local_experts": 4, "head_dim": 16},  # stored the other way round, gate and up in turns, with biases
}
slow = pytest.mark.slow
EVERY = pytest.mark.parametrize("family", ["Mixtral", *(pytest.param(name, marks=slow) for name in list(FAMILIES)[1:])])


def model_of(family: str, **config: Any) -> Any:
    given = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family] | config))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(given).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def captured(model: Any) -> Program:
    dynamic = {"input_ids": {0: "batch", 1: "sequence"}}
    program = capture_module(model, {"input_ids": ids(2, 9)}, dynamic=dynamic)
    program.origin = type(program.origin)(model=model, task="text-generation")
    return program


def compiled(program: Program, cache: Path, **options: Any) -> lrc.Compiled:
    items = [{"input_ids": ids(4, 20, seed=seed)} for seed in range(3)]
    return lrc.compile(program, tiny.factorize(**options), calibration=items, cache=cache)


def experts_of(done: lrc.Compiled) -> dict[str, Experts]:
    return {name: made for name, made in done.program.maps.items() if isinstance(made, Experts)}


def matrices(made: Experts) -> Tensor:
    return made.exact().weight.reshape(made.count, -1, made.in_features)


def test_the_operator_is_that_of_transformers_with_its_gradients() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 4, requires_grad=True), torch.randn(4, 5, 4, requires_grad=True)
    offs = torch.tensor([3, 3, 8, 9], dtype=torch.int32)
    import transformers.integrations.moe  # noqa: F401 - registers the other operator

    other = torch.ops.transformers.grouped_mm_fallback(x, weight.transpose(1, 2), offs)
    found = grouped_linear(x, weight, offs)
    assert torch.equal(found, other)
    wanted = torch.autograd.grad(other.square().sum(), (x, weight))
    for one, two in zip(torch.autograd.grad(found.square().sum(), (x, weight)), wanted, strict=True):
        assert torch.allclose(one, two, atol=1e-6)
    double = (x.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, offs), double)


@EVERY
def test_every_expert_gets_the_svd_of_its_own_weight(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    program = captured(model)
    with torch.no_grad():
        assert torch.equal(program(input_ids=ids(3, 7))["logits"], model(input_ids=ids(3, 7)).logits)
    dense = {fqn: site.original(program.originals) for fqn, site in program.sites.items() if site.kind == "experts"}
    assert dense
    done = compiled(program, tmp_path, targets=["type:Experts"], solver="svd", rank={"params_kept": 0.6})
    made = experts_of(done)
    assert made.keys() == dense.keys()
    for name, found in made.items():
        rank = found.factors[0].shape[2]
        before = dense[name]
        assert isinstance(before, Experts)
        U, S, Vh = torch.linalg.svd(matrices(before), full_matrices=False)
        assert torch.allclose(matrices(found), (U[..., :rank] * S[:, None, :rank]) @ Vh[:, :rank], atol=1e-5)
    check_views(done)


def check_views(done: lrc.Compiled) -> None:
    """The graph, and the module in each of the ways in which transformers runs experts, with and without a cache."""
    grafted: Any = done.graft()
    with torch.no_grad():
        expected = done.program(input_ids=ids(3, 7))["logits"]
        for way in ("grouped_mm", "batched_mm", "eager"):
            grafted.set_experts_implementation(way)
            assert torch.allclose(grafted(input_ids=ids(3, 7)).logits, expected, atol=1e-5), way
        grafted.set_experts_implementation("grouped_mm")
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        kept, plain = (grafted.generate(ids(2, 6), use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(kept, plain)


@EVERY
def test_the_default_rewrites_experts_under_a_budget_and_leaves_the_router(family: str, tmp_path: Path) -> None:
    done = compiled(captured(model_of(family)), tmp_path, targets=["**"], solver="kfac", rank={"params_kept": 0.6})
    assert experts_of(done)
    assert done.plan.parameters[1] <= 0.8 * done.plan.parameters[0]  # embeddings are no targets
    routers = [d for d in done.plan.decisions if d.keep == "it chooses the experts of every row"]
    assert {d.name for d in routers} == {fqn for fqn in done.program.sites if fqn.endswith(("gate.weight", "router.weight"))}
    assert all(made.isfinite().all() for one in experts_of(done).values() for made in one.factors)


def rows_of(model: Any, name: str) -> tuple[Tensor, Tensor]:
    """What a module of experts reads on the calibration data: (tokens, features), and the experts of every token."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        for seed in range(3):
            model(input_ids=ids(4, 20, seed=seed))
    hook.remove()
    return torch.cat([x for x, _ in seen]), torch.cat([chosen for _, chosen in seen])


def test_statistics_and_factors_are_those_of_the_rows_of_every_expert(tmp_path: Path) -> None:
    model = model_of("Mixtral")
    program = captured(model)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    x, chosen = rows_of(model, "model.layers.0.mlp.experts")
    batches = batches_of([{"input_ids": ids(4, 20, seed=seed)} for seed in range(3)], ["input_ids"])
    found = collect(program, batches, [name], frozenset({Need.INPUTS, Need.GRADIENTS}), fisher="labels")[name]
    assert found.gram is not None
    assert found.fisher is not None
    assert found.fisher.shape == (4, 96, 96)
    done = compiled(program, tmp_path, targets=[name], solver="whitened", rank=10)
    for expert in range(4):
        mine = x[(chosen == expert).any(1)].double()
        gram = mine.T @ mine
        assert torch.allclose(found.gram[expert], gram / chosen.numel(), atol=1e-6)
        weight = model.get_parameter(name)[expert].detach().double()
        L = torch.linalg.cholesky(gram)
        U = torch.linalg.svd(weight @ L, full_matrices=False)[0][:, :10]
        assert torch.allclose(matrices(experts_of(done)[name])[expert], U @ U.T @ weight, atol=1e-4)


def test_an_expert_that_no_row_is_sent_to_keeps_what_its_weight_says(tmp_path: Path) -> None:
    model = model_of("Mixtral", num_experts_per_tok=1)
    with torch.no_grad():  # the mean of the others is never the largest
        gate = model.get_parameter("model.layers.0.mlp.gate.weight")
        gate[3] = gate[:3].mean(0)
    done = compiled(captured(model), tmp_path, targets=["type:Experts"], solver="kfac", rank=12)
    for decision in done.plan.decisions:
        (note,) = decision.notes
        assert note == "1 of 4 blocks (numbers 3) read nothing in the calibration: by the SVD of their weights"
        U, S, Vh = torch.linalg.svd(model.get_parameter(decision.name)[3].detach().double(), full_matrices=False)
        made = matrices(experts_of(done)[decision.name])
        assert made.isfinite().all()
        assert torch.allclose(made[3], (U[:, :12] * S[:12]) @ Vh[:12], atol=1e-5)


def test_a_folder_keeps_factors_of_experts(tmp_path: Path, checked_here: None) -> None:
    folder = tiny.write_mixtral(tmp_path / "mixtral")
    spec = {**tiny.factorize(targets=["type:Experts"], rank=8), "export": ["hf"]}
    done = compile_to_folder(str(folder), spec, output="out")
    done.raise_on_failure()
    assert all(row["ok"] for row in done.record.parity)
    reloaded: Any = lrc.load("out")
    assert isinstance(reloaded.model.layers[0].mlp.experts.down_proj, Experts)


@slow
def test_an_onnx_decoder_writes_what_the_model_writes(tmp_path: Path) -> None:
    for options in ({"passes": []}, tiny.factorize(targets=["type:Experts"], solver="svd", rank=16)):
        done = lrc.compile(captured(model_of("Mixtral")), {"version": 1, **options}, cache=tmp_path / "c")
        done.to_onnx(tmp_path / "model.onnx")
        grafted: Any = done.graft()
        decoder = OnnxDecoder(tmp_path / "model.onnx")
        for prompt in (ids(2, 6), ids(1, 1)):
            wanted = grafted.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True)
            assert torch.equal(torch.as_tensor(decoder.generate(prompt, max_new_tokens=6)), wanted)

"""The Python face: what a user holds after `lrc.compile`, and every way out of it."""

import copy
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, fx, nn

import lrc
from lrc.api import compile_to_folder
from lrc.errors import CaptureError, LowerError, ModelError, UsageError
from lrc.lower.inductor import compiler
from lrc.lower.ort import OrtRunner
from lrc.maps import Chain, Pivoted
from lrc.run.plan import Plan

SPEC = tiny.factorize(targets=["up", "middle"], rank=3, form="two_factor")


@pytest.fixture(autouse=True)
def _in_tmp(in_tmp: Path, checked_here: None) -> None:
    """Run every test in a folder of its own."""


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "grads": {name: p.requires_grad for name, p in model.named_parameters()},
        "text": repr(model),
    }


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    tensors = a["state"].keys() == b["state"].keys() and all(torch.equal(a["state"][k], b["state"][k]) for k in a["state"])
    return tensors and all(a[key] == b[key] for key in ("modes", "grads", "text"))


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    return torch.export.export(model, (tiny.mlp_inputs(),), dynamic_shapes=({0: batch},))


# What is compiled.


def test_a_module_an_exported_program_and_a_graph_module_give_the_same() -> None:
    model, x = tiny.mlp(), tiny.mlp_inputs(5, seed=9)
    inputs = {"x": tiny.mlp_inputs()}
    given: dict[str, tuple[Any, Any]] = {
        "module": (model, inputs), "exported program": (exported(model), None),
        "graph module": (fx.symbolic_trace(model), inputs),
    }  # fmt: skip
    found = {}
    for name, (what, examples) in given.items():
        done = lrc.compile(what, SPEC, inputs=examples)
        assert [d.name for d in done.plan.decisions] == ["up", "middle"]
        found[name] = done.module(x)
        assert isinstance(done.module, nn.Module)
    for name, value in found.items():
        assert torch.equal(value, found["module"]), name


def test_a_program_is_compiled_as_often_as_one_likes() -> None:
    program = lrc.capture(tiny.mlp(), {"x": tiny.mlp_inputs()})
    before = str(program)
    ranks = [lrc.compile(program, tiny.factorize(rank=r, form="two_factor")).plan.decisions[0].rank for r in (2, 3)]
    assert ranks == [2, 3]
    compile_to_folder(program, SPEC, output="out")
    assert str(program) == before
    assert program.maps == {}


def test_positional_examples_and_modules_in_a_row_are_fine() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    for inputs in (tiny.mlp_inputs(), (tiny.mlp_inputs(),), {"input": tiny.mlp_inputs()}):
        done = lrc.compile(model, tiny.factorize(rank=2), inputs=inputs)
        assert done.module(tiny.mlp_inputs(3)).shape == (3, 4)


@pytest.mark.parametrize("training", [False, True])
def test_the_given_module_is_never_changed(training: bool) -> None:
    model = tiny.mlp().train(training)
    model.middle.weight.requires_grad_(False)
    before = snapshot(model)
    done = lrc.compile(
        model, tiny.factorize(solver="kfac", rank=3), inputs={"x": tiny.mlp_inputs()}, calibration=tiny.calibration_of_mlp()
    )
    done.graft(model)
    done.save("out")
    assert same(snapshot(model), before)


def test_the_given_graph_and_program_are_never_changed() -> None:
    traced, program = fx.symbolic_trace(tiny.mlp()), exported(tiny.mlp())
    before = traced.code, str(program.graph)
    lrc.compile(traced, SPEC, inputs={"x": tiny.mlp_inputs()})
    lrc.compile(program, SPEC)
    assert (traced.code, str(program.graph)) == before


# What comes back.


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Answering(nn.Module):
    """A module that answers in a form of the user's choice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.up(x))
        y = self.down(hidden)
        match self.kind:
            case "tuple":
                return y, hidden
            case "list":
                return [y, [hidden]]
            case "mapping":
                return {"y": y, "hidden": {"last": hidden}}
            case "named":
                return Pair(y, hidden)
        return y


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "mapping", "named"])
def test_the_module_answers_in_the_form_of_the_original(kind: str) -> None:
    model, x = Answering(kind).eval(), tiny.mlp_inputs(5, seed=9)
    done = lrc.compile(model, tiny.factorize(rank={"fraction": 1.0}, form="two_factor"), inputs={"x": tiny.mlp_inputs()})
    wanted, found = model(x), done.module(x)
    assert type(found) is type(wanted)
    leaves = [torch.utils._pytree.tree_flatten(value) for value in (wanted, found)]
    assert leaves[0][1] == leaves[1][1]
    assert all(torch.equal(a, b) for a, b in zip(leaves[0][0], leaves[1][0], strict=True))
    again = done.module(x=x)
    assert type(again) is type(wanted)


def test_a_transformers_model_answers_with_its_own_output_class(bert: Path) -> None:
    from transformers import AutoModel

    done = lrc.compile(str(bert), tiny.factorize(targets=[tiny.LAYERS], rank=4))
    ids = torch.tensor([[4, 5, 6]])
    found = done.module(input_ids=ids)
    wanted = AutoModel.from_pretrained(bert).eval()(input_ids=ids)
    assert type(found) is type(wanted)
    assert found.last_hidden_state.shape == wanted.last_hidden_state.shape
    assert torch.equal(done.graft()(input_ids=ids).last_hidden_state, found.last_hidden_state)


def test_both_views_share_their_parameters_and_train_together() -> None:
    model, x = tiny.mlp(), tiny.mlp_inputs(16, seed=9)
    done = lrc.compile(model, SPEC, inputs={"x": tiny.mlp_inputs()})
    grafted = done.graft(model)
    assert isinstance(grafted, tiny.Mlp)
    assert grafted.up is done.program.map_of("up")
    assert torch.equal(grafted(x), done.module(x))
    optimizer = torch.optim.SGD(grafted.parameters(), lr=0.1)
    before = done.module(x).detach()
    grafted(x).square().mean().backward()
    optimizer.step()
    assert grafted.up.A.grad is not None
    assert not torch.equal(done.module(x), before)
    assert torch.equal(grafted(x), done.module(x))
    assert set(dict(done.module.named_parameters())) == set(dict(grafted.named_parameters()))


def test_generate_works_on_the_grafted_model(llama: Path) -> None:
    done = lrc.compile(str(llama), tiny.factorize(targets=[tiny.LAYERS], rank=6))
    ids = torch.tensor([[4, 9, 11]])
    grafted = done.graft()
    with_cache, without = (
        grafted.generate(  # type: ignore[operator]  # a transformers model
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=cache
        )
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)
    assert torch.equal(with_cache[:, :3], ids)
    assert int(with_cache[0, 3]) == int(done.module(input_ids=ids).logits[0, -1].argmax())


def test_the_report_is_the_plan_as_text() -> None:
    done = lrc.compile(tiny.captured_mlp(), SPEC)
    assert isinstance(done.plan, Plan)
    lines = done.report.splitlines()
    assert "site" in lines[0]
    assert any("middle" in line and "two_factor" in line for line in lines)
    assert any(line.startswith("model:   750 → ") for line in lines)
    assert "\x1b" not in done.report


def test_a_plan_says_what_compile_does_and_changes_nothing() -> None:
    model = tiny.mlp()
    before = snapshot(model)
    planned = lrc.plan(model, SPEC, inputs={"x": tiny.mlp_inputs()})
    done = lrc.compile(model, SPEC, inputs={"x": tiny.mlp_inputs()})
    assert planned.to_json() == done.plan.to_json()
    assert same(snapshot(model), before)


def test_the_program_prints_as_text_with_its_maps() -> None:
    done = lrc.compile(tiny.captured_mlp(), SPEC)
    assert "linear(%x, up.A: f32[3, 12])  # factorize @ up" in str(done.program)


# Every way out.


def test_saving_and_loading_gives_the_same_module(in_tmp: Path) -> None:
    done = lrc.compile(tiny.captured_mlp(), SPEC)
    assert done.save("out") == in_tmp / "out"
    x = tiny.mlp_inputs(5, seed=9)
    assert torch.allclose(lrc.load("out")(x=x)["output"], done.module(x), atol=1e-6)
    with pytest.raises(UsageError, match="--overwrite"):
        done.save("out")
    done.save("out", overwrite=True)


def test_saving_keeps_the_plan_that_was_carried_out(in_tmp: Path) -> None:
    """The folder tells how it was made: it is not a folder of a run that did nothing."""
    done = lrc.compile(tiny.captured_mlp(), SPEC)
    done.save("out")
    assert Plan.load(Path("out")).decisions == done.plan.decisions
    assert Plan.load(Path("out")).parameters == done.plan.parameters
    assert "factorize" in Path("out/lrc/spec.resolved.yaml").read_text()


def test_saving_judges_the_result_beside_the_model_as_it_was(in_tmp: Path) -> None:
    x = tiny.mlp_inputs(64, seed=3)
    np.savez("labelled.npz", x=x.numpy(), labels=tiny.mlp()(x).argmax(-1).numpy())
    evaluate = {"metrics": ["accuracy"], "dataset": "labelled.npz"}
    done = lrc.compile(tiny.captured_mlp(), tiny.factorize(rank=1) | {"evaluate": evaluate})
    done.save("out")
    (metric,) = json.loads(Path("out/lrc/metrics.json").read_text())["metrics"]
    assert metric["original"] == 1.0
    assert metric["value"] == float((done.module(x).argmax(-1) == tiny.mlp()(x).argmax(-1)).double().mean()) < 1


def test_saving_a_transformers_model_gives_a_folder_that_the_auto_classes_load(bert: Path, in_tmp: Path) -> None:
    done = lrc.compile(str(bert), tiny.factorize(targets=[tiny.LAYERS], rank=4))
    done.save("out")
    from transformers import AutoModel

    import_module("lrc.hf")  # registers our classes
    ids = torch.tensor([[4, 5, 6]])
    found = AutoModel.from_pretrained("out").eval()(input_ids=ids).last_hidden_state
    assert torch.equal(found, done.graft()(input_ids=ids).last_hidden_state)


def test_one_onnx_file_where_one_wants_it(in_tmp: Path) -> None:
    done = lrc.compile(tiny.captured_mlp(), SPEC)
    path = done.to_onnx("deep/down/mine.onnx")
    assert path == Path("deep/down/mine.onnx")
    assert [p.name for p in path.parent.iterdir()] == ["mine.onnx"]
    x = tiny.mlp_inputs(5, seed=9)
    assert torch.allclose(torch.from_numpy(OrtRunner(path)(x=x)["output"]), done.module(x), atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="skipped: Inductor needs a C++ compiler (g++ or clang++)")
def test_one_package_where_one_wants_it(in_tmp: Path) -> None:
    done = lrc.compile(tiny.captured_mlp(), SPEC)
    path = done.to_aoti("mine.pt2")
    x = tiny.mlp_inputs(5, seed=9)
    found = torch._inductor.aoti_load_package(str(path))(x=x)["output"]
    assert torch.allclose(found, done.module(x), atol=1e-5)


# Refusals.


def test_a_module_needs_examples_that_fit() -> None:
    with pytest.raises(UsageError, match=r"Mlp: a module needs example inputs\. Give `inputs=`"):
        lrc.compile(tiny.mlp(), SPEC)
    with pytest.raises(CaptureError, match="the example inputs do not fit `forward`: too many positional arguments"):
        lrc.capture(tiny.mlp(), (tiny.mlp_inputs(), tiny.mlp_inputs()))
    with pytest.raises(CaptureError, match=r"expected example inputs, got no tensor\. Give `inputs=`"):
        lrc.capture(tiny.mlp(), {"x": 3})


def test_a_weight_without_a_module_of_its_own_cannot_be_grafted() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(20, 12))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.matrix)

    model = Bare().eval()
    done = lrc.compile(model, tiny.factorize(rank=3), inputs={"x": tiny.mlp_inputs()})
    assert isinstance(done.program.map_of("matrix"), Chain | Pivoted)
    with pytest.raises(LowerError, match=r"matrix: the weight is a parameter of a larger module.*use `\.module`"):
        done.graft(model)


def test_a_program_without_a_module_has_nothing_to_graft_into() -> None:
    done = lrc.compile(exported(tiny.mlp()), SPEC)
    with pytest.raises(LowerError, match="there is no module to graft into"):
        done.graft()
    twin = copy.deepcopy(tiny.mlp())
    assert torch.equal(done.graft(twin)(tiny.mlp_inputs()), done.module(tiny.mlp_inputs()))


def test_what_is_no_output_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a folder with `config\.json` or `program\.pt2`, got neither"):
        lrc.load(tmp_path)


def test_the_names_of_the_package_are_those_of_the_documentation() -> None:
    assert set(lrc.__all__) == {
        "Compiled", "__version__", "adapters_of", "capture", "compile", "load", "plan", "register_pass", "set_adapter",
    }  # fmt: skip
    with pytest.raises(AttributeError, match="module 'lrc' has no attribute 'complie'"):
        lrc.complie  # noqa: B018

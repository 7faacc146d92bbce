"""A captured program answers as the model does, at every size, and the model itself is left as it was."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import ARCHITECTURES, Captured, assert_agree, build, inputs_for, outputs_of, perceptron
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from lrc.errors import CaptureError, ModelError, UsageError
from lrc.program import Inputs
from lrc.program.capture import capture_exported, capture_graph, capture_module
from lrc.program.source import Source, load_program
from lrc.program.tasks import infer_task

TASKS = {
    "llama": "text-generation", "gpt2": "text-generation", "bert": "feature-extraction", "roberta": "fill-mask",
    "distilbert": "text-classification", "t5": "text2text-generation", "vit": "image-classification",
    "mistral": "text-generation", "qwen3": "text-generation", "opt": "text-generation",
}  # fmt: skip
Get = Callable[[str], Captured]


# Transformers models.


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_captured_folder_equals_its_model_at_other_sizes_and_with_padding(name: str, captured: Get) -> None:
    made = captured(name)
    for batch, length, padded in ((3, 9, True), (1, 4, False), (2, 7, False)):
        inputs = inputs_for(name, batch, length, padded=padded)
        expected = outputs_of(made.model, inputs)
        with torch.no_grad():
            found = made.dense(**inputs)
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_agree(found[key], value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_task_is_read_off_the_folder(name: str, captured: Get) -> None:
    assert captured(name).dense.task == TASKS[name]


def test_the_task_follows_the_architecture_and_sentence_transformers_files(tmp_path: Path) -> None:
    assert infer_task({"architectures": ["BertForTokenClassification"]}, tmp_path) == "token-classification"
    assert infer_task({"architectures": ["BertForQuestionAnswering"]}, tmp_path) == "question-answering"
    assert infer_task({"architectures": ["Wav2Vec2ForCTC"]}, tmp_path) == "automatic-speech-recognition"
    for nothing in ({}, {"architectures": None}, {"architectures": []}, {"architectures": {"a": 1}}, {"architectures": 3}):
        assert infer_task(nothing, tmp_path) == "feature-extraction"
    (tmp_path / "modules.json").write_text("[]")
    assert infer_task({"architectures": ["BertModel"]}, tmp_path) == "sentence-similarity"


def test_dynamic_sizes_have_names_and_the_positions_bound_the_sequence(captured: Get) -> None:
    program = captured("bert").dense
    assert list(program.inputs.examples) == ["input_ids", "token_type_ids", "attention_mask"]
    assert program.inputs.dynamic == {name: {0: "batch", 1: "sequence"} for name in program.inputs.examples}
    assert program.inputs.largest == {"sequence": 20}
    assert captured("t5").dense.inputs.dynamic["decoder_input_ids"] == {0: "batch", 1: "decoder_sequence"}
    assert captured("vit").dense.inputs.dynamic == {"pixel_values": {0: "batch"}}


def test_missing_masks_and_token_types_are_those_of_one_unpadded_text(captured: Get) -> None:
    program = captured("bert").dense
    ids = inputs_for("bert", 2, 6)["input_ids"]
    full = program(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
    short = program(input_ids=ids, labels=ids)  # what the graph does not take is left out
    assert torch.equal(short["last_hidden_state"], full["last_hidden_state"])


def test_a_missing_input_without_a_default_is_named(captured: Get) -> None:
    with pytest.raises(UsageError, match=r"inputs: expected the inputs input_ids, .*got attention_mask. Give `input_ids`"):
        captured("llama").dense(attention_mask=torch.ones(1, 3, dtype=torch.int64))


def test_positional_arguments_follow_the_order_of_the_model_not_of_the_tokenizer(captured: Get) -> None:
    made = captured("bert")
    inputs = inputs_for("bert", 2, 6)
    ids, mask, types = inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"]
    module = made.dense.module()
    with torch.no_grad():
        expected = made.model(ids, mask, types).last_hidden_state
        assert torch.equal(module(ids, mask, types).last_hidden_state, expected)
        assert torch.equal(module(ids, token_type_ids=types, attention_mask=mask).last_hidden_state, expected)


def test_the_module_of_a_program_returns_the_models_own_output_class(captured: Get) -> None:
    made = captured("llama")
    inputs = inputs_for("llama", 2, 5)
    with torch.no_grad():
        found, expected = made.dense.module()(**inputs), made.model(**inputs, use_cache=False)
    assert type(found) is type(expected)
    assert torch.equal(found.logits, expected.logits)


def test_capturing_leaves_mode_config_and_numbers_as_they_were() -> None:
    model = build("gpt2")
    model.train()
    model.lm_head.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    config = model.config.to_dict()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    capture_module(model, inputs_for("gpt2", 2, 5), constants={"use_cache": False})
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_program_shares_the_tensors_of_its_model(captured: Get) -> None:
    made = captured("llama")
    shared = {tensor.data_ptr() for tensor in made.model.state_dict().values()}
    weights = {name: t.data_ptr() for name, t in made.dense.tensors().items() if t.ndim == 2}
    assert set(weights.values()) <= shared


def test_a_folder_is_captured_without_reading_its_weights(captured: Get) -> None:
    made = captured("llama")
    program = load_program(Source(str(made.folder)), weights=False)
    assert {f: (s.shape, s.tied) for f, s in program.sites.items()} == {
        f: (s.shape, s.tied) for f, s in made.dense.sites.items()
    }


def test_a_folder_is_loaded_in_the_dtype_that_is_asked_for(captured: Get) -> None:
    program = load_program(Source(str(captured("vit").folder), dtype="bfloat16"))
    assert {site.dtype for site in program.sites.values()} == {torch.bfloat16}
    pixels = inputs_for("vit", 2, 0)["pixel_values"].bfloat16()
    assert program(pixel_values=pixels)["logits"].dtype == torch.bfloat16


# Sizes.


def test_a_size_that_the_model_bounds_is_bounded() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5))

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model
            self.register_buffer("table", torch.randn(12, 5))

        def forward(self, ids: Tensor) -> Tensor:
            return self.body(ids) + self.table[: ids.shape[1]]

    program = capture_module(Positions(), (torch.randint(9, (3, 4)),), dynamic={"ids": {0: "batch", 1: "sequence"}})
    assert program.inputs.largest == {"sequence": 12}
    ids = torch.randint(9, (2, 12))
    assert torch.equal(program(ids)["output"], Positions.forward(program.origin.model, ids))


def test_a_size_that_the_model_fixes_is_fixed() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(3, -1) + 1

    program = capture_module(Fixed(), torch.randn(3, 6))
    assert program.inputs.dynamic == {"x": {}}
    assert str(program).startswith("%x: f32[3, 6] = input")


def test_missing_positions_count_from_zero() -> None:
    ids = torch.randint(9, (2, 5))
    inputs = Inputs({"input_ids": ids, "position_ids": ids})
    assert inputs.fill({"input_ids": ids})["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2


# Modules.


class Two(nn.Module):
    """Two inputs, one with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, shift: Tensor | None = None, flag: bool = False) -> Tensor:
        y = self.fc(x)
        return y if shift is None else y + 2 * shift if flag else y - shift


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Result:
    scores: Tensor
    hidden: Tensor


torch.export.register_dataclass(Result, serialized_type_name="test_capture.Result")


class Returning(nn.Module):
    """Returns whatever a function makes of two tensors."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.fc(x), x)


def test_positional_and_keyword_inputs_mean_the_same() -> None:
    torch.manual_seed(0)
    model, x, shift = Two(), torch.randn(3, 6), torch.randn(3, 5)
    expected = model(x, shift)
    by_name = capture_module(model, {"shift": shift, "x": x})  # not the order of `forward`
    for program in (by_name, capture_module(model, (x, shift))):
        for found in (program.module()(x, shift), program.module()(x, shift=shift), program.module()(shift=shift, x=x)):
            assert torch.equal(found, expected)
        assert torch.equal(program(x, shift)["output"], expected)
    assert torch.equal(capture_module(model, x).module()(x), model(x))


def test_arguments_that_are_no_tensors_are_part_of_the_capture() -> None:
    torch.manual_seed(0)
    model, x, shift = Two(), torch.randn(3, 6), torch.randn(3, 5)
    module = capture_module(model, {"x": x, "shift": shift, "flag": True}).module()
    expected = model(x, shift, True)
    assert torch.equal(module(x, shift, True), expected)
    assert torch.equal(module(shift=shift, x=x, flag=True), expected)


def test_too_many_positional_arguments_are_refused() -> None:
    program = capture_module(perceptron(), torch.randn(3, 6))
    with pytest.raises(UsageError, match="inputs: expected at most 1 by position, got 2"):
        program(torch.randn(3, 6), torch.randn(3, 6))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda y, x: y, ["output"]),
        (lambda y, x: (y, x), ["output_0", "output_1"]),
        (lambda y, x: [y, (x, y + 1)], ["output_0", "output_1_0", "output_1_1"]),
        (lambda y, x: {"scores": y, "x": x}, ["scores", "x"]),
        (lambda y, x: {"a": Pair(y, x), "b": Pair(x, y)}, ["a.first", "a.second", "b.first", "b.second"]),
        (lambda y, x: Pair(y, x), ["first", "second"]),
        (lambda y, x: Result(y, x), ["scores", "hidden"]),
        (lambda y, x: (y, y), ["output_0", "output_1"]),
        (lambda y, x: (None, y, 3, "word"), ["output_1"]),
    ],
    ids=["tensor", "tuple", "nested", "dict", "dict_of_named_tuples", "named_tuple", "dataclass", "same_twice", "constants"],
)
def test_the_module_of_a_program_returns_the_same_type(make: Callable[..., Any], names: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Returning(make), torch.randn(3, 6)
    program = capture_module(model, x)
    found, expected = program.module()(x), model(x)
    assert list(program(x)) == names
    assert type(found) is type(expected)
    leaves, tree = torch.utils._pytree.tree_flatten(found)
    wanted, same = torch.utils._pytree.tree_flatten(expected)
    assert tree == same
    assert all(torch.equal(a, b) if isinstance(b, Tensor) else a == b for a, b in zip(leaves, wanted, strict=True))


def test_an_output_that_is_a_size_is_refused() -> None:
    with pytest.raises(CaptureError, match="output_1: expected outputs that are tensors, got a size"):
        capture_module(Returning(lambda y, x: (y, x.shape[0])), torch.randn(3, 6))


def test_inputs_that_hold_tensors_are_refused_by_name() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
            return x + pair[0] * pair[1]

    x = torch.randn(3, 6)
    with pytest.raises(CaptureError, match="Nested: expected inputs that are tensors, got `pair`, a tuple of them"):
        capture_module(Nested(), (x, (x, x)))
    with pytest.raises(CaptureError, match="Perceptron: the example inputs do not fit `forward`: too many positional"):
        capture_module(perceptron(), (x, x))
    with pytest.raises(CaptureError, match="Perceptron: expected example inputs, got no tensor"):
        capture_module(perceptron(), {"x": 3})


def test_only_a_batch_that_all_inputs_share_is_dynamic() -> None:
    assert capture_module(perceptron(), torch.randn(3, 6)).inputs.dynamic == {"x": {0: "batch"}}
    assert capture_module(perceptron(), torch.randn(1, 6)).inputs.dynamic == {}
    fixed = capture_module(Two(), {"x": torch.randn(3, 6), "shift": torch.randn(5)})
    assert fixed.inputs.dynamic == {}


def test_an_exported_program_keeps_its_names_sizes_and_bounds() -> None:
    torch.manual_seed(0)
    model, x, shift = Two().eval(), torch.randn(4, 6), torch.randn(4, 5)
    rows = torch.export.Dim("rows", max=32)
    exported = torch.export.export(model, (x,), {"shift": shift}, dynamic_shapes={"x": {0: rows}, "shift": {0: rows}})
    program = capture_exported(exported)
    assert program.inputs.dynamic == {"x": {0: "batch"}, "shift": {0: "batch"}}
    assert program.inputs.largest == {"batch": 32}
    x, shift = torch.randn(7, 6), torch.randn(7, 5)
    assert torch.equal(program.module()(x, shift=shift), model(x, shift))
    program.export()  # the bound is kept: torch.export refuses a range that the graph does not allow


def test_an_exported_program_may_take_nested_inputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, pair: tuple[Tensor, Tensor], *, more: dict[str, Tensor]) -> Tensor:
            return self.fc(pair[0]) - 2 * pair[1] + 3 * more["b"] - more["a"]

    torch.manual_seed(0)
    model = Nested().eval()
    p, q, a, b = torch.randn(4, 3, 6)
    program = capture_exported(torch.export.export(model, ((p, q),), {"more": {"a": a, "b": b}}))
    assert torch.equal(program.module()((p, q), more={"a": a, "b": b}), model((p, q), more={"a": a, "b": b}))


def test_a_graph_of_symbolic_trace_is_captured() -> None:
    model, x = perceptron(), torch.randn(4, 6)
    program = capture_graph(fx.symbolic_trace(model), (torch.randn(3, 6),))
    assert torch.equal(program.module()(x), model(x))
    assert list(program.sites) == ["up", "down"]


@pytest.mark.parametrize("decomposed", [False, True], ids=["plain", "decomposed"])
def test_a_saved_program_is_read_and_equals_the_model(decomposed: bool, tmp_path: Path, captured: Get) -> None:
    made = captured("bert")
    exported = made.dense.export()
    torch.export.save(exported.run_decompositions() if decomposed else exported, tmp_path / "model.pt2")
    program = load_program(Source(str(tmp_path / "model.pt2")))
    assert program.origin.name == "model"
    assert program.inputs.dynamic == made.dense.inputs.dynamic
    assert program.inputs.largest == {"sequence": 20}
    assert list(program.sites) == list(made.dense.sites)
    inputs = inputs_for("bert", 3, 9)
    expected = outputs_of(made.model, inputs)
    for key, value in program(**inputs).items():
        assert_agree(value, expected[key], steps=len(program.sites) if decomposed else 1)


# Refusals.


class DataDependent(nn.Module):
    """Looks at a value."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        if y.sum() > 0:  # this line
            return y
        return -x


def test_control_flow_that_depends_on_values_is_refused_with_its_line() -> None:
    lines, start = inspect.getsourcelines(DataDependent)
    line = start + next(i for i, text in enumerate(lines) if "this line" in text)
    model = DataDependent().train()
    with pytest.raises(CaptureError) as caught:
        capture_module(model, torch.randn(3, 6))
    assert caught.value.where == f"DataDependent at test_capture.py:{line}: `if y.sum() > 0:  # this line`"
    assert "Could not guard on data-dependent expression" in caught.value.message
    assert model.training


def test_an_error_of_the_models_own_code_names_its_line() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.zeros(5, 2)

    with pytest.raises(CaptureError, match=r"^Wrong at test_capture.py:\d+: `return x @ torch.zeros\(5, 2\)`: torch.export"):
        capture_module(Wrong(), torch.randn(3, 6))


# Factories.

FACTORIES = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(x)

def bare():
    return Net()

def whole():
    return Net(), (torch.randn(3, 6),)

def number():
    return 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "lrc_test_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    return "lrc_test_factories"


def test_a_factory_runs_only_when_code_is_allowed(factories: str) -> None:
    with pytest.raises(UsageError, match=f"{factories}:whole: a factory runs code of yours. Add `--allow-code`") as caught:
        load_program(Source(f"{factories}:whole"))
    assert caught.value.exit_code == 2
    program = load_program(Source(f"{factories}:whole", task="regression"), allow_code=True)
    assert list(program.sites) == ["fc"]
    assert program.task == "regression"
    assert program.inputs.dynamic == {"x": {0: "batch"}}


def test_remote_code_runs_only_when_code_is_allowed(captured: Get) -> None:
    with pytest.raises(UsageError, match=r"model.trust_remote_code: the model's own code would run. Add `--allow-code`"):
        load_program(Source(str(captured("vit").folder), trust_remote_code=True))


def test_a_factory_that_is_missing_or_returns_something_else_is_refused(factories: str) -> None:
    for path, error in {
        f"{factories}:nothing": "has no attribute 'nothing'",
        "lrc_no_such_module:make": "No module named 'lrc_no_such_module'",
        f"{factories}:number": "expected a torch.nn.Module, or one with its example inputs, got int",
        f"{factories}:bare": "no example inputs",
    }.items():
        with pytest.raises(ModelError, match=error):
            load_program(Source(path), allow_code=True)
    program = load_program(Source(f"{factories}:bare"), allow_code=True, inputs={"x": torch.randn(2, 6)})
    assert program.sites["fc"].shape == (5, 6)


def test_the_weights_of_a_factory_come_from_a_safetensors_file(factories: str, tmp_path: Path) -> None:
    state = {"fc.weight": torch.randn(5, 6), "fc.bias": torch.randn(5)}
    save_file(state, tmp_path / "w.safetensors")
    source = Source(f"{factories}:whole", weights=str(tmp_path / "w.safetensors"))
    program = load_program(source, allow_code=True)
    x = torch.randn(4, 6)
    assert torch.equal(program(x)["output"], nn.functional.linear(x, state["fc.weight"], state["fc.bias"]))


def test_weights_that_do_not_fit_the_factory_are_refused(factories: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    source = Source(f"{factories}:whole", weights=str(path))
    cases: dict[str, dict[str, Tensor]] = {
        "expected the model's tensors, got missing fc.bias; unexpected none": {"fc.weight": torch.zeros(5, 6)},
        "the weights do not fit the model: size mismatch for fc.weight": {
            "fc.weight": torch.zeros(6, 5),
            "fc.bias": torch.zeros(5),
        },
    }
    for message, state in cases.items():
        save_file(state, path)
        with pytest.raises(ModelError, match=message):
            load_program(source, allow_code=True)
    save_file({"fc.weight": torch.full((5, 6), float("nan")), "fc.bias": torch.zeros(5)}, path)
    with pytest.raises(ModelError, match=r"fc.weight: expected finite numbers, got 30 of 30"):
        load_program(source, allow_code=True)
    path.unlink()
    with pytest.raises(ModelError, match="the file is missing"):
        load_program(source, allow_code=True)


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, negate: bool = False, times: int = 2) -> Tensor:
        y: Tensor = self.linear(x)
        return -y if negate else y * times


def test_arguments_that_are_no_tensors_are_those_of_the_capture_or_refused() -> None:
    module, x = Switched().eval(), torch.randn(3, 4)
    program = capture_module(module, {"x": x, "times": 3})
    with torch.no_grad():
        assert torch.equal(program(x)["output"], module(x, times=3))
        assert torch.equal(program.module()(x, False, 3), module(x, False, 3))
        with pytest.raises(UsageError, match=r"inputs.times: expected 3, which the graph was captured for, got 2"):
            program(x, times=2)
        with pytest.raises(UsageError, match=r"inputs.negate"):
            program.module()(x, True)


def test_arguments_of_an_exported_program_that_are_no_tensors_are_those_of_the_export() -> None:
    module, x = Switched().eval(), torch.randn(3, 4)
    program = capture_exported(torch.export.export(module, (x, True), kwargs={"times": 3}))
    with torch.no_grad():
        assert torch.equal(program(x, True, times=3)["output"], module(x, True, 3))
        with pytest.raises(UsageError, match=r"inputs.negate: expected True"):
            program(x, False)
        with pytest.raises(UsageError, match=r"inputs.times: expected 3"):
            program(x, True, times=4)


def test_an_interrupt_that_python_wrapped_stays_an_interrupt() -> None:
    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as error:  # as `__set_name__` does in Python 3.11
                raise RuntimeError("Error calling __set_name__") from error

    with pytest.raises(KeyboardInterrupt):
        capture_module(Interrupted(), torch.randn(2, 3))

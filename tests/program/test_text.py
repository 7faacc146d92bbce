"""A program as text: golden files, rewritten by `pytest --rewrite-golden` and read in review."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Captured, exact_pivoted, low_rank, perceptron
from torch import Tensor, nn

from lrc.formats import FORMATS
from lrc.maps import Dense, Quantized, Sum
from lrc.program import Program
from lrc.program.capture import capture_module

GOLDEN = Path(__file__).parent / "golden"
Get = Callable[[str], Captured]
Golden = Callable[[str, object], None]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """A function that compares a program's text with a golden file."""

    def compare(name: str, program: object) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--rewrite-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(str(program), encoding="utf-8")
        assert str(program) == path.read_text(encoding="utf-8"), (
            f"{path.name} differs; `pytest --rewrite-golden` writes it anew"
        )

    return compare


@pytest.fixture
def program() -> Program:
    return capture_module(perceptron(), torch.randn(3, 6))


def test_a_captured_perceptron_reads_as_the_golden_text(program: Program, golden: Golden) -> None:
    golden("perceptron", program)


def test_a_product_of_two_factors_reads_as_the_golden_text(program: Program, golden: Golden) -> None:
    for fqn in ("up", "down"):
        program.replace(fqn, low_rank(program.sites[fqn], 2), "factorize")
    golden("perceptron_chain", program)


def test_pivoted_forms_read_as_the_golden_text(program: Program, golden: Golden) -> None:
    program.replace("up", exact_pivoted(program.sites["up"], "out"), "factorize")
    program.replace("down", exact_pivoted(program.sites["down"], "in"), "factorize")
    golden("perceptron_pivoted", program)


def test_a_nested_map_reads_as_the_golden_text(program: Program, golden: Golden) -> None:
    weight, bias = program.sites["up"].map.dense()
    program.replace("up", Sum(Dense(weight), low_rank(program.sites["up"], 2).with_bias(None), bias=bias), "split")
    golden("perceptron_sum", program)


def test_a_captured_llama_reads_as_the_golden_text(captured: Get, golden: Golden) -> None:
    golden("llama", captured("llama").dense)


def test_a_rewritten_gpt2_reads_as_the_golden_text(captured: Get, golden: Golden) -> None:
    program = captured("gpt2").program
    for fqn in ("transformer.h.0.attn.c_attn", "lm_head"):
        program.replace(fqn, low_rank(program.sites[fqn], 2), "factorize")
    golden("gpt2_chain", program)


def test_the_text_is_the_same_when_captured_again(captured: Get, program: Program) -> None:
    assert str(capture_module(perceptron(), torch.randn(3, 6))) == str(program)
    made = captured("gpt2")
    given = made.dense.inputs
    again = capture_module(
        made.model, dict(given.examples), dynamic=given.dynamic, largest=given.largest, constants={"use_cache": False}
    )
    assert str(again) == str(made.dense)


def test_the_text_is_the_same_in_another_process(program: Program) -> None:
    code = (
        "import torch, models; from lrc.program.capture import capture_module\n"
        "print(capture_module(models.perceptron(), torch.ones(3, 6)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert done.stdout == f"{program}\n"


def test_symbolic_sizes_are_called_as_the_inputs_call_them(captured: Get, program: Program) -> None:
    text = str(captured("bert").dense)
    assert text.startswith("%input_ids: i64[batch, sequence] = input\n")
    assert "f32[batch, sequence, 16] = linear(" in text
    assert "f32[batch*sequence" not in text
    assert str(program).startswith("%x: f32[batch, 6] = input\n")
    static = str(capture_module(perceptron(), torch.randn(1, 6)))
    assert static.startswith("%x: f32[1, 6] = input\n")


def test_the_text_holds_names_and_never_values(captured: Get) -> None:
    text = str(captured("gpt2").dense)
    assert "transformer.wte.weight: f32[32, 16]" in text
    assert "tensor(" not in text
    assert "0x" not in text
    for symbol in ("s0", "s27", "s53", "s77", "aten", "_assert"):
        assert symbol not in text


def test_a_text_names_the_pass_that_made_a_line(program: Program) -> None:
    program.replace("up", low_rank(program.sites["up"], 2), "factorize")
    program.replace("down", low_rank(program.sites["down"], 2))
    lines = str(program).splitlines()
    assert [line.partition("  # ")[2] for line in lines] == [
        "", "factorize @ up", "factorize @ up", "", "down", "down", "",
    ]  # fmt: skip


def test_every_input_and_output_has_a_line_of_its_own_name() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"sum": a + b, "product": a * b, "a": a}

    assert str(capture_module(Two(), (torch.randn(3, 2), torch.randn(3, 2)))).splitlines() == [
        "%a: f32[batch, 2] = input",
        "%b: f32[batch, 2] = input",
        "%0: f32[batch, 2] = add(%a, %b)",
        "%1: f32[batch, 2] = mul(%a, %b)",
        "return sum=%0, product=%1, a=%a",
    ]


def test_packed_weights_that_read_rows_which_are_not_contiguous_have_a_text() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv1d(48, 48, 3, padding=1, groups=4), nn.Linear(48, 40, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.conv(x).transpose(1, 2))
            return logits

    turned = capture_module(Turned(), (torch.randn(2, 48, 6),))
    turned.replace("head", Quantized.of(turned.map_of("head").dense().weight, FORMATS["int4"]))
    assert any(line.endswith("# head") and "linear" in line for line in str(turned).splitlines())

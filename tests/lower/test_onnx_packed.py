"""Packed weights in ONNX files: they stay packed, ONNX Runtime reads them, and what it computes is what the map says."""

import math
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import lrc
from lrc.errors import UsageError
from lrc.formats import FORMATS, Integer, NormalFloat, NumberFormat
from lrc.lower.onnx_decode import decode_function, spread_function
from lrc.lower.onnx_file import OnnxExport, export_onnx
from lrc.lower.onnx_packed import settle_products
from lrc.maps import Chain, Quantized, Sparse, Sum
from lrc.solvers.splits.support import strongest

SHAPES = [(5, 33), (64, 96), (1, 1)]
FORMS: list[NumberFormat] = [
    *FORMATS.values(),
    Integer(block=100),
    NormalFloat(bits=4, scale_bits=None, scale_dtype="float16"),
    NormalFloat(bits=3, scale_bits=4, super_block=16, block=32),
]


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def session(nodes: list[Any], stored: dict[str, Tensor], inputs: dict[str, list[Any]], output: list[Any], **more: Any) -> Any:
    """A session on a graph of these nodes; its output is called `y`."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value(name, 1, shape) for name, shape in inputs.items()], [value("y", 1, output)],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in stored.items()],
    )  # fmt: skip
    domains = [helper.make_opsetid(*domain) for domain in (("", 23), ("lrc", 1), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10, **more)
    if not more:
        settle_products(model, *model_form)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString())


model_form: tuple[Any, int] = ("matmul_nbits", 4)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name}-{form.block}")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_format_is_decoded_to_the_bit(form: NumberFormat, shape: tuple[int, int]) -> None:
    encoded = form.encode(randn(*shape))
    function = decode_function("decode", form, shape, 23)
    node = helper.make_node("decode", list(encoded), ["y"], domain="lrc")
    (found,) = session([node], encoded, {}, list(shape), functions=[function]).run(None, {})
    assert torch.equal(torch.from_numpy(found), form.decode(encoded, shape))


@pytest.mark.parametrize("pattern", ["all", "2:4", "4:8", "16x16", "2x3"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5])
def test_a_support_is_spread_to_the_bit(pattern: str, shape: tuple[int, int], density: float) -> None:
    W = randn(*shape)
    made = Sparse.of(W, strongest(W.abs(), pattern, density), pattern=pattern)
    by_position = made.support.dtype == torch.int32
    function = spread_function("spread", made.kind, shape, made.count, 23, by_position=by_position)
    node = helper.make_node("spread", ["values", "support"], ["y"], domain="lrc")
    stored = {"values": made.values.detach(), "support": made.support}
    (found,) = session([node], stored, {}, list(shape), functions=[function]).run(None, {})
    assert torch.equal(torch.from_numpy(found), made.spread())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("features", [128, 100])
@pytest.mark.parametrize(("form", "level"), [("matmul_nbits", 0), ("matmul_nbits", 4), ("dequantize", 4)])
def test_a_product_with_integers_is_the_maps(
    monkeypatch: pytest.MonkeyPatch, bits: Any, block: int, features: int, form: str, level: int
) -> None:
    monkeypatch.setattr(f"{__name__}.model_form", (form, level))
    made = Quantized.of(randn(48, features), Integer(bits=bits, block=block), randn(48, seed=1))
    sizes = {"N": 48, "K": features, "bits": bits, "block_size": block}
    assert made.bias is not None
    stored = made.encoded | {"bias": made.bias.detach()}
    node = helper.make_node("IntegerProduct", ["x", "codes", "scales", "bias"], ["y"], domain="lrc", **sizes)
    x = randn(7, features, seed=2)
    (found,) = session([node], stored, {"x": ["rows", features]}, ["rows", 48]).run(None, {"x": x.numpy()})
    expected = made(x).detach() - made.bias.detach()
    error = float((torch.from_numpy(found) - made(x).detach()).norm() / expected.norm())
    assert error < (math.sqrt(block / 12) / 127 if level else 1e-5)


class Parts(nn.Module):
    """Three linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 96), nn.Linear(96, 96, bias=False), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def packed_program() -> Any:
    """A small program with integers beside a product, a NormalFloat, and 2 of 4 numbers."""
    torch.manual_seed(0)
    program = lrc.capture(Parts().eval(), inputs={"x": randn(2, 5, 64)})
    W = {fqn: program.map_of(fqn).dense() for fqn in ("first", "second", "third")}
    branch = Chain(0.01 * randn(96, 3), 0.01 * randn(3, 64, seed=1))
    program.replace("first", Sum(branch, Quantized.of(W["first"].weight, FORMATS["int4"]), bias=W["first"].bias))
    program.replace("second", Quantized.of(W["second"].weight, FORMATS["nf3"]))
    support = strongest(W["third"].weight.abs(), "2:4", 0.0)
    program.replace("third", Sparse.of(W["third"].weight, support, W["third"].bias, "2:4"))
    return program


@pytest.mark.slow
def test_a_file_holds_the_packed_bytes_and_runs(tmp_path: Path) -> None:
    program = packed_program()
    written = export_onnx(program, tmp_path, OnnxExport(opset=21, accuracy_level=4))  # type: ignore[arg-type]
    model = onnx.load(tmp_path / written.artifact)
    stored = sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
    assert stored == pytest.approx(program.size()[1], rel=0.01)
    assert [node.op_type for node in model.graph.node if node.domain] == ["MatMulNBits", "nf3_0", "sparse_1"]
    assert written.notes == (
        "integer weights run packed by MatMulNBits, inputs rounded to 8 bits",
        "nf3, sparse: stored packed, decoded when the file is loaded, run dense",
    )
    assert written.rounding == pytest.approx(math.sqrt(32 / 12) / 127)
    for shape in ((1, 5), (3, 5)):
        x = randn(*shape, 64, seed=3)
        (found,) = onnxruntime.InferenceSession(tmp_path / written.artifact).run(None, {"x": x.numpy()})
        expected = next(iter(program(x=x).values())).detach()
        assert float((torch.from_numpy(found) - expected).norm() / expected.norm()) < 2 * written.rounding


def test_the_standards_form_needs_its_operator_set() -> None:
    with pytest.raises(UsageError, match="at least 21"):
        OnnxExport(opset=20, quantized="dequantize").check(packed_program())

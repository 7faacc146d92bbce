"""Packed weights in an ONNX file: nodes that read them as they are stored.

Quantized(int, blocks of 2^k >= 16)  ->  MatMulNBits of ONNX Runtime; or the standard's DequantizeLinear and MatMul, which it
                                         fuses into the same when it loads the file
Quantized(any other), Sparse         ->  a function of the file that decodes the weight, and a MatMul: fewer bytes, no time

The codes of our integers are laid out as MatMulNBits reads them: nothing is copied. Rules from measurements of ONNX Runtime
1.32 on a CPU: with inputs rounded to 8 bits these products are the fast ones; the operator for NormalFloat (MatMulBnb4) is
10 to 50 times slower than a dense product, so a NormalFloat is decoded once, when the file is loaded.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.formats import Integer
from lrc.lower.onnx_decode import DOMAIN, decode_function, spread_function
from lrc.maps import Quantized, Sparse

MICROSOFT = "com.microsoft"
PRODUCT = "IntegerProduct"  # stands in the graph until `settle` has chosen its form
Form = Literal["matmul_nbits", "dequantize"]


class PackedNodes:
    """What packed maps become while a program is exported, and the functions that this needs. opset: that of the file."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.functions: dict[Any, tuple[str, Callable[[str], Any]]] = {}  # made after the export, with real tensors
        self.blocks: set[int] = set()
        self.decoded: set[str] = set()

    def __call__(self, made: Any, x: Tensor) -> Tensor | None:
        """Return the output of a packed map by nodes that read its packed tensors."""
        if isinstance(made, Quantized):
            return self.integer_product(made, x) if has_product(made) else self.decoded_quantized(made, x)
        return self.decoded_sparse(made, x) if isinstance(made, Sparse) else None

    def integer_product(self, made: Quantized, x: Tensor) -> Tensor:
        """Add the node of a product with integers."""
        assert isinstance(made.form, Integer), "the caller has asked"
        self.blocks.add(made.form.block)
        scales = made.encoded["scales"]
        scales = scales.to(x.dtype) if x.dtype == torch.float16 else scales
        inputs = (x, made.encoded["codes"], scales, *(() if made.bias is None else (made.bias,)))
        sizes = {"N": made.out_features, "K": made.in_features, "bits": made.form.bits, "block_size": made.form.block}
        return symbolic(f"{DOMAIN}::{PRODUCT}", inputs, sizes, x.dtype, (*x.shape[:-1], made.out_features))

    def decoded_quantized(self, made: Quantized, x: Tensor) -> Tensor:
        """Add the call of a function that decodes, and the product."""
        self.decoded.add(made.form.name)
        shape = (made.out_features, made.in_features)
        key = (made.form, shape)
        name = self.named(key, made.form.name, lambda name: decode_function(name, made.form, shape, self.opset))
        return product(name, tuple(made.encoded.values()), shape, x, made.bias)

    def decoded_sparse(self, made: Sparse, x: Tensor) -> Tensor:
        """Add the call of a function that spreads the numbers out, and the product."""
        self.decoded.add("sparse")
        by_position = made.support.dtype == torch.int32
        key = (made.kind, made.shape, made.count, by_position)
        kind, shape, count = made.kind, made.shape, made.count
        name = self.named(
            key, "sparse", lambda name: spread_function(name, kind, shape, count, self.opset, by_position=by_position)
        )
        return product(name, (made.values, made.support), shape, x, made.bias)

    def named(self, key: Any, word: str, make: Callable[[str], Any]) -> str:
        """Return the name of the function of a key."""
        return self.functions.setdefault(key, (f"{word}_{len(self.functions)}", make))[0]

    def settle(self, model: Any, form: Form, accuracy_level: int) -> list[str]:
        """Give the nodes of a file their final form, and add the functions. Returns what the user should know."""
        from onnx import helper

        settle_products(model, form, accuracy_level)
        model.functions.extend(make(name) for name, make in self.functions.values())
        used = {node.domain for node in model.graph.node}
        kept = [entry for entry in model.opset_import if entry.domain not in (DOMAIN, MICROSOFT)]
        del model.opset_import[:]
        model.opset_import.extend([*kept, *(helper.make_opsetid(d, 1) for d in (DOMAIN, MICROSOFT) if d in used)])
        notes = []
        if self.blocks:
            inputs = "inputs rounded to 8 bits" if accuracy_level == 4 else "float32 inputs, slower than dense"
            name = "MatMulNBits" if form == "matmul_nbits" else "DequantizeLinear and MatMul"
            notes.append(f"integer weights run packed by {name}, {inputs}")
        if self.decoded:
            notes.append(f"{', '.join(sorted(self.decoded))}: stored packed, decoded when the file is loaded, run dense")
        return notes

    def rounding(self, accuracy_level: int) -> float:
        """Return the relative error that a product adds because its inputs are rounded to 8 bits in blocks, at most.

        A number is rounded to a multiple of s = max|x| / 127 of its block: an error of standard deviation s / sqrt(12), and
        max|x| is at most sqrt(block) times the root mean square of the block.
        """
        return math.sqrt(max(self.blocks) / 12) / 127 if self.blocks and accuracy_level == 4 else 0.0


def has_product(made: Quantized) -> bool:
    """Say whether ONNX Runtime has a product for a format: integers in blocks of a power of two, 16 or more."""
    return isinstance(made.form, Integer) and made.form.block >= 16 and made.form.block & (made.form.block - 1) == 0


def symbolic(name: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], dtype: torch.dtype, shape: Any) -> Tensor:
    """Add a node of ONNX to the graph that is being exported."""
    import torch.onnx

    made: Tensor = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=1)
    return made


def product(name: str, packed: tuple[Tensor, ...], shape: tuple[int, int], x: Tensor, bias: Tensor | None) -> Tensor:
    """Add the call of a decoding function, and the product with what it gives."""
    weight = symbolic(f"{DOMAIN}::{name}", packed, {}, torch.float32, shape)
    return F.linear(x, weight.to(x.dtype), bias)


def settle_products(model: Any, form: Form, accuracy_level: int) -> None:
    """Turn every product with integers into the operators of a form."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    made: list[Any] = []
    changed: set[str] = set()
    for node in nodes:
        if node.domain != DOMAIN or node.op_type != PRODUCT:
            made.append(node)
            continue
        sizes = {
            attribute.name: attribute.i for attribute in node.attribute if attribute.name in ("N", "K", "bits", "block_size")
        }
        make = matmul_nbits if form == "matmul_nbits" else dequantized
        made += make(node, stored, sizes, accuracy_level)
        changed |= set(node.input[1:3])
    described = [value for value in model.graph.value_info if value.name not in changed]  # their sizes are others now
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(made)
    model.graph.value_info.extend(described)


def matmul_nbits(node: Any, stored: dict[str, Any], sizes: dict[str, int], accuracy_level: int) -> list[Any]:
    """Return a MatMulNBits; the packed tensors are only told their sizes."""
    from onnx import helper

    x, codes, scales, *bias = node.input
    blocks = -(-sizes["K"] // sizes["block_size"])
    resize(stored[codes], sizes["N"], blocks, sizes["block_size"] * sizes["bits"] // 8)
    if scales in stored:  # not where they are cast
        resize(stored[scales], sizes["N"], blocks)
    inputs = [x, codes, scales, *(["", "", *bias] if bias else [])]
    settings = sizes | {"accuracy_level": accuracy_level}
    return [helper.make_node("MatMulNBits", inputs, list(node.output), name=node.name, domain=MICROSOFT, **settings)]


def dequantized(node: Any, stored: dict[str, Any], sizes: dict[str, int], accuracy_level: int) -> list[Any]:
    """Return DequantizeLinear, MatMul and Add, the weight stored as (in_features, out_features) as the fast form wants it."""
    from onnx import TensorProto, helper, numpy_helper

    x, codes, scales, *bias = node.input
    N, K, bits, block = (sizes[name] for name in ("N", "K", "bits", "block_size"))
    blocks = -(-K // block)
    if stored[codes].data_type == TensorProto.UINT8:
        packed = numpy_helper.to_array(stored[codes])
        spread = packed if bits == 8 else np.stack([packed & 15, packed >> 4], 1)
        signed = (spread.reshape(N, blocks * block)[:, :K].astype(np.int16) - 2 ** (bits - 1)).T.reshape(-1)
        if bits == 4:
            signed = np.append(signed, 0)[: signed.size + signed.size % 2] & 15
            raw = (signed[::2] | signed[1::2] << 4).astype(np.uint8).tobytes()
        else:
            raw = signed.astype(np.int8).tobytes()
        kind = TensorProto.INT4 if bits == 4 else TensorProto.INT8
        stored[codes].CopyFrom(helper.make_tensor(codes, kind, [K, N], raw, raw=True))
        across = np.ascontiguousarray(numpy_helper.to_array(stored[scales]).reshape(N, blocks).T)
        stored[scales].CopyFrom(numpy_helper.from_array(across, scales))
    weight, result = f"{node.output[0]}_weight", f"{node.output[0]}_product" if bias else node.output[0]
    made = [
        helper.make_node("DequantizeLinear", [codes, scales], [weight], axis=0, block_size=block),
        helper.make_node("MatMul", [x, weight], [result]),
    ]
    return [*made, helper.make_node("Add", [result, *bias], list(node.output))] if bias else made


def resize(tensor: Any, *sizes: int) -> None:
    """Give a stored tensor other sizes for the same numbers."""
    del tensor.dims[:]
    tensor.dims.extend(sizes)

"""ONNX functions that decode a packed weight: what `NumberFormat.decode` and `Support.spread` compute, in ONNX's operators.

A function is stored once for every format and shape; a node calls it on the packed tensors, which the file keeps packed. It is
computed in float32. ONNX Runtime computes it once, when it loads a file.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrc.formats import BlockSupport, GroupSupport, Integer, NormalFloat, NumberFormat, Support, normalfloat_values
from lrc.formats.packing import FIELDS

DOMAIN = "lrc"


class Body:
    """The nodes of a function, in order."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        from onnx import helper

        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def constant(self, value: NDArray[Any] | Sequence[int]) -> str:
        """Add a constant; a sequence is one of int64."""
        from onnx import numpy_helper

        array = value if isinstance(value, np.ndarray) else np.asarray(value, np.int64)
        return self("Constant", value=numpy_helper.from_array(array))

    def number(self, value: float) -> str:
        """Add a float32 of no dimensions."""
        return self.constant(np.asarray(value, np.float32))

    def reshaped(self, x: str, *sizes: int) -> str:
        """Reshape."""
        return self("Reshape", x, self.constant(sizes))

    def cut(self, x: str, start: int, end: int, axis: int = 0) -> str:
        """Return x[start:end] along an axis."""
        return self("Slice", x, self.constant([start]), self.constant([end]), self.constant([axis]))

    def cast(self, x: str, kind: str) -> str:
        """Cast to `FLOAT` or `INT64`."""
        from onnx import TensorProto

        return self("Cast", x, to=int(getattr(TensorProto, kind)))

    def unpacked(self, packed: str, bits: int, count: int) -> str:
        """Return the codes (count,), int64, of `lrc.formats.packing`."""
        found, start, low = "", 0, bits
        for field in FIELDS[bits]:
            low -= field
            end = start + -(-count * field // 8)
            codes = packed if len(FIELDS[bits]) == 1 else self.cut(packed, start, end)
            if field < 8:
                shifts = self.constant(np.arange(0, 8, field, dtype=np.uint8))
                spread = self("BitShift", self.reshaped(codes, -1, 1), shifts, direction="RIGHT")
                mask = self.constant(np.asarray(2**field - 1, np.uint8))
                codes = self.cut(self.reshaped(self("BitwiseAnd", spread, mask), -1), 0, count)
            codes = self.cast(codes, "INT64")
            codes = self("Mul", codes, self.constant([2**low])) if low else codes
            found = self("Add", found, codes) if found else codes
            start = end
        return found


def packed_names(form: NumberFormat) -> tuple[str, ...]:
    """Return the packed tensors of a format, in the order that its function takes them."""
    return tuple(form.empty((1, 1)))


def decode_function(name: str, form: NumberFormat, shape: tuple[int, int], opset: int) -> Any:
    """Return the function of a format: packed tensors, in the order of `packed_names` -> the weight, float32.

    opset: that of the file, at least 18. Raises TypeError for a format that has none.
    """
    body, inputs = Body(), packed_names(form)
    if isinstance(form, NormalFloat):
        weight = normalfloat(body, form, shape)
    elif isinstance(form, Integer):
        rows, width = shape[0], -(-shape[1] // form.block) * form.block
        codes = body.cast(body.unpacked("codes", form.bits, rows * width), "FLOAT")
        blocks = body.reshaped(body("Sub", codes, body.number(2 ** (form.bits - 1))), -1, form.block)
        scales = body.reshaped(body.cast("scales", "FLOAT"), -1, 1)
        weight = body.cut(body.reshaped(body("Mul", blocks, scales), rows, width), 0, shape[1], axis=1)
    else:
        raise TypeError(f"the format {form.name} has no ONNX function")
    return function(name, inputs, body, weight, opset)


def normalfloat(body: Body, form: NormalFloat, shape: tuple[int, int]) -> str:
    """Add the nodes of `NormalFloat.decode`."""
    count = shape[0] * shape[1]
    blocks = -(-count // form.block)
    found = body("Gather", body.constant(normalfloat_values(form.bits).numpy()), body.unpacked("codes", form.bits, count))
    if blocks * form.block > count:
        found = body("Pad", found, body.constant([0, blocks * form.block - count]))
    if form.scale_bits is None:
        scales = body.cast("scales", "FLOAT")
    else:
        codes = body.cast(body.unpacked("scale_codes", form.scale_bits, blocks), "FLOAT")
        steps = body.reshaped(body.cast("steps", "FLOAT"), -1, 1)
        repeated = body.reshaped(body("Expand", steps, body.constant([1, form.super_block])), -1)
        above = body("Div", body("Mul", codes, body.cut(repeated, 0, blocks)), body.number(2**form.scale_bits - 1))
        scales = body("Add", "offset", above)
    weight = body("Mul", body.reshaped(found, blocks, form.block), body.reshaped(scales, blocks, 1))
    return body.reshaped(body.cut(body.reshaped(weight, -1), 0, count), *shape)


def spread_function(name: str, kind: Support, shape: tuple[int, int], count: int, opset: int, *, by_position: bool) -> Any:
    """Return the function of a support: values (count,) and the packed support -> the weight, float32."""
    body = Body()
    values = body.cast("values", "FLOAT")
    if isinstance(kind, GroupSupport):
        weight = groups(body, values, kind, shape, count)
    else:
        assert isinstance(kind, BlockSupport), "the supports are these"
        weight = blocks(body, values, kind, shape, count, by_position=by_position)
    return function(name, ("values", "support"), body, weight, opset)


def groups(body: Body, values: str, kind: GroupSupport, shape: tuple[int, int], count: int) -> str:
    """Add the nodes of `GroupSupport.spread`."""
    number, stored = count // kind.n, body.reshaped(values, count // kind.n, kind.n)
    if kind.index_bits is None:
        inside = body.reshaped(body.unpacked("support", 1, number * kind.m), number, kind.m)
        place = body("Sub", body("CumSum", inside, body.constant(np.asarray(1, np.int64))), body.constant([1]))
        found = body("GatherElements", stored, body("Max", place, body.constant([0])), axis=1)
        whole = body("Mul", found, body.cast(inside, "FLOAT"))
    else:
        place = body.reshaped(body.unpacked("support", kind.index_bits, count), number, kind.n)
        empty = body("ConstantOfShape", body.constant([number, kind.m]))
        whole = body("ScatterElements", empty, place, stored, axis=1)
    width = -(-shape[1] // kind.m) * kind.m
    return body.cut(body.reshaped(whole, shape[0], width), 0, shape[1], axis=1)


def blocks(body: Body, values: str, kind: BlockSupport, shape: tuple[int, int], count: int, *, by_position: bool) -> str:
    """Add the nodes of `BlockSupport.spread`."""
    down, across = -(-shape[0] // kind.rows), -(-shape[1] // kind.columns)
    number, stored = down * across, body.reshaped(values, count // kind.size, kind.size)
    if by_position or not count:
        empty = body("ConstantOfShape", body.constant([number, kind.size]))
        places = body.reshaped(body.cast("support", "INT64"), -1, 1)
        whole = body("ScatterND", empty, places, stored) if count else empty
    else:
        inside = body.unpacked("support", 1, number)
        place = body("Sub", body("CumSum", inside, body.constant(np.asarray(0, np.int64))), body.constant([1]))
        found = body("Gather", stored, body("Max", place, body.constant([0])), axis=0)
        whole = body("Mul", found, body.reshaped(body.cast(inside, "FLOAT"), -1, 1))
    grid = body("Transpose", body.reshaped(whole, down, across, kind.rows, kind.columns), perm=[0, 2, 1, 3])
    padded = body.reshaped(grid, down * kind.rows, across * kind.columns)
    return body.cut(body.cut(padded, 0, shape[0]), 0, shape[1], axis=1)


def function(name: str, inputs: Sequence[str], body: Body, output: str, opset: int) -> Any:
    """Return a function of this body."""
    from onnx import helper

    body.nodes.append(helper.make_node("Identity", [output], ["weight"]))
    return helper.make_function(DOMAIN, name, inputs, ["weight"], body.nodes, [helper.make_opsetid("", opset)])

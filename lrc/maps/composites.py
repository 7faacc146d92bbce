"""Maps made of maps: `Chain` (product), `Sum`, `Scale`."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrc.maps.base import (
    Affine,
    Cost,
    InParts,
    LinearMap,
    Slot,
    Structure,
    add,
    apply_slot,
    as_slot,
    exact_bias,
    slot_cost,
    slot_exact,
    slot_shape,
    slot_structure,
    slot_weight,
)
from lrc.maps.fused import chain_by_kernel, sum_by_kernel


class Composite(InParts):
    """A map with named slots, each a bare matrix or a map."""

    names: tuple[str, ...]

    def hold(self, names: Sequence[str], parts: Sequence[Tensor | LinearMap]) -> None:
        """Keep the parts under their names: matrices as parameters, maps as submodules."""
        self.names = tuple(names)
        for name, part in zip(names, parts, strict=True):
            setattr(self, name, as_slot(part))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The parts, in order."""
        return tuple(getattr(self, name) for name in self.names)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parts' numbers; of what they stand for where none of them stores any."""
        stored = (t.dtype for t in self.parameters() if t.is_floating_point())
        return next(stored, None) or self.slots[0].dtype

    @property
    def spatial(self) -> int:
        """The spatial dimensions of the parts; those that act on every number alone know of none."""
        return max(slot.spatial if isinstance(slot, LinearMap) else 0 for slot in self.slots)

    def obstacle(self) -> str | None:
        """Return why one of the parts stands for no weight, or None."""
        found = (slot.obstacle() for slot in self.slots if isinstance(slot, LinearMap))
        return next((reason for reason in found if reason is not None), None)

    def exact_parts(self) -> list[Affine]:
        """Return what the parts stand for, in float64, on one device: a part without numbers does not know where it is."""
        device = next((t.device for t in self.parameters()), None)
        return [Affine(weight.to(device), bias) for weight, bias in map(slot_exact, self.slots)]

    def cost(self, tokens: int = 1) -> Cost:
        """Return the sum over the parts."""
        return sum((slot_cost(slot, tokens) for slot in self.slots), self.bias_cost(tokens))

    def structure(self) -> Structure:
        """Return the structures of the parts."""
        parts = [slot_structure(slot) for slot in self.slots]
        return {"map": self.word, "names": list(self.names), "parts": parts, "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "LinearMap":
        """Return an uninitialised map; `lrc.maps.restore` has put the restored parts in the structure."""
        made = cls(*structure["parts"], names=structure["names"])
        if structure["bias"]:
            made.set_bias(torch.empty(made.out_features))
        return made


def chain_names(count: int) -> tuple[str, ...]:
    """Return B, A for two parts, B, R, A for three, B, R1, R2, A for four, and so on."""
    if count <= 2:
        return ("B", "A")[:count]
    middle = ("R",) if count == 3 else tuple(f"R{i}" for i in range(1, count - 1))
    return ("B", *middle, "A")


class Chain(Composite):
    """The product of its parts, the last one applied first: `Chain(B, A)` is x -> B (A x) + bias."""

    word: ClassVar[str] = "chain"

    def __init__(self, *parts: Tensor | LinearMap, bias: Tensor | None = None, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.hold(names or chain_names(len(parts)), parts)
        shapes = [slot_shape(slot) for slot in self.slots]
        for (_, left), (right, _) in pairwise(shapes):
            if left != right:
                raise ValueError(f"a chain of shapes {shapes} does not fit together")
        self.out_features, self.in_features = shapes[0][0], shapes[-1][1]
        self.set_bias(bias)

    def forward(self, x: Tensor, *inputs: Any, **context: Any) -> Tensor:
        """Apply to (..., in_features). inputs: what the map that is applied first takes beside x (the offsets of bags)."""
        found = None if inputs or context else chain_by_kernel(self.slots, x, self.bias)
        if found is not None:
            return found
        first, *rest = self.slots
        for slot in reversed(rest):
            x, inputs = apply_slot(slot, x, None, context, inputs=inputs), ()
        return apply_slot(first, x, self.bias, context, self.spatial, inputs)

    def scaled(self, x: Tensor, scale: float, context: Mapping[str, Any]) -> Tensor:
        """Return `scale` times what the map gives: in front of the outermost matrix, whose input is the narrower one."""
        first, *rest = self.slots
        if isinstance(first, LinearMap) or self.bias is not None or not rest:
            y: Tensor = self(x, **context)
            return scale * y
        for slot in reversed(rest):
            x = apply_slot(slot, x, None, context)
        return apply_slot(first, scale * x, None, context)

    def exact(self) -> Affine:
        """Return the product and the bias in float64."""
        *others, (weight, bias) = self.exact_parts()
        for left, own in reversed(others):
            weight, bias = left @ weight, add(None if bias is None else left @ bias, own)
        return Affine(weight, add(bias, exact_bias(self.bias)))

    def matrix(self) -> Tensor:
        """Return the product."""
        weight = slot_weight(self.slots[-1])
        for slot in reversed(self.slots[:-1]):
            weight = slot_weight(slot) @ weight
        return weight

    def __repr__(self) -> str:
        trained = {isinstance(slot, LinearMap) or slot.requires_grad for slot in self.slots}
        if len(trained) > 1 or any(isinstance(slot, LinearMap) for slot in self.slots):
            return f"Chain({', '.join(_text(slot) for slot in self.slots)})"
        sizes = [slot_shape(slot)[0] for slot in self.slots] + [self.in_features]
        return f"Chain[{','.join(map(str, sizes))}]{self.mark()}"


class Sum(Composite):
    """The sum of its parts, all of one shape, plus a bias."""

    word: ClassVar[str] = "sum"

    def __init__(self, *parts: Tensor | LinearMap, bias: Tensor | None = None, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.hold(names or tuple(f"term{i}" for i in range(len(parts))), parts)
        shapes = {slot_shape(slot) for slot in self.slots}
        if len(shapes) != 1:
            raise ValueError(f"the terms of a sum have the shapes {sorted(shapes)}")
        self.out_features, self.in_features = shapes.pop()
        self.set_bias(bias)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features)."""
        found = None if context else sum_by_kernel(self.slots, x, self.bias)
        if found is not None:
            return found
        first, *rest = self.slots
        y = apply_slot(first, x, self.bias, context, self.spatial)
        for slot in rest:
            y = y + apply_slot(slot, x, None, context)
        return y

    def exact(self) -> Affine:
        """Return the sum and the bias in float64."""
        (weight, bias), *others = self.exact_parts()
        for more, own in others:
            weight, bias = weight + more, add(bias, own)
        return Affine(weight, add(bias, exact_bias(self.bias)))

    def matrix(self) -> Tensor:
        """Return the sum."""
        first, *rest = self.slots
        return sum((slot_weight(slot) for slot in rest), slot_weight(first))

    def __repr__(self) -> str:
        return f"Sum({', '.join(_text(slot) for slot in self.slots)})"


class Scale(Composite):
    """A constant times a map: x -> scale (inner x) + bias."""

    word: ClassVar[str] = "scale"

    def __init__(
        self,
        inner: Tensor | LinearMap,
        scale: float = 1.0,
        bias: Tensor | None = None,
        names: Sequence[str] = ("inner",),
    ) -> None:
        super().__init__()
        self.hold(names, (inner,))
        self.scale = scale
        self.out_features, self.in_features = slot_shape(self.slots[0])
        self.set_bias(bias)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features)."""
        inner = self.slots[0]
        if self.scale == 1.0:
            y = apply_slot(inner, x, None, context)
        elif isinstance(inner, Chain):
            y = inner.scaled(x, self.scale, context)
        else:
            y = self.scale * apply_slot(inner, x, None, context)
        return self.plus(y, self.bias)

    def matrix(self) -> Tensor:
        """Return the scaled weight."""
        return self.scale * slot_weight(self.slots[0])

    def exact(self) -> Affine:
        """Return the scaled weight and the bias in float64."""
        weight, bias = slot_exact(self.slots[0])
        return Affine(self.scale * weight, add(None if bias is None else self.scale * bias, exact_bias(self.bias)))

    def structure(self) -> Structure:
        """Return the structure of the inner map and the constant."""
        return super().structure() | {"scale": self.scale}

    @classmethod
    def restored(cls, structure: Structure) -> "LinearMap":
        """Return an uninitialised map."""
        made = super().restored(structure)
        assert isinstance(made, Scale)
        made.scale = float(structure["scale"])
        return made

    def __repr__(self) -> str:
        return f"Scale({self.scale:g}, {_text(self.slots[0])})"


def _text(slot: Slot) -> str:
    if isinstance(slot, LinearMap):
        return repr(slot)
    return f"Dense[{slot.shape[0]},{slot.shape[1]}]{'' if slot.requires_grad else '*'}"

"""How many rows a site's weight multiplies: from the graph's traced shapes, at the shapes of the calibration or chosen ones."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx

from lrc.errors import SiteError, UsageError
from lrc.program import Program, Site
from lrc.spec.base import SpecModel

Shapes = Mapping[str, tuple[int, ...]]


class Workload(SpecModel):
    """Shapes that a budget of FLOPs or time counts at; what is not given is as in the calibration."""

    batch: int | None = Field(default=None, ge=1, description="Samples that run together.")
    length: int | None = Field(default=None, ge=1, description="Tokens a sample.")

    def sizes(self) -> dict[str, int]:
        """Return what is given, by the names of dynamic sizes."""
        given = {"batch": self.batch, "sequence": self.length}
        return {name: size for name, size in given.items() if size is not None}


def shapes_at(program: Program, batches: Iterable[Mapping[str, Tensor]], at: Workload) -> list[Shapes]:
    """Return the shapes of every batch of inputs, with the sizes that `at` gives.

    Raises UsageError for a size that the captured graph does not take.
    """
    dynamic, largest, sizes = program.inputs.dynamic, program.inputs.largest, at.sizes()
    known = {name for dims in dynamic.values() for name in dims.values()}
    for name, size in sizes.items():
        option = f"at.{'length' if name == 'sequence' else name}"
        if name not in known:
            hint = f"Capture the model with a dynamic {name}, or leave `{option}` out"
            raise UsageError(option, message=f"the captured graph has no dynamic {name}", hint=hint)
        if size > largest.get(name, size):
            raise UsageError(option, expected=f"at most {largest[name]}, the model's largest", got=str(size))
    found: list[Shapes] = []
    for batch in batches:
        shapes = {name: list(value.shape) for name, value in program.inputs.fill(batch).items()}
        for name, dims in dynamic.items():
            for dim, size_name in dims.items():
                shapes[name][dim] = sizes.get(size_name, shapes[name][dim])
        found.append({name: tuple(shape) for name, shape in shapes.items()})
    return found


def typical(shapes: Sequence[Shapes]) -> Shapes:
    """Return the shapes of the middle one of all batches by the numbers that they hold; of two, the larger."""
    order = sorted(shapes, key=lambda of_batch: sum(map(prod, of_batch.values())))
    return order[len(order) // 2]


def samples_in(program: Program, shapes: Shapes) -> int:
    """Return how many samples a batch of these shapes has: the size called `batch`, else the first of the first input."""
    for name, dims in program.inputs.dynamic.items():
        for dim, size_name in dims.items():
            if size_name == "batch":
                return shapes[name][dim]
    first = next(iter(shapes.values()), ())
    return first[0] if first else 1


def shapes_per_use(program: Program, site: Site, shapes: Shapes) -> tuple[tuple[int, ...], ...]:
    """Return the shape of what every use of a site reads, for inputs of these shapes.

    Raises SiteError where it depends on the data, was not traced, or does not tell how much is read.
    """
    if site.looped:
        raise SiteError(
            site.fqn, message="its time is that of a loop, step by step", hint="Choose a budget of parameters, size or FLOPs, "
            "or ignore the site",
        )  # fmt: skip
    if site.kind == "experts":
        raise SiteError(
            site.fqn, message="its time depends on how many rows each expert gets",
            hint="Choose a budget of parameters or size",
        )  # fmt: skip
    if any(use.context for use in site.uses):
        raise SiteError(
            site.fqn, message="its time depends on how large the bags are", hint="Choose a budget of parameters or size",
        )  # fmt: skip
    bound = bound_sizes(program, shapes)
    return tuple(_shape(program.nodes[use.input], bound, site.fqn) for use in site.uses if use.layout is None)


def rows_per_sample(program: Program, site: Site, shapes: Sequence[Shapes]) -> float:
    """Return the rows that all uses of a site give for one sample, over several batches: tokens, or positions of an image.

    Lookups in a head's weight are not counted: they cost next to nothing beside the head.
    """
    numbers = 0
    for of_batch in shapes:
        bound = bound_sizes(program, of_batch)
        numbers += sum(prod(_shape(program.nodes[use.gives], bound, site.fqn)) for use in site.uses if use.layout is None)
    return numbers / site.out_features / sum(samples_in(program, of_batch) for of_batch in shapes)


def bound_sizes(program: Program, shapes: Shapes) -> dict[Any, int]:
    """Return what the symbols of the traced inputs stand for."""
    bound: dict[Any, int] = {}
    for node in program.graph_module.graph.find_nodes(op="placeholder"):
        traced = node.meta.get("val")
        for size, actual in zip(traced.shape if isinstance(traced, Tensor) else (), shapes[str(node.target)], strict=False):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                bound[size.node.expr] = actual
    return bound


def _shape(node: fx.Node, bound: Mapping[Any, int], fqn: str) -> tuple[int, ...]:
    traced = node.meta.get("val")
    if not isinstance(traced, Tensor):
        raise SiteError(fqn, message="the shapes around it were not traced", hint="Choose a budget of parameters or size")
    sizes = []
    for size in traced.shape:
        value = size.node.expr.subs(bound) if isinstance(size, torch.SymInt) else size
        if not isinstance(value, int) and not value.is_Integer:
            raise SiteError(
                fqn,
                message=f"how many rows it sees depends on the data ({size})",
                hint="Choose a budget of parameters or size, or ignore the site",
            )
        sizes.append(int(value))
    return tuple(sizes)

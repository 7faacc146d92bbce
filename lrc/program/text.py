"""A program as text: one short line a node, in graph order, the same on every run and machine.

%x: f32[batch, 6] = input
%h: f32[batch, 2] = linear(%x, fc.A: f32[2, 6])                   # factorize @ fc
%y: f32[batch, 4] = linear(%h, fc.B: f32[4, 2], fc.bias: f32[4])  # factorize @ fc
return y=%y
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lrc.maps import LinearMap, RmsNorm
from lrc.maps.recurrence import Recurrence
from lrc.program.find import plain_name

if TYPE_CHECKING:
    from lrc.program.program import Program

DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip
NAMES = {  # what we call an operation, whatever torch calls it
    "view": "reshape", "unsafe_view": "reshape", "t": "transpose", "numpy_T": "transpose", "permute": "permute",
    "scaled_dot_product_attention": "attention", "sym_size": "size", "sym_numel": "numel", "to": "cast",
    "cat": "concat", "index_select": "gather", "gathered": "gather", "ge": "greater_equal", "le": "less_equal",
    "gt": "greater", "lt": "less",
    "ne": "not_equal", "eq": "equal", "bitwise_and": "and", "bitwise_or": "or", "bitwise_not": "not", "truediv": "div",
}  # fmt: skip
SILENT = {  # arguments that say nothing about the mathematics
    "layout", "device", "pin_memory", "implicit", "max_norm", "norm_type", "scale_grad_by_freq", "sparse",
}  # fmt: skip
HIDDEN = ("assert", "sym_constrain", "lazy_load", "enter_autocast")


def program_text(program: "Program") -> str:
    """Return the graph with the sites written out as the operations of their maps."""
    return "\n".join(_Writer(program).lines()) + "\n"


class _Writer:
    def __init__(self, program: "Program") -> None:
        self.program = program
        self.symbols = _symbols(program)
        self.tensors = program.tensors() | dict(program.graph_module.named_parameters(remove_duplicate=False))
        self.values: dict[fx.Node, str] = {}
        self.count = 0

    def lines(self) -> Iterator[str]:
        modules = {use.module: site.fqn for site in self.program.sites.values() for use in site.uses}
        for node in self.program.graph_module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = f"%{node.target}"
                yield f"%{node.target}: {self.type_of(node)} = input"
            elif node.op == "get_attr":
                self.values[node] = self.stored(str(node.target))
            elif node.op == "output":
                returned = ", ".join(f"{name}={self.value(value)}" for name, value in node.args[0].items())
                yield f"return {returned}"
            elif node.op == "call_module":
                yield from self.map_lines(node, modules.get(str(node.target), ""))
            elif not plain_name(node.target).startswith(HIDDEN):
                yield self.line(node, self.values, "")

    def stored(self, name: str) -> str:
        tensor = self.tensors.get(name)
        return name if tensor is None else f"{name}: {self.type_text(tensor)}"

    def map_lines(self, node: fx.Node, fqn: str) -> Iterator[str]:
        """Yield the operations of the map that a node calls, as tracing it shows them."""
        made = self.program.graph_module.get_submodule(str(node.target))
        fqn = fqn or str(node.target)
        by = self.program.made_by.get(fqn, "")
        note = f"# {by} @ {fqn}" if by else f"# {fqn}"
        if isinstance(made, RmsNorm):
            yield self.norm_line(node, made, note)
            return
        if isinstance(made, Recurrence):
            yield self.loop_line(node, made, note)
            return
        traced = _trace(made, node)
        given = iter([node.args[0], *node.kwargs.values()])
        inner: dict[fx.Node, str] = {}
        for step in traced.nodes:
            if step.op == "placeholder":
                inner[step] = self.value(next(given))
            elif step.op == "get_attr":
                inner[step] = self.stored(f"{node.target}.{step.target}")
            elif step.op == "output":
                self.values[node] = inner[step.args[0]]
            else:
                yield self.line(step, inner, note)

    def norm_line(self, node: fx.Node, made: RmsNorm, note: str) -> str:
        """Return the line of a norm without numbers."""
        name = f"%{self.count}"
        self.count += 1
        self.values[node] = name
        constants = f"features={made.features}, eps={made.eps:g}"
        return f"{name}: {self.type_of(node)} = rms_norm({self.value(node.args[0])}, {constants})  {note}"

    def loop_line(self, node: fx.Node, made: Recurrence, note: str) -> str:
        """Return the line of a loop over time: what it reads, and the tensors of its map."""
        name = f"%{self.count}"
        self.count += 1
        self.values[node] = name
        reads = [self.value(read) for read in (node.args[0], *node.kwargs.values())]
        held = [self.stored(f"{node.target}.{key}") for key in made.state_dict()]
        back = ", reverse" if made.cell.reverse else ""
        return f"{name}: {self.type_of(node)} = {made.cell.kind}_loop({', '.join([*reads, *held])}{back})  {note}"

    def line(self, node: fx.Node, values: dict[fx.Node, str], note: str) -> str:
        name = f"%{self.count}"
        self.count += 1
        values[node] = name
        operation = plain_name(node.target)
        args = list(node.args)
        while args and args[-1] is None:
            args.pop()
        arguments = [self.value(arg, values) for arg in args]
        arguments += [f"{key}={self.value(arg, values)}" for key, arg in node.kwargs.items() if key not in SILENT]
        text = f"{name}: {self.type_of(node)} = {NAMES.get(operation, operation)}({', '.join(arguments)})"
        return f"{text}  {note}" if note else text

    def value(self, value: Any, values: dict[fx.Node, str] | None = None) -> str:
        if isinstance(value, fx.Node):
            return (values or self.values)[value]
        if isinstance(value, list | tuple):
            return "[" + ", ".join(self.value(part, values) for part in value) + "]"
        if isinstance(value, torch.dtype):
            return DTYPES.get(value, str(value))
        if isinstance(value, int) and not isinstance(value, bool) and value == 2**63 - 1:
            return "end"
        return str(value)

    def type_of(self, node: fx.Node) -> str:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return self.type_text(value)
        return "int" if isinstance(value, torch.SymInt | int) else "list" if isinstance(value, list | tuple) else "value"

    def type_text(self, tensor: Tensor) -> str:
        sizes = ", ".join(self.size(size) for size in tensor.shape)
        return f"{DTYPES.get(tensor.dtype, str(tensor.dtype))}[{sizes}]"

    def size(self, size: Any) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        expression = size.node.expr
        return str(expression.subs(self.symbols))


def _symbols(program: "Program") -> dict[Any, Any]:
    """Return the names of the dynamic sizes for the symbols that torch.export chose."""
    import sympy  # type: ignore[import-untyped]  # it has no annotations; torch depends on it

    found: dict[Any, Any] = {}
    for node in program.graph_module.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, Tensor):
            continue
        for dim, name in program.inputs.dynamic.get(str(node.target), {}).items():
            size = value.shape[dim]
            if isinstance(size, torch.SymInt):
                found[size.node.expr] = sympy.Symbol(name, integer=True, positive=True)
    return found


def _trace(made: torch.nn.Module, node: fx.Node) -> fx.Graph:
    """Return the operations of the map that a node calls, each with the traced value that it would give for what is read."""
    assert isinstance(made, LinearMap)
    graph = _MapTracer(node.kwargs).trace(made)
    reads = [node.args[0], *node.kwargs.values()]
    values = [read.meta.get("val") if isinstance(read, fx.Node) else None for read in reads]
    if all(isinstance(value, Tensor) for value in values):
        mode = getattr(values[0], "fake_mode", None) or FakeTensorMode(allow_non_fake_inputs=True)
        previous, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
        try:
            with mode:  # or torch's linear wants sizes that are numbers, where a constant is given rows that are not contiguous
                _Shapes(fx.GraphModule(made, graph)).run(*values)
        finally:
            mode.allow_non_fake_inputs = previous
    return graph


class _MapTracer(fx.Tracer):
    """Traces through the maps inside a composite, down to torch functions. context: the names of what a map takes beside x."""

    def __init__(self, context: Iterable[str]) -> None:
        super().__init__(param_shapes_constant=True)
        self.context = tuple(context)

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        """Trace into every map."""
        return not isinstance(m, LinearMap)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Give `x`, and of the maps' `**context` what the node gives."""
        x, *others = (self.create_proxy("placeholder", name, (), {}) for name in ("x", *self.context))
        given = dict(zip(self.context, others, strict=True))
        return lambda root, value: root_fn(root, value, **given), [self.root, x]


class _Shapes(fx.Interpreter):
    """Runs a map on traced values and keeps what each step gives."""

    def run_node(self, n: fx.Node) -> Any:
        """Keep the value as the node's `val`."""
        value = super().run_node(n)
        n.meta["val"] = value
        return value

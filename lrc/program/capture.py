"""From a module, an exported program or an FX graph to a `Program`."""

import io
import re
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]  # it has no annotations; torch depends on it
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrc.errors import CaptureError
from lrc.program.archive import check_archive
from lrc.program.inputs import Dynamic, Inputs, leading_batch, output_names
from lrc.program.parts import split_weights
from lrc.program.program import Calling, Origin, Program
from lrc.program.sites import Names

ATTEMPTS = 4
Given = Mapping[str, Any] | Sequence[Any] | Tensor


def capture_module(
    model: nn.Module,
    inputs: Given,
    *,
    dynamic: Dynamic | None = None,
    largest: Mapping[str, int] | None = None,
    constants: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
) -> Program:
    """Capture a module in eval mode, without gradients; the program shares the module's tensors.

    inputs: example inputs by name, or as positional arguments. dynamic: input -> dimension -> name of the size; left out,
    the first dimension of all inputs is `batch` where they agree on a size of at least 2. constants: further arguments that
    are no tensors. The module's mode is restored. Raises CaptureError that names what torch.export refused, and where.
    """
    examples, extra = by_name(model, inputs)
    extra |= dict(constants or {})
    spec = Inputs(examples, leading_batch(examples) if dynamic is None else dynamic, largest or {})
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        exported, spec = _export(model, spec, extra)
    finally:
        for module, mode in training.items():
            module.training = mode
    origin = origin or Origin(name=type(model).__name__)
    program = capture_exported(exported, origin=replace(origin, model=model), inputs=spec)
    takes = signature(model.forward).parameters
    defaults = {name: p.default for name, p in takes.items() if p.default is not p.empty and name not in examples}
    program.calling = replace(program.calling, positional=tuple(takes), baked={**defaults, **program.calling.baked})
    return program


def _export(model: nn.Module, spec: Inputs, extra: Mapping[str, Any]) -> tuple[torch.export.ExportedProgram, Inputs]:
    """Export a module; a size that the model bounds or fixes is bounded or fixed as torch.export suggests."""
    for _ in range(ATTEMPTS):
        shapes = spec.dims() | dict.fromkeys(extra)
        try:
            with torch.no_grad(), redirect_stderr(io.StringIO()), quiet_recurrence():  # torch prints half of what it refuses
                kwargs = {**spec.examples, **extra}
                return torch.export.export(model, (), kwargs=kwargs, dynamic_shapes=shapes, strict=False), spec
        except Exception as error:  # a model's own code may raise anything
            if is_interrupt(error):
                raise KeyboardInterrupt from error
            narrowed = narrow(spec, str(error))
            if narrowed is None:
                raise refused(error, type(model).__name__) from error
            spec = narrowed
    raise CaptureError(type(model).__name__, message="torch.export finds no range of sizes that it accepts")


@contextmanager
def quiet_recurrence() -> Iterator[None]:
    """Keep torch's warning off the terminal that its own recurrent layers hold a list of their weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights", category=UserWarning)
        yield


def narrow(spec: Inputs, refusal: str) -> Inputs | None:
    """Return the inputs with the bounds that torch.export's refusal suggests, or None where it suggests none."""
    bounds = {name: int(top) for name, top in re.findall(r"(\w+) = Dim\('\w+'.*?max=(\d+)\)", refusal)}
    fixed = set(re.findall(r"^ +(\w+) = \d+$", refusal, re.MULTILINE))
    bounds = {name: top for name, top in bounds.items() if top < spec.largest.get(name, top + 1)}
    dynamic = {name: {dim: size for dim, size in dims.items() if size not in fixed} for name, dims in spec.dynamic.items()}
    if not bounds and dynamic == spec.dynamic:
        return None
    return Inputs(spec.examples, dynamic, {**spec.largest, **bounds})


def capture_exported(
    exported: torch.export.ExportedProgram, *, origin: Origin | None = None, inputs: Inputs | None = None
) -> Program:
    """Make a program of what `torch.export.export` returned, also after `run_decompositions`."""
    module = exported.module(check_guards=False)
    stored = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    names = Names.of(stored | split_weights(module, graph))
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    positional, keyword = argument_names(in_spec, [str(node.target) for node in graph.find_nodes(op="placeholder")])
    baked = {str(node.target): node.meta.get("val") for node in graph.find_nodes(op="placeholder") if not _is_tensor(node)}
    calling = Calling(positional, keyword, out_spec, _flatten(graph, output_names(out_spec)), baked)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in names.canonical:
            node.target = names.canonical[node.target]
    made = fx.GraphModule(module, graph)
    found = inputs or _inputs_of(exported, graph)
    placeholders = [str(node.target) for node in graph.find_nodes(op="placeholder")]  # `input_1` is called `input`
    found = replace(found, examples={name: found.examples[name] for name in placeholders})
    return Program(made, found, names, calling, origin or Origin(name="exported program"))


def capture_graph(graph_module: fx.GraphModule, inputs: Given, *, dynamic: Dynamic | None = None) -> Program:
    """Capture an FX graph of torch functions and modules, as `symbolic_trace` makes it, by exporting it."""
    return capture_module(graph_module, inputs, dynamic=dynamic, origin=Origin(name="graph module"))


def load_exported(path: Path) -> Program:
    """Read a `.pt2` file. Raises CaptureError when it is none, or holds pickled objects."""
    check_archive(path)
    try:
        exported = torch.export.load(path)
    except Exception as error:  # torch raises many kinds here, and the file is not ours
        raise CaptureError(
            str(path),
            expected="a program saved by torch.export.save",
            got=_first_line(error),
            hint="A program that returns transformers' output classes needs `import transformers` first; "
            "an AOTInductor package holds no graph: give the model that it was made from",
        ) from error
    return capture_exported(exported, origin=Origin(name=path.stem))


def by_name(model: nn.Module, inputs: Given) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return example inputs by the names of `forward`'s parameters: the tensors, and all others."""
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    else:
        positional = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        try:
            bound = signature(model.forward).bind(*positional)
        except TypeError as error:
            raise CaptureError(type(model).__name__, message=f"the example inputs do not fit `forward`: {error}") from error
        named = {}
        for name, value in bound.arguments.items():
            named |= value if isinstance(value, dict) else {name: value}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in named.items() if not isinstance(value, Tensor)}
    for name, value in others.items():
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            raise CaptureError(
                type(model).__name__,
                expected="inputs that are tensors",
                got=f"`{name}`, a {type(value).__name__} of them",
                hint="Capture a module whose `forward` takes each one by name",
            )
    if not tensors:
        raise CaptureError(type(model).__name__, expected="example inputs", got="no tensor", hint="Give `inputs=`")
    return tensors, others


def argument_names(spec: pytree.TreeSpec, leaves: Sequence[str]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return the names of the leaves that arguments by position stand for, and those of every argument by name."""
    args, kwargs = spec.children()
    rest = iter(leaves[args.num_leaves :])
    keyword = {name: tuple(islice(rest, tree.num_leaves)) for name, tree in zip(kwargs.context, kwargs.children(), strict=True)}
    return tuple(leaves[: args.num_leaves]), keyword


def _flatten(graph: fx.Graph, outputs: Sequence[str]) -> dict[int, Any]:
    """Give the graph plain tensor inputs and a mapping of named tensors as output. Returns the other outputs, by place."""
    fixed: dict[int, Any] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and not _is_tensor(node):
            if node.users:
                raise CaptureError(node.name, expected="tensor inputs", got=type(node.meta.get("val")).__name__)
            graph.erase_node(node)
        elif node.op == "output":
            returned = pytree.tree_leaves(node.args[0])
            fixed = {i: value for i, value in enumerate(returned) if not _is_tensor(value)}
            node.args = ({name: value for name, value in zip(outputs, returned, strict=True) if _is_tensor(value)},)
    computed = [outputs[i] for i, value in fixed.items() if isinstance(value, fx.Node)]
    if computed:
        raise CaptureError(computed[0], expected="outputs that are tensors", got="a size", hint="Return it as a tensor")
    return fixed


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def _inputs_of(exported: torch.export.ExportedProgram, graph: fx.Graph) -> Inputs:
    """Read examples and dynamic sizes off an exported program whose maker we do not know."""
    symbols: dict[str, str] = {}
    largest: dict[str, int] = {}
    dynamic: dict[str, dict[int, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        sizes: list[int] = []
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                symbol = str(size.node.expr)
                known = "batch" if dim == 0 and "batch" not in symbols.values() else f"size{len(symbols)}"
                if dim == 1 and symbol not in symbols and "sequence" not in symbols.values():
                    known = "sequence"
                name = symbols.setdefault(symbol, known)
                bounds = exported.range_constraints.get(size.node.expr)
                if bounds is not None and str(bounds.upper).isdigit():  # infinity is not
                    largest[name] = int(bounds.upper)
                dynamic.setdefault(str(node.target), {})[dim] = name
                sizes.append(int(size.node.hint) if size.node.hint is not None else 2 + list(symbols).index(symbol))
            else:
                sizes.append(int(size))
        shapes[str(node.target)] = tuple(sizes)
    examples: dict[str, Tensor] = {}
    given = [t for t in pytree.tree_leaves(exported.example_inputs) if isinstance(t, Tensor)]
    for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        name, value = str(node.target), node.meta["val"]
        if i < len(given) and given[i].shape == shapes[name]:
            examples[name] = given[i]
        elif value.dtype.is_floating_point:
            generator = torch.Generator().manual_seed(i)
            examples[name] = torch.randn(shapes[name], generator=generator, dtype=torch.float32).to(value.dtype)
        else:
            examples[name] = torch.ones(shapes[name], dtype=value.dtype)
    return Inputs(examples, dynamic, largest)


def refused(error: BaseException, name: str) -> CaptureError:
    """Return the error of a capture that torch.export refused, with the line of the model's code where it stopped."""
    frames = traceback.extract_tb(error.__traceback__)
    skipped = (str(Path(torch.__file__).parent), str(Path(sympy.__file__).parent), str(Path(__file__).parent), "<")
    library = sysconfig.get_path("stdlib")
    outside = [
        f for f in frames
        if not f.filename.startswith(skipped)
        and ("site-packages" in f.filename or not f.filename.startswith(library))
        and f.name != "forward_no_grad"
    ]  # fmt: skip
    place = ""
    if outside:
        last = outside[-1]
        place = f"{Path(last.filename).name}:{last.lineno}: `{(last.line or '').strip()}`"
    return CaptureError(
        f"{name}{' at ' + place if place else ''}",
        message=f"torch.export refused the model: {type(error).__name__}: {_first_line(error)}",
        hint="Rewrite that line without control flow that depends on values, or compile the part of the model around it",
    )


def is_interrupt(error: BaseException | None) -> bool:
    """Say whether an error hides a Ctrl-C: Python wraps what is raised while a class is being made, as imports do."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__
    return False


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]

"""The values that a graph was traced with, made again after an edit has changed their shapes."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from lrc.program.late import compiled
from lrc.program.program import Program


def refresh_values(program: Program, edited: Collection[fx.Node]) -> None:
    """Let every node's `val` be what it gives now. Raises what torch does where shapes do not fit.

    edited: operators whose own arguments were changed. Those that were not, and read what they read before, are not called:
    what they gave is what they give, and some (an LSTM, a trilinear product) cannot be called on sizes that are not known.
    """
    compiled(program.graph_module)
    nodes = list(program.graph_module.graph.nodes)
    given = [node.meta.get("val") for node in nodes if node.op == "placeholder"]
    mode = next((value.fake_mode for value in given if isinstance(value, Tensor) and hasattr(value, "fake_mode")), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    previous, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with mode:
            _Refresh(program.graph_module, set(edited)).run(*given, enable_io_processing=False)
    finally:
        mode.allow_non_fake_inputs = previous


class _Refresh(fx.Interpreter):
    """Runs what may have changed. changed: nodes that were edited or give values of another form than before."""

    def __init__(self, module: fx.GraphModule, changed: set[fx.Node]) -> None:
        super().__init__(module)
        self.changed = changed

    def run_node(self, n: fx.Node) -> Any:
        """Keep the value as the node's `val`."""
        before = n.meta.get("val")
        if n.op == "call_function" and before is not None and not self.changed & {n, *n.all_input_nodes}:
            return before
        value = super().run_node(n)
        if n.op in ("call_function", "call_module"):
            n.meta["val"] = value
        if n.op != "placeholder" and form(value) != form(before):
            self.changed.add(n)
        return value


def form(value: Any) -> list[str]:
    """Return the sizes and types of the tensors in a value; what is none as text, which asks nothing of sizes not known."""
    return [f"{leaf.dtype}{tuple(leaf.shape)}" if isinstance(leaf, Tensor) else str(leaf) for leaf in pytree.tree_leaves(value)]

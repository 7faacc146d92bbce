"""The values that a graph was traced with, made again after an edit has changed their shapes."""

from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lrc.program.late import compiled
from lrc.program.program import Program


def refresh_values(program: Program) -> None:
    """Let every node's `val` be what it gives now. Raises what torch does where shapes do not fit."""
    compiled(program.graph_module)
    nodes = list(program.graph_module.graph.nodes)
    given = [node.meta.get("val") for node in nodes if node.op == "placeholder"]
    mode = next((value.fake_mode for value in given if isinstance(value, Tensor) and hasattr(value, "fake_mode")), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    previous, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with mode:
            _Refresh(program.graph_module).run(*given, enable_io_processing=False)
    finally:
        mode.allow_non_fake_inputs = previous


class _Refresh(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        """Keep the value as the node's `val`."""
        value = super().run_node(n)
        if n.op in ("call_function", "call_module"):
            n.meta["val"] = value
        return value

"""A program as a module that is called, and answers, as the captured one was."""

from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from lrc.program.program import Program


class Callable_(nn.Module):  # noqa: N801 - not for users; its class name shows in a repr only
    """A program as a module: the graph's own tree of parameters, called and answering as the captured module did."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        for name, child in program.graph_module.named_children():
            self.add_module(name, child)
        for name, parameter in program.graph_module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in program.graph_module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._program = (program,)  # in a tuple, so that its parameters are not registered a second time

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; the result has the type that the captured module returned."""
        program = self._program[0]
        outputs = program(*args, **kwargs)
        spec, fixed = program.calling.out_spec, program.calling.fixed
        if spec is None:
            return outputs
        tensors = iter(outputs.values())
        leaves = [fixed[i] if i in fixed else next(tensors) for i in range(spec.num_leaves)]
        return pytree.tree_unflatten(leaves, spec)

"""The memory of a training step: what is held before it, and what it allocates, counted by storages."""

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def held(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no annotation here
    """Counts the bytes of all storages that operations make while it is active. peak: the most that lived at once.

    What an operation is given and none made (weights, inputs) is not counted, nor is work space inside of one operation. It
    costs some microseconds an operation, and changes no value.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation here
        self.now: int = 0
        self.peak: int = 0
        self.sizes: dict[Any, int] = {}  # by weak references, which leave when their storage does
        self.given: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made."""
        for storage in storages((args, kwargs)):
            if weakref.ref(storage) not in self.sizes:
                self.given.add(storage)
        found = func(*args, **(kwargs or {}))
        for storage in storages(found):
            if storage not in self.given and weakref.ref(storage) not in self.sizes:
                self.sizes[weakref.ref(storage, self.forget)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return found

    def forget(self, dead: Any) -> None:
        """Count a storage no more."""
        self.now -= self.sizes.pop(dead, 0)


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return the storages of all strided tensors in a tree."""
    leaves = pytree.tree_leaves(tree)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout is torch.strided]


def predicted(student: nn.Module, trained: Iterable[Tensor], run: Callable[[nn.Module], Tensor], *, freed: bool = False) -> int:
    """Return the bytes that forward and backward pass allocate at most, gradients included; nothing is computed.

    student: in the mode that it trains in, which is not changed. run: from a copy of it whose tensors have no memory to a loss,
    also without. freed: every gradient is freed as soon as it is there. Raises what torch raises for operations whose shapes
    depend on values.
    """
    wanted = {id(t) for t in trained}
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        memo: dict[int, Any] = {}
        for tensor in (*student.parameters(), *student.buffers()):
            fake = fakes.from_tensor(tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(fake, requires_grad=id(tensor) in wanted) if is_parameter else fake
        for value in memo.values():
            if freed and value.requires_grad:
                value.register_post_accumulate_grad_hook(_drop)
        twin = copy.deepcopy(student, memo)
        watch = Watch()
        with watch:
            run(twin).backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
    return watch.peak


def _drop(p: Tensor) -> None:
    p.grad = None

"""Several processes, as torchrun starts them: who they are, and how they share the work of a training step.

Every process holds the program and runs its share of each batch. Gradients are averaged: by DistributedDataParallel, or by
FSDP2, which also keeps a share of the trained parameters, of their gradients and of the optimizer's state in every process.
Sources: Li et al. (2020), arXiv:2006.15704; Zhao et al. (2023), arXiv:2304.11277.
"""

import atexit
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lrc.data import Batch
from lrc.errors import TrainError
from lrc.train.blocks import InBlocks

LossOf = Callable[[Batch, torch.Generator], Tensor]


@dataclass(frozen=True)
class World:
    """The processes of a run. rank: which one this is; size: how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    def mean(self, value: float) -> float:
        """Return the mean of a number over all processes, the same bits in each. Raises TrainError when one is gone."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        try:
            dist.all_reduce(total)
        except RuntimeError as error:
            raise TrainError(
                f"process {self.rank + 1} of {self.size}", message="another process of this run has stopped", hint="It says why"
            ) from error
        return float(total) / self.size

    def agreed(self, value: Any) -> Any:
        """Return the first process's value."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told)
        return told[0]


def world() -> World:
    """Return the processes that torchrun started, joined on the first call, or that the caller joined; else this one alone."""
    if not dist.is_available():
        return World()
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
            return World()
        dist.init_process_group("gloo")
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Alone:
    """One process that does everything: what the others do together in its place."""

    def __init__(self, losses: LossOf, parameters: Mapping[str, Tensor]) -> None:
        self.losses, self.parameters, self.world = losses, dict(parameters), World()

    def share(self, places: Sequence[int]) -> Sequence[int]:
        """Return the examples of a batch that this process runs."""
        return places[self.world.rank :: self.world.size]

    def accumulating(self) -> AbstractContextManager[Any]:
        """Return the context of a backward pass that is not the last one of a step."""
        return nullcontext()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Give the program all values for as long as it lasts."""
        yield

    def finish(self) -> None:
        """Give the program all values for good."""

    def whole(self, tree: Any) -> Any:
        """Return a tree with whole tensors in place of shares; every process calls it."""
        return tree

    def shared(self, value: Tensor, like: Tensor) -> Tensor:
        """Return this process's share of a whole tensor."""
        return value

    def load_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load a state that `whole` returned."""
        optimizer.load_state_dict(state)


class Replicated(Alone):
    """DistributedDataParallel around the loss: what the loss does not depend on is found from the loss itself."""

    def __init__(self, losses: LossOf, parameters: Mapping[str, Tensor], student: nn.Module) -> None:
        super().__init__(losses, parameters)
        self.world = world()
        self.wrapped = DistributedDataParallel(
            _Loss(losses, student), forward_sync_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
        )
        self.losses = lambda batch, generator: self.wrapped(batch, generator)

    def accumulating(self) -> AbstractContextManager[Any]:
        """Return the context in which gradients are not averaged yet."""
        made: AbstractContextManager[Any] = self.wrapped.no_sync()
        return made


class _Loss(nn.Module):
    def __init__(self, losses: LossOf, student: nn.Module) -> None:
        super().__init__()
        self.student, self.losses = student, losses

    def forward(self, batch: Batch, generator: torch.Generator) -> Tensor:
        return self.losses(batch, generator)


class Sharded(Alone):
    """FSDP2 over the blocks of a graph; parameters that are not trained stay whole in every process.

    student: is copied, its tensors are not. While it trains, the program's own parameters hold nothing: `gathered` fills them.
    """

    def __init__(self, parameters: Mapping[str, Tensor], student: InBlocks) -> None:
        self.world, self.plain = world(), dict(parameters)
        tensors = [*student.parameters(), *student.buffers()]
        self.student: InBlocks = copy.deepcopy(student, {id(t): t for t in tensors})
        trained = {id(p) for p in parameters.values()}
        frozen = {p for p in self.student.parameters() if id(p) not in trained}
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.student.modules():
            for name, p in module._parameters.items():
                owners.setdefault(id(p), []).append((module, name))
        mesh = init_device_mesh("cpu", (self.world.size,))
        several = {id(p) for p in parameters.values() if _blocks_of(p, self.student) > 1}
        for block in self.student.blocks:
            mine = {id(p) for p in block.parameters()}
            if mine & trained and not mine & several:
                fully_shard(block, mesh=mesh, ignored_params=frozen & set(block.parameters()))
        fully_shard(self.student, mesh=mesh, ignored_params=frozen)
        found = {name: owners[id(p)][0] for name, p in parameters.items()}
        super().__init__(_unset, {name: getattr(module, own) for name, (module, own) in found.items()})
        self.world = world()
        self._release()

    def _release(self) -> None:
        for p in self.plain.values():
            p.data = p.data.new_empty(0)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Give the program all values for as long as it lasts."""
        self.finish()
        yield
        self._release()

    def finish(self) -> None:
        """Give the program all values for good; every process calls it."""
        for name, p in self.parameters.items():
            assert isinstance(p, DTensor), "every trained parameter is sharded"
            self.plain[name].data = p.full_tensor().detach()

    def whole(self, tree: Any) -> Any:
        """Return a tree with whole tensors in place of shares; every process calls it."""

        def full(value: Any) -> Any:
            return value.full_tensor() if isinstance(value, DTensor) else value

        return pytree.tree_map(full, tree)

    def shared(self, value: Tensor, like: Tensor) -> Tensor:
        """Return this process's share of a whole tensor."""
        if not isinstance(like, DTensor) or value.shape != like.shape:
            return value
        return distribute_tensor(value, like.device_mesh, like.placements)

    def load_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load a state that `whole` returned."""
        order = [p for group in optimizer.param_groups for p in group["params"]]
        slots = {
            i: {key: self.shared(v, order[i]) if isinstance(v, Tensor) else v for key, v in values.items()}
            for i, values in state["state"].items()
        }
        optimizer.load_state_dict(state | {"state": slots})


def _blocks_of(p: Tensor, student: InBlocks) -> int:
    return sum(any(p is other for other in block.parameters()) for block in student.blocks)


def _unset(batch: Batch, generator: torch.Generator) -> Tensor:
    raise AssertionError("the losses of a sharded student are set by its maker")

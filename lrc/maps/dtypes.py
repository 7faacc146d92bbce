"""What maps share that store tensors in another dtype than they compute in."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrc.maps.base import InParts, LinearMap, as_parameter


class OwnDtypes(InParts):
    """A map whose stored tensors do not follow the model's dtype.

    apart: names of floating buffers that keep their own dtype; a cast of the model changes the dtype that is computed in.
    """

    apart: tuple[str, ...] = ()
    _dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is computed in."""
        return self._dtype

    def store(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor: in the map's dtype as a parameter, in a dtype of its own as a buffer that no cast changes."""
        if tensor.dtype == self._dtype:
            self.register_parameter(name, as_parameter(tensor))
        else:
            self.register_buffer(name, tensor.detach())
            self.apart = (*self.apart, name)

    def computed(self, name: str) -> Tensor:
        """Return a stored tensor in the dtype that is computed in."""
        stored: Tensor = getattr(self, name)
        return stored.to(self._dtype) if name in self.apart else stored

    def own_dtype(self, name: str) -> str | None:
        """Return the name of the dtype that a tensor keeps, or None where that is the model's."""
        return str(getattr(self, name).dtype).removeprefix("torch.") if name in self.apart else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearMap:
        """Move or cast the map as `nn.Module` does, but leave the tensors of `apart` in their own dtype."""
        own = {id(getattr(self, name)) for name in self.apart}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in own and moved.dtype != tensor.dtype else moved

        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        made: LinearMap = super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return made


def stored_dtype(name: str | None) -> torch.dtype:
    """Return a dtype by the name that `OwnDtypes.own_dtype` has given it; None stands for the current one."""
    found: torch.dtype = torch.get_default_dtype() if name is None else getattr(torch, name)
    return found

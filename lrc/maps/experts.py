"""One matrix an expert, stored as one tensor: the weights of a mixture of experts, and of any batch of matrices."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.kernels import grouped_linear
from lrc.maps.base import Affine, Cost, LinearMap, Structure, as_parameter, exact_bias
from lrc.maps.composites import chain_names

PRODUCTS = {torch.bmm, torch.matmul}
GROUPED = ("grouped_mm_fallback", "_grouped_mm")  # of transformers, of torch


class Experts(LinearMap):
    """y = F[e] … A[e] x for the expert e of a row; every factor is (experts, rows, columns), the last applied first.

    It stands for the matrices of all experts one below the other, (experts * out_features of one, in_features). transposed:
    the tensor in whose place it stands has (experts, in_features, out_features); in the user's module the map acts as that
    tensor where it is multiplied (`torch.bmm`, `@`, `grouped_mm`), selected by index and multiplied.
    """

    word: ClassVar[str] = "experts"

    def __init__(self, factors: Sequence[Tensor], *, transposed: bool = False) -> None:
        super().__init__()
        self.names = ("weight",) if len(factors) == 1 else chain_names(len(factors))
        for name, factor in zip(self.names, factors, strict=True):
            setattr(self, name, as_parameter(factor))
        self.count, self.transposed = len(factors[0]), transposed
        self.out_features, self.in_features = self.count * factors[0].shape[1], factors[-1].shape[2]
        self.set_bias(None)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors, the one that is applied last first."""
        return tuple(getattr(self, name) for name in self.names)

    @property
    def device(self) -> torch.device:
        """The device of the factors: code that multiplies by a tensor asks for it."""
        return self.factors[0].device

    def forward(self, x: Tensor, ids: Tensor | None = None, offs: Tensor | None = None, **context: Any) -> Tensor:
        """Apply to (experts, rows, in_features), or to rows (rows, in_features) of the experts that `ids` or `offs` tell.

        ids: (rows,), the expert of each row, or () of all of them; offs: (experts,), where the rows of each end.
        """
        for factor in reversed(self.factors):
            if offs is not None:
                x = grouped_linear(x.to(factor.dtype), factor, offs)
            elif ids is None:
                x = torch.bmm(x, factor.transpose(1, 2))
            else:
                x = F.linear(x, factor[ids]) if ids.ndim == 0 else torch.bmm(factor[ids], x.unsqueeze(-1)).squeeze(-1)
        return x

    def exact(self) -> Affine:
        """Return the matrices one below the other, in float64, and no bias."""
        return Affine(_product([factor.detach().double() for factor in self.factors]).flatten(0, 1), exact_bias(self.bias))

    def matrix(self) -> Tensor:
        """Return the matrices one below the other."""
        return _product(self.factors).flatten(0, 1)

    def cost(self, tokens: int = 1) -> Cost:
        """Return the numbers of all experts, and the FLOPs of `tokens` rows for every expert."""
        size = sum(factor.numel() for factor in self.factors)
        return Cost(size, size * self.factors[0].element_size(), 2 * tokens * size)

    def structure(self) -> Structure:
        """Return the sizes of the factors."""
        return {"map": self.word, "shapes": [list(factor.shape) for factor in self.factors], "transposed": self.transposed}

    @classmethod
    def restored(cls, structure: Structure) -> "Experts":
        """Return an uninitialised map."""
        return cls([torch.empty(*shape) for shape in structure["shapes"]], transposed=bool(structure["transposed"]))

    def __repr__(self) -> str:
        sizes = [self.out_features // self.count, *(factor.shape[2] for factor in self.factors)]
        return f"Experts[{self.count},{','.join(map(str, sizes))}]{self.mark()}"

    def __getitem__(self, ids: Tensor) -> "View":
        """Return the matrices of the experts `ids` as what is multiplied next."""
        return View(self, ids, self.transposed)

    def transpose(self, first: int, second: int) -> "View":
        """Return the tensor transposed, as what is multiplied next."""
        return View(self, None, self.transposed).transpose(first, second)

    def __rmatmul__(self, x: Tensor) -> Any:
        return View(self, None, self.transposed).times(x, before=True)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Multiply where torch is given the map in the place of a tensor. Raises TypeError for anything else."""
        own = [View(arg, None, arg.transposed) if isinstance(arg, Experts) else arg for arg in args]
        return View.__torch_function__(func, types, own, kwargs)


class View:
    """A map in the place of a tensor that is about to be multiplied. turned: its matrices are (in_features, out_features)."""

    def __init__(self, made: Experts, ids: Tensor | None, turned: bool) -> None:
        self.made, self.ids, self.turned = made, ids, turned

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.made.dtype

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.made.device

    def transpose(self, first: int, second: int) -> "View":
        """Return it with its matrices transposed."""
        if {first % 3, second % 3} != {1, 2}:
            raise TypeError("experts that are factors have no other order of dimensions")
        return View(self.made, self.ids, not self.turned)

    def times(self, x: Tensor, *, before: bool) -> Any:
        """Return x times the matrices (before), or the matrices times x."""
        if before != self.turned:
            raise TypeError("the matrices of experts that are factors are multiplied on the side of their inputs alone")
        if self.ids is None:
            return self.made(x) if before else self.made(x.transpose(1, 2)).transpose(1, 2)
        if self.ids.ndim == 0:
            return self.made(x, ids=self.ids) if before else self.made(x.mT, ids=self.ids).mT
        row = 1 if before else 2
        return self.made(x.squeeze(row), ids=self.ids).unsqueeze(row)

    def __rmatmul__(self, x: Tensor) -> Any:
        """Return x times the matrices."""
        return self.times(x, before=True)

    def grouped(self, x: Tensor, offs: Tensor) -> Any:
        """Return x, rows sorted by expert, times the matrix of each; offs: where the rows of every expert end."""
        if not self.turned or self.ids is not None:
            raise TypeError("the matrices of experts that are factors are multiplied on the side of their inputs alone")
        return self.made(x, offs=offs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Multiply. Raises TypeError for any other function."""
        given = {name: value for name, value in (kwargs or {}).items() if value is not None}
        name = getattr(func, "__name__", str(func))
        if name.split(".")[0] in GROUPED and isinstance(args[1], View):
            offs = args[2] if len(args) > 2 else given.pop("offs", None)
            if offs is not None and not given and len(args) < 4:
                return args[1].grouped(args[0], offs)
        elif func is F.linear and len(args) == 2 and not given and isinstance(args[1], View):
            return args[1].transpose(1, 2).times(args[0], before=True)
        elif func in PRODUCTS and len(args) == 2 and not given:
            left, right = args
            if isinstance(right, View):
                return right.times(left, before=True)
            if isinstance(left, View):
                return left.times(right, before=False)
        raise TypeError(f"experts that are factors are multiplied alone, not read by `{name}`")


def _product(factors: Sequence[Tensor]) -> Tensor:
    made = factors[0]
    for factor in factors[1:]:
        made = torch.bmm(made, factor)
    return made

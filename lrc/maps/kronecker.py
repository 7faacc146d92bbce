"""A sum of Kronecker products: the PHM layer of parameterised hypercomplex multiplication."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lrc.maps.base import Affine, Cost, InParts, Structure, as_parameter, exact_bias


class Kronecker(InParts):
    """weightᵀ = sum_i C[i] ⊗ (S[i] T[i]): C (n, n, n) is the slow rule, S (n, in / n, rank) and T (n, rank, out / n) are fast.

    The sources write rows, y = x H with H (in_features, out_features); the weight here is Hᵀ. Applied without building H.
    C may be one parameter of many maps. Each map counts it; a program counts it once.
    Sources: Zhang et al. (2021), arXiv:2102.08597; low-rank fast factors: Compacter (2021), arXiv:2106.04647, eqs. 4 to 6.
    """

    word: ClassVar[str] = "kronecker"

    def __init__(self, rule: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        n = rule.shape[0]
        if tuple(rule.shape) != (n, n, n) or left.shape[0] != n or right.shape[0] != n or left.shape[2] != right.shape[1]:
            shapes = [tuple(part.shape) for part in (rule, left, right)]
            raise ValueError(f"a rule (n, n, n), left (n, in/n, rank) and right (n, rank, out/n) do not fit: {shapes}")
        self.C, self.S, self.T = as_parameter(rule), as_parameter(left), as_parameter(right)
        self.in_features, self.out_features = n * left.shape[1], n * right.shape[2]
        self.set_bias(bias)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features)."""
        n = self.C.shape[0]
        u = torch.einsum("...pa,iar->...pir", torch.unflatten(x, -1, (n, -1)), self.S)
        v = torch.einsum("...pir,ipq->...qir", u, self.C)
        y = torch.einsum("...qir,irc->...qc", v, self.T).flatten(-2)
        return y if self.bias is None else y + self.bias

    def exact(self) -> Affine:
        """Return the weight (out_features, in_features) and the bias in float64."""
        parts = (part.detach().double() for part in (self.C, self.S, self.T))
        return Affine(self._product(*parts), exact_bias(self.bias))

    def matrix(self) -> Tensor:
        """Return the weight (out_features, in_features)."""
        return self._product(self.C, self.S, self.T)

    def _product(self, C: Tensor, S: Tensor, T: Tensor) -> Tensor:
        return torch.einsum("ipq,iac->paqc", C, S @ T).reshape(self.in_features, self.out_features).T

    def cost(self, tokens: int = 1) -> Cost:
        """Return rank (in + out) + n³ numbers, and 2 rank (n (in + out) + n³) FLOPs a token."""
        n, rank = self.C.shape[0], self.S.shape[2]
        size = rank * (self.in_features + self.out_features) + n**3
        flops = 2 * tokens * rank * (n * (self.in_features + self.out_features) + n**3)
        return Cost(size, size * self.C.element_size(), flops) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the sizes."""
        shape = [self.out_features, self.in_features]
        n, rank = self.C.shape[0], self.S.shape[2]
        return {"map": self.word, "shape": shape, "n": n, "rank": rank, "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "Kronecker":
        """Return an uninitialised map, with a rule of its own."""
        (out_features, in_features), n, rank = structure["shape"], structure["n"], structure["rank"]
        left, right = torch.empty(n, in_features // n, rank), torch.empty(n, rank, out_features // n)
        return cls(torch.empty(n, n, n), left, right, torch.empty(out_features) if structure["bias"] else None)

    def __repr__(self) -> str:
        return f"Kronecker[{self.out_features},{self.in_features}; {self.C.shape[0]}]{self.mark()}"

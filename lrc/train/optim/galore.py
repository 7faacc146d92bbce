"""GaLore: Adam whose moments live in a low-rank subspace of the gradient, found anew every so many steps."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import UsageError
from lrc.spec.patterns import Candidate, select
from lrc.train.optim.adam import Adam, Params
from lrc.train.optim.base import OptimizerOptions, Trained, optimizer
from lrc.train.optim.projection import SIDES, ProjType, basis, down, side_of, up
from lrc.train.optim.quantized import moment_bytes


class GaLore(Adam):
    """AdamW on full-rank weights with moments of a rank-r projection of the gradient.

    Every matrix of a group that has a `rank` is projected: R = P' G (or G Q', see `projection`), N = M / (sqrt(V) + eps) of R,
    and the weight moves by scale P N. P comes from an SVD of the gradient at steps 0, update_proj_gap, 2 update_proj_gap, …,
    counted per parameter before its update; the moments are neither turned nor reset then. A kernel (o, i, h, w) is taken as
    the matrix (o, i h w); vectors, and groups with `rank: None`, get plain AdamW.
    State of a weight (m, n), m <= n: m r + 2 n r numbers, against 2 m n of Adam. A rank above min(m, n) is min(m, n).
    Source: Zhao et al. (2024), arXiv:2403.03507, algorithm 2. Departures from the paper, as in its authors' package: eps is
    1e-6, and the gap counts the steps of each parameter.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: ProjType = "std",
        **options: Any,
    ) -> None:
        defaults: dict[str, Any] = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        super().__init__(params, lr, **defaults, **options)
        for group in self.param_groups:
            if group["rank"] is not None and group["rank"] < 1:
                raise ValueError(f"rank is at least 1, got {group['rank']}")
            if group["update_proj_gap"] < 1:
                raise ValueError(f"update_proj_gap is at least 1, got {group['update_proj_gap']}")
            if group["proj_type"] not in SIDES:
                raise ValueError(f"proj_type is one of {', '.join(SIDES)}, got {group['proj_type']!r}")

    def update(self, grad: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> Tensor:
        """Return scale P N, or N itself for what is not projected."""
        if group["rank"] is None or grad.ndim < 2:
            return self.normalized(grad, group, state)
        G = grad.flatten(1)
        if state["step"] % group["update_proj_gap"] == 0 or not ("P" in state or "Q" in state):
            state |= basis(G, group["rank"], side_of(G.shape[0], G.shape[1], group["proj_type"]))
        R = down(G, state)
        N = self.normalized(R, group, state)
        return self.back(G, R, N, group, state).view_as(grad)

    def back(self, G: Tensor, R: Tensor, N: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> Tensor:
        """Return the direction in the shape of the weight."""
        return up(N, state).mul_(group["scale"])


class GaLoreOptions(OptimizerOptions):
    """AdamW with its moments in a low-rank subspace of the gradient of every matrix (GaLore)."""

    type: Literal["galore"] = "galore"
    lr: float = Field(default=1e-2, ge=0, description="Learning rate.")
    eps: float = Field(default=1e-6, ge=0, description="Added to the root of the mean square.")
    rank: int = Field(default=128, ge=1, description="Of the subspace; at most min(out_features, in_features) is used.")
    update_proj_gap: int = Field(default=200, ge=1, description="Steps between two subspaces.")
    scale: float = Field(default=0.25, gt=0, description="Factor of the step that comes back from the subspace.")
    proj_type: ProjType = Field(default="std", description="Side that is projected; std: the shorter one.")
    state_bits: Literal[8, 32] = Field(default=32, description="Bits of the moments.")
    ignore: list[str] = Field(
        default=[], description="Patterns of parameters that get plain AdamW: embeddings and heads, as published."
    )

    def arguments(self) -> dict[str, Any]:
        """Return the options without the patterns, which say what the groups are."""
        return self.model_dump(exclude={"type", "ignore"})

    def state_bytes(self, shape: torch.Size, itemsize: int) -> int:
        """Return the bytes of the subspace and of the moments inside it."""
        if len(shape) < 2:
            return 2 * moment_bytes(shape.numel(), itemsize, self.state_bits)
        m, n = shape[0], shape.numel() // shape[0]
        rank, side = min(self.rank, m, n), side_of(m, n, self.proj_type)
        inside = {"left": rank * n, "right": m * rank, "full": rank * rank}[side]
        bases = (m * rank if side != "right" else 0) + (rank * n if side != "left" else 0)
        return bases * itemsize + 2 * moment_bytes(inside, itemsize, self.state_bits)


@optimizer(GaLoreOptions)
def galore(trained: Trained, options: GaLoreOptions) -> GaLore:
    """Return GaLore over what is trained: matrices projected; vectors, gates and what is ignored not."""
    given = options.arguments()
    return GaLore(groups_of(trained, options, given.pop("rank")), **given)


def groups_of(trained: Trained, options: GaLoreOptions, rank: int) -> list[dict[str, Any]]:
    """Return the groups, of which one is projected. Raises UsageError for a pattern that matches no parameter."""
    found = select([Candidate(name, "Parameter") for name in trained.parameters], options.ignore)
    if found.unmatched and len(trained.parameters) > 1:  # one parameter alone: it is updated by itself
        raise UsageError(
            "train.optimizer", message=f"`ignore: {found.unmatched[0]}` matches no trained parameter",
            hint=f"There are {', '.join(list(trained.parameters)[-3:])} and others",
        )  # fmt: skip
    return trained.groups(matrices={"rank": rank}, plain=found.rules)

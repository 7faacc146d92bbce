"""`lrc merge` and `lrc extract-lora`: adapters into a model or into one another, and a fine-tuned model into an adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lrc.errors import UsageError
from lrc.lower.hf_folder import HfExport, export_hf
from lrc.lower.peft_export import PeftExport, peft_folder
from lrc.lower.peft_folder import read_folder
from lrc.lower.peft_read import maps_of
from lrc.lower.peft_sites import Factors, adapted_map, split
from lrc.lower.pt2 import Pt2Export, export_pt2
from lrc.maps import LinearMap, RowNorm
from lrc.program import Adapted, Program, Site
from lrc.solvers.combine import Method, combine
from lrc.spec.patterns import Candidate, select

Combining = Literal["linear", "cat", "svd", "ties", "dare", "dare_ties", "factor_swap"]
PRODUCTS = ("cat", "factor_swap")  # what they make is a product already


@dataclass(frozen=True)
class Combination:
    """How adapters are made one: the method, a factor each (none: 1 each), the kept share of TIES and DARE, a rank, a seed."""

    method: Combining = "linear"
    weights: tuple[float, ...] = ()
    density: float = 0.5
    rank: int | None = None
    seed: int = 0

    def check(self, count: int) -> None:
        """Raise UsageError for what does not fit together, before anything is read."""
        if self.method not in get_args(Combining):
            raise UsageError("--method", expected=f"one of {', '.join(get_args(Combining))}", got=self.method)
        if self.weights and len(self.weights) != count:
            raise UsageError("--weights", expected=f"{count}, one for each adapter", got=str(len(self.weights)))
        if not 0 < self.density <= 1:
            raise UsageError("--density", expected="a share in (0, 1]", got=str(self.density))
        if self.method == "svd" and self.rank is None:
            raise UsageError("--method svd", message="needs a rank", hint="Add `--rank`")
        if self.rank is not None and self.rank < 1:
            raise UsageError("--rank", expected="at least 1", got=str(self.rank))
        if self.method == "factor_swap" and (count != 2 or self.weights):
            raise UsageError(
                "--method factor_swap", expected="two adapters, style and content, without weights", got=str(count)
            )


def merge_adapters(
    program: Program, folders: Sequence[Path], output: Path, how: Combination, *, as_adapter: bool = False
) -> dict[str, Any]:
    """Merge PEFT folders into a captured model and write it, or combine them to one PEFT folder. Returns what was done.

    linear: the weighted sum of the changes; cat: the same as one adapter of the summed rank, exactly; svd: the best one of rank
    `rank`; ties, dare, dare_ties: see `lrc.solvers.combine`, on the changes of the weights, not on the factors; factor_swap:
    see `swapped`. As an adapter, every method but `cat` and `factor_swap` needs a rank. Biases that adapters have trained are
    added up, weighted, in the model. The model's folder is a stock one. Raises UsageError before anything is written.
    """
    how.check(len(folders))
    must_be_free(output)
    if as_adapter and how.method not in PRODUCTS and how.rank is None:
        raise UsageError(f"--method {how.method}", message="the change may have any rank", hint="Add `--rank`, or use `cat`")
    maps = [maps_of(program, read_folder(folder)) for folder in folders]
    weights = how.weights or (1.0,) * len(folders)
    sites = [fqn for fqn in program.sites if any(fqn in made for made in maps)]
    errors = {}
    for fqn in sites:
        present = [(made[fqn], weight) for made, weight in zip(maps, weights, strict=True) if fqn in made]
        if as_adapter and any(made.bias is not None and made.bias.requires_grad for made, _ in present):
            raise UsageError(fqn, message="a trained bias stands beside an adapter", hint="Merge into the model instead")
        if how.method == "factor_swap":
            swap = swapped(present, fqn)
            present = [(adapted_map(program.sites[fqn], swap, trained_bias=present[0][0].bias), 1.0)]
        if how.method in PRODUCTS and as_adapter:
            put_adapter(program, fqn, side_by_side(present, fqn))
            continue
        before = program.sites[fqn].map.exact().weight
        generator = torch.Generator().manual_seed(how.seed)
        method: Method = "linear" if how.method in (*PRODUCTS, "svd") else how.method  # type: ignore[assignment]
        changes = [made.exact().weight - before for made, _ in present]
        change = combine(changes, [weight for _, weight in present], method, how.density, generator)
        if how.rank is not None:
            factors = best(change, how.rank)
            kept = factors.B @ factors.A
            errors[fqn] = relative(change - kept, change)
            change = kept
            if as_adapter:
                put_adapter(program, fqn, factors)
                continue
        site = program.sites[fqn]
        dense = site.layout.dense((before + change).to(site.dtype), bias_after(site, present))
        program.replace(fqn, dense, "merge", settle=False)
    program.settle()
    write(program, output, as_adapter=as_adapter)
    return {"output": str(output), "adapters": len(folders), "sites": len(sites), "method": how.method, "errors": errors}


def side_by_side(present: Sequence[tuple[LinearMap, float]], fqn: str) -> Factors:
    """Return weighted adapters as one of the summed rank. Raises UsageError for DoRA, which is no sum."""
    Bs, As = [], []
    for made, weight in present:
        if isinstance(made, RowNorm):
            raise UsageError(
                fqn, message="a DoRA adapter is no product, so it cannot be laid beside others", hint="Use `--method svd`"
            )
        _, factors = split(made, fqn)
        Bs.append(weight * factors.scaling * factors.B)
        As.append(factors.A)
    return Factors(torch.cat(Bs, 1), torch.cat(As, 0), 1.0)


def swapped(present: Sequence[tuple[LinearMap, float]], fqn: str) -> Factors:
    """Return the first adapter (style) with the second half of A's columns taken from the second one (content).

    What partly learnable projections learn apart, put together: B and the frozen half of A are those of style, the learnt half
    of A is content's. Raises UsageError for adapters of other ranks, or of one of the two alone.
    Source: Xu et al. (2024), arXiv:2403.19456, section 4.3.
    """
    found = [split(made, fqn)[1] for made, _ in present]
    if len(found) != 2 or found[0].A.shape != found[1].A.shape or any(factors.magnitude is not None for factors in found):
        shapes = [tuple(factors.A.shape) for factors in found]
        raise UsageError(fqn, expected="two products of one rank, whose halves are to be put together", got=str(shapes))
    style, content = found
    half = style.A.shape[1] // 2
    return Factors(style.B, torch.cat([style.A[:, :half], content.A[:, half:]], 1), style.scaling)


def bias_after(site: Site, present: Sequence[tuple[LinearMap, float]]) -> Tensor | None:
    """Return a site's bias with the weighted changes that adapters have trained."""
    if site.bias is None:
        return None
    bias = site.bias.detach().double()
    moved = [weight * (made.bias.detach().double() - bias) for made, weight in present if made.bias is not None]
    return torch.stack([bias, *moved]).sum(0).to(site.dtype)


def best(change: Tensor, rank: int) -> Factors:
    """Return the closest product of a rank (at most the weight's own), its singular values shared by both factors, float64.

    Source: Eckart & Young (1936), doi:10.1007/BF02288367.
    """
    U, S, Vh = torch.linalg.svd(change.double(), full_matrices=False)
    rank = min(rank, len(S))
    root = S[:rank].sqrt()
    return Factors(U[:, :rank] * root, root[:, None] * Vh[:rank], 1.0)


def put_adapter(program: Program, fqn: str, factors: Factors) -> None:
    """Put an adapter at a site, and remember it for the export."""
    program.replace(fqn, adapted_map(program.sites[fqn], factors), "extract", settle=False)
    program.adapters[fqn] = Adapted("lora", factors.rank, float(factors.rank), factors.scaling)


def extract_lora(
    base: Program, tuned: Program, output: Path, rank: int, targets: Sequence[str] = ("**",), ignore: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the PEFT folder whose adapter is the closest to what fine-tuning changed. Returns errors by site, and what is lost.

    The singular value decomposition of every changed weight, cut at `rank`, in float64. Raises UsageError for two models that
    are not one architecture.
    """
    must_be_free(output)
    if rank < 1:
        raise UsageError("--rank", expected="at least 1", got=str(rank))
    check_same(base, tuned)
    found = select([Candidate(site.fqn, site.type_name) for site in base.sites.values()], targets, ignore)
    if found.unmatched:
        raise UsageError(
            "--targets", message=f"pattern {found.unmatched[0]!r} matches no site", hint="`lrc inspect` lists them"
        )
    errors: dict[str, float] = {}
    for fqn, rule in found.rules.items():
        site = base.sites[fqn]
        if fqn in found.ignored or site.layout.obstacle() or (rule == "**" and (site.kind == "embedding" or site.tied)):
            continue
        change = tuned.sites[fqn].map.exact().weight - site.map.exact().weight
        if not bool(change.any()):
            continue
        factors = best(change, rank)
        errors[fqn] = relative(change - factors.B @ factors.A, change)
        put_adapter(base, fqn, factors)
    if not errors:
        raise UsageError("extract-lora", message="the chosen weights of the two models are equal: there is nothing to extract")
    base.settle()
    lost = left_out(base, tuned, errors)
    write(base, output, as_adapter=True)
    return {"output": str(output), "rank": rank, "errors": errors, "not_in_the_adapter": lost}


def check_same(base: Program, tuned: Program) -> None:
    """Raise UsageError where two programs have other weights by name or shape."""
    a, b = ({name: tuple(t.shape) for name, t in program.originals.items()} for program in (base, tuned))
    odd = sorted({name for name in a.keys() | b.keys() if a.get(name) != b.get(name)})
    if odd:
        raise UsageError(
            "extract-lora", expected="two models of one architecture", got=f"{odd[0]}: {a.get(odd[0])} and {b.get(odd[0])}",
            hint="BASE is the model that TUNED was trained from",
        )  # fmt: skip


def left_out(base: Program, tuned: Program, adapted: Mapping[str, float]) -> list[str]:
    """Return the tensors that fine-tuning changed and no adapter holds."""
    held = {base.sites[fqn].weight_name for fqn in adapted}
    return [
        name for name, before in base.originals.items() if name not in held and not torch.equal(before, tuned.originals[name])
    ]


def relative(difference: Tensor, whole: Tensor) -> float:
    """Return the Frobenius norm of a difference over that of the whole."""
    size = float(whole.norm())
    return float(difference.norm()) / size if size else 0.0


def must_be_free(output: Path) -> None:
    """Raise UsageError for an output folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(str(output), message="the output folder is not empty", hint="Choose another one with `-o`")


def write(program: Program, output: Path, *, as_adapter: bool) -> None:
    """Write a PEFT folder, or the model: a Hugging Face folder, or `program.pt2` of what has none."""
    if as_adapter:
        peft_folder(program, PeftExport())[0].save(output)
        return
    output.mkdir(parents=True, exist_ok=True)
    if program.origin.folder is not None:
        export_hf(program, output, HfExport())
    else:
        export_pt2(program, output, Pt2Export())

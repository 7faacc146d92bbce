"""What there is: the sites of a model as rows, and the names of everything that a spec may use."""

from typing import Any

from lrc.errors import UsageError
from lrc.measure import Cache, spectrum, stable_rank
from lrc.program import Program
from lrc.spec.load import preset_names
from lrc.spec.registry import (
    ADAPTERS,
    ALLOCATORS,
    EXPORTERS,
    INITIALISERS,
    METRICS,
    OBJECTIVES,
    OPTIMIZERS,
    PASSES,
    PRUNERS,
    RANKS,
    RECIPES,
    SOLVERS,
    SPLITTERS,
    WAYS,
    Registry,
)

REGISTRIES: dict[str, Registry] = {
    "passes": PASSES, "solvers": SOLVERS, "splitters": SPLITTERS, "pruners": PRUNERS, "ways": WAYS, "ranks": RANKS,
    "allocators": ALLOCATORS, "adapters": ADAPTERS, "initialisers": INITIALISERS, "optimizers": OPTIMIZERS,
    "objectives": OBJECTIVES, "recipes": RECIPES, "metrics": METRICS, "exports": EXPORTERS,
}  # fmt: skip


def site_rows(program: Program, cache: Cache | None = None) -> list[dict[str, Any]]:
    """Return a row per site: name, class, shape, share of the model's parameters, stable rank, and what is special."""
    total, _ = program.size()
    rows = []
    for site in program.sites.values():
        weight, bias = site.map.dense()
        numbers = site.map.cost().parameters
        special = [f"tied to {name}" for name in site.tied]
        special += [f"used {len(site.uses)} times"] if len(site.uses) > 1 else []
        special += ["stored transposed"] if site.transposed else []
        special += [] if bias is not None else ["no bias"]
        rows.append({
            "site": site.fqn, "type": site.type_name, "map": repr(site.map),
            "parameters": numbers, "share": round(numbers / max(total, 1), 4),
            "stable_rank": round(stable_rank(spectrum(weight, cache)), 2), "note": ", ".join(special),
        })  # fmt: skip
    return rows


def names(kind: str | None = None) -> dict[str, list[str]]:
    """Return the known names by kind. Raises UsageError for an unknown kind."""
    found = {key: registry.names() for key, registry in REGISTRIES.items()}
    found |= {"presets": preset_names()}
    if kind is None:
        return found
    if kind not in found:
        raise UsageError(f"list {kind}", expected=f"one of {', '.join(found)}", got=kind)
    return {kind: found[kind]}

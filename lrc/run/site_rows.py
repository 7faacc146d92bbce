"""The sites of a model as rows."""

from typing import Any

from lrc.measure import Cache, spectrum, stable_rank
from lrc.program import Program


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

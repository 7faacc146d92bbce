"""`lrc validate`: the spec, and its patterns against the names of a model whose weights are not read."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrc.measure import Cache
from lrc.run.prepare import batches_for, capture, check_data, read_spec
from lrc.run.selection import select_sites
from lrc.run.session import Session


def validate(
    spec: str | Path, model: str | None = None, *, overrides: Sequence[str] = (), allow_code: bool = False
) -> dict[str, Any]:
    """Return what was found: the passes, and how many sites they select, where a model is known.

    Raises SpecError, UsageError, or what loading the model raises.
    """
    document, file = read_spec(spec, overrides)
    base = file.parent if file else Path()
    passes = [str(getattr(options, "type", "")) for options in document.passes]
    if model is None and document.model.path is None:
        return {"valid": True, "passes": passes, "sites": None}
    check_data(document, base)
    program = capture(model, document=document, allow_code=allow_code, base=base, weights=False)
    with tempfile.TemporaryDirectory() as scratch:
        batches = batches_for(program, document, base, None, allow_code)
        session = Session(cache=Cache(scratch), batches=batches, spec_path=file)
        chosen: set[str] = set()
        for index, options in enumerate(document.passes):
            chosen |= {selected.fqn for selected in select_sites(program, session, options, index)}
    return {"valid": True, "passes": passes, "sites": len(chosen)}

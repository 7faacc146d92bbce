"""How large each input of a layer is, as weights for its columns."""

from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers.base import Moments

FLOOR = 1e-5  # of the largest input: its square still leaves 6 digits of float64


def input_scale(moments: Moments) -> tuple[Tensor, tuple[str, ...]]:
    """Return the root mean square of every input (in_features,), float64 and positive, and notes on dead ones.

    Raises SolverError where the inputs were not measured.
    """
    if moments.gram is None:
        raise SolverError(
            "moments.gram", expected="the inputs that this splitter needs", got="none", hint="Give `calibration` data"
        )
    gram = moments.gram.double()
    scale = (gram if gram.ndim == 1 else gram.diagonal()).clamp(min=0).sqrt()
    largest = float(scale.max())
    if largest == 0:
        return scale + 1, ("no input is ever other than zero: errors are not weighed",)
    dead = int((scale < FLOOR * largest).sum())
    notes = (f"{dead} of {len(scale)} inputs are always nearly zero: floor {FLOOR:g}",) if dead else ()
    return scale.clamp(min=FLOOR * largest), notes

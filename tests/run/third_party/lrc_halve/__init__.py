"""A pass from another package: W -> W / 2."""

from typing import Literal

from lrc.maps import Dense, LinearMap
from lrc.program import Site
from lrc.run import PassOptions, Statistics, site_pass


class Halve(PassOptions):
    """Halve weights."""

    type: Literal["halve"] = "halve"


@site_pass(Halve)
def halve(site: Site, statistics: Statistics, options: Halve) -> LinearMap:
    """W -> W / 2, the bias as it was."""
    weight, bias = site.map.dense()
    return Dense(weight / 2, bias)

"""Captured programs: loading a model, its graph and sites, raising, grafting, printing."""

from lrc.program.adapted import Adapted
from lrc.program.inputs import Inputs
from lrc.program.program import Calling, Origin, Program
from lrc.program.sites import Names, Site, Use

__all__ = ["Adapted", "Calling", "Inputs", "Names", "Origin", "Program", "Site", "Use"]

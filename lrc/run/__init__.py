"""The runner: what a pass is, the plan and its decisions, statistics and cache, the output folder."""

from lrc.run.adapters import Adapted, AdapterOptions, Place, adapter
from lrc.run.decorators import site_pass
from lrc.run.passes import PassOptions, ProgramPass, RankedOptions, Rewrite, Statistics, StoredOptions, pass_for, program_pass
from lrc.run.plan import Decision, Keep, Plan, Summary
from lrc.run.session import Progress, Session, silent

__all__ = [
    "Adapted",
    "AdapterOptions",
    "Decision",
    "Keep",
    "PassOptions",
    "Place",
    "Plan",
    "ProgramPass",
    "Progress",
    "RankedOptions",
    "Rewrite",
    "Session",
    "Statistics",
    "StoredOptions",
    "Summary",
    "adapter",
    "pass_for",
    "program_pass",
    "silent",
    "site_pass",
]

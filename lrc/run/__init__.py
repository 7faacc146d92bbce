"""The runner: what a pass is, the plan and its decisions, statistics and cache, the output folder."""

from lrc.run.passes import PassOptions, ProgramPass, RankedOptions, Rewrite, Statistics, pass_for, program_pass
from lrc.run.plan import Decision, Keep, Plan, Summary
from lrc.run.session import Progress, Session, silent
from lrc.run.site_pass import site_pass

__all__ = [
    "Decision",
    "Keep",
    "PassOptions",
    "Plan",
    "ProgramPass",
    "Progress",
    "RankedOptions",
    "Rewrite",
    "Session",
    "Statistics",
    "Summary",
    "pass_for",
    "program_pass",
    "silent",
    "site_pass",
]

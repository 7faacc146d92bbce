"""The forms of a convolution beside two factors: its kernel in several smaller ones.

A form is one file here and one entry of `KERNEL_FORMS`; the spec, the plan, budgets and passes learn of it from that list.
"""

from lrc.forms.base import KernelForm
from lrc.forms.cp import Cp
from lrc.forms.spatial import Spatial
from lrc.forms.tucker2 import Tucker2
from lrc.maps import Layout

KERNEL_FORMS: tuple[KernelForm, ...] = (Spatial(), Tucker2(), Cp())
NAMES = ("auto", "two_factor", "pivoted", *(form.name for form in KERNEL_FORMS))


def kernel_forms(layout: Layout, asked: str = "auto") -> tuple[KernelForm, ...]:
    """Return the forms of `KERNEL_FORMS` that a tensor of this layout has, all or the one that is asked for."""
    return tuple(form for form in KERNEL_FORMS if asked in ("auto", form.name) and form.fits(layout))


def kernel_form(name: str) -> KernelForm | None:
    """Return the form of this name, or None for a product of two factors."""
    return next((form for form in KERNEL_FORMS if form.name == name), None)


def forms_of(layout: Layout) -> tuple[str, ...]:
    """Return the names of all forms that a tensor of this layout has."""
    return (*layout.forms, *(form.name for form in kernel_forms(layout)))


__all__ = ["KERNEL_FORMS", "NAMES", "KernelForm", "forms_of", "kernel_form", "kernel_forms"]

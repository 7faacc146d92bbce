"""What the further forms of a convolution lose and cost at a site, computed once for a decomposition."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrc.forms import KernelForm, kernel_form, kernel_forms
from lrc.forms.base import Ranks
from lrc.maps import ConvChain, Patches
from lrc.measure import digest
from lrc.program import Site
from lrc.ranks import Front
from lrc.solvers import Decomposition

Choices = Mapping[str, list[Ranks]]


def choices_of(site: Site, options: Any, rank: int) -> Choices:
    """Return the ranks to look at by form: those that a budget chooses among, or the one that is asked for.

    rank: the largest one that the rank policy may choose. A rank site by site means two factors, unless a form is named.
    """
    layout = site.layout
    if not isinstance(layout, Patches) or not (options.rank.budget or kernel_form(options.form)):
        return {}
    if options.solver.type == "dobi" or options.allocate.type == "learned":
        return {}  # ranks that are learned are those of two factors
    size, found = layout.size(site.shape), {}
    for form in kernel_forms(layout, options.form):
        chosen = [form.at(size, rank)] if options.rank.by_shape else form.choices(size, options.round_to)
        if chosen:
            found[form.name] = chosen
    return found


def key_of(choices: Choices) -> str:
    """Return a hash of what is to be looked at."""
    return digest("fronts-1", {form: list(ranks) for form, ranks in choices.items()})


def look(site: Site, terms: Decomposition, choices: Choices) -> dict[str, Tensor]:
    """Return the losses of the products by form, each (k,), float64; none where the solver has no norm to compare them in."""
    if terms.norm is None:
        return {}
    size = _layout(site).size(site.shape)
    return {form: terms.scale * _form(form).losses(terms.norm, size, ranks) for form, ranks in choices.items()}


def fronts(site: Site, choices: Choices, losses: Mapping[str, Tensor]) -> tuple[Front, ...]:
    """Return the products of every form that was looked at."""
    if not losses:
        return ()
    layout, found = _layout(site), []
    size = layout.size(site.shape)
    for name, of_form in losses.items():
        form, chosen = _form(name), tuple(choices[name])
        numbers = torch.tensor([form.numbers(size, ranks) for ranks in chosen], dtype=torch.float64)
        flops = torch.tensor([form.flops(layout, size, ranks) for ranks in chosen], dtype=torch.float64)
        found.append(Front(name, chosen, numbers, flops, of_form.double()))
    return tuple(found)


def in_kernels(site: Site, terms: Decomposition, form: KernelForm, ranks: Ranks) -> ConvChain:
    """Return the map of a form at a site, with the bias that goes with it."""
    layout = _layout(site)
    assert terms.norm is not None, "a form of its own was chosen by a norm"
    made = form.made(terms.norm, layout, layout.size(site.shape), ranks, site.dtype)
    bias = terms.bias
    if terms.mean is not None:
        bias = terms.bias_for(made.exact().weight @ terms.mean.double())
    made.set_bias(None if bias is None else bias.to(site.dtype))
    return made


def _form(name: str) -> KernelForm:
    form = kernel_form(name)
    assert form is not None, name
    return form


def _layout(site: Site) -> Patches:
    assert isinstance(site.layout, Patches), "only convolutions have such forms"
    return site.layout

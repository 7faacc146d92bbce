"""The config of a stock model with other sizes: the integers that the class takes for the shapes that a pruned model has.

Where pruning leaves every layer as wide as the others, the model is one that its own class can build. Which of a config's
integers say so is not written down anywhere by name; so those that are in proportion to a changed size are tried, and what
the class builds has to have the shapes of the weights, and then their outputs.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import combinations
from typing import Any

import torch
from torch import nn

from lrc.program import Program
from lrc.program.checks import need_transformers
from lrc.program.dependency.attributes import same_outputs
from lrc.program.huggingface import Quiet

BUILDS = 300  # models on the meta device that are tried
Shapes = Mapping[str, tuple[int, ...]]


def stock_of_sizes(program: Program, model: nn.Module) -> tuple[nn.Module | None, str]:
    """Return the model of its own class with its sizes in the config, and what was changed; or None, and why not.

    model: a transformers model whose modules are all of its own kind, some of them smaller than its config says.
    """
    source: Any = program.origin.model
    old, new = shapes_of(source), shapes_of(model)
    if old.keys() != new.keys():
        return None, "it has other tensors than its class"
    uneven = uneven_layers(old, new)
    if uneven is not None:
        return None, f"{uneven} is not as large in every layer, for which its config has no place"
    before, fits = source.config.to_dict(), False
    for config in fitting_configs(source, old, new):
        fits = True
        made = built(source, config)
        made.load_state_dict(model.state_dict())
        if same_outputs(program, made):
            changes = [
                f"{key} {before.get(key)} → {value}" for key, value in config.to_dict().items() if value != before.get(key)
            ]
            return made, f"a stock model of other sizes: {', '.join(changes)}"
    if fits:
        return None, "its class gives other outputs at these sizes"
    return None, "none of the integers of its config gives its class these sizes"


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def uneven_layers(old: Shapes, new: Shapes) -> str | None:
    """Return the name of a tensor that was as large as in other layers and is no more, or None."""
    first: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    for name, shape in old.items():
        if first.setdefault((re.sub(r"\d+", "*", name), shape), new[name]) != new[name]:
            return name
    return None


def fitting_configs(model: Any, old: Shapes, new: Shapes) -> Iterator[Any]:
    """Yield configs with which a model's class has other shapes: heads may be fewer, or smaller, which shapes do not tell.

    One integer after the other is changed, or two at once where no single one helps, to what leaves fewer sizes wrong.
    """
    waiting: list[tuple[dict[str, int], int]] = [({}, misfit(old, new))]
    seen: set[frozenset[tuple[str, int]]] = set()
    builds = 0
    while waiting:
        chosen, wrong = waiting.pop()
        if wrong == 0:
            yield changed(model.config, chosen)
            continue
        better: list[tuple[dict[str, int], int]] = []
        for changes in proposals(changed(model.config, chosen), old, new):
            if better and len(changes) > 1:
                break
            tried = {**chosen, **changes}
            if frozenset(tried.items()) in seen or chosen.keys() & changes.keys():
                continue
            seen.add(frozenset(tried.items()))
            builds += 1
            if builds > BUILDS:
                return
            left = misfit_of(model, changed(model.config, tried), new)
            if left is not None and left < wrong:
                better.append((tried, left))
        waiting += sorted(better, key=lambda one: -one[1])  # the one that leaves least is next


def proposals(config: Any, old: Shapes, new: Shapes) -> Iterator[dict[str, int]]:
    """Yield changes of a config: every integer by every ratio of a changed size, what is left open, and pairs of these."""
    pairs = sorted({(a, b) for name, shape in old.items() for a, b in zip(shape, new[name], strict=True) if a != b})
    ratios = sorted({Fraction(b, a) for a, b in pairs})
    numbers = {k: v for k, v in config.to_dict().items() if isinstance(v, int) and not isinstance(v, bool) and v > 1}
    exact = [(key, b) for a, b in pairs for key, value in numbers.items() if value == a]
    scaled = [(key, int(value * r)) for key, value in numbers.items() for r in ratios if (value * r).denominator == 1]
    opened = [(key, b) for key, value in config.to_dict().items() if value is None for b in sorted({b for _, b in pairs})]
    singles = list(dict.fromkeys([*exact, *scaled, *opened]))
    yield from ({key: value} for key, value in singles)
    yield from ({k: v, key: value} for (k, v), (key, value) in combinations([*dict.fromkeys([*exact, *scaled])], 2) if k != key)


def changed(config: Any, changes: Mapping[str, int]) -> Any | None:
    """Return a config with other integers, or None where its class refuses them."""
    try:
        with Quiet(need_transformers()):
            return type(config).from_dict({**copy.deepcopy(config.to_dict()), **changes})
    except Exception:  # a class checks as it likes
        return None


def misfit_of(model: Any, config: Any | None, new: Shapes) -> int | None:
    """Return how many tensors the class builds in another shape, or None where it builds none or others."""
    if config is None:
        return None
    try:
        with torch.device("meta"), Quiet(need_transformers()), torch.random.fork_rng(devices=[]):
            found = shapes_of(type(model)(config))
    except Exception:  # a class fails as it likes with sizes that do not fit together
        return None
    return misfit(found, new) if found.keys() == new.keys() else None


def misfit(found: Shapes, wanted: Shapes) -> int:
    """Return how many dimensions of tensors differ."""
    return sum(a != b for name, shape in wanted.items() for a, b in zip(found[name], shape, strict=True))


def built(model: Any, config: Any) -> nn.Module:
    """Return the class's model of a config, in eval mode, with the dtype and generation settings of another."""
    dtypes = {p.dtype for p in model.parameters()}
    with Quiet(need_transformers()), torch.random.fork_rng(devices=[]):
        made: Any = type(model)(config)
    made = made.to(dtypes.pop() if len(dtypes) == 1 else None).to(next(model.parameters()).device).eval()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return made  # type: ignore[no-any-return]

"""Several named adapters on one program: which one is active is a value, and no graph is captured or compiled again.

x -> query(x)      the module at `query` is the map of the active adapter; switching puts another one at that name
"""

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lrc.errors import UsageError
from lrc.lower.peft_folder import read_folder
from lrc.lower.peft_read import adapted_by, maps_of
from lrc.maps import LinearMap, RowNorm, Sum, fold
from lrc.program import Adapted, Program
from lrc.program.edits import put
from lrc.program.graft import graft
from lrc.program.owners import place

OF: "weakref.WeakKeyDictionary[nn.Module, Adapters]" = weakref.WeakKeyDictionary()


class Adapters:
    """Named adapters that share one frozen base, one of them active, or none.

    Those that the program already has are called `default`. Everything else of the program acts on the active one: calls,
    training, merging and exports. Grafted trees that this object has made, and modules, switch with the program. An optimiser
    made while an adapter is active trains that adapter alone; the others keep their numbers.
    """

    def __init__(self, program: Program, name: str = "default") -> None:
        self.program = program
        self.active: str | None = None
        self._maps: dict[str, dict[str, LinearMap]] = {}
        self._about: dict[str, dict[str, Adapted]] = {}
        self._base: dict[str, LinearMap | None] = {}
        self._trees: list[weakref.ref[nn.Module]] = []
        if program.adapters:
            self._about[name] = dict(program.adapters)
            self._maps[name] = {fqn: program.maps[fqn] for fqn in program.adapters}
            self._base = {fqn: base_of(program, fqn) for fqn in program.adapters}
            self.active = name

    @property
    def names(self) -> Sequence[str]:
        """The names, in the order in which they came."""
        return tuple(self._maps)

    def load(self, name: str, folder: str | Path) -> None:
        """Read a PEFT folder under a name, and make it active. Raises UsageError for a taken name or an unfit folder."""
        if not name or name in self._maps:
            raise UsageError(
                "adapters", expected="a name that is not taken", got=repr(name), hint=f"Taken: {', '.join(self.names)}"
            )
        read = read_folder(Path(folder))
        if not self.program.frozen:
            self.program.freeze()
        program = self.program
        standing = {fqn: self._base.get(fqn) or program.map_of(fqn) for fqn in program.sites}
        without = next((fqn for fqn, held in self._base.items() if held is None), None)
        if without is not None:
            raise no_base(without)
        made = maps_of(program, read, standing)
        self._base |= {fqn: standing[fqn] for fqn in made}
        self._maps[name], self._about[name] = made, {fqn: adapted_by(read, fqn) for fqn in made}
        self.set(name)

    def set(self, name: str | None) -> None:
        """Make an adapter active; None: the base alone. Raises UsageError for a name that there is not."""
        if name is not None and name not in self._maps:
            known = ", ".join(self.names) or "none"
            raise UsageError("adapters", expected=f"one of {known}", got=repr(name), hint="`load` reads another one")
        chosen = {} if name is None else self._maps[name]
        fresh = [fqn for fqn in self._base if fqn not in self.program.maps]
        for fqn, base in self._base.items():
            made = chosen.get(fqn, base)
            if made is None:
                raise no_base(fqn)
        for fqn, base in self._base.items():
            made = chosen.get(fqn, base)
            assert made is not None, "looked at above"
            training = self.program.graph_module.training
            self.program.replace(fqn, made, "adapt", settle=False)
            made.train(training)
            if fqn in chosen and name is not None:
                self.program.adapters[fqn] = self._about[name][fqn]
        if fresh:
            self.program.settle()  # only where a site gets its first adapter does the graph change
        self.active = name
        for tree in self._living():
            self._put(tree)

    def graft(self, model: nn.Module | None = None) -> nn.Module:
        """Return a tree as `lrc.program.graft` makes it, that switches with the program."""
        return self._followed(graft(self.program, model))

    def module(self) -> nn.Module:
        """Return a module that is called as the captured one, and switches with the program."""
        return self._followed(self.program.module())

    def merged(self, name: str) -> Program:
        """Return a program with one adapter multiplied into the base, exactly to rounding, and no other; this one stays."""
        before = self.active
        self.set(name)
        twin = self.program.clone()
        self.set(before)
        for fqn in self._maps[name]:
            twin.replace(fqn, fold(self._maps[name][fqn]), "merge", settle=False)
        twin.settle()
        return twin

    def _followed(self, tree: nn.Module) -> nn.Module:
        self._trees = [ref for ref in self._trees if ref() is not None] + [weakref.ref(tree)]
        OF[tree] = self
        return tree

    def _living(self) -> list[nn.Module]:
        return [tree for ref in self._trees if (tree := ref()) is not None]

    def _put(self, tree: nn.Module) -> None:
        grafted = hasattr(tree, "_program") is False
        for fqn in self._base:
            for module, made in self.program.placed(fqn).items():
                if grafted:
                    place(tree, module, made)
                else:
                    put(tree, module, made)


def adapters_of(module: nn.Module) -> Adapters:
    """Return the adapters that a module switches with. Raises UsageError for a module that was not made by `Adapters`."""
    if module not in OF:
        raise UsageError(
            type(module).__name__, message="the module has no named adapters", hint="Make it by `compiled.adapters.graft()`, "
            "or by `lrc.load(folder, adapters={…})`",
        )  # fmt: skip
    return OF[module]


def load_adapters(program: Program, folders: Mapping[str, str | Path]) -> Adapters:
    """Return the adapters of PEFT folders, by name, on one program; the first is active."""
    made = Adapters(program)
    for name, folder in folders.items():
        made.load(name, folder)
    made.set(next(iter(folders), None))
    return made


def base_of(program: Program, fqn: str) -> LinearMap | None:
    """Return what stands under an adapter that was beside it, with the site's bias; None where the adapter is no such sum."""
    made: Any = program.maps[fqn]
    inner = made.inner if isinstance(made, RowNorm) else made
    if not isinstance(inner, Sum) or inner.names != ("base", "adapter") or program.adapters[fqn].initial is not None:
        return None
    base: Any = inner.base
    held = base if isinstance(base, LinearMap) else program.sites[fqn].layout.dense(base, None)
    return held.with_bias(made.bias)


def no_base(fqn: str) -> UsageError:
    """Return the error for an adapter without which there is nothing to go back to."""
    return UsageError(
        fqn, message="the adapter is no branch beside an untouched base, so nothing can be switched there",
        hint="Export it (`format: peft`), and load it beside the others",
    )  # fmt: skip

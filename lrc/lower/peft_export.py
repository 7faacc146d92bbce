"""`format: peft`: the adapters alone, as a folder that PEFT loads onto the untouched model."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import LowerError
from lrc.lower.base import ExportOptions, Written, exporter
from lrc.lower.peft_config import VERSION, defaults, patterns, target_modules
from lrc.lower.peft_folder import BIAS, PREFIX, PeftFolder, read_folder
from lrc.lower.peft_read import maps_of
from lrc.lower.peft_sites import Factors, doubled, factors_of, peft_tensors, split
from lrc.maps import Chain, LinearMap, Lookup, Scale, Sum
from lrc.maps.base import Slot
from lrc.program import Adapted, Program, Site

EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT stores the base's weight too where one of these is a target


class PeftExport(ExportOptions):
    """`adapters/NAME/adapter_config.json` and `adapter_model.safetensors`."""

    format: Literal["peft"] = "peft"
    name: str = Field(default="default", pattern=r"^[\w.-]+$", description="Of the adapter: the folder is `adapters/NAME`.")
    version: str = Field(default=VERSION, pattern=r"^\d+\.\d+(\.\d+)?$", description="The PEFT whose keys are written.")
    task_type: str | None = Field(default=None, description="As PEFT names it (CAUSAL_LM, …); any model without.")
    base_model: str | None = Field(default=None, description="Hub id of the base, for `base_model_name_or_path`.")
    opens: ClassVar[str] = ""
    artifact: ClassVar[str] = "adapters/default/adapter_config.json"


@exporter(PeftExport)
def export_peft(program: Program, folder: Path, options: PeftExport) -> Written:
    """Write the adapters, and read them back onto the captured weights: every site has the weight that the program has.

    Raises LowerError for adapters that PEFT does not know, and for a base that is not the captured weight.
    """
    made, notes = peft_folder(program, options)
    place = folder / "adapters" / options.name
    made.save(place)
    verify(program, read_folder(place))
    return Written(f"adapters/{options.name}/adapter_config.json", tuple(notes))


def peft_folder(program: Program, options: PeftExport) -> tuple[PeftFolder, list[str]]:
    """Return the program's adapters as PEFT stores them, and what there is to note."""
    adapted = {fqn: kept for fqn, kept in program.adapters.items() if fqn in program.maps}
    check(program, adapted)
    config = defaults("VERA" if is_vera(adapted) else "LORA", options.version)
    config |= {"task_type": options.task_type, "base_model_name_or_path": options.base_model}
    model = program.origin.model
    if options.task_type is None and model is not None:
        config["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    tensors, pairs, notes = ({}, {}, []) if is_vera(adapted) else lora_tensors(program, adapted)
    names = [module for fqn in adapted for module in program.placed(fqn) if is_vera(adapted) or module in pairs]
    every = [name for name, _ in model.named_modules()] if model is not None else list(program.sites)
    config["target_modules"] = target_modules(names, every)
    config["fan_in_fan_out"] = any(program.sites[fqn].transposed for fqn in adapted)
    if is_vera(adapted):
        return PeftFolder(config | vera_config(adapted), vera_tensors(program, adapted)), notes
    config["bias"] = trained_biases(tensors, adapted)
    dropouts = {kept.dropout for kept in adapted.values()}
    stabilised = {is_stabilised(kept) for kept in adapted.values()}
    config |= {"lora_dropout": max(dropouts), "use_rslora": True in stabilised, "use_dora": uses_dora(program, adapted)}
    config |= patterns(pairs)
    saved = [n for n in names if isinstance(config["target_modules"], list) and n.rpartition(".")[2] in EMBEDDINGS]
    if set(EMBEDDINGS) & set(config["target_modules"]):
        for fqn in adapted:
            tensors |= {f"{PREFIX}{n}.base_layer.weight": original(program, fqn) for n in program.placed(fqn) if n in saved}
    return PeftFolder(config, tensors), notes


def check(program: Program, adapted: Mapping[str, Adapted]) -> None:
    """Raise LowerError for what PEFT has no form of, or would load in another way than it was meant."""
    name = program.origin.name
    if not adapted:
        raise LowerError(name, message="the program has no adapter", hint="Add a pass `adapt`, or export another format")
    if len({kept.method == "vera" for kept in adapted.values()}) > 1:
        raise LowerError(name, message="VeRA and other adapters do not go into one folder", hint="Use one of them")
    if len({is_stabilised(kept) for kept in adapted.values()}) > 1 or len({kept.dropout for kept in adapted.values()}) > 1:
        raise LowerError(
            name, message="adapters of one folder share their dropout, and whether alpha is divided by sqrt(rank)",
            hint="Give both passes the same options",
        )  # fmt: skip
    for fqn in adapted:
        site = program.sites[fqn]
        geometry = getattr(site.layout, "geometry", None)
        if geometry is not None and any(d != 1 for d in geometry.dilation):
            raise LowerError(fqn, message="PEFT cannot load an adapter of a dilated convolution", hint="Merge it, or ignore it")
        if not site.has_module:
            raise LowerError(
                fqn, message="the weight is a parameter of a larger module, which PEFT cannot name", hint="Ignore it"
            )


def lora_tensors(
    program: Program, adapted: Mapping[str, Adapted]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, float]], list[str]]:
    """Return the tensors, rank and alpha of every module, and what there is to note."""
    tensors: dict[str, Tensor] = {}
    pairs: dict[str, tuple[int, float]] = {}
    turned, closed = 0, []
    for fqn, kept in adapted.items():
        site = program.sites[fqn]
        base, factors = split(program.maps[fqn], fqn)
        if factors.rank == 0:
            closed.append(fqn)
            continue
        if kept.initial is not None:
            factors, turned = doubled(factors, kept.initial), turned + 1
        elif not is_original(program, fqn, base):
            raise LowerError(
                fqn, message=f"the adapter stands on a changed base (`init: {kept.init}`, or another pass), so it means "
                "nothing on the original model", hint="Export the whole model (`format: hf`), merged or not",
            )  # fmt: skip
        alpha = factors.scaling * (factors.rank**0.5 if is_stabilised(kept) else factors.rank)
        if kept.alpha is not None and factors.rank == kept.rank and math.isclose(alpha, kept.alpha, rel_tol=1e-6):
            alpha = kept.alpha
        for module in program.placed(fqn):
            tensors |= peft_tensors(f"{PREFIX}{module}", site, factors) | bias_of(program, fqn, f"{PREFIX}{module}")
            pairs[module] = (factors.rank, round(alpha, 12))
    if not pairs:
        raise LowerError(program.origin.name, message="every gate of every adapter is closed: there is nothing to export")
    notes = [f"{turned} adapters have twice their rank here: so they hold on the untouched base"] if turned else []
    return tensors, pairs, notes + [f"{fqn} is left out: all its gates are closed" for fqn in closed]


def bias_of(program: Program, fqn: str, prefix: str) -> dict[str, Tensor]:
    """Return the bias of a site by PEFT's name where it was trained, float32: PEFT puts it in the place of the base's.

    Raises LowerError where branches have made one that the module has no place for.
    """
    bias, name = whole_bias(program.maps[fqn]), program.sites[fqn].uses[0].bias
    if bias is not None and name is None and bool(bias.any()):
        raise LowerError(
            fqn, message="the branches add a bias, and the module has none: PEFT has no place for it",
            hint="Adapt it with `branch_bias: false`, or merge it and export the model",
        )  # fmt: skip
    if bias is None or name is None or not (bias.requires_grad or not torch.equal(bias, program.originals[name].to(bias))):
        return {}
    return {f"{prefix}.{BIAS}": bias.detach().float().contiguous()}


def whole_bias(made: LinearMap) -> Tensor | None:
    """Return the bias of a map: the parameter itself where no part has one of its own, else what all come to, float64."""
    parts = (part for part in made.modules() if isinstance(part, LinearMap) and part is not made)
    return made.exact().bias if any(part.bias is not None for part in parts) else made.bias


def trained_biases(tensors: Mapping[str, Tensor], adapted: Mapping[str, Adapted]) -> str:
    """Return which biases a folder holds, in PEFT's words: as it was read, else those of the adapted modules, or none."""
    if not any(name.endswith(BIAS) for name in tensors):
        return "none"
    return next((str(kept.options["bias"]) for kept in adapted.values() if "bias" in kept.options), "lora_only")


def is_stabilised(kept: Adapted) -> bool:
    """Say whether a method divides alpha by sqrt(rank)."""
    return kept.method == "rslora" or bool(kept.options.get("rslora"))


def uses_dora(program: Program, adapted: Mapping[str, Adapted]) -> bool:
    """Say whether the adapters have magnitudes. Raises LowerError where some have and some have not."""
    found = {fqn: split(program.maps[fqn], fqn)[1].magnitude is not None for fqn in adapted}
    if len(set(found.values())) > 1:
        raise LowerError(
            program.origin.name, message="DoRA and other adapters do not go into one folder", hint="Use one of them"
        )
    return all(found.values())


def original(program: Program, fqn: str) -> Tensor:
    """Return a site's captured weight as it is stored, float32."""
    return program.originals[program.sites[fqn].weight_name].detach().float()


def is_original(program: Program, fqn: str, base: Slot) -> bool:
    """Say whether the base under an adapter is the captured weight."""
    stored = program.originals[program.sites[fqn].weight_name].detach()
    held = getattr(base, "weight", None) if isinstance(base, LinearMap) else base
    if isinstance(base, Chain | Sum) or not isinstance(held, Tensor):
        return False
    if not isinstance(base, Lookup) and program.sites[fqn].transposed:
        stored = stored.T
    return held.shape == stored.shape and torch.equal(held.detach(), stored)


def is_vera(adapted: Mapping[str, Adapted]) -> bool:
    """Say whether the adapters are VeRA's."""
    return all(kept.method == "vera" for kept in adapted.values())


def vera_config(adapted: Mapping[str, Adapted]) -> dict[str, Any]:
    """Return the keys of a VeRA config that are not defaults."""
    first, *rest = adapted.values()
    if any((kept.rank, kept.options) != (first.rank, first.options) for kept in rest):
        raise LowerError("vera", message="all VeRA adapters of a folder have one rank and one seed")
    return {
        "r": first.rank, "vera_dropout": first.dropout, "d_initial": first.options.get("d_initial", 0.1),
        "projection_prng_key": first.options.get("seed", 0),
    }  # fmt: skip


def vera_tensors(program: Program, adapted: Mapping[str, Adapted]) -> dict[str, Tensor]:
    """Return the vectors of every module and the projections that they share, cut to the largest module."""
    tensors: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    for fqn in adapted:
        branch: Any = program.maps[fqn].adapter
        for module in program.placed(fqn):
            tensors[f"{PREFIX}{module}.vera_lambda_b"] = branch.lambda_b.diagonal.detach().float()
            tensors[f"{PREFIX}{module}.vera_lambda_d"] = branch.lambda_d.diagonal.detach().float()
        for name, dim in (("A", 1), ("B", 0)):
            held = getattr(branch, name).detach()
            if name not in largest or held.shape[dim] > largest[name].shape[dim]:
                largest[name] = held
    return tensors | {f"base_model.vera_{name}": held.float().contiguous() for name, held in largest.items()}


def verify(program: Program, read: PeftFolder) -> None:
    """Raise LowerError where a folder, read onto the captured weights, does not give the program's."""
    plain = {fqn: Site.original(program.sites[fqn], program.originals) for fqn in program.adapters}
    for fqn, made in maps_of(program, read, plain).items():
        (ours, bias), (theirs, read_bias) = program.maps[fqn].exact(), made.exact()
        size = float(ours.abs().max()) + sum(largest(branch) for branch in made.modules() if isinstance(branch, Scale))
        if float((ours - theirs).abs().max()) > 64 * torch.finfo(program.sites[fqn].dtype).eps * size:
            raise LowerError(fqn, message="the adapter as written stands for another weight than the program's")
        if not same_bias(bias, read_bias):
            raise LowerError(fqn, message="the adapter as written stands for another bias than the program's")


def same_bias(a: Tensor | None, b: Tensor | None) -> bool:
    """Say whether two biases, float64, are the same to the rounding of single precision; none is one of zeros."""
    if a is None or b is None:
        return not any(bool(t.any()) for t in (a, b) if t is not None)
    return torch.allclose(a, b)


def largest(branch: Scale) -> float:
    """Return a bound of the entries that add up in a product `scaling * B @ A`: what its rounding errors are relative to."""
    factors = factors_of(branch, "")
    return factors.scaling * float(factors.B.double().norm(dim=1).max() * factors.A.double().norm(dim=0).max())


__all__ = ["Factors", "PeftExport", "export_peft", "peft_folder"]

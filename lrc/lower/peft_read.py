"""From a PEFT folder to maps at a program's sites."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrc.errors import UsageError
from lrc.initialisers import Initial, Olora, Pissa, Start
from lrc.initialisers.olora import olora
from lrc.initialisers.pissa import pissa
from lrc.lower.peft_folder import BIAS, CORE, PeftFolder, by_module
from lrc.lower.peft_sites import Factors, adapted_map
from lrc.maps import Chain, Diagonal, LinearMap, Sum, frozen_base
from lrc.program import Adapted, Program, Site

AS_TRAINED = {"eva", "gaussian", "orthogonal"}  # starts that leave the base as it is


def maps_of(program: Program, folder: PeftFolder, at: Mapping[str, LinearMap] | None = None) -> dict[str, LinearMap]:
    """Return the map of every site that a folder adapts. at: what counts as standing there, in place of the program's maps.

    An adapter that says `pissa` or `olora` holds on what these leave of the weight, which is made again, as PEFT does. Raises
    UsageError for modules that the program lacks, for sizes that do not fit, and for starts that cannot be made again.
    """
    kind = folder.kind
    found = by_module(folder.tensors)
    known = {use.module: site for site in program.sites.values() for use in site.uses}
    missing = sorted(set(found) - set(known))
    if missing or not found:
        raise UsageError(
            folder.where, message=f"the adapter is for {missing[0]!r}, no site of the model" if missing else "no adapter",
            hint="Is this the base model of the adapter? `lrc inspect` lists its sites",
        )  # fmt: skip
    made = {}
    for module, tensors in found.items():
        site = known[module]
        standing = None if at is None else at[site.fqn]
        if kind == "VERA":
            made[site.fqn] = vera_map(site, folder, tensors, standing)
        else:
            made[site.fqn] = lora_map(site, module, folder, tensors, standing)
    return made


def lora_map(
    site: Site, module: str, folder: PeftFolder, tensors: Mapping[str, Tensor], standing: LinearMap | None
) -> LinearMap:
    """Return a site's map with a LoRA or DoRA adapter."""
    factors = factors_in(site, module, folder, tensors)
    base = frozen_base(site.map if standing is None else standing)
    start = initial_of(folder, site, factors, base)
    if start is not None:
        assert start.base is not None, "both change the base"
        base = site.layout.dense(start.base.to(site.dtype), None).requires_grad_(False)
    dropout = float(folder.config.get("lora_dropout") or 0.0)
    return adapted_map(site, factors, base, dropout, standing, tensors.get(BIAS))


def factors_in(site: Site, module: str, folder: PeftFolder, tensors: Mapping[str, Tensor]) -> Factors:
    """Return the factors of one module. Raises UsageError for sizes that are not the site's."""
    looked_up = site.kind == "embedding"
    names = ("lora_embedding_A", "lora_embedding_B") if looked_up else ("lora_A.weight", "lora_B.weight")
    if not all(name in tensors for name in names):
        raise UsageError(folder.where, expected=f"{names[0]} and {names[1]} of {module}", got=", ".join(tensors))
    if site.layout.groups > 1:
        raise UsageError(
            folder.where, message=f"{module} is a convolution in groups, whose adapter in PEFT reads the channels of all "
            "groups: it is no change of the weight, and PEFT cannot merge it either", hint="Leave it out of `target_modules`",
        )  # fmt: skip
    A, B = (tensors[name].flatten(1) for name in names)
    if CORE in tensors:
        B = B @ tensors[CORE]
    if (B.shape[0], A.shape[1]) != site.shape or A.shape[0] != B.shape[1]:
        raise UsageError(
            folder.where, expected=f"factors of {module} for a weight of shape {site.shape}",
            got=f"{tuple(B.shape)} and {tuple(A.shape)}", hint="Is this the base model of the adapter?",
        )  # fmt: skip
    return Factors(B, A, scaling_of(folder.config, module, A.shape[0]), tensors.get("lora_magnitude_vector"))


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return a module's scaling as its config says: alpha / r, or alpha / sqrt(r)."""
    alpha = float(value_for(config, "alpha_pattern", "lora_alpha", module, 8))
    r = value_for(config, "rank_pattern", "r", module, 8)
    if int(r) != rank:
        raise UsageError(module, expected=f"rank {r}, as adapter_config.json says", got=f"tensors of rank {rank}")
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def value_for(config: Mapping[str, Any], patterns: str, default: str, module: str, otherwise: Any) -> Any:
    """Return a module's own value where a pattern matches it, first one first, else the config's."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config.get(default, otherwise)


def initial_of(folder: PeftFolder, site: Site, factors: Factors, base: LinearMap) -> Initial | None:
    """Return the start that changes the base, made again from it; None where the base stays."""
    init = folder.config.get("init_lora_weights", True)
    if isinstance(init, bool) or init in AS_TRAINED:
        return None
    word = str(init)
    niter = re.fullmatch(r"pissa_niter_(\d+)", word)
    if word != "olora" and word != "pissa":
        why = "drew random numbers" if niter else "needs the data of its calibration, or its quantised base"
        raise UsageError(
            folder.where, message=f"`init_lora_weights: {word}` changed the base, and cannot be made again: it {why}",
            hint="In PEFT, save it with `path_initial_model_for_weight_conversion`: then it holds on the untouched base",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weight = base.exact().weight.to(torch.promote_types(site.dtype, torch.float32))
    start = Start(lambda: weight, site.shape, factors.rank, factors.scaling, site.kind, generator)  # type: ignore[arg-type]
    return pissa(start, Pissa()) if word == "pissa" else olora(start, Olora())


def vera_map(site: Site, folder: PeftFolder, tensors: Mapping[str, Tensor], standing: LinearMap | None) -> LinearMap:
    """Return a site's map with a VeRA adapter. Raises UsageError where the projections were not saved."""
    shared = [folder.tensors.get(f"base_model.vera_{name}") for name in "BA"]
    if any(t is None for t in shared):
        raise UsageError(folder.where, message="the shared projections are not there", hint="Set `save_projection: true`")
    B, A = (t.to(site.dtype) for t in shared if t is not None)
    parts: list[Any] = [
        Diagonal(tensors["vera_lambda_b"].to(site.dtype)), nn.Parameter(B[: site.out_features], requires_grad=False),
        Diagonal(tensors["vera_lambda_d"].to(site.dtype)), nn.Parameter(A[:, : site.in_features], requires_grad=False),
    ]  # fmt: skip
    under = site.map if standing is None else standing
    bias = None if under.bias is None else nn.Parameter(under.bias.detach(), requires_grad=False)
    branch = Chain(*parts, names=("lambda_b", "B", "lambda_d", "A"))
    return Sum(frozen_base(under), branch, bias=bias, names=("base", "adapter"))


def attach(program: Program, folder: PeftFolder) -> list[str]:
    """Put a folder's adapters at the program's sites, and freeze everything else. Returns the sites."""
    made = maps_of(program, folder)
    program.freeze()
    for fqn, map_ in made.items():
        program.replace(fqn, map_, "load_adapter", settle=False)
        program.adapters[fqn] = adapted_by(folder, fqn)
    program.settle()
    return list(made)


def adapted_by(folder: PeftFolder, module: str) -> Adapted:
    """Return what is remembered of an adapter that was read."""
    config = folder.config
    if folder.kind == "VERA":
        options = {"d_initial": config.get("d_initial", 0.1), "seed": config.get("projection_prng_key", 0)}
        return Adapted("vera", int(config["r"]), None, 1.0, dropout=float(config.get("vera_dropout") or 0.0), options=options)
    rank, alpha = (
        int(value_for(config, "rank_pattern", "r", module, 8)),
        value_for(config, "alpha_pattern", "lora_alpha", module, 8),
    )
    stabilised = bool(config.get("use_rslora"))
    method = "dora" if config.get("use_dora") else "rslora" if stabilised else "lora"
    return Adapted(
        method, rank, float(alpha), scaling_of(config, module, rank), dropout=float(config.get("lora_dropout") or 0.0),
        options=({"rslora": stabilised} if method == "dora" else {})
        | ({"bias": config["bias"]} if config.get("bias", "none") != "none" else {}),
    )  # fmt: skip

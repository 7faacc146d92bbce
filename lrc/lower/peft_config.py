"""`adapter_config.json`: the keys that each version of PEFT writes, and which modules a list of names means."""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lrc.errors import UsageError

VERSION = "0.18.0"
COMMON: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "inference_mode": True, "modules_to_save": None,
    "layers_pattern": None, "layers_to_transform": None, "revision": None, "task_type": None, "fan_in_fan_out": False,
}  # fmt: skip
LORA: dict[str, Any] = COMMON | {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "init_lora_weights": True,
    "layer_replication": None, "loftq_config": {},
    "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "megatron_config": None, "megatron_core": "megatron.core",
    "peft_type": "LORA", "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "target_modules": None, "target_parameters": None,
    "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip
VERA: dict[str, Any] = COMMON | {
    "d_initial": 0.1, "init_weights": True, "peft_type": "VERA", "projection_prng_key": 0, "r": 256, "save_projection": True,
    "target_modules": None, "vera_dropout": 0.0,
}  # fmt: skip
ADDED: dict[tuple[int, int], tuple[str, ...]] = {  # to LoRA, all None
    (0, 19): ("lora_ga_config", "use_bdlora"),
    (0, 20): ("monteclora_config", "velora_config"),
    (0, 21): ("kasa_config",),
}
Pair = tuple[int, float]


def defaults(kind: str, version: str) -> dict[str, Any]:
    """Return the keys that a version of PEFT (0.18 and later) writes for `LORA` or `VERA`, with their defaults."""
    major, minor = (int(part) for part in version.split(".")[:2])
    made = dict(LORA if kind == "LORA" else VERA)
    for since, names in ADDED.items() if kind == "LORA" else ():
        if (major, minor) >= since:
            made |= dict.fromkeys(names)
    return made | {"peft_version": version}


def config_text(config: Mapping[str, Any]) -> str:
    """Return the file's text, as PEFT formats it."""
    return json.dumps(config, indent=2, sort_keys=True)


def patterns(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """Return `r`, `lora_alpha`, `rank_pattern` and `alpha_pattern` for the rank and alpha of every module.

    The most common pair is the default; of the others the whole name is the key, marked as a beginning where another module
    ends with it.
    """
    (rank, alpha), _ = Counter(pairs.values()).most_common(1)[0]
    keys = {name: f"^{re.escape(name)}" if any(o.endswith(f".{name}") for o in pairs) else name for name in pairs}
    return {
        "r": rank, "lora_alpha": plain(alpha),
        "rank_pattern": {keys[name]: r for name, (r, _) in pairs.items() if r != rank},
        "alpha_pattern": {keys[name]: plain(a) for name, (_, a) in pairs.items() if a != alpha},
    }  # fmt: skip


def plain(alpha: float) -> float | int:
    """Return a whole number as one: PEFT's alpha is most often an integer."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def target_modules(chosen: Sequence[str], every: Collection[str]) -> list[str] | str:
    """Return the shortest ends of names that mean the chosen modules and no other, sorted; a pattern where there are none."""
    wanted, found = set(chosen), set()
    for name in chosen:
        parts = name.split(".")
        ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        fitting = [end for end in ends if all(n in wanted for n in every if n == end or n.endswith(f".{end}"))]
        if not fitting:
            return "|".join(re.escape(n) for n in sorted(wanted))
        found.add(fitting[0])
    return sorted(found)


def check_config(config: Mapping[str, Any], where: str) -> str:
    """Return the kind of adapter, `LORA` or `VERA`. Raises UsageError for what is not read, with the reason."""
    kind = str(config.get("peft_type"))
    if kind not in ("LORA", "VERA"):
        raise UsageError(where, expected="an adapter of type LORA or VERA", got=kind)
    unread = {
        "lora_bias": "a bias of B", "modules_to_save": "whole modules beside the adapter",
        "trainable_token_indices": "single tokens", "target_parameters": "parameters of experts",
        "layer_replication": "repeated layers", "use_qalora": "QA-LoRA", "alora_invocation_tokens": "aLoRA",
        "arrow_config": "Arrow", "use_bdlora": "BD-LoRA", "monteclora_config": "MonteCLoRA", "velora_config": "VeLoRA",
        "kasa_config": "KaSA",
    }  # fmt: skip
    for key, what in unread.items():
        if config.get(key) not in (None, False, "none", [], {}):
            raise UsageError(where, message=f"`{key}: {config[key]}`: {what} cannot be read", hint="Merge the adapter in PEFT")
    return kind

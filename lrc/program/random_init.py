"""Random weights for training from scratch: an architecture out of a config, or a module whose own rules are run again."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrc.errors import LrcError, ModelError, UsageError
from lrc.program.checks import need_transformers
from lrc.program.folder import read_config
from lrc.program.tasks import auto_class, infer_task

RULES = ("reset_parameters", "_reset_parameters")  # the second one is that of torch's attention and transformers


def model_of_config(
    folder: Path, *, seed: int, task: str | None = None, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> tuple[nn.Module, str]:
    """Return the transformers model of a folder's `config.json` as its class initialises it, in eval mode, and its task.

    Weights in the folder are not looked at; the numbers follow from `seed`. Raises ModelError for a config that transformers
    refuses, UsageError without transformers and for a folder that lrc wrote.
    """
    transformers = need_transformers()
    config = read_config(folder)
    task = task or infer_task(config, folder)
    if str(config.get("model_type", "")).startswith("lrc_"):
        raise UsageError(
            "model.init", message="the folder holds a model that lrc has changed, which has no start of its own",
            hint="Name the folder of the original, and repeat the passes",
        )  # fmt: skip
    try:
        loaded = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = getattr(transformers, auto_class(task)).from_config(
                loaded, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except LrcError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise unusable(folder, task, config, error) from error
    return model.eval(), task


def unusable(folder: Path, task: str, config: Mapping[str, Any], error: Exception) -> ModelError:
    """Return the error of a folder of which transformers makes no model."""
    return ModelError(
        str(folder),
        message=f"transformers cannot load the folder: {(str(error) or type(error).__name__).splitlines()[0]}",
        hint=f"Is `model.task: {task}` right? The config names {config.get('architectures')}",
    )


def renewed(module: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a module with the weights that it would start from, by the rules of its own parts.

    A transformers model is made anew from its config; of any other module every part that holds parameters runs its
    `reset_parameters`, inner parts first, so that the rule of a whole comes after those of what is in it. The numbers follow
    from `seed`. Raises ModelError for a part that has parameters and no such rule.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if callable(getattr(module, "init_weights", None)) and hasattr(module, "config"):
            kept = {p.dtype for p in module.parameters()}
            made: nn.Module = type(module)(copy.deepcopy(module.config))
            return made.to(kept.pop() if len(kept) == 1 else None).train(module.training)
        made = copy.deepcopy(module)
        for name, part in reversed(list(made.named_modules())):
            rule = next((getattr(part, word) for word in RULES if callable(getattr(part, word, None))), None)
            if rule is not None:
                rule()
            elif part._parameters:
                raise ModelError(
                    name or type(module).__name__,
                    message=f"{type(part).__name__} has parameters of its own and no `reset_parameters` for them",
                    hint="Give it one, or build the module with random weights and leave out `model.init`",
                )
    return made

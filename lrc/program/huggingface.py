"""Loading a Hugging Face folder with transformers, checked, and capturing it with inputs chosen for its task."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lrc.errors import LrcError, ModelError
from lrc.program.capture import capture_module
from lrc.program.checks import check_finite, need_transformers
from lrc.program.folder import check_weights, read_config
from lrc.program.program import Origin, Program
from lrc.program.random_init import model_of_config, unusable
from lrc.program.tasks import auto_class, example_inputs, infer_task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def capture_folder(
    folder: Path,
    *,
    name: str = "",
    task: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    weights: bool = True,
    seed: int | None = None,
) -> Program:
    """Load a folder and capture it. weights: False captures its architecture alone; seed: of random weights, or None.

    Raises ModelError or CaptureError.
    """
    if not weights:
        return _capture_architecture(folder, name, task, trust_remote_code)
    if seed is None:
        model, task = load_folder(folder, task=task, dtype=dtype, trust_remote_code=trust_remote_code)
    else:
        model, task = model_of_config(
            folder, seed=seed, task=task, dtype=DTYPES.get(dtype, torch.float32), trust_remote_code=trust_remote_code
        )
    return _capture(model.to(device), folder, name, task, lambda tensor: tensor.to(device))


def _capture_architecture(folder: Path, name: str, task: str | None, trust_remote_code: bool) -> Program:
    """Capture a folder's architecture with tensors that have shapes and no numbers."""
    transformers = need_transformers()
    config = read_config(folder)
    task = task or infer_task(config, folder)
    if str(config.get("model_type", "")).startswith("lrc_"):
        from lrc.program.auto_classes import register

        register()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        loaded = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with mode:
            model = getattr(transformers, auto_class(task)).from_config(loaded).eval()
    except LrcError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise unusable(folder, task, config, error) from error
    return _capture(model, folder, name, task, mode.from_tensor)


def _capture(model: nn.Module, folder: Path, name: str, task: str, place: Callable[[Tensor], Tensor]) -> Program:
    examples = example_inputs(model, model.config, folder)
    return capture_module(
        model,
        {name: place(tensor) for name, tensor in examples.tensors.items()},
        dynamic=examples.dynamic,
        largest=examples.largest,
        constants=examples.constants,
        origin=Origin(task=task, folder=folder, name=name or str(folder)),
    )


def load_folder(
    folder: Path, *, task: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[nn.Module, str]:
    """Return the transformers model of a folder in eval mode, every number checked to be finite, and its task.

    Raises ModelError for missing, damaged or non-finite weights, and UsageError without transformers.
    """
    transformers = need_transformers()
    config = read_config(folder)
    check_weights(folder)
    task = task or infer_task(config, folder)
    loader = getattr(transformers, auto_class(task))
    kind = str(config.get("model_type", ""))
    if kind.startswith("lrc_"):
        from lrc.program.auto_classes import register

        register()
    try:
        with Quiet(transformers):
            model, found = loader.from_pretrained(
                folder, dtype=DTYPES.get(dtype, "auto"), output_loading_info=True, local_files_only=True,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise unusable(folder, task, config, error) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            str(folder),
            message=f"the weights lack {len(missing)} tensors, first {missing[0]!r}",
            hint="Copy the whole folder again, or name the `task` that it was trained for",
        )
    check_finite(model, str(folder))
    made: nn.Module = model.eval()
    return made, task


class Quiet:
    """Keeps transformers' own reports of a load or save off the terminal: what matters is checked and raised here."""

    def __init__(self, transformers: Any) -> None:
        self.logging = transformers.utils.logging
        self.level = self.logging.get_verbosity()
        self.bars = self.logging.is_progress_bar_enabled()

    def __enter__(self) -> None:
        self.logging.set_verbosity_error()
        self.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self.logging.set_verbosity(self.level)
        if self.bars:
            self.logging.enable_progress_bar()

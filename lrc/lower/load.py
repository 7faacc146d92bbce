"""One call that reloads what a run left."""

from pathlib import Path

from torch import nn

from lrc.errors import ModelError
from lrc.lower.hf_folder import load_model
from lrc.lower.pt2 import Pt2Runner


def load(folder: Path) -> nn.Module:
    """Return the model of an output folder in eval mode: the transformers model, or the module of `program.pt2`.

    Raises ModelError for a folder that is none of ours, or that is damaged.
    """
    if (folder / "config.json").is_file():
        return load_model(folder)
    if (folder / "program.pt2").is_file():
        return Pt2Runner(folder / "program.pt2").module
    raise ModelError(
        str(folder),
        expected="a folder with `config.json` or `program.pt2`",
        got="neither",
        hint="Name the output folder of a run",
    )

"""The Hugging Face folder: config, safetensors, tokenizer and the other files beside the weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lrc.errors import LowerError
from lrc.lower.base import ExportOptions, Written, exporter
from lrc.program import Program
from lrc.program.checks import need_transformers
from lrc.program.graft import graft, joint_modules, share
from lrc.program.huggingface import Quiet, load_folder

SKIPPED = {"config.json", "README.md", "generation_config.json", "data_config.json"}
KEPT_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".vocab"}
WEIGHTS = ("model", "pytorch_model", "tf_model", "flax_model")


class HfExport(ExportOptions):
    """A folder that `lrc.load` reloads, and the auto classes of transformers after `import lrc.hf`."""

    format: Literal["hf"] = "hf"
    opens: ClassVar[str] = "lrc.lower.hf_folder:open_folder"
    artifact: ClassVar[str] = "config.json"


@exporter(HfExport)
def export_hf(program: Program, folder: Path, options: HfExport) -> Written:
    """Write the folder: `config.json` with `model_type: lrc_<base>`, safetensors, tokenizer and sidecar files.

    Raises LowerError for a program that did not come from a transformers model.
    """
    model: Any = graft(program)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise LowerError(
            program.origin.name,
            message="only transformers models have a Hugging Face folder",
            hint="Export `format: pt2` instead",
        )
    notes = separate_shared_maps(program, model)
    with Quiet(need_transformers()):
        model.save_pretrained(folder)
    write_config(program, folder / "config.json")
    if program.origin.folder is not None:
        copy_sidecars(Path(program.origin.folder), folder)
    return Written("config.json", tuple(notes))


def write_config(program: Program, path: Path) -> None:
    """Rewrite a saved config so that it names our model type and the map at every rewritten site."""
    config = json.loads(path.read_text(encoding="utf-8"))
    base = str(config.get("model_type", ""))
    kept = config.pop("lrc", None)
    if not base.startswith("lrc_") and program.maps:
        config["model_type"] = f"lrc_{base}"
    sites = dict(kept["sites"]) if isinstance(kept, Mapping) else {}
    for fqn in program.maps:
        sites |= {module: made.structure() for module, made in program.placed(fqn).items()}
    if sites:
        config["lrc"] = {"format": 1, "task": program.task, "sites": sites}
        ties = [list(names) for names in joint_modules(program)] or (kept or {}).get("ties")
        if ties:
            config["lrc"]["ties"] = ties
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def separate_shared_maps(program: Program, model: nn.Module) -> list[str]:
    """Give every use of a weight that several modules share its own copy: transformers knows no such sharing."""
    notes = []
    for fqn in program.maps:
        tables = [use.module for use in program.site(fqn).uses if use.layout is not None]
        uses = [module for module in program.placed(fqn) if module not in tables]
        for other in uses[1:]:
            model.set_submodule(other, _copied(model.get_submodule(other)))
            notes.append(
                f"{other} shares the weight of {fqn}; the folder holds it twice, since transformers shares embeddings alone"
            )
    return notes


def _copied(module: nn.Module) -> nn.Module:
    twin = share(module)
    for name, tensor in list(twin.named_parameters()):
        owner, _, last = name.rpartition(".")
        parent = twin.get_submodule(owner) if owner else twin
        setattr(parent, last, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad))
    return twin


def copy_sidecars(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer, chat template and other small files beside the weights, and folders of such files."""
    copied = []
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in SKIPPED or (folder / path.name).exists():
            continue
        if path.is_dir():
            inner = [p for p in sorted(path.iterdir()) if p.is_file() and p.suffix in KEPT_SUFFIXES]
            if path.name in {"lrc", "onnx", "aoti", "openvino"} or not inner:
                continue
            (folder / path.name).mkdir()
            for file in inner:
                shutil.copyfile(file, folder / path.name / file.name)
        elif path.suffix in KEPT_SUFFIXES and not (path.stem.startswith(WEIGHTS) and "index" in path.name):
            shutil.copyfile(path, folder / path.name)
        else:
            continue
        copied.append(path.name)
    return copied


class ModelRunner:
    """A transformers model (or any module that returns a mapping or tensors) as a runner."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        """Run without gradients; caches and other values that are no tensors are left out."""
        import torch

        with torch.no_grad():
            return named_tensors(self.model(**inputs))


def named_tensors(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors among a module's outputs by name; a bare tensor is `output`, members of a tuple `output_<i>`."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if isinstance(outputs, tuple | list):
        return {f"output_{i}": value for i, value in enumerate(outputs) if isinstance(value, Tensor)}
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def load_model(folder: Path) -> nn.Module:
    """Reload a folder of ours, or any Hugging Face folder, as a transformers model in eval mode."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return load_folder(folder, task=(config.get("lrc") or {}).get("task"))[0]


def open_folder(path: Path) -> ModelRunner:
    """Open the artifact of `format: hf`."""
    return ModelRunner(load_model(path.parent))

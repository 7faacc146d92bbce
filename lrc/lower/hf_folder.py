"""The Hugging Face folder: config, safetensors, tokenizer and the other files beside the weights."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lrc.errors import LowerError
from lrc.lower.base import ExportOptions, Written, exporter
from lrc.lower.stock_sizes import stock_of_sizes
from lrc.maps import Chain, Conv, Dense, Lookup, SharedLookup
from lrc.program import Program
from lrc.program.checks import need_transformers
from lrc.program.graft import graft, share, shared_factors
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

    A model of single weights keeps its own type: merged, or pruned to sizes that its own config can say.
    Raises LowerError for a program that did not come from a transformers model.
    """
    model: Any = graft(program)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise LowerError(
            program.origin.name,
            message="only transformers models have a Hugging Face folder",
            hint="Export `format: pt2` instead",
        )
    model, notes, stock = as_stored(program, model)
    with Quiet(need_transformers()):
        model.save_pretrained(folder, save_original_format=stock)  # factors of experts have no names in the original one
    write_config(program, folder / "config.json", stock=stock)
    if program.origin.folder is not None:
        copy_sidecars(Path(program.origin.folder), folder)
    return Written("config.json", tuple(notes))


def as_stored(program: Program, model: nn.Module) -> tuple[Any, list[str], bool]:
    """Return the model that is written for a grafted one, notes on it, and whether its folder is a stock one."""
    made, notes = stock_modules(program, model), []
    if made is not None:
        resized = any(new.weight.shape != old.shape for new, old in made.values())
        twin = share(model) if resized else model
        for name, (module, _) in made.items():
            twin.set_submodule(name, module)
        if not resized:
            return twin, [], True
        stock, note = stock_of_sizes(program, twin)
        if stock is not None:
            return stock, [note], True
        notes = [f"the folder needs lrc to load: {note}"]
    return model, [*notes, *separate_shared_maps(program, model), *give_own_memory(program, model)], False


def stock_modules(program: Program, model: nn.Module) -> dict[str, tuple[Any, Tensor]] | None:
    """Return the model's own kind of module for every site, with the map's weight, where all maps are one weight each.

    With each comes the weight that it had. Of these alone the folder is a stock one: what was merged needs nothing of ours.
    """
    source = program.origin.model
    if source is None or "lrc" in getattr(model.config, "to_dict", dict)():
        return None
    made: dict[str, tuple[Any, Tensor]] = {}
    modules: dict[str, Any] = dict(source.named_modules(remove_duplicate=False))
    for fqn in program.maps:
        site = program.sites[fqn]
        for name, held in program.placed(fqn).items():
            old = modules.get(name)  # None for a bare parameter, such as the weights of experts
            if old is None or not isinstance(held, Dense | Conv | Lookup):
                return None
            if (held.bias is None) != (getattr(old, "bias", None) is None):
                return None
            weight = held.weight.T.contiguous() if site.transposed else held.weight
            if weight.shape != old.weight.shape and (weight.ndim != old.weight.ndim or program.modules or program.idle):
                return None
            new = share(old)
            new.weight = nn.Parameter(weight.detach())
            if held.bias is not None:
                new.bias = nn.Parameter(held.bias.detach())
            made[name] = new.train(old.training), old.weight
    return made


def write_config(program: Program, path: Path, *, stock: bool = False) -> None:
    """Rewrite a saved config so that it names our model type and the map at every rewritten site; not of a stock model."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if stock:
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        return
    base = str(config.get("model_type", ""))
    kept = config.pop("lrc", None)
    if not base.startswith("lrc_") and program.maps:
        config["model_type"] = f"lrc_{base}"
    sites = dict(kept["sites"]) if isinstance(kept, Mapping) else {}
    for fqn in program.maps:
        sites |= {module: made.structure() for module, made in program.placed(fqn).items()}
    sites |= {fqn: module.structure() for fqn, module in program.modules.items()}  # type: ignore[operator]  # as all of ours
    if sites:
        config["lrc"] = {"format": 1, "task": program.task, "sites": sites}
        shared = (dict(kept.get("shared", {})) if isinstance(kept, Mapping) else {}) | shared_factors(program)
        if shared:
            config["lrc"]["shared"] = shared
    if "lrc" in config:
        config["lrc"] |= beside(program, kept or {})
    idle = sorted({*(kept or {}).get("idle", ()), *program.idle})
    if idle:
        config["lrc"]["idle"] = idle
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def beside(program: Program, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says beside the maps, where pruning asks for it: numbers of modules, and shapes of other tensors."""
    tensors = program.tensors()
    attributes = {name: dict(own) for name, own in {**kept.get("attributes", {}), **program.attributes}.items()}
    shapes = dict(kept.get("shapes", {})) | {
        name: list(tensors[name].shape)
        for name in sorted(program.changed & tensors.keys() & program.originals.keys())
        if tensors[name].shape != program.originals[name].shape
    }
    return {key: value for key, value in (("attributes", attributes), ("shapes", shapes)) if value}


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


def give_own_memory(program: Program, model: nn.Module) -> list[str]:
    """Give every map its own copy of a tensor that shares memory with anything else in the model: files know no such sharing.

    So the base under the adapter of a tied embedding, the rule that all sites of `compacter` share, VeRA's projections. A
    factor that products of several sites share, and nothing else, is stored once: `config.json` says whose it is.
    """
    tied = shared_factors(program)
    named = Counter(tied.values())
    once = {name: named[stored] + 1 for name, stored in [*tied.items(), *((stored, stored) for stored in named)]}
    holders = Counter(p.untyped_storage().data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    copies = 0
    for place in (place for fqn in program.maps for place in program.placed(fqn)):
        module = model.get_submodule(place)
        shared = [
            name
            for name, p in module.named_parameters(remove_duplicate=False)
            if (count := holders[p.untyped_storage().data_ptr()]) > 1 or not p.is_contiguous()
            if not (
                isinstance(module, Chain | SharedLookup)
                and "." not in name
                and once.get(f"{place}.{name}") == count
                and p.is_contiguous()
            )
        ]
        if shared:
            model.set_submodule(place, _copied(module, shared))
            copies += len(shared)
    return [f"maps share memory with one another or the model; the folder holds {copies} copies of it"] if copies else []


def _copied(module: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """Return a module with copies of its parameters, or of those that are named."""
    twin = share(module)
    for name, tensor in list(twin.named_parameters(remove_duplicate=names is None)):
        if names is None or name in names:
            owner, _, last = name.rpartition(".")
            parent = twin.get_submodule(owner) if owner else twin
            copy = tensor.detach().clone(memory_format=torch.contiguous_format)
            setattr(parent, last, nn.Parameter(copy, requires_grad=tensor.requires_grad))
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

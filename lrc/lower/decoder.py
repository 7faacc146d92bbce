"""A causal language model whose key-value cache is plain tensors, in and out: the graph that a served decoder needs."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from lrc.errors import UsageError
from lrc.program import Program
from lrc.program.graft import graft

TAKEN = ("input_ids", "attention_mask", "position_ids")
PAST, PRESENT = "past_key_values", "present"
OLD, NEW = 4, 3  # tokens of the example, in the cache and after it; torch.export would take equal sizes for one
Pairs = Sequence[tuple[Tensor, Tensor]]


class CachedDecoder(nn.Module):
    """The user's module with the program's maps; what its cache holds comes in and goes out as pairs of keys and values.

    Each is (batch, heads, past, features), in the order of the layers. The cache keeps every token: attention with a sliding
    window sees its window through the mask. The parameters have the names that they have in the user's module.

    Raises UsageError for a model without such a cache, LowerError for a program that cannot be grafted.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        check_cache(program.origin.model)
        model: Any = graft(program).eval()
        for name, child in model.named_children():
            self.add_module(name, child)
        self._model = (model,)  # in a tuple, so that its parameters do not get a second name
        accepted = signature(model.forward).parameters
        self.takes = tuple(name for name in TAKEN if name in accepted)

    def forward(self, inputs: Mapping[str, Tensor], past: Pairs) -> tuple[Tensor, Pairs]:
        """Return the logits (batch, sequence, vocabulary) and the cache with the new tokens."""
        from transformers import DynamicCache

        cache = DynamicCache([tuple(pair) for pair in past])
        outputs = self._model[0](**inputs, past_key_values=cache, use_cache=True)
        return outputs.logits, [(layer.keys, layer.values) for layer in cache.layers]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once without gradients on inputs by the names of the file, the cache empty where it has no past.

        Returns the outputs by the names of the file.
        """
        flat = [value for name, value in inputs.items() if name.startswith(PAST)]
        with torch.no_grad():
            logits, present = self(
                {name: inputs[name] for name in self.takes if name in inputs}, list(zip(flat[::2], flat[1::2], strict=True))
            )
        return {"logits": logits} | dict(zip(names(PRESENT, present), flatten(present), strict=True))

    def example(self, ids: Tensor) -> tuple[dict[str, Tensor], Pairs]:
        """Return example inputs and an example past of (2, OLD + NEW) ids. Raises UsageError for a layer without a cache."""
        mask = torch.ones_like(ids)
        with torch.no_grad():
            _, past = self({"input_ids": ids[:, :OLD], "attention_mask": mask[:, :OLD]}, [])
        if not all(isinstance(tensor, Tensor) and tensor.ndim == 4 for pair in past for tensor in pair):
            raise refusal("a layer keeps no keys and values of its own")
        places = torch.arange(OLD, OLD + NEW, device=ids.device).expand(2, NEW).contiguous()
        given = {"input_ids": ids[:, OLD:], "attention_mask": mask, "position_ids": places}
        return {name: given[name] for name in self.takes}, past

    def export_arguments(self, examples: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of `torch.onnx.export` beside the module: the example, names and dynamic sizes.

        examples: those of the program. Raises UsageError for a program that takes no tokens.
        """
        if "input_ids" not in examples:
            raise refusal(f"the program takes {', '.join(examples)}, no `input_ids`")
        tokens = examples["input_ids"].flatten()
        ids = tokens[torch.arange(2 * (OLD + NEW), device=tokens.device) % len(tokens)].reshape(2, -1)
        inputs, past = self.example(ids)
        batch, sequence, total = Dim("batch"), Dim("sequence"), Dim("total")
        before = {0: batch, 2: Dim("past", min=0)}
        sizes = {name: {0: batch, 1: total if name == "attention_mask" else sequence} for name in inputs}
        return {
            "args": (inputs, past),
            "dynamic_shapes": (sizes, [(before, before) for _ in past]),
            "input_names": [*inputs, *names(PAST, past)],
            "output_names": ["logits", *names(PRESENT, past)],
        }


def wants_cache(program: Program, asked: bool | None) -> bool:
    """Say whether a program is exported with its cache: as asked, or where it is a causal model of transformers.

    A program with modules that have no place in that model is not. Raises UsageError, before any work, for a model whose cache
    cannot be exported.
    """
    model = program.origin.model
    if asked is None:
        asked = program.task == "text-generation" and hasattr(model, "config") and not program.inserted
    if asked:
        check_cache(model)
    return asked


def check_cache(model: Any) -> None:
    """Raise UsageError for a model whose cache is not one pair of keys and values a layer, as transformers tells it."""
    if not hasattr(model, "can_generate") or not model.can_generate():
        raise refusal(f"{type(model).__name__} is no model of transformers that generates text")
    if "past_key_values" not in signature(model.forward).parameters:
        raise refusal(f"{type(model).__name__} takes no `past_key_values`")
    if getattr(model.config, "is_encoder_decoder", False):
        raise refusal("an encoder-decoder has two caches")
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    try:
        layers = DynamicCache(config=model.config).layers
    except Exception as error:  # configs of other makers may lack anything
        raise refusal(f"transformers makes no cache of the config ({type(error).__name__}: {error})") from error
    for i, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise refusal(f"layer {i} keeps its past in a {type(layer).__name__}, not in keys and values alone")


def refusal(why: str) -> UsageError:
    """Return the error of a model whose cache cannot be exported."""
    return UsageError(
        "export.onnx.cache",
        message=f"the key-value cache cannot be exported: {why}",
        hint="Set `cache: false` for the graph of a whole text, without a cache",
    )


def names(kind: str, pairs: Pairs) -> list[str]:
    """Return the names of a cache's tensors: `past_key_values.0.key`, `past_key_values.0.value` and so on."""
    return [f"{kind}.{i}.{part}" for i in range(len(pairs)) for part in ("key", "value")]


def flatten(pairs: Pairs) -> list[Tensor]:
    """Return a cache's tensors in the order of their names."""
    return [tensor for pair in pairs for tensor in pair]

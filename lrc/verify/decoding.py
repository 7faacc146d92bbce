"""What a decoder with a cache must answer: for a whole text, and for one token after a text that is in the cache."""

import torch

from lrc.lower.decoder import PAST, PRESENT, CachedDecoder
from lrc.program import Program
from lrc.verify.cases import Case, make_cases


def cases_of(program: Program, *, dynamic: bool = True, cached: bool = False) -> list[Case]:
    """Return what an artifact of a program is checked with; cached: it takes and returns a key-value cache."""
    cases = make_cases(program, program.inputs, dynamic=dynamic)
    return decoding_cases(program, cases) if cached else cases


def decoding_cases(program: Program, cases: list[Case]) -> list[Case]:
    """Return the cases of whole texts with what the cache then holds, and one that gives the last token of the last text alone.

    The logits are always those of the program on the whole text; the cache is that of the user's module.
    """
    decoder = CachedDecoder(program)
    made = []
    for case in cases:
        known = decoder.run(case.inputs)
        made.append(Case(case.inputs, known | {"logits": case.expected["logits"]}))
    whole = made[-1]
    ids, mask = whole.inputs["input_ids"], whole.inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    before = decoder.run({"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]})
    step = {
        "input_ids": ids[:, -1:].contiguous(),
        "attention_mask": mask.clone(),  # two inputs in one memory cannot be stored
        "position_ids": torch.full((len(ids), 1), ids.shape[1] - 1),
    }
    step |= {n.replace(PRESENT, PAST): value.contiguous() for n, value in before.items() if n.startswith(PRESENT)}
    last = whole.expected["logits"][:, -1:].contiguous()
    return [*made, Case(step, whole.expected | {"logits": last})]

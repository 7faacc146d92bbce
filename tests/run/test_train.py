"""The pass `train` on whole models: what moves, what stays, every objective, resuming, export, and what is refused."""

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LAYERS, Run, captured_mlp, mlp, mlp_inputs
from torch import Tensor

import lrc
from lrc.api import Compiled, compile_to_folder
from lrc.data import Request
from lrc.errors import DataError, LrcError, SpecError, TrainError, UsageError
from lrc.program import Program
from lrc.run.prepare import prepare, replace_task
from lrc.train.data import TrainData, load_examples

FACTORIZE = {"type": "factorize", "targets": [LAYERS], "solver": "svd", "rank": {"fraction": 0.25}, "form": "two_factor"}
SQUEEZE = {"type": "factorize", "solver": "svd", "rank": {"fraction": 0.25}, "form": "two_factor"}
LORA = {"type": "adapt", "method": "lora", "targets": [LAYERS], "rank": 4, "alpha": 8}


def train(data: Path | None, objective: Any = "distillation", **options: Any) -> dict[str, Any]:
    """Return the pass with a few steps."""
    given = {"steps": 6, "batch_size": 8, "optimizer": {"type": "adamw", "lr": 1e-2}, "schedule": "constant"}
    where = {} if data is None else {"data": str(data)}
    return {"type": "train", "objective": objective, **where, **given, **options}  # type: ignore[dict-item]  # any options


def compiled(model: Any, cache: Path, *passes: Mapping[str, Any], **options: Any) -> Compiled:
    return lrc.compile(model, {"version": 1, "passes": list(passes)}, cache=cache, **options)


@pytest.fixture(scope="module")
def encoder(bert: Path) -> Program:
    """The encoder as a model of sentences, captured once; the pass trains copies."""
    return replace_task(lrc.capture(str(bert)), "sentence-similarity")


def losses(made: Compiled) -> list[float]:
    return [row["loss"] for row in made.training[0]["history"]]


def weights(made: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in made.program.tensors().items()}


def test_distillation_brings_a_compressed_model_back_towards_the_dense_one(
    encoder: Program, data: Path, tmp_path: Path
) -> None:
    passes = (FACTORIZE, train(data / "calib.txt", steps=40))
    made = compiled(encoder, tmp_path, *passes)
    assert sum(losses(made)[-5:]) < 0.4 * sum(losses(made)[:5])
    before = made.dense.tensors()
    kept = {name: t for name, t in made.program.tensors().items() if name in before and not t.requires_grad}
    assert "embeddings.LayerNorm.weight" in kept
    assert all(torch.equal(before[name], t) for name, t in kept.items())
    assert all(d.before == d.after or d.type == "factorize" for d in made.plan.decisions)
    assert made.plan.notes[-1].startswith("train: 40 steps, loss ")
    assert sum(d.type == "train" for d in made.plan.decisions) == 6


def test_the_captured_module_and_programs_that_share_its_tensors_keep_their_values(tmp_path: Path) -> None:
    model, x = mlp(), mlp_inputs()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    program = lrc.capture(model, {"x": x})
    squeezed = lrc.compile(program, {"version": 1, "passes": [SQUEEZE]}, cache=tmp_path)
    factors = weights(squeezed)
    options = train(Path("tiny:calibration_of_mlp"), parameters="all", batch_size=32, steps=40)
    made = compiled(squeezed.program, tmp_path, options, allow_code=True)
    assert losses(made)[0] == pytest.approx(0.0, abs=1e-9)  # the program before the passes is the teacher
    made = compiled(program, tmp_path, SQUEEZE, options, allow_code=True)
    assert losses(made)[-1] < 0.8 * losses(made)[0]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(torch.equal(a, factors[name]) for name, a in squeezed.program.tensors().items())


def test_training_the_program_is_training_the_grafted_module(encoder: Program, data: Path, tmp_path: Path) -> None:
    """The two views have equal gradients."""
    made = compiled(encoder, tmp_path, FACTORIZE, train(data / "calib.txt", steps=1))
    model = made.graft()
    ids = torch.randint(4, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    name = "encoder.layer.0.output.dense.A"
    parameter = dict(model.named_parameters())[name]
    assert parameter is made.program.tensors()[name]
    gradients = []
    for run in (lambda: made.program(input_ids=ids), lambda: model(input_ids=ids)):
        (gradient,) = torch.autograd.grad(run()["last_hidden_state"].square().sum(), parameter)
        gradients.append(gradient)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_lora_trains_its_factors_alone_and_merges(llama: Path, data: Path, tmp_path: Path) -> None:
    learn = train(None, "causal_lm", steps=30) | {"data": {"dataset": str(data / "stream.txt"), "max_length": 16}}
    program = lrc.capture(str(llama))
    made = compiled(program, tmp_path, LORA, learn)
    assert losses(made)[-1] < 0.9 * losses(made)[0]
    names = {n for n, p in made.program.graph_module.named_parameters() if p.requires_grad}
    assert names
    assert all(n.endswith((".A", ".B")) for n in names)
    dense = made.dense.tensors()
    base = {n: t for n, t in made.program.tensors().items() if n.endswith("base")}
    assert base
    assert all(torch.equal(t, dense[n.removesuffix("base") + "weight"]) for n, t in base.items())
    merged = compiled(program, tmp_path, LORA, learn, {"type": "merge", "dense": True})
    ids = torch.randint(4, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = (c.program(input_ids=ids)["logits"] for c in (merged, made))
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(found, made.dense(input_ids=ids)["logits"], atol=1e-2)


def test_sora_closes_gates_exactly_and_merging_keeps_the_outputs(llama: Path, data: Path, tmp_path: Path) -> None:
    program = lrc.capture(str(llama))
    adapt = {"type": "adapt", "method": "sora", "targets": [LAYERS], "rank": 4}
    learn = train(None, "causal_lm", steps=40, recipe={"type": "sora", "to": 3e-2, "values": 3, "each": 8}) | {
        "data": {"dataset": str(data / "stream.txt"), "max_length": 16},
        "optimizer": {"type": "proximal_adamw", "lr": 1e-2, "threshold": 1e-2},
    }
    made = compiled(program, tmp_path, adapt, learn)
    gates = [p for n, p in made.program.graph_module.named_parameters() if n.endswith("gate.diagonal")]
    closed = sum(int((g == 0).sum()) for g in gates)
    assert len(gates) == 7
    assert closed > 0
    assert f"train: {closed} of 28 gates are closed" in made.plan.notes
    merged = compiled(program, tmp_path, adapt, learn, {"type": "merge"})
    ids = torch.randint(4, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = (c.program(input_ids=ids)["logits"] for c in (merged, made))
    assert torch.allclose(found, wanted, atol=1e-4)
    assert merged.program.size()[0] < made.program.size()[0]


@pytest.mark.parametrize("optimizer", ["fira", "galore", "adamw8bit", "riemannian_adamw", "proximal_adamw", "sgd"])
def test_every_optimizer_trains_through_the_spec(optimizer: str, tmp_path: Path) -> None:
    more = {"rank": 2} if optimizer in ("fira", "galore") else {}
    options = train(Path("tiny:calibration_of_mlp"), optimizer={"type": optimizer, "lr": 1e-2, **more}, steps=12)
    made = compiled(captured_mlp(), tmp_path, SQUEEZE, options, allow_code=True)
    assert losses(made)[-1] < losses(made)[0]


def test_updates_inside_the_backward_pass_train_the_same(tmp_path: Path) -> None:
    found = []
    for per_layer in (False, True):
        options = train(
            Path("tiny:calibration_of_mlp"), clip=None, per_layer=per_layer, parameters="all",
            optimizer={"type": "fira", "rank": 2, "lr": 1e-2},
        )  # fmt: skip
        found.append(weights(compiled(captured_mlp(), tmp_path, SQUEEZE, options, allow_code=True)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("optimizer", ["adamw", "galore", "proximal_adamw", "sgd"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_parameters_that_a_pattern_matches_learn_at_a_multiple_of_the_rate(
    optimizer: str, per_layer: bool, tmp_path: Path
) -> None:
    given = {"clip": None, "per_layer": per_layer, "optimizer": {"type": optimizer, "lr": 1e-4}, "steps": 1}
    before, plain, faster = (
        weights(compiled(captured_mlp(), tmp_path, SQUEEZE, *passes, allow_code=True))
        for passes in (
            (), (train(Path("tiny:calibration_of_mlp"), **given),),
            (train(Path("tiny:calibration_of_mlp"), **given, lr_factors={"**.B": 3.0, "**.A": 2.0, "up.A": 1.0}),),
        )
    )  # fmt: skip
    moved = [name for name in before if not torch.equal(before[name], plain[name])]
    assert {name.rsplit(".", 1)[-1] for name in moved} >= {"A", "B"}
    for name in moved:
        factor = 3.0 if name.endswith(".B") else 2.0 if name.endswith(".A") and name != "up.A" else 1.0
        assert torch.allclose(faster[name] - before[name], factor * (plain[name] - before[name]), rtol=2e-2, atol=1e-7), name


def test_objectives_with_labels(encoder: Program, data: Path, tmp_path: Path) -> None:
    made = compiled(
        encoder, tmp_path, FACTORIZE, train(data / "pairs.csv", {"type": "cosine", "scale": 1.0}, batch_size=4, steps=20),
    )  # fmt: skip
    assert sum(losses(made)[-4:]) < sum(losses(made)[:4])
    made = compiled(encoder, tmp_path, FACTORIZE, train(data / "calib.txt", "reconstruction", steps=20))
    assert sum(losses(made)[-4:]) < 0.8 * sum(losses(made)[:4])


def classes_of_mlp() -> list[dict[str, Tensor]]:
    """Return inputs with the class of the dense perceptron's largest output."""
    with torch.no_grad():
        return [{"x": x, "labels": mlp()(x).argmax(-1)} for x in (mlp_inputs(32, seed) for seed in range(4))]


def regression_of_mlp() -> list[dict[str, Tensor]]:
    """Return inputs with the outputs of another perceptron."""
    with torch.no_grad():
        return [{"x": x, "labels": mlp(1)(x)} for x in (mlp_inputs(32, seed) for seed in range(4))]


def halves(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """A loss of the user's own."""
    return outputs["output"].square().mean() + 0 * batch["x"].sum()


@pytest.mark.parametrize(
    ("objective", "factory"),
    [
        ("classification", "classes_of_mlp"),
        ("regression", "regression_of_mlp"),
        ({"type": "python", "function": "test_train:halves"}, "regression_of_mlp"),
    ],
)
def test_objectives_on_arrays(objective: Any, factory: str, tmp_path: Path) -> None:
    options = train(Path(f"test_train:{factory}"), objective, steps=30)
    made = compiled(captured_mlp(), tmp_path, SQUEEZE, options, allow_code=True)
    assert losses(made)[-1] < 0.9 * losses(made)[0]


def test_masked_language_models_learn_hidden_tokens(data: Path, tmp_path: Path) -> None:
    from tiny import write_bert
    from transformers import AutoTokenizer

    folder = write_bert(tmp_path / "bert", "BertForMaskedLM")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UsageError, match="a tokenizer with a mask token"):
        compiled(str(folder), tmp_path, FACTORIZE, train(data / "calib.txt", "masked_lm"))
    tokenizer.mask_token = "[UNK]"
    tokenizer.save_pretrained(folder)
    from lrc.data.text import load_tokenizer

    load_tokenizer.cache_clear()
    made = compiled(str(folder), tmp_path, FACTORIZE, train(data / "calib.txt", "masked_lm", steps=40, dropout=False))
    assert sum(losses(made)[-5:]) < sum(losses(made)[:5])


def test_validation_by_a_metric_and_by_the_loss(encoder: Program, data: Path, tmp_path: Path) -> None:
    judged = {"metric": {"type": "spearman", "dataset": str(data / "pairs.csv")}, "every": 3}
    made = compiled(
        encoder, tmp_path, FACTORIZE, train(data / "calib.txt", validation=judged)
    )  # fmt: skip
    assert [row["step"] for row in made.training[0]["history"] if "validation" in row] == [3, 6]
    judged = {"data": str(data / "calib.txt"), "every": 2, "patience": 1}
    made = compiled(encoder, tmp_path, FACTORIZE, train(data / "calib.txt", validation=judged, steps=30))
    figures = [row["validation"] for row in made.training[0]["history"] if "validation" in row]
    assert figures[0] > min(figures)
    assert made.training[0]["best_step"] == 2 * (1 + figures.index(min(figures)))


def test_mixed_precision_keeps_the_parameters_in_their_own(tmp_path: Path) -> None:
    options = train(Path("tiny:calibration_of_mlp"), precision="bfloat16", steps=12)
    made = compiled(captured_mlp(), tmp_path, SQUEEZE, options, allow_code=True)
    assert {t.dtype for t in made.program.tensors().values()} == {torch.float32}
    assert losses(made)[-1] < losses(made)[0]


def test_without_data_of_its_own_the_pass_trains_on_the_calibration_data(tmp_path: Path) -> None:
    made = compiled(captured_mlp(), tmp_path, SQUEEZE, train(None), calibration=[{"x": mlp_inputs(16, s)} for s in range(3)])
    assert losses(made)[-1] < losses(made)[0]


def test_a_run_is_repeated_from_its_checkpoint_and_its_seed_decides(tmp_path: Path) -> None:
    options = train(Path("tiny:calibration_of_mlp"))
    runs = [
        compiled(captured_mlp(), tmp_path / cache, SQUEEZE, options | {"seed": seed}, allow_code=True)
        for cache, seed in (("a", 0), ("b", 0), ("a", 0), ("a", 1))
    ]
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2]) != losses(runs[3])
    first = weights(runs[0])
    assert all(torch.equal(t, first[n]) for run in runs[1:3] for n, t in weights(run).items())


def test_planning_trains_nothing_and_says_so(tmp_path: Path) -> None:
    spec = {"version": 1, "passes": [SQUEEZE, train(Path("tiny:calibration_of_mlp")), {"type": "merge"}]}
    plan = lrc.plan(captured_mlp(), spec, cache=tmp_path, allow_code=True)
    assert not (tmp_path / "train").exists()
    assert [d.notes for d in plan.decisions if d.type == "train"] != []
    assert "passes after `train` are planned on the values before it" in plan.notes


def test_the_output_folder_holds_the_trained_values_of_all_parameters(
    bert: Path, data: Path, tmp_path: Path, checked_here: None
) -> None:
    spec = tmp_path / "spec.yaml"
    options = train(data / "calib.txt", parameters="all", steps=4)
    spec.write_text(json.dumps({"version": 1, "passes": [FACTORIZE, options], "export": [{"format": "hf"}]}))
    done = compile_to_folder(str(bert), spec, output=tmp_path / "out")
    done.raise_on_failure()
    model = lrc.load(done.path)
    source = lrc.capture(str(bert)).tensors()
    for name in ("embeddings.word_embeddings.weight", "embeddings.LayerNorm.bias"):
        assert not torch.equal(dict(model.named_parameters())[name], source[name])
    manifest = json.loads((done.path / "lrc" / "manifest.json").read_text())
    assert [row["step"] for row in manifest["training"][0]["history"]] == [1, 2, 3, 4]
    assert "<polyline" in (done.path / "lrc" / "report.html").read_text()


@pytest.mark.slow
def test_a_killed_training_ends_at_the_same_bytes(tmp_path: Path) -> None:
    """Five times `kill -9`, each at another step of the run; a forked child is the run."""
    options = train(Path("tiny:calibration_of_mlp"), steps=400, checkpoint_every=7, optimizer={"type": "fira", "rank": 2})

    def run(cache: str) -> Compiled:
        return compiled(captured_mlp(), tmp_path / cache, SQUEEZE, options, allow_code=True)

    whole = weights(run("whole"))
    for _ in range(5):
        seen = len(list((tmp_path / "killed").rglob("step-*.pt")))
        pid = os.fork()
        if pid == 0:
            try:
                run("killed")
            finally:
                os._exit(0)
        newest = max((p.name for p in (tmp_path / "killed").rglob("step-*.pt")), default="")
        for _ in range(2000):
            time.sleep(0.005)
            found = max((p.name for p in (tmp_path / "killed").rglob("step-*.pt")), default="")
            if found > newest or (seen == 0 and found):
                break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    last = max(p.name for p in (tmp_path / "killed").rglob("step-*.pt"))
    assert last < "step-00000400.pt", "the run was finished before it could be killed five times"
    again = weights(run("killed"))
    assert all(torch.equal(again[name], t) for name, t in whole.items())


def refused(error: type[LrcError], words: str, model: Any, *passes: Mapping[str, Any], tmp: Path, **options: Any) -> LrcError:
    with pytest.raises(error, match=words) as caught:
        compiled(model, tmp, *passes, **options)
    return caught.value


def bad_classes() -> list[dict[str, Tensor]]:
    return [{"x": mlp_inputs(16), "labels": torch.full((16,), 10)}]


def wild_inputs() -> list[dict[str, Tensor]]:
    return [{"x": mlp_inputs(16) * float("inf")}]


def test_what_cannot_be_trained_is_refused_with_the_place_and_the_remedy(tmp_path: Path) -> None:
    program, here = captured_mlp(), Path("tiny:calibration_of_mlp")
    nothing = refused(UsageError, "nothing is left to train", program, train(here), tmp=tmp_path, allow_code=True)
    assert nothing.exit_code == 2
    assert "`parameters: all`" in nothing.hint
    refused(
        UsageError, "selects no parameter", program, SQUEEZE, train(here, parameters="adapters"), tmp=tmp_path, allow_code=True
    )
    refused(UsageError, "matches no parameter", program, SQUEEZE, train(here, also=["head.*"]), tmp=tmp_path, allow_code=True)
    factors = train(here, lr_factors={"head.*": 2.0})
    refused(UsageError, "matches no trained parameter", program, SQUEEZE, factors, tmp=tmp_path, allow_code=True)
    small = refused(
        DataError,
        "at least one batch, 500 samples",
        program,
        SQUEEZE,
        train(here, batch_size=500),
        tmp=tmp_path,
        allow_code=True,
    )
    assert small.exit_code == 2
    wrong = train(Path("test_train:bad_classes"), "classification")
    labels = refused(
        DataError,
        "whole labels 0 to 9, the classes of the model, got 10",
        program,
        SQUEEZE,
        wrong,
        tmp=tmp_path,
        allow_code=True,
    )
    assert labels.exit_code == 2
    refused(
        DataError, "expected data with labels", program, SQUEEZE, train(here, "classification"), tmp=tmp_path, allow_code=True
    )
    wild = refused(
        TrainError, "the loss is nan", program, SQUEEZE, train(Path("test_train:wild_inputs")), tmp=tmp_path, allow_code=True
    )
    assert wild.exit_code == 1
    pairs = train(here, per_layer=True, clip=None, optimizer="riemannian_adamw")
    refused(UsageError, "looks at pairs of parameters", program, SQUEEZE, pairs, tmp=tmp_path, allow_code=True)
    own = train(here, {"type": "python", "function": "test_train:halves"})
    refused(UsageError, "factory runs code", program, SQUEEZE, own, tmp=tmp_path)
    refused(UsageError, "no such file", program, SQUEEZE, train(Path("absent.txt")), tmp=tmp_path)


def tokens(**changed: np.ndarray) -> dict[str, np.ndarray]:
    """Return ids of the tiny decoder, and what is changed."""
    return {"input_ids": np.random.default_rng(0).integers(4, 40, (8, 12)), **changed}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (tokens(input_ids=np.full((8, 12), 5000)), r"does not run on this data: index out of range.*below the size"),
        (tokens(input_ids=np.full((8, 12), -3)), r"does not run on this data: index out of range"),
        (tokens(input_ids=np.full((8, 12), 0.5, np.float32)), r"does not run on this data: .*input_ids: \[batch, \w+\]"),
        (tokens(labels=np.full((8, 12), 5000)), r"expected whole labels 0 to 63, the classes of the model, got 5000"),
        (tokens(labels=np.full((8, 12), -7)), r"expected whole labels 0 to 63, the classes of the model, got -7"),
        (tokens(labels=np.full((8, 5), 7)), r"expected labels of shape \(4, 12\), got \(4, 5\)"),
        (tokens(labels=np.full((8, 12), -100)), "expected something to predict in every batch, got labels that are all -100"),
        (tokens(input_ids=np.full((8, 1), 7)), "expected something to predict in every batch, got none"),
    ],
)
def test_tokens_and_labels_that_the_model_does_not_know_are_refused(
    arrays: Mapping[str, Any], words: str, tokens_of: Program, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    learn = train(tmp_path / "x.npz", "causal_lm", batch_size=4)
    made = refused(DataError, words, tokens_of, LORA, learn, tmp=tmp_path)
    assert made.exit_code == 2


@pytest.fixture(scope="module")
def tokens_of(llama: Path) -> Program:
    return lrc.capture(str(llama))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "many"])
@pytest.mark.parametrize(("kind", "columns"), [("labelled", "text,label"), ("pairs", "sentence1,sentence2,score")])
def test_numbers_of_a_file_that_are_none_are_refused(value: str, kind: Any, columns: str, bert: Path, tmp_path: Path) -> None:
    request = Request("x.csv", ["input_ids", "attention_mask"], tokenizer=bert, base=tmp_path)
    texts = "the cat," * columns.count(",")
    last = columns.split(",")[-1]
    for cell, words in ((value, f"expected numbers in the column `{last}`, got '{value}'"), ("", f"got nothing in {last}")):
        (tmp_path / "x.csv").write_text("\n".join([columns, f"{texts}1", f"{texts}{cell}"]))
        with pytest.raises(DataError, match=words):
            load_examples(request, TrainData(dataset="x.csv"), kind)


def test_a_recipe_that_looks_at_gradients_is_not_run_where_they_are_freed(tokens_of: Program, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **tokens())
    learn = train(
        tmp_path / "x.npz", "causal_lm", per_layer=True, clip=None,
        recipe={"type": "loraprune", "width_kept": 0.5, "skip_first": 0.0, "skip_last": 0},
    )  # fmt: skip
    refused(UsageError, "`loraprune` looks at the gradients of a step", tokens_of, LORA, learn, tmp=tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 3, "epochs": 1}, "`steps` or `epochs`"),
        ({"per_layer": True}, "`clip: null`"),
        ({"optimizer": "fyra"}, "Did you mean 'fira'"),
        ({"objective": "classify"}, "Did you mean 'classification'"),
        ({"validation": {"every": 3}}, "give `data`, for the loss on it, or `metric`"),
        ({"parameters": "some"}, "inserted"),
        ({"lr_factors": {"**": 0.0}}, "greater than 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=words):
        compiled(captured_mlp(), tmp_path, SQUEEZE, train(None) | options)


def test_data_that_a_file_names_decides_the_output(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=mlp_inputs(32).numpy())
    (tmp_path / "spec.yaml").write_text(json.dumps({"version": 1, "passes": [SQUEEZE, train(Path("x.npz"))]}))
    made = prepare(captured_mlp(), tmp_path / "spec.yaml", cache=tmp_path / "c")
    assert made.document.passes[1].datasets() == {"data": "x.npz"}  # type: ignore[attr-defined]


def test_the_command_line_says_what_went_wrong(cli: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(json.dumps({"version": 1, "passes": [train(Path("tiny:calibration_of_mlp"))]}))
    made = cli("compile", tmp_path / "s.yaml", "tiny:mlp_with_inputs", "-o", "out", "--allow-code", "--quiet")
    assert made.code == 2
    assert "nothing is left to train" in made.error

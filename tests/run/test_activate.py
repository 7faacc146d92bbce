"""activate: a ReLU between the factors, the bias divided as the paper does, in every form of the model; merging refuses it."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lrc
from lrc.errors import LrcError
from lrc.lower.ort import OrtRunner
from lrc.maps import Activation, Chain

RANK = 5


def compiled(*further: dict[str, Any], solver: Any = "afm", **first: Any) -> lrc.Compiled:
    """The perceptron, factorized on a draw of its inputs, and what comes after."""
    asked = {
        "version": 1,
        "calibration": {"dataset": "tiny:calibration_of_mlp", "samples": 128},
        "passes": [
            {"type": "factorize", "solver": solver, "rank": RANK, "form": "two_factor", "targets": ["up", "middle"], **first},
            *further,
        ],
    }
    return lrc.compile(tiny.captured_mlp(), asked, inputs=tiny.calibration_of_mlp()[0], allow_code=True)


@pytest.mark.parametrize("center", [True, False])
def test_the_factors_and_their_biases_are_those_of_the_paper(center: bool) -> None:
    made = compiled({"type": "activate"}, solver={"type": "afm", "center": center}).program.map_of("up")
    up = tiny.mlp().up
    x = torch.cat([batch["x"] for batch in tiny.calibration_of_mlp()]).double()
    W, b = up.weight.detach().double(), up.bias.detach().double()
    y = x @ W.T + b
    spread = (y - y.mean(0) * center).T @ (y - y.mean(0) * center) if center else (x @ W.T).T @ (x @ W.T)
    U = torch.linalg.eigh(spread)[1].flip(1)[:, :RANK]
    B, between, A = made.slots
    signs = (B.double().T @ U).diagonal().sign()
    assert torch.allclose(B.double(), U * signs, atol=1e-5)
    assert torch.allclose(A.weight.double(), signs[:, None] * (U.T @ W), atol=1e-5)
    assert torch.allclose(A.bias.double(), signs * (U.T @ b), atol=1e-5)
    mean = y.mean(0) if center else b
    assert torch.allclose(made.bias.double(), mean - U @ (U.T @ mean), atol=1e-5)
    assert isinstance(between, Activation)


def test_without_its_activation_the_block_is_what_was_factorized() -> None:
    plain, made = (compiled(*more).program.map_of("up") for more in ((), ({"type": "activate"},)))
    B, _, A = made.slots
    x = tiny.mlp_inputs()
    assert torch.allclose(A(x) @ B.T + made.bias, plain(x), atol=1e-6)
    assert torch.allclose(made(x), torch.relu(A(x)) @ B.T + made.bias, atol=1e-6)


def test_the_graph_the_graft_and_onnx_run_it_and_the_plan_says_what_it_is(tmp_path: Path) -> None:
    done = compiled({"type": "activate", "targets": ["up"], "function": "gelu"})
    assert repr(done.program.map_of("up")) == "Chain(Dense[20,5], Activation[5; gelu], Dense[5,12])"
    assert done.plan.parameters[1] == done.program.size()[0]
    (decision,) = done.plan.of_pass(1)
    assert decision.notes == ("not what was factorized until it is trained: the activation `gelu` stands between the factors",)
    x = tiny.mlp_inputs(3, 1)
    wanted = done.program(x=x)
    (y,) = wanted.values()
    with torch.no_grad():
        assert torch.allclose(done.graft(tiny.mlp())(x), y, atol=1e-6)
    runner = OrtRunner(done.to_onnx(tmp_path / "model.onnx"))
    (found,) = runner(x=x).values()
    assert torch.allclose(torch.as_tensor(found), y, atol=1e-5)


def test_merging_refuses_it_with_the_reason() -> None:
    program = compiled({"type": "activate"}).program
    reason = "the activation `relu` stands between the factors"
    inputs = tiny.calibration_of_mlp()[0]
    done = lrc.compile(program, {"version": 1, "passes": [{"type": "merge"}]}, inputs=inputs)
    kept = {d.sites[0]: d.keep for d in done.plan.decisions}
    assert kept["up"] == kept["middle"] == f"nothing to fold: {reason}"
    with pytest.raises(LrcError, match=reason):
        lrc.compile(program, {"version": 1, "passes": [{"type": "merge", "dense": True}]}, inputs=inputs)


def test_what_is_no_product_of_two_matrices_stays_and_a_second_run_changes_nothing() -> None:
    done = compiled({"type": "activate"}, {"type": "activate"})
    first, second = ({d.sites[0]: d.keep for d in done.plan.of_pass(index)} for index in (1, 2))
    assert first["up"] is None
    assert str(first["down"]).startswith("no product of two matrices (`factorize` with `form: two_factor` makes one): Dense")
    assert all(second.values())
    assert isinstance(done.program.map_of("middle"), Chain)
    assert done.program.map_of("middle").slots[2].bias is not None  # the mean is in the bias


def test_its_factors_are_trained() -> None:
    train = {
        "type": "train", "data": "tiny:calibration_of_mlp", "objective": "distillation", "steps": 60, "batch_size": 16,
        "optimizer": {"type": "adamw", "lr": 1e-2},
    }  # fmt: skip
    x = torch.cat([batch["x"] for batch in tiny.calibration_of_mlp()])
    (wanted,) = tiny.captured_mlp()(x=x).values()
    errors = []
    for more in ((), (train,)):
        (found,) = compiled({"type": "activate"}, *more).program(x=x).values()
        errors.append(float((found - wanted).detach().square().mean()))
    assert errors[1] < 0.7 * errors[0]

"""Gates: what must hold of the metrics, told apart from failures by the exit code."""

import pytest

from lrc.errors import GateError
from lrc.spec.document import GatesSpec
from lrc.verify.evaluate import Score, judge, raise_on_missed

ACCURACY = Score("accuracy", 0.72, 0.8, -0.1)
PERPLEXITY = Score("perplexity", 21.0, 20.0, -0.05)


def held(gates: GatesSpec, *scores: Score) -> dict[str, bool]:
    return {gate.gate: gate.ok for gate in judge(scores, gates)}


@pytest.mark.parametrize(("bound", "ok"), [(0.1, True), (0.11, True), (0.09, False), (0.0, False)])
def test_the_largest_degradation_is_relative_to_the_original(bound: float, ok: bool) -> None:
    assert held(GatesSpec(max_degradation=bound), ACCURACY) == {"max_degradation of accuracy": ok}


def test_every_metric_is_judged_whichever_way_is_good() -> None:
    found = held(GatesSpec(max_degradation=0.06), ACCURACY, PERPLEXITY)
    assert found == {"max_degradation of accuracy": False, "max_degradation of perplexity": True}


@pytest.mark.parametrize(("bound", "ok"), [(-0.1, True), (0.0, False)])
def test_the_smallest_improvement_may_be_a_loss(bound: float, ok: bool) -> None:
    assert held(GatesSpec(min_improvement=bound), ACCURACY) == {"min_improvement of accuracy": ok}


def test_a_metric_without_original_has_no_degradation() -> None:
    gates = GatesSpec(max_degradation=0.0, min_improvement=0.0, at_least={"generation": 0.5})
    assert held(gates, Score("generation", 0.4, None, None)) == {"at_least generation": False}


@pytest.mark.parametrize(("value", "at_least", "at_most"), [(0.5, True, True), (0.499, False, True), (0.501, True, False)])
def test_absolute_bounds_include_themselves(value: float, at_least: bool, at_most: bool) -> None:
    gates = GatesSpec(at_least={"kl": 0.5}, at_most={"kl": 0.5})
    assert held(gates, Score("kl", value, None, None)) == {"at_least kl": at_least, "at_most kl": at_most}


def test_a_gate_on_what_was_not_measured_is_missed() -> None:
    (gate,) = judge([ACCURACY], GatesSpec(at_most={"perplexity": 20.0}))
    assert (gate.ok, gate.found) == (False, "not measured")


def test_no_gates_judge_nothing() -> None:
    assert judge([ACCURACY], GatesSpec()) == []
    raise_on_missed([], "out")


def test_a_missed_gate_is_an_error_that_names_each_of_them() -> None:
    rows = [gate.row() for gate in judge([ACCURACY, PERPLEXITY], GatesSpec(max_degradation=0.01))]
    with pytest.raises(GateError) as caught:
        raise_on_missed(rows, "out")
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "out: max_degradation of accuracy expected <= 0.01, got 0.1; max_degradation of perplexity expected <= 0.01, "
        "got 0.05. The result was written; the report has every figure."
    )


def test_a_missed_parity_says_by_how_much() -> None:
    row = {"format": "onnx", "shape": "1x9", "output": "logits", "largest": 0.5, "allowed": 0.001, "ok": False}
    with pytest.raises(GateError, match=r"onnx at 1x9: logits differs by 0\.5, allowed 0\.001"):
        raise_on_missed([row], "out")

"""The pass `adapt`: what it inserts, what stays frozen, what it refuses, and that nothing changes at the start."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import lrc
from lrc.errors import LrcError
from lrc.maps import RowNorm, Sum


class Kinds(nn.Module):
    """An embedding, two convolutions and a linear, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.image = nn.Conv2d(1, 4, (3, 2), stride=2, dilation=(1, 2))
        self.out = nn.Linear(5, 7)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.out(self.line(self.table(ids).mT).mT), self.image(image)


def kinds() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Kinds().eval()
    return model, {"ids": torch.randint(1, 11, (2, 9)), "image": torch.randn(2, 1, 12, 9)}


def adapt(**options: Any) -> dict[str, Any]:
    return {"version": 1, "passes": [{"type": "adapt", **options}]}


def spread(a: Any, b: Any) -> float:
    """The largest difference of two tuples of outputs, over their size."""
    return max(float((x - y).detach().abs().max() / y.detach().abs().max()) for x, y in zip(a, b, strict=True))


def disturb(module: nn.Module) -> None:
    """Train, in effect: add random numbers to whatever is trained."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


EVERY = ["{table,line,image,out}"]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", {"type": "pissa", "niter": 4}])
def test_the_output_is_unchanged_at_the_start_and_merging_keeps_what_was_trained(method: str, init: Any) -> None:
    model, inputs = kinds()
    made = lrc.compile(model, adapt(targets=EVERY, method=method, rank=2, init=init), inputs=inputs)
    assert all(isinstance(made.program.maps[name], Sum | RowNorm) for name in ("table", "line", "image", "out"))
    assert spread(made.module(**inputs), model(**inputs)) < 1e-5
    grafted = made.graft()
    disturb(grafted)
    trained = grafted(**inputs)
    assert spread(trained, model(**inputs)) > 1e-2
    assert spread(made.module(**inputs), trained) < 1e-6
    merged = lrc.compile(
        made.program, {"version": 1, "passes": [{"type": "merge"}, {"type": "merge", "targets": ["table"]}]}, inputs=inputs
    )
    assert [repr(m).strip("*") for m in merged.program.maps.values()] == [
        "Lookup[11,6]", "Conv[5,6,3]", "Conv[4,1,3x2]", "Dense[7,5]",
    ]  # fmt: skip
    assert spread(merged.module(**inputs), trained) < 1e-5


def test_only_the_factors_are_trained_and_the_model_itself_is_as_it_was() -> None:
    model = tiny.mlp()
    made = lrc.compile(model, adapt(targets=["up"], rank=3), inputs={"x": tiny.mlp_inputs()})
    factors = {"up.adapter.inner.A", "up.adapter.inner.B"}
    for view in (made.program.graph_module, made.graft()):
        assert {name for name, p in view.named_parameters() if p.requires_grad} == factors
    assert all(p.requires_grad for p in model.parameters())
    own = dict(made.program.graph_module.named_parameters())
    assert own["up.base"].data_ptr() == model.up.weight.data_ptr()
    assert sum(own[name].numel() for name in factors) == 3 * (12 + 20)


def test_a_second_adapter_freezes_the_first_one_at_its_site_and_no_other() -> None:
    passes = [{"type": "adapt", "targets": targets, "rank": 2} for targets in (["up", "down"], ["up"])]
    made = lrc.compile(tiny.mlp(), {"version": 1, "passes": passes}, inputs={"x": tiny.mlp_inputs()})
    trained = {name for name, p in made.program.graph_module.named_parameters() if p.requires_grad}
    assert trained == {f"{site}.adapter.inner.{factor}" for site in ("up", "down") for factor in "AB"}
    assert repr(made.program.maps["up"]) == "Sum(Sum(Dense[20,12]*, Scale(8, Chain[20,2,12]*)), Scale(8, Chain[20,2,12]))"


def test_an_adapter_stands_on_a_factorised_weight_too() -> None:
    passes = [{"type": "factorize", "solver": "svd", "rank": 4, "form": "two_factor"}, {"type": "adapt", "rank": 2}]
    x = tiny.mlp_inputs()
    made = lrc.compile(tiny.mlp(), {"version": 1, "passes": passes}, inputs={"x": x})
    assert repr(made.program.maps["up"]) == "Sum(Chain[20,4,12]*, Scale(8, Chain[20,2,12]))"
    disturb(made.program.graph_module)
    trained = made.module(x)
    merged = lrc.compile(made.program, {"version": 1, "passes": [{"type": "merge"}]}, inputs={"x": x})
    assert repr(merged.program.maps["up"]) == "Chain[20,6,12]"
    assert spread([merged.module(x)], [trained]) < 1e-5


def test_peft_spells_the_same_options_differently() -> None:
    theirs = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.25, "use_rslora": True, "init_lora_weights": "gaussian",
              "target_modules": ["up", "down"], "exclude_modules": ["down"]}  # fmt: skip
    ours = {"rank": 3, "alpha": 6, "dropout": 0.25, "method": "rslora", "init": "gaussian", "targets": ["up"]}
    x = tiny.mlp_inputs()
    a, b = (lrc.compile(tiny.mlp(), adapt(**options), inputs={"x": x}) for options in (theirs, ours))
    assert repr(a.program.maps) == repr(b.program.maps)
    assert all(torch.equal(p, q) for p, q in zip(a.program.tensors().values(), b.program.tensors().values(), strict=True))


def test_ranks_and_alphas_of_single_sites_follow_patterns() -> None:
    made = lrc.compile(
        tiny.mlp(), adapt(rank=2, alpha=4, rank_pattern={"up": 5}, alpha_pattern={"do.*": 8}), inputs={"x": tiny.mlp_inputs()}
    )
    assert {name: repr(m).split("Scale")[1] for name, m in made.program.maps.items()} == {
        "up": "(0.8, Chain[20,5,12]))", "middle": "(2, Chain[16,2,20]))", "down": "(4, Chain[10,2,16]))",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 3, "r": 3}, "PEFT's spelling"),
        ({"rank": {"energy": 0.9}}, "whole number"),
        ({"method": "loro"}, "Did you mean 'lora'"),
        ({"init": "pisa"}, "Did you mean 'pissa'"),
        ({"rank_pattern": {"upp": 3}}, "matches no selected site"),
        ({"use_dora": True, "method": "lora"}, "choose the method"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LrcError, match=words):
        lrc.compile(tiny.mlp(), adapt(**options), inputs={"x": tiny.mlp_inputs()})


def test_a_site_that_an_initialiser_cannot_serve_is_kept_with_the_reason() -> None:
    made = lrc.compile(tiny.mlp(), adapt(rank=11, init="pissa"), inputs={"x": tiny.mlp_inputs()})
    assert {d.name: d.keep for d in made.plan.decisions if d.keep} == {
        "down": "`init: pissa` has 10 terms at most, and rank 11 was asked for"
    }


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone() -> None:
    x = tiny.mlp_inputs()
    made = lrc.compile(tiny.mlp(), adapt(targets=["up"], rank=3, dropout=0.5), inputs={"x": x})
    assert "Dropout(0.5)" in repr(made.program.maps["up"])
    disturb(made.program.graph_module)
    site = made.program.maps["up"]
    quiet = site(x)
    assert torch.equal(site(x), quiet)
    site.train()
    assert not torch.equal(site(x), quiet)
    site.eval()
    merged = lrc.compile(made.program, {"version": 1, "passes": [{"type": "merge", "targets": ["up"]}]}, inputs={"x": x})
    assert spread([merged.program.maps["up"](x)], [quiet]) < 1e-5

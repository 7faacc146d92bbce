"""Trained numbers: for every method the formula of its paper, and the counts that the papers print."""

from typing import Any

import pytest
from adapted import adapted, case, trained
from torch import nn

from lrc.spec.registry import ADAPTERS, INITIALISERS

r, n_rule = 4, 4
SHAPES = {"tall": (20, 8), "square": (20, 20), "wide": (8, 20)}
FORMULAS: dict[str, Any] = {
    "lora": lambda m, n: r * (m + n),
    "rslora": lambda m, n: r * (m + n),
    "dora": lambda m, n: r * (m + n) + m,
    "vera": lambda m, n: r + m,
    "hydra": lambda m, n: r * (m + n) + 2 * 2 * m + (r + 2 + 2 * m),
    "lora_xs": lambda m, n: r * r,
    "loldu": lambda m, n: r,
    "sora": lambda m, n: r * (m + n) + r,
    "flora": lambda m, n: r * r + r * (m + n),
    "plp": lambda m, n: r * (n - n // 2 + m - m // 2),
    "compacter": lambda m, n: 3 * (m + r) + n_rule**3,
}


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("site", SHAPES)
def test_the_trained_numbers_of_a_linear_are_the_formula(method: str, site: str) -> None:
    made = adapted(case(), targets=[site], method=method, rank=r)
    assert trained(made.program.maps[site]) == FORMULAS[method](*SHAPES[site])


def test_colora_trains_the_bias_too_and_no_method_is_left_out() -> None:
    made = adapted(case(), targets=["tall", "wide"], method="colora", rank=r)
    assert trained(made.program.maps["tall"]) == r * 28 + 20
    assert trained(made.program.maps["wide"]) == r * 28  # it has none
    assert set(ADAPTERS.names()) == set(FORMULAS) | {"colora"}


PRINTED = {
    "LoRA of GPT-3, rank 1 on query and value": (96 * 2 * FORMULAS["lora"](12288, 12288) // r, 4.7e6),
    "LoRA of GPT-3, rank 8 on query and value": (96 * 2 * FORMULAS["lora"](12288, 12288) * 2, 37.7e6),
    "LoRA of Mistral-7B, rank 32": (
        32 * 8 * sum(FORMULAS["lora"](*s) for s in [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 3), 83.9e6,
    ),
    "LoRA-XS of RoBERTa-large, rank 16": (24 * 4 * 16**2, 24.6e3),
    "LoRA-XS of RoBERTa-large, rank 25": (24 * 4 * 25**2, 60e3),
    "LoRA-SB of Mistral-7B, rank 96": (224 * 96**2, 2.06e6),
    "LoRA of DeBERTaV3-base, rank 8": (
        12 * 2 * (4 * FORMULAS["lora"](768, 768) + 2 * FORMULAS["lora"](3072, 768)), 1.33e6,
    ),
    "LoRA of Llama-3-8B, rank 8 on query and value, all layers of Flexora": (
        32 * 2 * (FORMULAS["lora"](4096, 4096) + FORMULAS["lora"](1024, 4096)), 3_407_872,
    ),
    "the same on the 14 layers that it selects": (
        14 * 2 * (FORMULAS["lora"](4096, 4096) + FORMULAS["lora"](1024, 4096)), 1_490_944,
    ),
    "FLoRA of LLaMA-7B over LoRA, rank 4": (
        32 * 5 * (FORMULAS["flora"](4096, 4096) - FORMULAS["lora"](4096, 4096)), 2.6e3,
    ),
    "Hydra of RoBERTa-base": (12 * (4 * 3840 + 8 * 1536), 331_776),
    "Compacter of T5-base": (48 * 3 * (768 + 24) + 64 + 62 * 768, 161_728),
    "Compacter++ of T5-base": (24 * 3 * (768 + 24) + 64 + 62 * 768, 104_704),
}  # fmt: skip


@pytest.mark.parametrize("what", PRINTED)
def test_the_formulas_give_what_the_papers_print(what: str) -> None:
    numbers, printed = PRINTED[what]
    assert numbers == pytest.approx(printed, rel=0.016)  # two digits are printed


def test_a_core_of_the_rank_of_mistral_counts_as_the_paper_has_it() -> None:
    it = case()._replace(model=nn.Linear(128, 160), inputs={"input": case().inputs["image"].new_zeros(1, 128)})
    made = adapted(it, targets=["**"], method="lora_xs", rank=96)
    assert 224 * trained(next(iter(made.program.maps.values()))) == 2_064_384


DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"default_rank": 8, "default_alpha": 16.0},
    "hydra": {"default_rank": 2, "sequential": 2, "parallel": True, "branch_bias": True, "default_alpha": None},
    "lora_xs": {"default_alpha": None},
    "loldu": {"default_rank": 64, "default_alpha": 1.0, "z_init": "lu"},
    "sora": {"default_rank": 8, "default_alpha": 16.0, "gate": "normal"},
    "flora": {"kernel_rank": 2, "default_alpha": None},
    "colora": {"default_alpha": None, "train_bias": True},
    "compacter": {"n": 4, "reduction": 32, "phm_rank": 1, "shared_rule": True, "activation": "gelu_new"},
    "plp": {"default_rank": 64, "default_alpha": None, "zero_init": False, "train": "both"},
    "vera": {"default_rank": 256, "d_initial": 0.1, "seed": 0},
}
STARTS: dict[str, dict[str, Any]] = {
    "lora_ga": {"direction": "ArB2r", "scale": "stable", "gamma": 16.0, "niter": 4, "norm_clip": False},
    "lora_ga_hf": {"direction": "ArB2r", "scale": "stable", "gamma": 16.0, "niter": 4},
    "lora_sb": {"niter": 10}, "svd_weight": {"core_std": 1e-5}, "eva": {"rho": 2.0, "tau": 0.99}, "corda": {"mode": "ipm"},
    "loftq": {"bits": 4, "iterations": 1}, "pissa": {"niter": None},
}  # fmt: skip


@pytest.mark.parametrize(("registry", "wanted"), [(ADAPTERS, DEFAULTS), (INITIALISERS, STARTS)], ids=["methods", "starts"])
def test_defaults_are_those_of_the_authors(registry: Any, wanted: dict[str, dict[str, Any]]) -> None:
    for name, options in wanted.items():
        made = registry.get(name).options()
        assert {key: getattr(made, key) for key in options} == options, name

"""Against PEFT itself: equal starts, equal outputs, equal files, and folders that load on the other side."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrc
from lrc.api import Compiled
from lrc.errors import LrcError
from lrc.lower.peft_export import PeftExport, export_peft
from lrc.maps import LinearMap

peft = pytest.importorskip("peft", reason="skipped: comparisons with PEFT, which is not installed")
WARNED = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
pytestmark = WARNED


class Kinds(nn.Module):
    """An embedding, two convolutions and two linears, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.image = nn.Conv2d(1, 4, (3, 2), stride=2)
        self.up = nn.Linear(5, 12)
        self.down = nn.Linear(12, 7, bias=False)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(torch.tanh(self.up(self.line(self.table(ids).mT).mT.contiguous()))), self.image(image)


EVERY = ["down", "image", "line", "table", "up"]
LINEAR = ["down", "up"]


def kinds() -> nn.Module:
    torch.manual_seed(0)
    return Kinds().eval()


def inputs(rows: int = 2, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(0, 11, (rows, 9), generator=generator),
        "image": torch.randn(rows, 1, 12, 9, generator=generator),
    }


def theirs(targets: list[str] = EVERY, **options: Any) -> Any:
    """A PEFT model, disturbed as training would."""
    options = {"r": 4, "lora_alpha": 8} | options
    return peft.get_peft_model(kinds(), peft.LoraConfig(target_modules=targets, **options)).eval()


def ours(targets: list[str] = EVERY, calibration: Any = None, **options: Any) -> Compiled:
    options = {"rank": 4, "alpha": 8} | options
    spec = {"version": 1, "passes": [{"type": "adapt", "targets": targets, **options}]}
    return lrc.compile(kinds(), spec, inputs=inputs(), calibration=calibration)


def disturb(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def loaded(folder: Path) -> Compiled:
    """What `load_adapter` makes of a PEFT folder."""
    spec = {"version": 1, "passes": [{"type": "load_adapter", "path": str(folder)}]}
    return lrc.compile(kinds(), spec, inputs=inputs())


def close(a: Any, b: Any, tolerance: float = 2e-6) -> bool:
    return all(
        float((x - y).detach().abs().max()) <= tolerance * (1 + float(y.detach().abs().max()))
        for x, y in zip(a, b, strict=True)
    )


def weight_of(made: LinearMap) -> Tensor:
    return made.exact().weight.float()


METHODS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_of_peft_loads_here_and_is_written_again_byte_by_byte(method: str, tmp_path: Path) -> None:
    model = theirs(**METHODS[method])
    disturb(model.parameters())
    model.save_pretrained(tmp_path / "theirs")
    made = loaded(tmp_path / "theirs")
    assert close(made.module(**inputs()), model(**inputs()))
    export_peft(made.program, tmp_path, PeftExport(version=peft.__version__))
    a, b = tmp_path / "theirs", tmp_path / "adapters" / "default"
    assert (a / "adapter_model.safetensors").read_bytes() == (b / "adapter_model.safetensors").read_bytes()
    assert parsed(a) == parsed(b)


def parsed(folder: Path) -> dict[str, Any]:
    """The config, with what PEFT keeps as a set as one; where the test's module lives is no matter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = set(config["target_modules"])
    config["init_lora_weights"] = (
        True if config.get("init_lora_weights") in ("eva", "gaussian") else config.get("init_lora_weights")
    )
    return config


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_written_here_loads_in_peft(method: str, tmp_path: Path) -> None:
    made = ours(method=method, dropout=0.25)
    disturb(made.program.graph_module.parameters())
    export_peft(made.program, tmp_path, PeftExport(version=peft.__version__))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing or unexpected key is a warning in PEFT
        model = peft.PeftModel.from_pretrained(kinds(), tmp_path / "adapters" / "default").eval()
    assert close(model(**inputs()), made.module(**inputs()))
    merged = model.merge_and_unload()
    folded = lrc.compile(
        made.program, {"version": 1, "passes": [{"type": "merge", "targets": EVERY, "dense": True}]}, inputs=inputs()
    )
    for name, map_ in folded.program.maps.items():
        held = merged.get_submodule(name).weight
        stored = map_.weight
        assert close([stored], [held])


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_change_the_base_are_those_of_peft(init: str, stabilised: bool, tmp_path: Path) -> None:
    model = theirs(LINEAR, init_lora_weights=init, use_rslora=stabilised)
    made = ours(LINEAR, init=init, method="rslora" if stabilised else "lora")
    for name in LINEAR:
        layer, map_ = model.base_model.model.get_submodule(name), made.program.maps[name]
        assert close([map_.base], [layer.base_layer.weight])
        A, B = (getattr(layer, f"lora_{f}").default.weight for f in "AB")
        assert close([map_.adapter.inner.A, map_.adapter.inner.B], [A, B])
    assert close(made.module(**inputs()), kinds()(**inputs()))
    disturb(made.program.graph_module.parameters())
    written = export_peft(made.program, tmp_path, PeftExport(version=peft.__version__))
    assert "twice their rank" in written.notes[0]
    config = json.loads((tmp_path / "adapters" / "default" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, pytest.approx(8 * 2**0.5 if stabilised else 16))
    there = peft.PeftModel.from_pretrained(kinds(), tmp_path / "adapters" / "default").eval()
    assert close(there(**inputs()), made.module(**inputs()), 4e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_folder_of_peft_that_changed_the_base_is_read_as_peft_reads_it(init: str, tmp_path: Path) -> None:
    model = theirs(LINEAR, init_lora_weights=init)
    disturb(model.parameters())
    model.save_pretrained(tmp_path)
    assert close(loaded(tmp_path).module(**inputs()), model(**inputs()), 4e-6)


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "pissa_niter_4"])
def test_a_base_that_cannot_be_made_again_is_refused(init: str, tmp_path: Path) -> None:
    model = theirs(LINEAR)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(LrcError, match="cannot be made again"):
        loaded(tmp_path)


def batches() -> list[dict[str, Tensor]]:
    """The same batch again and again: every component has converged after the second one, here and there."""
    return [inputs(8)] * 4


def test_eva_starts_and_shares_out_ranks_as_peft_does() -> None:
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=LINEAR, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0, tau=0.99)
    )
    model = peft.get_peft_model(kinds(), config).eval()
    peft.initialize_lora_eva_weights(
        model, batches(), forward_fn=lambda m, x: m(**x), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )  # fmt: skip
    made = ours(LINEAR, batches(), rank=2, alpha=6, init={"type": "eva", "tau": 0.99})
    found = {name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    for name, layer in found.items():
        map_ = made.program.maps[name]
        A = layer.lora_A.default.weight
        assert map_.adapter.inner.A.shape == A.shape
        assert map_.adapter.scale == pytest.approx(layer.scaling["default"])
        assert float(torch.cosine_similarity(map_.adapter.inner.A, A).abs().min()) > 1 - 1e-4
    assert sum(map_.adapter.inner.A.shape[0] for map_ in made.program.maps.values()) == 4


def test_the_principal_components_of_eva_are_those_of_peft() -> None:
    from peft.utils.incremental_pca import IncrementalPCA

    from lrc.initialisers.eva import IncrementalPca

    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(9, 9, generator=generator)
    there, here = IncrementalPCA(n_components=4, copy=True, lowrank=True, lowrank_seed=42), IncrementalPca(4, 0.99)
    for shift in range(4):
        rows = torch.randn(30, 9, generator=generator) @ mix + shift
        there.partial_fit(rows)
        here.see(rows)
        found = here.found()
        assert close([found.S, found.explained], [there.singular_values_, there.explained_variance_ratio_], 1e-5)
        assert close([found.components.double()], [there.components_.double()], 1e-4)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_starts_as_in_peft(mode: str) -> None:
    model = kinds()
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=LINEAR, init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode),
    )  # fmt: skip
    data = [inputs(1, seed) for seed in range(20)]

    @torch.no_grad()
    def run() -> None:
        for batch in data:
            model(**batch)

    pytest.importorskip("attr", reason="skipped: PEFT's CorDA needs the package attrs, which is not installed")
    from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(model, config, run_model=run)
    there = peft.get_peft_model(model, config).eval()
    made = ours(LINEAR, data, rank=3, alpha=6, init={"type": "corda", "mode": mode})
    for name in LINEAR:
        layer, map_ = there.base_model.model.get_submodule(name), made.program.maps[name]
        assert close([map_.base], [layer.base_layer.weight], 2e-4)
        theirs_delta = layer.lora_B.default.weight @ layer.lora_A.default.weight
        assert close([map_.adapter.inner.exact().weight.float()], [theirs_delta], 2e-4)
    assert close(made.module(**inputs()), kinds()(**inputs()), 1e-5)


def test_the_normal_float_of_loftq_is_that_of_peft() -> None:
    from peft.utils import loftq_utils

    from lrc.formats import NormalFloat

    if not hasattr(loftq_utils, "NFQuantizer"):
        pytest.skip("skipped: this version of PEFT quantises with bitsandbytes alone")
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        quantizer = loftq_utils.NFQuantizer(num_bits=bits, device="cpu", block_size=64)
        assert close(
            [NormalFloat(bits=bits, scale_bits=None).rounded(weight)],
            [quantizer.dequantize_block(*quantizer.quantize_block(weight))],
            1e-6,
        )


def test_vera_starts_as_in_peft_and_folders_go_both_ways(tmp_path: Path) -> None:
    model = peft.get_peft_model(kinds(), peft.VeraConfig(r=5, target_modules=LINEAR)).eval()
    made = ours(LINEAR, method="vera", rank=5, alpha=None)
    assert close(made.module(**inputs()), kinds()(**inputs()))
    shared = model.base_model.vera_A["default"], model.base_model.vera_B["default"]
    for name in LINEAR:
        branch = made.program.maps[name].adapter
        assert torch.equal(branch.A, shared[0][:, : branch.in_features])
        assert torch.equal(branch.B, shared[1][: branch.out_features])
    disturb(model.parameters())
    model.save_pretrained(tmp_path / "theirs")
    read = loaded(tmp_path / "theirs")
    assert close(read.module(**inputs()), model(**inputs()))
    export_peft(read.program, tmp_path, PeftExport(version=peft.__version__))
    a, b = tmp_path / "theirs", tmp_path / "adapters" / "default"
    assert (a / "adapter_model.safetensors").read_bytes() == (b / "adapter_model.safetensors").read_bytes()
    assert parsed(a) == parsed(b)


def test_a_head_tied_to_the_embedding_is_adapted_alone_on_both_sides(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    there = peft.get_peft_model(model, config).eval()
    disturb(there.parameters())
    there.save_pretrained(tmp_path / "theirs")
    spec = {"version": 1, "passes": [{"type": "load_adapter", "path": str(tmp_path / "theirs")}]}
    made = lrc.compile(str(llama), spec)
    ids = torch.arange(4, 14)[None]
    got = made.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert close([got.logits if hasattr(got, "logits") else got[0]], [there(input_ids=ids).logits], 1e-5)
    export_peft(made.program, tmp_path, PeftExport(version=peft.__version__, task_type="CAUSAL_LM", base_model=str(llama)))
    a, b = tmp_path / "theirs", tmp_path / "adapters" / "default"
    assert (a / "adapter_model.safetensors").read_bytes() == (b / "adapter_model.safetensors").read_bytes()
    assert parsed(a) == parsed(b)


def test_what_peft_has_no_form_of_is_refused_with_the_reason(tmp_path: Path) -> None:
    made = ours(LINEAR, init="loftq")
    with pytest.raises(LrcError, match="changed base"):
        export_peft(made.program, tmp_path, PeftExport())
    passes = [
        {"type": "factorize", "solver": "svd", "rank": 3, "targets": ["up"]},
        {"type": "adapt", "targets": ["up"], "rank": 2},
    ]
    made = lrc.compile(kinds(), {"version": 1, "passes": passes}, inputs=inputs())
    with pytest.raises(LrcError, match="changed base"):
        export_peft(made.program, tmp_path, PeftExport())
    with pytest.raises(LrcError, match="no adapter"):
        export_peft(lrc.capture(kinds(), inputs()), tmp_path, PeftExport())


def test_ranks_of_single_sites_come_back(tmp_path: Path) -> None:
    made = ours(rank_pattern={"up": 2}, alpha_pattern={"down": 3.0})
    disturb(made.program.graph_module.parameters())
    export_peft(made.program, tmp_path, PeftExport(version=peft.__version__))
    model = peft.PeftModel.from_pretrained(kinds(), tmp_path / "adapters" / "default").eval()
    assert close(model(**inputs()), made.module(**inputs()))
    assert close(loaded(tmp_path / "adapters" / "default").module(**inputs()), made.module(**inputs()))

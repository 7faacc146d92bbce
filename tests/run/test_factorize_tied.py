"""factorize on a table that a head shares: one product for both."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch

import lrc
from lrc.api import compile_to_folder
from lrc.errors import SiteError
from lrc.lower.ort_decoder import OnnxDecoder
from lrc.maps import Chain, SharedLookup

NAMES = {"llama": ("lm_head", "model.embed_tokens"), "gpt2": ("lm_head", "transformer.wte")}
IDS = torch.randint(4, tiny.VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Decoders whose heads share the embedding."""
    made = tmp_path_factory.mktemp("tied")
    return {"llama": tiny.write_llama(made / "llama", tie_word_embeddings=True), "gpt2": tiny.write_gpt2(made / "gpt2")}


def spec(data: Path, tied: str = "joint", **options: Any) -> dict[str, Any]:
    calibration = {"dataset": str(data / "stream.txt"), "samples": 8, "max_length": 16}
    step = {"type": "factorize", "targets": ["lm_head"], "solver": "kfac", "rank": 8, "tied": tied}
    return {"version": 1, "calibration": calibration, "passes": [step | options]}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", ["svd", "whitened", "afm", "kfac", {"type": "kfac", "propagate": "compressed"}], ids=str)
def test_one_product_stands_for_both(name: str, solver: Any, folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    head, table = NAMES[name]
    done = lrc.compile(str(folders[name]), spec(data, solver=solver), cache=tmp_path / "cache")
    (decision,) = done.plan.decisions
    made, program = done.program.maps[head], done.program
    assert isinstance(made, Chain)
    shared = program.graph_module.get_submodule(table)
    assert isinstance(shared, SharedLookup)
    assert (shared.B, shared.A) == (made.B, made.A)
    bias = 0 if made.bias is None else tiny.VOCAB
    assert done.plan.parameters[1] == done.plan.parameters[0] - tiny.VOCAB * 32 + 8 * (tiny.VOCAB + 32) + bias
    assert program.size()[0] == done.plan.parameters[1]
    assert (decision.before.parameters, decision.after.parameters) == (tiny.VOCAB * 32, 8 * (tiny.VOCAB + 32) + bias)
    grafted: Any = done.graft()
    with torch.no_grad():
        expected = program(input_ids=IDS)["logits"]
        assert torch.equal(grafted(input_ids=IDS).logits, expected)
    dense = sum(p.numel() for p in done.program.origin.model.parameters())  # type: ignore[union-attr]
    assert sum(p.numel() for p in grafted.parameters()) - dense == done.plan.parameters[1] - done.plan.parameters[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_files_keep_the_tie(name: str, folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    head, table = NAMES[name]
    job = spec(data) | {"export": [{"format": "hf"}, {"format": "onnx"}]}
    done = compile_to_folder(str(folders[name]), job, output=tmp_path / "out")  # checks both in a fresh process
    stored = load_file(done.path / "model.safetensors")
    assert {key for key in stored if head in key or table in key} == {f"{table}.A", f"{table}.B"}
    loaded: Any = lrc.load(done.path)
    assert loaded.config.tie_word_embeddings
    made = loaded.get_submodule(head)
    assert made.B is loaded.get_submodule(table).B
    with torch.no_grad():
        expected = loaded(input_ids=IDS).logits
        assert torch.equal(lrc.capture(str(done.path))(input_ids=IDS)["logits"], expected)
    generated = loaded.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=8, pad_token_id=0)
    path = done.path / "onnx" / "model.onnx"
    assert (OnnxDecoder(path).generate(IDS, max_new_tokens=8, eos_token_id=3, pad_token_id=0) == generated.numpy()).all()
    sizes = [list(t.dims) for t in onnx.load(path).graph.initializer if len(t.dims) == 2]
    assert [sizes.count(size) for size in ([tiny.VOCAB, 8], [8, tiny.VOCAB], [8, 32], [32, 8])] == [1, 0, 1, 0]


def test_the_body_alone_reads_the_folder(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    import lrc.hf

    done = lrc.compile(str(folders["llama"]), spec(data), cache=tmp_path / "cache")
    done.save(tmp_path / "out")
    body = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = done.graft().model(input_ids=IDS).last_hidden_state  # type: ignore[operator,union-attr]
        assert torch.equal(body(input_ids=IDS).last_hidden_state, expected)


def test_what_tied_says_is_done(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    folder = str(folders["llama"])
    kept = lrc.compile(folder, spec(data, "keep"), cache=tmp_path / "cache")
    assert kept.plan.decisions[0].keep.startswith("tied: embedding reads the same weight")  # type: ignore[union-attr]
    untied = lrc.compile(folder, spec(data, "untie", solver="svd"), cache=tmp_path / "cache")
    assert untied.plan.parameters[1] == untied.plan.parameters[0] + 8 * (tiny.VOCAB + 32)
    with pytest.raises(SiteError, match=r"the weight is tied: embedding reads it too. Set `tied: keep`, `untie` or `joint`"):
        lrc.compile(folder, spec(data, "error"), cache=tmp_path / "cache")


def test_a_table_that_its_model_scales_is_left_with_the_reason(data: Path, tmp_path: Path) -> None:
    class Speaker(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(20, 12))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.embedding(ids, self.weight) @ self.weight.T

    step = {"type": "factorize", "targets": ["**"], "solver": "svd", "rank": 2, "tied": "joint"}
    ids = {"ids": torch.randint(0, 20, (3, 4))}
    done = lrc.compile(Speaker().eval(), {"version": 1, "passes": [step]}, inputs=ids, cache=tmp_path / "cache")
    (decision,) = done.plan.decisions
    assert decision.keep == "tied: embedding reads the same weight in a way that no product can be shared with"


def test_merge_gives_one_table_back(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    job = spec(data)
    job["passes"].append({"type": "merge", "targets": ["lm_head"], "dense": True})
    done = lrc.compile(str(folders["llama"]), job, cache=tmp_path / "cache")
    assert done.plan.parameters[1] == done.plan.parameters[0]
    model: Any = done.graft()
    assert model.lm_head.weight is model.model.embed_tokens.table
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, done.program(input_ids=IDS)["logits"], atol=1e-6)
    done.save(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(lrc.load(tmp_path / "out")(input_ids=IDS).logits, model(input_ids=IDS).logits)

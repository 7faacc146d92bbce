"""factorize on torch's own transformer layers: both views, and the files."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import lrc
from lrc.lower.ort import OrtRunner

Compile = Callable[..., lrc.Compiled]


class Reader(nn.Module):
    """A decoder layer of torch's: attention to itself and to another input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        made: Tensor = self.layer(x, memory)
        return made


def test_torchs_decoder_layer_is_factorized_with_every_projection(compiled: Compile, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    items = [{"x": torch.randn(8, 5, 16), "memory": torch.randn(8, 6, 16)} for _ in range(3)]
    done = compiled(model, inputs=items[0], calibration=items[1:], targets=["**"], solver="kfac", rank={"params_kept": 0.6})
    names = [f"layer.{name}" for name in ("multihead_attn.in_proj_weight_0_16", "multihead_attn.in_proj_weight_16_48")]
    assert set(done.program.maps) >= {*names, "layer.self_attn.in_proj_weight", "layer.linear1"}
    assert done.plan.parameters[1] < 0.65 * done.plan.parameters[0]
    with torch.no_grad():
        expected = done.program(**items[0])["output"]
        assert torch.allclose(done.graft()(**items[0]), expected, atol=1e-5)
        assert 0 < float((expected - model(**items[0])).norm() / expected.norm()) < 0.5
    done.save(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(lrc.load(tmp_path / "out")(**items[0])["output"], expected, atol=1e-5)
    runner = OrtRunner(done.to_onnx(tmp_path / "model.onnx"))
    assert torch.allclose(torch.as_tensor(runner(**items[0])["output"]), expected, atol=1e-4)

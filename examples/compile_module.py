"""The Python face on a module of your own: plan, compile, check, graft, train on, save, export.

python examples/compile_module.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import lrc

torch.manual_seed(0)


class Regressor(nn.Module):
    """A small network whose wide layers hold less than their size suggests."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 128)
        self.middle = nn.Linear(128, 128)
        self.down = nn.Linear(128, 4)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(features))
        return self.down(torch.relu(self.middle(hidden)))


def main() -> None:
    model = Regressor()
    samples = torch.randn(512, 6) @ torch.randn(6, 24)  # inputs that lie in a 6-dimensional subspace
    spec = {
        "version": 1,
        "passes": [{"type": "factorize", "targets": ["up", "middle"], "solver": "kfac", "rank": {"params_kept": 0.4}}],
    }
    with tempfile.TemporaryDirectory() as folder:
        done = lrc.compile(
            model, spec, inputs={"features": samples[:8]}, calibration=samples.split(64), cache=Path(folder) / "cache"
        )
        print(done.report)
        print(done.program)

        with torch.no_grad():
            error = (done.module(samples) - model(samples)).std() / model(samples).std()
        print(f"relative error on the samples: {error:.3f}")
        assert error < 0.1, error

        grafted = done.graft(model)  # the same factors inside a tree like the model's own: train it as ever
        optimizer = torch.optim.Adam(grafted.parameters(), lr=1e-3)
        target = model(samples).detach()
        for _ in range(50):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(grafted(samples), target)
            loss.backward()
            optimizer.step()
        print(f"loss after 50 steps of training: {loss.item():.2e}")

        saved = done.save(Path(folder) / "out")
        reloaded = lrc.load(saved)
        with torch.no_grad():
            again = reloaded(features=samples[:5])["output"]
        assert torch.allclose(again, done.module(samples[:5]), atol=1e-5)
        print("wrote", sorted(p.name for p in saved.iterdir()))
        print("wrote", done.to_onnx(Path(folder) / "model.onnx").name)


if __name__ == "__main__":
    main()

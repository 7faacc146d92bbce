"""The kernels for GPUs: against their references in Triton's interpreter, compiled for sm_90, and chosen where they can run."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lrc.kernels.choice
from lrc.formats import FORMATS
from lrc.kernels import quantized_linear, refusal, runs_quantized, two_factor_linear
from lrc.kernels.ops import HAS_TRITON, packed_linear
from lrc.maps import Chain, LinearMap, Quantized, Scale, Sum

HERE = Path(__file__).parent
SHARED = 232_448  # bytes that one block may have on a GPU of compute capability 9.0, as NVIDIA documents it
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None,
    reason="triton is not installed (extra `gpu`): its kernels are neither interpreted nor compiled",
)


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def printed(script: str, tmp_path: Path, **variables: str) -> dict[str, Any]:
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"} | variables
    run = subprocess.run(
        [sys.executable, HERE / script], capture_output=True, text=True, env=dict(os.environ) | environment, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


@needs_triton
@pytest.mark.slow
def test_the_kernels_compute_what_their_references_do(tmp_path: Path) -> None:
    errors = printed("interpreted.py", tmp_path, TRITON_INTERPRET="1")
    assert len(errors) == 25
    for name, error in errors.items():
        eps = torch.finfo(torch.float16 if "float16" in name or "half" in name else torch.float32).eps
        assert error < 4 * eps, name


@needs_triton
@pytest.mark.slow
def test_every_configuration_compiles_for_a_hopper_gpu(tmp_path: Path) -> None:
    rows = printed("compiled.py", tmp_path)
    assert len(rows) == 11
    for name, row in rows.items():
        assert row["shared"] <= SHARED, name
        assert row["stack"] == 0, name
        assert row["wgmma"] == ("'BM': 64" in name or "'BM': 128" in name), name


def test_the_operators_are_their_references_on_a_cpu() -> None:
    x, A, B, b = randn(3, 5, 64), randn(4, 64, seed=1), randn(48, 4, seed=2), randn(48, seed=3)
    torch.testing.assert_close(two_factor_linear(x, A, B, b), x @ A.T @ B.T + b)
    form = FORMATS["nf3"]
    encoded = form.encode(randn(48, 64, seed=4))
    W = form.decode(encoded, (48, 64))
    torch.testing.assert_close(quantized_linear(x, encoded, form, 48, A, B), x @ W.T + x @ A.T @ B.T)
    torch.testing.assert_close(quantized_linear(x, encoded, form, 48), x @ W.T)


def test_the_gradients_of_the_operator_are_right() -> None:
    form = FORMATS["int4"]
    encoded = form.encode(randn(6, 40, seed=4))
    x, A, B = (t.double().requires_grad_() for t in (randn(2, 3, 40), randn(2, 40, seed=1), randn(6, 2, seed=2)))
    assert torch.autograd.gradcheck(lambda *given: quantized_linear(given[0], encoded, form, 6, *given[1:]), (x, A, B))
    assert torch.autograd.gradcheck(lambda x: quantized_linear(x, encoded, form, 6), (x,))
    given = (x.detach().float().requires_grad_(), list(encoded.values()), ",".join(encoded), form.model_dump_json(), 6)
    if HAS_TRITON:
        torch.library.opcheck(packed_linear, (*given, None, None), test_utils=("test_schema", "test_faketensor"))


def test_a_map_runs_by_the_kernels_where_they_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("two_factor_linear", "quantized_linear"):
        real = getattr(lrc.kernels.ops, name)

        def seen(*given: Any, name: str = name, real: Any = real) -> Any:
            ran.append(name)
            return real(*given)

        monkeypatch.setattr(f"lrc.maps.fused.{name}", seen)
    monkeypatch.setattr(
        "lrc.maps.quantized.quantized_linear", lambda *given: (ran.append("alone"), quantized_linear(*given))[1]
    )
    product, x = Chain(randn(48, 4), randn(4, 64, seed=1)), randn(3, 64, seed=2)
    rest = Quantized.of(randn(48, 64, seed=3), FORMATS["nf4"])
    bias = randn(48, seed=4)
    cases: list[tuple[LinearMap, list[str]]] = [
        (Chain(*product.slots, bias=bias), ["two_factor_linear"]),
        (Chain(randn(48, 300), randn(300, 64), bias=bias), []),
        (Sum(product, rest, bias=bias), ["quantized_linear"]),
        (Sum(rest, Scale(product, 0.5)), ["quantized_linear"]),
        (Sum(product, rest, rest), ["two_factor_linear", "alone", "alone"]),
        (rest.with_bias(torch.nn.Parameter(bias)), ["alone"]),
    ]
    for made, names in cases:
        with torch.no_grad():
            expected = made(x)
            assert ran == []
            with monkeypatch.context() as patched:
                patched.setattr(lrc.kernels.choice, "_on_gpu", lambda x: True)
                found = made(x)
        torch.testing.assert_close(found, expected)
        assert ran == names
        ran.clear()


def test_without_a_gpu_nothing_runs_by_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal() == "no CUDA device"
    assert not runs_quantized(randn(2, 3), FORMATS["nf4"], (2, 3))
    refusal.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert refusal() == "the device is older than compute capability 8.0"
    refusal.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(lrc.kernels.choice, "find_spec", lambda name: None)
    assert "triton is not installed" in str(refusal())
    refusal.cache_clear()

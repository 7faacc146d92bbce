"""What ranks are multiples of, by device, dtype and the layers' sizes."""

import pytest
import torch

from lrc.measure.alignment import aligned, step, tile, vector


@pytest.mark.parametrize(
    ("size", "dtype", "ranks", "expected"),
    [
        (64, torch.float32, [384] * 3, 16),
        (32, torch.float32, [384] * 3, 8),
        (16, torch.float32, [384] * 3, 4),
        (128, torch.bfloat16, [4096, 4096, 1024], 64),
        (16, torch.float16, [4096], 8),
        (64, torch.float64, [768], 8),
        (64, torch.float32, [2, 24, 24], 4),  # a head of two classes does not decide, the middle layer does
        (64, torch.float32, [3], 1),
        (64, torch.float32, [], 16),
    ],
)
def test_a_step_is_what_a_vector_holds_halved_for_small_layers(
    size: int, dtype: torch.dtype, ranks: list[int], expected: int
) -> None:
    made, reason = step(size, "vectors", dtype, ranks)
    assert made == expected
    assert ("halved" in reason) == (made < size // dtype.itemsize)


def test_tensor_cores_want_128_bytes_from_compute_capability_8_on() -> None:
    assert [tile(capability) for capability in ((7, 0), (7, 5), (8, 0), (9, 0), (12, 0))] == [16, 16, 128, 128, 128]


def test_this_cpu_says_how_wide_its_vectors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("AVX512", 64), ("AVX2", 32), ("DEFAULT", 16), ("SVE256", 16)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=name: name)
        assert vector(torch.device("cpu")) == (size, f"vectors of {name}")
        assert aligned(torch.device("cpu"), torch.float32, [512])[0] == size // 4

"""Where the Triton kernels run: decided for every call from the device, the types and the sizes, with a reason."""

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor, fx

from lrc.formats import Integer, NormalFloat, NumberFormat

MOST_RANK = 256  # what stands between the factors has to fit on the chip
MOST_RANK_PACKED = 128  # beside the tiles of the packed weight
MOST_ENTRIES = 2**31  # positions are of 32 bits
TYPES = (torch.float16, torch.bfloat16)  # what tensor cores multiply; float32 stays with torch's own operators
OLDEST = (8, 0)  # on older devices the kernels spill their registers


@lru_cache
def refusal() -> str | None:
    """Return why no Triton kernel runs in this process, or None. A map then runs in torch's own operators."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < OLDEST:
        return "the device is older than compute capability 8.0"
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'lrc-compiler[gpu]')"
    return None


def _on_gpu(x: Tensor) -> bool:
    """Say whether x is on a device that has the kernels; an exported program keeps to torch's own operators."""
    if isinstance(x, fx.Proxy) or torch.compiler.is_exporting() or not x.is_cuda:
        return False
    return refusal() is None and x.dtype in TYPES and not torch.is_autocast_enabled("cuda")


def runs_two_factor(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Say whether `two_factor_linear` takes these by its kernel. Training, which keeps what is between, does not."""
    same = _on_gpu(x) and x.dtype == A.dtype == B.dtype and A.shape[0] <= MOST_RANK
    return same and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, A, B)))


def runs_quantized(x: Tensor, form: NumberFormat, shape: tuple[int, int], rank: int = 0) -> bool:
    """Say whether `quantized_linear` takes a weight of this format and shape, and a product of this rank, by its kernel."""
    small = (shape[0] + 1) * (shape[1] + 256) < MOST_ENTRIES and rank <= MOST_RANK_PACKED
    return _on_gpu(x) and small and isinstance(form, Integer | NormalFloat)

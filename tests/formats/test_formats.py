"""Number formats: tables, packing, scales, and what a stored matrix stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc.formats import FORMATS, Integer, NormalFloat, format_of, normalfloat_values, pack, packed_bytes, unpack

NF4 = [  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_values_ascend_from_minus_one_to_one_through_zero(bits: int) -> None:
    values = normalfloat_values(bits)
    assert len(values) == 2**bits
    assert bool((values.diff() > 0).all())
    assert (float(values[0]), float(values[2 ** (bits - 1) - 1]), float(values[-1])) == (-1.0, 0.0, 1.0)


def test_four_bits_are_the_table_of_qlora_and_the_others_nest_as_published() -> None:
    torch.testing.assert_close(normalfloat_values(4), torch.tensor(NF4), atol=2e-7, rtol=0)
    torch.testing.assert_close(normalfloat_values(2), torch.tensor([-1, 0, 0.3379152, 1]), atol=2e-7, rtol=0)
    torch.testing.assert_close(normalfloat_values(8)[[1, 2, -3, -2]], torch.tensor([-0.973655, -0.949434, 0.949798, 0.973852]),
                               atol=1e-6, rtol=0)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 16), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_packed_codes_come_back(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    packed = pack(codes, bits)
    assert len(packed) == packed_bytes(count, bits)
    assert torch.equal(unpack(packed, bits, count), codes)


def test_codes_of_seventeen_bits_have_no_layout() -> None:
    with pytest.raises(ValueError, match="17 bits cannot be packed; 1 to 16 bits can"):
        pack(torch.zeros(4), 17)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (64, 96), (7, 1)])
def test_empty_tensors_have_the_sizes_of_encoded_ones(name: str, shape: tuple[int, int]) -> None:
    form = FORMATS[name]
    encoded, empty = form.encode(weight(*shape)), form.empty(shape)
    assert {k: (v.shape, v.dtype) for k, v in encoded.items()} == {k: (v.shape, v.dtype) for k, v in empty.items()}


@pytest.mark.parametrize(
    "form", [NormalFloat(bits=b, scale_bits=None) for b in (2, 3, 4, 8)] + [Integer(bits=4), Integer(bits=8)]
)
def test_what_a_format_holds_with_exact_scales_is_stored_as_it_is(form: NormalFloat | Integer) -> None:
    once = form.rounded(weight(40, 96))
    again = form.encode(once)
    torch.testing.assert_close(form.decode(again, (40, 96)), once, rtol=1e-6, atol=0)
    assert torch.equal(again["codes"], form.encode(weight(40, 96))["codes"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_are_within_half_a_step_and_never_below_the_least(dtype: str) -> None:
    form = NormalFloat(bits=4, scale_bits=4, super_block=16, scale_dtype=dtype)  # type: ignore[arg-type]
    W = weight(96, 64) * torch.rand(96, 1, generator=torch.Generator().manual_seed(1))
    scales = W.abs().amax(1)
    encoded = form.encode(W)
    found = form._scales(encoded, 96)
    assert float(encoded["offset"]) == float(scales.min()) > 0
    assert bool((found >= encoded["offset"]).all())
    steps = encoded["steps"].float().repeat_interleave(16)
    of_the_step = 0.0 if dtype == "float32" else 2**-8
    assert bool(((found - scales).abs() <= steps / 30 + of_the_step * steps + 1e-7).all())


def test_no_number_is_further_off_than_half_the_widest_gap() -> None:
    form = NormalFloat(bits=4, scale_bits=None)
    W = weight(128, 64)
    gap = float(normalfloat_values(4).diff().max()) / 2
    assert gap == pytest.approx(0.1520, abs=1e-4)
    assert bool(((form.rounded(W) - W).abs() <= gap * W.abs().amax(1, keepdim=True) + 1e-7).all())


def test_a_tie_goes_to_the_lower_code() -> None:
    values = normalfloat_values(2)
    middle = (values[2] + values[3]) / 2
    form = NormalFloat(bits=2, block=2, scale_bits=None)
    assert torch.equal(form.rounded(torch.stack([torch.ones(()), middle])[None]), torch.stack([values[3], values[2]])[None])


@pytest.mark.parametrize("name", list(FORMATS))
def test_blocks_of_zeros_stay_zeros(name: str) -> None:
    W = torch.cat([torch.zeros(2, 64), weight(2, 64)])
    found = FORMATS[name].rounded(W)
    assert bool(torch.isfinite(found).all())
    assert bool((found[:2] == 0).all())
    assert torch.equal(FORMATS[name].rounded(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_blocks_that_are_all_alike_need_no_step() -> None:
    W = torch.ones(4, 64)
    torch.testing.assert_close(FORMATS["nf4"].rounded(W), W)


@pytest.mark.parametrize(("form", "bits"), [
    (NormalFloat(bits=4), 4.126953), (NormalFloat(bits=3), 3.126953), (NormalFloat(bits=2), 2.126953),
    (NormalFloat(bits=2, scale_bits=2, scale_dtype="bfloat16", block=16, super_block=16), 2.1875), (Integer(bits=4), 5.0),
])  # fmt: skip
def test_bits_per_weight(form: NormalFloat | Integer, bits: float) -> None:
    assert form.bits_per_weight() == pytest.approx(bits, abs=1e-6)
    encoded = form.encode(weight(512, 512))
    stored = sum(t.numel() * t.element_size() for t in encoded.values())
    assert 8 * stored / 512**2 == pytest.approx(bits, rel=1e-3)


def test_a_format_is_named_by_a_word_or_by_its_settings() -> None:
    assert format_of("nf3") == NormalFloat(bits=3)
    assert format_of({"type": "int", "bits": 8, "block": 64}) == Integer(bits=8, block=64)
    with pytest.raises(Exception, match="nf2, nf3, nf4, nf8, int4, int8"):
        format_of("fp4")

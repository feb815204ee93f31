"""The Hadamard transform of 16 to 128 points: its definition bit by bit, its matrix, and what it is for."""

from __future__ import annotations

import pytest
import torch
from _assertions import assert_bitwise_equal, assert_within_ulp

from metis.errors import ConfigError, ShapeError
from metis.formats import RHT_SCALES_F32, RHT_SIGN_VECTOR
from metis.quantize import random_hadamard, seeded_sign_vector
from metis.quantize.reference import reference_hadamard, reference_hadamard_matrix

SIZES = [16, 32, 64, 128]
# Butterflies of small integers are exact, as is 1/sqrt(n) for 16 and 64: only the rounding to bf16 is left.
EXACT_SUM_ULP = 0.5  # measured 0.5
SCALED_SUM_ULP = 0.5 + 2.0**-14  # two fp32 roundings of 2^-16 bf16 ulp each on top; measured 0.498
# Gaussian inputs, relative to the largest entry of the tile (cancellation): measured 3.8e-3.
RELATIVE_TO_TILE = 2.0**-8
# Entries of R as the transform makes them, bf16(fp32(1/sqrt(n))): relative to the exact one, measured 1.1e-4.
BF16_ENTRY = 2.0**-12
# Bits of Philox4x32-10 as they came the first time: a change would change every seeded run.
FIRST_SEEDED_SIGNS = (-1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, -1, -1, -1, -1)


def signs_of(size: int) -> tuple[int, ...]:
    return RHT_SIGN_VECTOR if size == 16 else seeded_sign_vector(3, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_transform_equals_the_slow_butterflies_bitwise(size, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 256, generator=generator) * torch.exp(4 * torch.randn(6, 256, generator=generator))
    x[0, 5], x[1, :16], x[2, ::2] = 0.0, 1.0, -0.0
    x = x.clamp(-1e4, 1e4).to(dtype)
    expected = torch.from_numpy(reference_hadamard(x.float().numpy(), signs_of(size))).to(torch.bfloat16)
    rotated = random_hadamard(x, size, None if size == 16 else signs_of(size))
    assert rotated.dtype == torch.bfloat16
    assert_bitwise_equal(rotated, expected, f"rotation of {dtype} by {size}")


@pytest.mark.parametrize("size", SIZES)
def test_transform_is_multiplication_by_r_on_the_right(size):
    generator = torch.Generator().manual_seed(2)
    R = torch.from_numpy(reference_hadamard_matrix(signs_of(size)))
    integers = torch.randint(-63, 64, (32, size), generator=generator).float()
    allowed = EXACT_SUM_ULP if size in (16, 64) else SCALED_SUM_ULP
    rotated = random_hadamard(integers, size, signs_of(size))
    # Divided last, so that a sum of zero is zero and not a rounding error of float64.
    sums = integers.double() @ (R * size**0.5).round()
    assert_within_ulp(rotated, sums / size**0.5, allowed, "integers times R")
    x = torch.randn(256, size, generator=generator)
    exact = x.double() @ R
    error = (random_hadamard(x, size, signs_of(size)).double() - exact).abs().amax(1) / exact.abs().amax(1)
    assert float(error.max()) <= RELATIVE_TO_TILE


@pytest.mark.parametrize("size", SIZES)
def test_unit_vectors_give_the_rows_of_r(size):
    R = torch.from_numpy(reference_hadamard_matrix(signs_of(size)))
    rows = random_hadamard(torch.eye(size), size, signs_of(size)).double()
    assert torch.equal(rows.sign(), R.sign())
    assert float((rows / R - 1).abs().max()) <= (0 if size in (16, 64) else BF16_ENTRY)
    assert float((R @ R.T - torch.eye(size)).abs().max()) < 1e-14


def test_the_fixed_signs_and_the_scales_are_the_published_ones():
    minus_mask = sum(1 << i for i, sign in enumerate(RHT_SIGN_VECTOR) if sign < 0)
    assert minus_mask == 0xD7E8
    bits = {
        size: torch.tensor(scale, dtype=torch.float32).view(torch.int32).item()
        for size, scale in RHT_SCALES_F32.items()
    }
    assert bits == {16: 0x3E800000, 32: 0x3E3504F3, 64: 0x3E000000, 128: 0x3DB504F3}


def test_seeded_signs_are_pinned_balanced_and_different_for_each_seed():
    assert seeded_sign_vector(0, 16) == FIRST_SEEDED_SIGNS
    drawn = torch.tensor([seeded_sign_vector(seed, 128) for seed in range(200)], dtype=torch.float64)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert len({tuple(row) for row in drawn.tolist()}) == 200
    assert abs(float(drawn.mean())) < 5 / (200 * 128) ** 0.5  # five sigma
    assert float(drawn.mean(0).abs().max()) < 5 / 200**0.5
    assert seeded_sign_vector(0, 32)[:16] == seeded_sign_vector(0, 16), "entry i does not depend on the size"


@pytest.mark.parametrize("size", SIZES)
def test_transposed_view_gives_the_bits_of_its_copy(size):
    x = torch.randn(128, 48, generator=torch.Generator().manual_seed(3))
    view, copy = (random_hadamard(t, size, signs_of(size)) for t in (x.t(), x.t().contiguous()))
    assert_bitwise_equal(view, copy, "transposed view")


def test_input_is_left_alone():
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    before = x.clone()
    random_hadamard(x)
    random_hadamard(x, 32, signs_of(32))
    assert_bitwise_equal(x, before, "input")


@pytest.mark.parametrize("size", [16, 64])
def test_rotation_cancels_in_the_product_of_two_rotated_operands(size):
    generator = torch.Generator().manual_seed(5)
    # Sums of integers up to 3 over 64 points are exact in bf16 (8 bits): the product must come back exactly.
    limit = 7 if size == 16 else 3
    a = torch.randint(-limit, limit + 1, (8, 128), generator=generator).float()
    b = torch.randint(-limit, limit + 1, (12, 128), generator=generator).float()
    rotated_a, rotated_b = (random_hadamard(t, size, signs_of(size)).double() for t in (a, b))
    assert torch.equal(rotated_a @ rotated_b.T, a.double() @ b.double().T)


@pytest.mark.parametrize("size", SIZES)
def test_one_outlier_is_spread_over_its_tile(size):
    x = torch.zeros(1, 2 * size)
    x[0, 7] = 64.0
    rotated = random_hadamard(x, size, signs_of(size))[0]
    level = torch.tensor(64 * RHT_SCALES_F32[size]).to(torch.bfloat16)
    assert torch.equal(rotated[:size].abs(), level.expand(size))
    assert not rotated[size:].any()


def test_wrong_sizes_dtypes_and_signs_are_refused():
    with pytest.raises(ShapeError, match="multiple of 16, received shape"):
        random_hadamard(torch.zeros(4, 24))
    with pytest.raises(ShapeError, match="multiple of 64, received shape"):
        random_hadamard(torch.zeros(4, 32), 64, signs_of(64))
    with pytest.raises(ShapeError, match="float64"):
        random_hadamard(torch.zeros(4, 16, dtype=torch.float64))
    with pytest.raises(ConfigError, match="must be one of"):
        random_hadamard(torch.zeros(4, 8), 8, (1,) * 8)
    with pytest.raises(ConfigError, match="must be given for size 32"):
        random_hadamard(torch.zeros(4, 32), 32)
    with pytest.raises(ConfigError, match="must be 32 numbers"):
        random_hadamard(torch.zeros(4, 32), 32, (1,) * 16)
    with pytest.raises(ConfigError, match="must be one of"):
        seeded_sign_vector(1, 20)

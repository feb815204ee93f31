"""The 16-point Hadamard transform: its definition bit by bit, its matrix, and what the rotation is for."""

from __future__ import annotations

import pytest
import torch
from _assertions import assert_bitwise_equal, assert_within_ulp

from metis.errors import ShapeError
from metis.formats import RHT_SIGN_VECTOR
from metis.quantize.hadamard import random_hadamard_16
from metis.quantize.reference import reference_hadamard_16, reference_hadamard_matrix

# Butterflies of small integers are exact, so only the rounding to bf16 is left: measured 0.5.
EXACT_SUM_ULP = 0.5
# Gaussian inputs, relative to the largest entry of the tile (cancellation): measured 3.8e-3.
RELATIVE_TO_TILE = 2.0**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transform_equals_the_slow_butterflies_bitwise(dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 64, generator=generator) * torch.exp(4 * torch.randn(24, 64, generator=generator))
    x[0, 5], x[1, :16], x[2, ::2] = 0.0, 1.0, -0.0
    x = x.clamp(-1e4, 1e4).to(dtype)
    expected = torch.from_numpy(reference_hadamard_16(x.float().numpy())).to(torch.bfloat16)
    rotated = random_hadamard_16(x)
    assert rotated.dtype == torch.bfloat16
    assert_bitwise_equal(rotated, expected, f"rotation of {dtype}")


def test_transform_is_multiplication_by_r_on_the_right():
    generator = torch.Generator().manual_seed(2)
    R = torch.from_numpy(reference_hadamard_matrix())
    integers = torch.randint(-63, 64, (32, 16), generator=generator).float()
    assert_within_ulp(random_hadamard_16(integers), integers.double() @ R, EXACT_SUM_ULP, "integers times R")
    x = torch.randn(256, 16, generator=generator)
    error = (random_hadamard_16(x).double() - x.double() @ R).abs().amax(1) / (x.double() @ R).abs().amax(1)
    assert float(error.max()) <= RELATIVE_TO_TILE


def test_unit_vectors_give_the_rows_of_r():
    R = torch.from_numpy(reference_hadamard_matrix())
    assert torch.equal(random_hadamard_16(torch.eye(16)).double(), R)
    assert torch.equal(R @ R.T, torch.eye(16, dtype=torch.float64))
    minus_mask = sum(1 << i for i, sign in enumerate(RHT_SIGN_VECTOR) if sign < 0)
    assert minus_mask == 0xD7E8


def test_transposed_view_gives_the_bits_of_its_copy():
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(3))
    assert_bitwise_equal(random_hadamard_16(x.t()), random_hadamard_16(x.t().contiguous()), "transposed view")


def test_input_is_left_alone():
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    before = x.clone()
    random_hadamard_16(x)
    assert_bitwise_equal(x, before, "input")


def test_rotation_cancels_in_the_product_of_two_rotated_operands():
    generator = torch.Generator().manual_seed(5)
    # Integers up to 7 and sums up to 112 / 4 are exact in bf16, so the product must come back exactly.
    a = torch.randint(-7, 8, (8, 64), generator=generator).float()
    b = torch.randint(-7, 8, (12, 64), generator=generator).float()
    product = random_hadamard_16(a).double() @ random_hadamard_16(b).double().T
    assert torch.equal(product, a.double() @ b.double().T)


def test_one_outlier_is_spread_over_its_tile():
    x = torch.zeros(1, 32)
    x[0, 7] = 64.0
    rotated = random_hadamard_16(x)[0]
    assert torch.equal(rotated[:16].abs(), torch.full((16,), 16.0, dtype=torch.bfloat16))
    assert not rotated[16:].any()


def test_wrong_sizes_and_dtypes_are_refused():
    with pytest.raises(ShapeError, match="multiple of 16, received shape"):
        random_hadamard_16(torch.zeros(4, 24))
    with pytest.raises(ShapeError, match="float64"):
        random_hadamard_16(torch.zeros(4, 16, dtype=torch.float64))

"""The scale layout of FP4 tensor cores against its address formula, byte by byte."""

from __future__ import annotations

import pytest
import torch
from _assertions import assert_bitwise_equal

from metis.errors import ShapeError
from metis.quantize import expand_tile_scales, quantize, swizzle_block_scales, unswizzle_block_scales
from metis.quantize.reference_formats import reference_swizzle_offset

SHAPES = [(1, 1), (128, 4), (3, 5), (129, 4), (128, 5), (200, 9), (256, 8), (300, 13), (384, 1)]


def every_byte_different_nearby(rows: int, cols: int) -> torch.Tensor:
    return (
        ((torch.arange(rows * cols) * 37 + torch.arange(rows * cols) // 251) % 255 + 1)
        .to(torch.uint8)
        .view(rows, cols)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_every_scale_lies_where_the_formula_says_and_the_rest_is_zero(shape):
    scales = every_byte_different_nearby(*shape)
    flat = swizzle_block_scales(scales)
    rows, cols = -(-shape[0] // 128) * 128, -(-shape[1] // 4) * 4
    expected = torch.zeros(rows * cols, dtype=torch.uint8)
    for row in range(shape[0]):
        for col in range(shape[1]):
            expected[reference_swizzle_offset(row, col, shape[1])] = scales[row, col]
    assert_bitwise_equal(flat, expected, "swizzled scales")
    assert flat.is_contiguous()


def test_corners_of_a_tile_by_hand():
    scales = torch.zeros(256, 8, dtype=torch.uint8)
    # (row, col) -> byte: four columns together, then rows 32 apart, then rows, then tiles by row of tiles
    places = {(0, 0): 0, (0, 3): 3, (32, 0): 4, (96, 3): 15, (1, 0): 16, (31, 0): 496, (127, 3): 511,
              (0, 4): 512, (128, 0): 1024, (255, 7): 2047}  # fmt: skip
    for number, place in enumerate(places, start=1):
        scales[place] = number
    flat = swizzle_block_scales(scales)
    assert [int(flat[offset]) for offset in places.values()] == list(range(1, len(places) + 1))
    assert int(flat.count_nonzero()) == len(places)


@pytest.mark.parametrize("shape", SHAPES)
def test_swizzling_is_undone(shape):
    scales = every_byte_different_nearby(*shape)
    assert_bitwise_equal(unswizzle_block_scales(swizzle_block_scales(scales), *shape), scales, "round trip")


def test_a_transposed_view_is_read_as_its_copy():
    scales = every_byte_different_nearby(12, 140).t()
    assert_bitwise_equal(swizzle_block_scales(scales), swizzle_block_scales(scales.contiguous()), "view")


def test_expanded_tile_scales_decode_as_the_tiles_do():
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    q = quantize(x, block_shape=(16, 16))
    rows = expand_tile_scales(q.block_scale_bytes())
    assert rows.shape == (48, 4)
    per_element = rows.view(torch.float8_e4m3fn).float().repeat_interleave(16, dim=1)
    assert_bitwise_equal(q.values * per_element, q.operand(torch.float32), "operand")


def test_wrong_shapes_and_dtypes_are_refused():
    with pytest.raises(ShapeError, match="uint8 matrix"):
        swizzle_block_scales(torch.zeros(4, 4))
    with pytest.raises(ShapeError, match="uint8 matrix"):
        swizzle_block_scales(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="must be uint8 of 512 bytes"):
        unswizzle_block_scales(torch.zeros(500, dtype=torch.uint8), 100, 3)
    with pytest.raises(ShapeError, match="must be a matrix"):
        expand_tile_scales(torch.zeros(4, dtype=torch.uint8))

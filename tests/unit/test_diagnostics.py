"""Diagnostics against formulas written out by hand, and the known SNR of NVFP4 on Gaussian data."""

from __future__ import annotations

import math

import pytest
import torch

from metis import diagnostics
from metis.config import CellConfig, QuantizerConfig, Recipe
from metis.errors import ShapeError
from metis.quantize import quantize
from metis.recipes import BF16, METIS, NVFP4, NVFP4_DIRECT

ROWS_RNE_DB = 20.4
ROWS_RNE_TOLERANCE_DB = 0.2  # worst of 12 cells and seeds measured: 0.05
OTHER_TOLERANCE_DB = 0.2  # worst measured: 0.06
TILES_RNE_DB = 19.0
ROWS_SR_DB = 17.3


def test_sqnr_relative_error_and_tail_error_follow_their_formulas():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 32, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(20, 32, generator=generator, dtype=torch.float64)
    v = torch.linalg.qr(torch.randn(32, 3, generator=generator, dtype=torch.float64)).Q
    tail = torch.eye(32, dtype=torch.float64) - v @ v.t()
    ratio = torch.linalg.norm(noise) / torch.linalg.norm(x)
    assert diagnostics.relative_error(x, x + noise) == pytest.approx(float(ratio), rel=1e-12)
    assert diagnostics.sqnr_db(x, x + noise) == pytest.approx(-20 * math.log10(float(ratio)), rel=1e-12)
    expected = torch.linalg.norm(noise @ tail) / torch.linalg.norm(x @ tail)
    assert diagnostics.tail_error(x, x + noise, v) == pytest.approx(float(expected), rel=1e-12)
    # An error inside the head's span does not show in the tail.
    assert diagnostics.tail_error(x, x + x @ v @ v.t(), v) < 1e-14


def test_degenerate_tensors_have_named_answers():
    zero, one = torch.zeros(4, 16), torch.ones(4, 16)
    assert diagnostics.sqnr_db(one, one) == math.inf
    assert diagnostics.sqnr_db(zero, one) == -math.inf
    assert math.isnan(diagnostics.sqnr_db(zero, zero))
    assert math.isnan(diagnostics.relative_error(zero, one))
    with pytest.raises(ShapeError, match="one shape"):
        diagnostics.sqnr_db(zero, torch.zeros(4, 8))
    with pytest.raises(ShapeError, match=r"v \[C, r\]"):
        diagnostics.tail_error(one, one, torch.ones(4, 2))


def test_zeroed_and_saturated_shares_are_counted_by_hand():
    # amax 6 * 448 makes the tensor scale 1. First block: maximum 2688, scale 448, step near zero 224, so the
    # fifteen elements of 100 round to zero. Second block: maximum 10.3 asks for a scale of 1.717, E4M3 rounds
    # it to 1.75 (nothing saturates); third: 11 asks for 1.833 and gets 1.875. Fourth: 9.9 asks for 1.65 and
    # gets 1.625, so that 9.75 is the limit and one element saturates.
    x = torch.zeros(1, 64)
    x[0, :16] = 100.0
    x[0, 0] = 2688.0
    x[0, 16], x[0, 32], x[0, 48] = 10.3, 11.0, 9.9
    encoded = quantize(x, block_shape=(1, 16))
    assert encoded.block_scale.tolist() == [[448.0, 1.75, 1.875, 1.625]]
    assert diagnostics.zeroed_share(x, encoded) == 15 / 19
    assert diagnostics.saturated_share(x, encoded) == 1 / 64


def test_operand_sqnr_on_gaussian_data_is_the_known_one():
    """20.4 dB for 1x16 blocks rounded to nearest; 16x16 tiles and stochastic rounding are each worse."""
    nvfp4 = diagnostics.gaussian_operand_sqnr(NVFP4)
    direct = diagnostics.gaussian_operand_sqnr(NVFP4_DIRECT, seed=7)
    for name, value in {**direct, "fprop_input": nvfp4["fprop_input"]}.items():
        assert abs(value - ROWS_RNE_DB) <= ROWS_RNE_TOLERANCE_DB, (name, value)
    # Rotated operands are compared with the rotated matrix, where Gaussian data stay Gaussian.
    assert abs(nvfp4["wgrad_input"] - ROWS_RNE_DB) <= ROWS_RNE_TOLERANCE_DB
    for name in ("fprop_weight", "dgrad_weight"):
        assert abs(nvfp4[name] - TILES_RNE_DB) <= OTHER_TOLERANCE_DB, (name, nvfp4[name])
    for name in ("dgrad_grad_output", "wgrad_grad_output"):
        assert abs(nvfp4[name] - ROWS_SR_DB) <= OTHER_TOLERANCE_DB, (name, nvfp4[name])


def test_only_quantised_cells_are_reported_in_one_line():
    assert diagnostics.gaussian_operand_sqnr(BF16) == {}
    assert "quantises no operand" in diagnostics.describe(BF16)
    rows = CellConfig(quantizer=QuantizerConfig())
    line = diagnostics.describe(Recipe(name="forward_only", fprop_input=rows, fprop_weight=rows))
    assert line == " > operand SNR on Gaussian data (dB): fprop_input 20.4 | fprop_weight 20.4"
    assert diagnostics.describe(METIS).count("|") == 5

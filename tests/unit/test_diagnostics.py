"""Diagnostics against formulas written out by hand, and the known SNR of NVFP4 on Gaussian data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from metis import diagnostics, observe
from metis.config import CELL_NAMES, CellConfig, QuantizerConfig, Recipe
from metis.errors import ShapeError
from metis.formats import RHT_SIGN_VECTOR
from metis.functional import LinearPlan
from metis.nn import MetisLinear
from metis.operand import Axis, EncodedMatrix, SplitMatrix
from metis.quantize import quantize
from metis.recipes import BF16, METIS, NVFP4, NVFP4_DIRECT, RECIPES

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


# --------------------------------------------------------------------------------- inside a training step

METRIC_TOLERANCE = 1e-10  # relative; worst of all recipes, cells and metrics measured: 2e-13
GAPLESS_TOLERANCE = 3e-3  # relative, of the energy in the tail; measured: 1.7e-3
GAP_TOLERANCE = 1e-11  # measured: 3e-15
TOP_VALUE_TOLERANCE = 1e-11  # relative; measured: 2e-15
OBSERVED_RECIPES = (
    "metis",
    "metis_merged",
    "nvfp4",
    "mean_split",
    "mxfp4",
    "fp8",
    "fp8_blocks",
    "metis_paper",
    "nvfp4_4over6",
)


@dataclass(frozen=True)
class Observation:
    """What the observer was told about one operand, and what the meter said."""

    plan: LinearPlan
    cell: str
    source: Tensor
    split: SplitMatrix
    encoded: EncodedMatrix
    metrics: dict[str, float]


def observe_training(recipe: Recipe, sizes: tuple[int, int, int] = (128, 128, 256)) -> list[Observation]:
    """Return every operand of the fourth step of one linear whose operands have outliers and weak values."""
    tokens, k, n = sizes
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)  # a clock of one's own is seeded from it
    linear = MetisLinear(k, n, bias=False, recipe=recipe, name="here")
    with torch.no_grad():
        linear.weight.copy_(0.1 * torch.randn(n, k, generator=generator))
    left, right = torch.randn(tokens, 4, generator=generator), torch.randn(4, k, generator=generator)
    x = 3.0 * left @ right + torch.randn(tokens, k, generator=generator) * torch.logspace(-4, 0, k)
    g = torch.randn(tokens, n, generator=generator) * torch.logspace(-6, 0, n)
    seen: list[Observation] = []
    for step in range(4):
        if step == 3:
            meter = observe.OperandMeter()

            def observer(plan, cell, source, split, encoded, meter=meter):
                metrics = meter.measure(plan, cell, source, split, encoded)
                seen.append(Observation(plan, cell, source.detach().clone(), split, encoded, metrics))

            linear.clock.watch.observer = observer
        linear(x.clone().requires_grad_()).backward(g)
        linear.after_step()
    return seen


def rotation(quantizer: QuantizerConfig) -> Tensor:
    """Return the Hadamard matrix of a cell by its definition, float64."""
    size = quantizer.rht.size
    signs = torch.tensor(RHT_SIGN_VECTOR, dtype=torch.float64)
    parity = [[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return signs[:, None] * torch.tensor(parity, dtype=torch.float64) / math.sqrt(size)


def expected_metrics(seen: Observation) -> dict[str, float]:
    """Return the metrics of one operand by their formulas: float64, exact singular vectors, sorting."""
    quantizer = getattr(seen.plan.recipe, seen.cell).quantizer
    transposed = seen.cell in ("dgrad_weight", "wgrad_grad_output", "wgrad_input")
    x, residual = seen.source.double(), seen.split.residual.double()
    decoded, term = seen.encoded.dequantize().double(), seen.encoded.terms[0]
    read = residual.t() if transposed else residual
    if quantizer.rht is not None:
        matrix = rotation(quantizer)
        read = (read.unflatten(1, (-1, 16)) @ matrix).flatten(1)
        unrotated = torch.linalg.solve(matrix.t(), decoded.unflatten(1, (-1, 16)).mT).mT.flatten(1)
        assert torch.allclose((unrotated.unflatten(1, (-1, 16)) @ matrix).flatten(1), decoded)
        read = read.to(torch.bfloat16).double()
    else:
        unrotated = decoded
    approximation = unrotated.t() if transposed else unrotated
    result = {}
    if seen.split.p is not None:
        head = seen.split.p.double() @ seen.split.v.double().t()
        if getattr(seen.plan.recipe, seen.cell).is_merged:
            approximation = (x + (approximation - residual)).to(torch.bfloat16).double()
        else:
            approximation = approximation + head
        result["captured_energy"] = float(head.square().sum() / x.square().sum())
        result["residual_amax_ratio"] = float(residual.abs().max() / x.abs().max())
    u = torch.linalg.svd(x, full_matrices=False)[2][:16].t()
    result["relative_error"] = diagnostics.relative_error(x, approximation)
    result["sqnr_db"] = diagnostics.sqnr_db(x, approximation)
    result["tail_error"] = diagnostics.tail_error(x, approximation, u)
    magnitude, zeroed = read.abs().flatten(), decoded.flatten() == 0
    nonzero = magnitude > 0
    result["zeroed_share"] = float((zeroed & nonzero).sum() / nonzero.sum())
    limit = torch.full_like(read, term.element_max * (1 + 1e-6)) * term.tensor_scale()
    if term.block_scale is not None:
        rows, cols = term.block_shape
        scales = term.block_scale.double().repeat_interleave(rows, dim=0).repeat_interleave(cols, dim=1)
        limit = limit * scales
    result["clipped_share"] = float((read.abs() > limit).double().mean())
    if term.block_scale is not None:
        rows, cols = term.block_shape
        blocks = read.abs().unflatten(0, (-1, rows)).unflatten(2, (-1, cols)).amax(dim=(1, 3)) > 0
        top, normal = {"n": (448.0, 2.0**-6), "m": (2.0**127, 2.0**-126), "f": (math.inf, 2.0**-126)}[
            term.format[0]
        ]
        result["scale_saturated_share"] = float((term.block_scale >= top)[blocks].double().mean())
        result["scale_underflow_share"] = float((term.block_scale < normal)[blocks].double().mean())
    return result


@pytest.mark.parametrize("name", OBSERVED_RECIPES)
def test_every_metric_of_a_step_follows_its_formula(name: str):
    observations = observe_training(RECIPES[name])
    cells = [cell for cell in CELL_NAMES if getattr(RECIPES[name], cell).quantizer is not None]
    assert sorted(seen.cell for seen in observations) == sorted(cells)
    for seen in observations:
        expected = expected_metrics(seen)
        assert set(expected) <= set(seen.metrics) <= set(observe.METRICS), seen.cell
        for metric, value in expected.items():
            assert seen.metrics[metric] == pytest.approx(value, rel=METRIC_TOLERANCE, abs=1e-12), (
                seen.cell,
                metric,
            )
        assert ("unsplit_tail_error" in seen.metrics) == (seen.split.p is not None)


def test_unsplit_errors_are_those_of_the_same_cell_without_its_head():
    """A recipe with the heads taken away quantises the very operands whole: same noise, same step."""
    cells = {name: CellConfig(quantizer=getattr(METIS, name).quantizer) for name in CELL_NAMES}
    whole = Recipe(name="metis", basis=None, **cells)
    split, unsplit = observe_training(METIS), {seen.cell: seen for seen in observe_training(whole)}
    for seen in split:
        assert torch.equal(seen.source, unsplit[seen.cell].source)
        assert seen.metrics["unsplit_relative_error"] == unsplit[seen.cell].metrics["relative_error"]
        assert seen.metrics["unsplit_tail_error"] == unsplit[seen.cell].metrics["tail_error"]
        if seen.cell == "fprop_input":  # what the split is for: its four directions drown the others
            assert seen.metrics["tail_error"] < 0.5 * seen.metrics["unsplit_tail_error"]


def measure_whole(x: Tensor, quantizer: QuantizerConfig) -> dict[str, float]:
    """Return the metrics of x [tokens, K] as the input of a forward GEMM."""
    seen: dict[str, dict[str, float]] = {}
    cell = CellConfig(quantizer=quantizer)
    recipe = Recipe(name="forward_only", fprop_input=cell, fprop_weight=cell)
    linear = MetisLinear(x.shape[1], 16, bias=False, recipe=recipe)
    meter = observe.OperandMeter()

    def observer(plan, cell_name, source, split, encoded):
        seen[cell_name] = meter.measure(plan, cell_name, source, split, encoded)

    linear.clock.watch.observer = observer
    linear(x)
    return seen["fprop_input"]


def test_flushed_quartiles_and_scales_are_counted_by_hand():
    # The tensor scale is 1 (amax 6 * 448). Row 0: maximum 2688, scale 448, so 100 flushes and 500 does not.
    # Row 1: scale 2^-7, subnormal, codes 6 and 1. Row 2: 6 * 2^-12 gives a scale of zero and flushes all.
    # Other rows: zeros, blocks that do not count.
    x = torch.zeros(16, 16)
    x[0] = torch.tensor([2688.0] + [500.0] * 7 + [100.0] * 8)
    x[1] = torch.tensor([6.0] + [1.0] * 15) * 2.0**-7
    x[2] = 6.0 * 2.0**-12
    metrics = measure_whole(x, QuantizerConfig())
    assert metrics["zeroed_share"] == 24 / 48
    # By rank: 16 of 6 * 2^-12, 15 of 2^-7, one of 6 * 2^-7, 8 of 100, 8 above. A quartile has 12 ranks, and
    # equal magnitudes stay together in the quartile of the first of them.
    assert metrics["zeroed_share_q1"] == 1.0  # the 16 of row 2
    assert metrics["zeroed_share_q2"] == 0.0  # the 15 of row 1, ranks 16 to 30
    assert (
        metrics["zeroed_share_q3"] == 8 / 9
    )  # row 1's maximum (rank 31) and the eight of 100 (from rank 32)
    assert metrics["zeroed_share_q4"] == 0.0  # the eight above
    assert metrics["scale_saturated_share"] == 1 / 3
    assert metrics["scale_underflow_share"] == 2 / 3
    assert metrics["clipped_share"] == 16 / 256  # whose scale is zero: nothing can be held


def test_degenerate_operands_have_defined_metrics():
    zero = measure_whole(torch.zeros(16, 32), QuantizerConfig())
    assert math.isnan(zero["relative_error"]) and math.isnan(zero["zeroed_share"])
    assert math.isnan(zero["scale_underflow_share"]) and zero["clipped_share"] == 0.0
    # Sixteen tokens span the default rank: no tail is left. Every value is on the grid: no error at all.
    exact = measure_whole(torch.ones(16, 32) * 6.0, QuantizerConfig())
    assert exact["relative_error"] == 0.0 and exact["sqnr_db"] == math.inf and math.isnan(exact["tail_error"])
    spoiled = torch.ones(16, 32)
    spoiled[3, 4] = math.nan
    assert measure_whole(spoiled, QuantizerConfig()) == {}


@pytest.mark.parametrize(("head", "tolerance"), [(0.0, GAPLESS_TOLERANCE), (100.0, GAP_TOLERANCE)])
def test_directions_beyond_the_exact_size_leave_the_tail_of_an_svd(head: float, tolerance: float):
    """640 features: a block Krylov space, once without a gap at the rank and once with one."""
    generator = torch.Generator().manual_seed(5)
    assert 640 > observe.EXACT_FEATURES
    x = torch.randn(96, 640, generator=generator)
    x = x + head * torch.randn(96, 16, generator=generator) @ torch.randn(16, 640, generator=generator)
    u, sigma = observe.leading_directions(x, Axis.whole(96), Axis.whole(640), 16)
    values = torch.linalg.svdvals(x.double())
    assert torch.allclose(u.t() @ u, torch.eye(16, dtype=torch.float64), atol=1e-12)
    tail = float((x.double() - x.double() @ u @ u.t()).square().sum())
    assert tail == pytest.approx(float(values[16:].square().sum()), rel=tolerance)
    assert torch.allclose(sigma, values[:16], rtol=tolerance**0.5)


def test_top_singular_value_of_a_matrix_without_a_gap():
    weight = torch.randn(700, 600, generator=torch.Generator().manual_seed(6))
    value = observe.top_singular_value(weight, Axis.whole(700), Axis.whole(600))
    exact = float(torch.linalg.svdvals(weight.double())[0])
    assert value == pytest.approx(exact, rel=TOP_VALUE_TOLERANCE)


def test_observing_changes_no_result():
    def run(is_observed: bool) -> Tensor:
        torch.manual_seed(0)  # a clock of one's own is seeded from it
        linear = MetisLinear(64, 64, bias=False, recipe="metis", name="here")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            linear.weight.copy_(0.1 * torch.randn(64, 64, generator=generator))
        if is_observed:
            linear.clock.watch.observer = observe.OperandMeter().measure
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
        for _ in range(4):
            y = linear(x)
            y.square().sum().backward()
            linear.after_step()
        return torch.cat((y.flatten(), linear.weight.grad.flatten()))

    assert torch.equal(run(True), run(False))

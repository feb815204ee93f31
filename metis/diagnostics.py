"""What quantisation does to a tensor, in a few named numbers.

One idea: the usual signal-to-noise ratio looks at the whole tensor and misses what a spectral split is for.
When a few directions hold most of the energy, direct NVFP4 keeps the ratio of any Gaussian tensor (20 dB) and
drowns all other directions. So two errors are reported side by side: over everything (`sqnr_db`,
`relative_error`) and inside the residual subspace (`tail_error`). Formulas: arXiv 2509.00404 v4 for the
subspace, NVFP4's two failure modes (zeroed and saturated elements) from its block scales.

Cost: all are O(rows * cols) in float64 except `tail_error`, O(rows * cols * r). None is called inside a
training step; `gaussian_operand_sqnr` runs once, at the start of a run, and takes half a second on one core.

Traps:
* A wgrad operand's reference is the *rotated* matrix where its cell asks for the Hadamard transform: that is
  what the quantiser reads.
* Metrics compare values. Encode twice with stochastic rounding and the two results differ.

Shape letters: R rows, C columns (the contraction axis), r columns of a basis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metis.config import CELL_NAMES, QuantizerConfig, Recipe
from metis.errors import ShapeError
from metis.operand import Axis, EncodedMatrix, NoiseStream, encode, rotate
from metis.quantize import QuantizedTensor
from metis.quantize.tensor import multiply_blocks
from metis.rng import NoisePosition, gaussian, stream_key

CELLS_WITH_TOKENS_ON_COLUMNS = ("wgrad_grad_output", "wgrad_input")
"""Their matrix is [features, tokens]: wgrad contracts over tokens, so that is where its blocks run."""

_STREAM = "diagnostics"
_SCALE_ROUNDINGS = 1.0 + 2.0**-20


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Return 10 log10(sum x^2 / sum (x^ - x)^2) in dB: inf for equal tensors, nan for two zero sums.

    reference, approximation: same shape, any float dtype; sums in float64.
    """
    x, x_hat = _same_shape("sqnr_db", reference, approximation)
    noise, signal = float((x_hat - x).square().sum()), float(x.square().sum())
    if noise == 0.0:
        return math.inf if signal > 0.0 else math.nan
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def relative_error(reference: Tensor, approximation: Tensor) -> float:
    """Return ||x^ - x|| / ||x|| (Frobenius, float64): nan for a zero reference."""
    x, x_hat = _same_shape("relative_error", reference, approximation)
    return _ratio(x_hat - x, x)


def tail_error(reference: Tensor, approximation: Tensor, v: Tensor) -> float:
    """Return ||(x^ - x)(I - V V^T)|| / ||x (I - V V^T)||: the error inside the residual subspace.

    reference, approximation: [R, C]; v: [C, r] with orthonormal columns, the *exact* leading directions even
    when x^ was made with other ones. nan when the reference lies in the span of v.
    Source: arXiv 2509.00404 v4.
    """
    x, x_hat = _same_shape("tail_error", reference, approximation)
    if v.dim() != 2 or x.dim() != 2 or v.shape[0] != x.shape[1]:
        raise ShapeError(
            "tail_error", f"needs x [R, C] and v [C, r], received {tuple(x.shape)} and {tuple(v.shape)}"
        )
    basis = v.to(torch.float64)
    error = x_hat - x
    return _ratio(error - (error @ basis) @ basis.t(), x - (x @ basis) @ basis.t())


def zeroed_share(reference: Tensor, encoded: QuantizedTensor) -> float:
    """Return the share of the non-zero elements of `reference` that decode to zero, in [0, 1].

    Two ways there: below a quarter of the block's step, or in a block whose scale underflowed to zero.
    """
    x, x_hat = _same_shape("zeroed_share", reference, encoded.operand(torch.float64))
    nonzero = x != 0
    count = int(nonzero.sum())
    return int((nonzero & (x_hat == 0)).sum()) / count if count else 0.0


def exceeds_block_limit(reference: Tensor, encoded: QuantizedTensor) -> Tensor:
    """Return where an element of `reference` is above what its block can hold, bool [R, C].

    |x| > element_max * block_scale * tensor_scale, by more than the roundings of the scales themselves.
    """
    x, _ = _same_shape("exceeds_block_limit", reference, encoded.values)
    limit = torch.full_like(x, encoded.element_max * _SCALE_ROUNDINGS) * encoded.tensor_scale()
    if encoded.block_scale is not None and encoded.block_shape is not None:
        limit = multiply_blocks(limit, encoded.block_scale.to(torch.float64), encoded.block_shape)
    return x.abs() > limit


def saturated_share(reference: Tensor, encoded: QuantizedTensor) -> float:
    """Return the share of elements of `reference` above what their block can hold, in [0, 1].

    Happens where a block scale was rounded down (half of the blocks, so about 1/32 of the elements of
    Gaussian data); it biases stochastic rounding too.
    """
    return float(exceeds_block_limit(reference, encoded).to(torch.float64).mean())


def encode_gaussian(
    quantizer: QuantizerConfig, cell_name: str, *, amax_scope: str, rows: int, cols: int, seed: int
) -> tuple[Tensor, EncodedMatrix]:
    """Return (what the quantiser read, what it made of it) for Gaussian data [rows, cols], blocks along cols.

    The encoding is the one of `metis.functional` for this cell, without a basis; rotated cells return the
    rotated matrix (bf16) as reference.
    """
    row_axis, col_axis = Axis.whole(rows), Axis.whole(cols)
    device = torch.device("cpu")
    data = gaussian(
        stream_key(seed, _STREAM, cell_name, "data"), row_axis.indices(device), col_axis.indices(device)
    ).to(torch.float32)
    noise = NoiseStream(
        seed=seed, layer=_STREAM, operand=cell_name, position=NoisePosition(step=0, microbatch=0)
    )
    encoded = encode(
        data,
        quantizer,
        row_axis,
        col_axis,
        amax_scope=amax_scope,
        noise=noise,
        noise_is_transposed=cell_name in CELLS_WITH_TOKENS_ON_COLUMNS,
    )
    return rotate(data, quantizer.rht), encoded


def gaussian_operand_sqnr(
    recipe: Recipe, rows: int = 256, cols: int = 1024, seed: int = 0
) -> dict[str, float]:
    """Return the SNR in dB of every quantised cell of `recipe` on standard normal data [rows, cols].

    Cells in the compute dtype are absent. Known values at the default size: 1x16 nearest 20.4, 16x16 nearest
    19.0, 1x16 stochastic 17.3; a cell that is not quantised as it claims shows here before any loss does.
    """
    result = {}
    for name in CELL_NAMES:
        quantizer: QuantizerConfig | None = getattr(recipe, name).quantizer
        if quantizer is not None:
            reference, encoded = encode_gaussian(
                quantizer, name, amax_scope=recipe.amax_scope, rows=rows, cols=cols, seed=seed
            )
            result[name] = sqnr_db(reference, encoded.dequantize())
    return result


def describe(recipe: Recipe) -> str:
    """Return one line for the start of a run: the operand SNR of every quantised cell on Gaussian data."""
    measured = gaussian_operand_sqnr(recipe)
    if not measured:
        return f" > operand SNR on Gaussian data (dB): recipe {recipe.name} quantises no operand"
    cells = " | ".join(f"{name} {value:.1f}" for name, value in measured.items())
    return f" > operand SNR on Gaussian data (dB): {cells}"


def _same_shape(where: str, reference: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != approximation.shape:
        raise ShapeError(
            where,
            f"needs two tensors of one shape, received {tuple(reference.shape)} and "
            f"{tuple(approximation.shape)}",
        )
    return reference.detach().to(torch.float64), approximation.detach().to(torch.float64)


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    norm = float(torch.linalg.norm(denominator))
    return float(torch.linalg.norm(numerator)) / norm if norm > 0.0 else math.nan

"""What a recipe is made of: frozen dataclasses, one per concern, validated when they are built.

A recipe says *how* one linear layer computes its three GEMMs. Its heart is the six-cell table: each GEMM has
a left and a right operand, and each of these six operands has one cell that is read in exactly one place
(`metis/operand.py`). Where a recipe applies is the business of a policy (`metis/policy.py`).

    | GEMM  | left                                  | right                              | result |
    | fprop | fprop_input        x_MK, blocks on K  | fprop_weight  w_NK, blocks on K    | y_MN   |
    | dgrad | dgrad_grad_output  g_MN, blocks on N  | dgrad_weight  w_NK, blocks on N    | dx_MK  |
    | wgrad | wgrad_grad_output  g_MN, blocks on M  | wgrad_input   x_MK, blocks on M    | dw_NK  |

Absence of a feature is absence of its sub-config: a cell without `quantizer` stays in the compute dtype, a
cell without `split` has no head, a recipe without `basis` keeps no state. This file imports neither torch
nor megatron, so that a wrong recipe is refused before anything slow is loaded.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeVar

from metis.errors import ConfigError, nearest_name
from metis.formats import FORMAT_BLOCK_SHAPES, RHT_SIZES

T = TypeVar("T")

_FLOAT_WITHOUT_POINT = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")


def _require(condition: bool, where: str, message: str) -> None:
    if not condition:
        raise ConfigError(where, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class RhtConfig:
    """A random Hadamard transform of both operands of a GEMM along its contraction axis, in tiles."""

    size: int = field(
        default=16, metadata={"range": "16, 32, 64, 128", "doc": "points of a tile: 16, 32, 64 or 128"}
    )
    sign_seed: int | None = field(
        default=None,
        metadata={
            "range": "whole number",
            "doc": "seed of the signs; none: the fixed 16 signs of NVIDIA's recipe (size 16 only)",
        },
    )

    def __post_init__(self) -> None:
        _require(self.size in RHT_SIZES, "rht.size", f"must be 16, 32, 64 or 128, received {self.size}")
        _require(
            self.size == 16 or self.sign_seed is not None,
            "rht.sign_seed",
            f"must be given for size {self.size}: fixed signs exist for 16 points only",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerConfig:
    """How one operand becomes codes and scales.

    nvfp4: E2M1 codes, E4M3 block scales, one fp32 tensor scale. mxfp4: E2M1 codes, E8M0 scales of 32 values.
    fp8_e4m3, fp8_e5m2: one fp32 scale per tensor or block.
    """

    format: Literal["nvfp4", "mxfp4", "fp8_e4m3", "fp8_e5m2"] = field(
        default="nvfp4", metadata={"doc": "element and scale format"}
    )
    block_shape: tuple[int, int] | None = field(
        default=(1, 16),
        metadata={
            "doc": "values that share a scale, the second number along the contraction axis. nvfp4: [1, 16] "
            "or [16, 16]; mxfp4: [1, 32]; fp8: [1, 128], [128, 128] or none (the whole tensor)"
        },
    )
    rounding: Literal["rne", "stochastic"] = field(
        default="rne", metadata={"doc": "of the E2M1 values; scales are rounded as scale_rounding says"}
    )
    num_random_bits: int = field(
        default=16,
        metadata={"range": "8, 16, 24", "doc": "bits per element of stochastic rounding: 8, 16 or 24"},
    )
    rht: RhtConfig | None = field(
        default=None,
        metadata={"doc": "random Hadamard transform along the contraction axis first; none: off"},
    )
    four_over_six: Literal["mae", "mse"] | None = field(
        default=None,
        metadata={
            "doc": "nvfp4: scale each block's maximum to 4 or 6, whichever has the smaller error; none: 6"
        },
    )
    num_terms: int = field(
        default=1,
        metadata={
            "range": "1, 2",
            "doc": "2: what the first term leaves is quantised again and both multiply",
        },
    )
    scale_rounding: Literal["standard", "even", "up"] = field(
        default="standard",
        metadata={
            "doc": "standard: nearest E4M3 (nvfp4), floor of the exponent (mxfp4); even: mxfp4 exponent of "
            "the block maximum rounded to E2M1; up: the smallest scale at which no element saturates"
        },
    )
    power_of_two_scales: bool = field(
        default=False, metadata={"doc": "fp8 blocks: scales rounded down to a power of two"}
    )

    def __post_init__(self) -> None:
        if self.block_shape is not None:
            object.__setattr__(self, "block_shape", tuple(self.block_shape))
        for name in ("format", "rounding", "scale_rounding"):
            self._require_choice(name)
        is_fp8 = self.format.startswith("fp8")
        _require(
            self.block_shape in FORMAT_BLOCK_SHAPES[self.format],
            "quantizer.block_shape",
            f"must be {_one_of(FORMAT_BLOCK_SHAPES[self.format])} for format {self.format!r}, received "
            f"{_one_of([self.block_shape])}",
        )
        _require(
            self.num_random_bits in (8, 16, 24),
            "quantizer.num_random_bits",
            f"must be 8, 16 or 24, received {self.num_random_bits}; the bias is below 2^-bits of a grid step",
        )
        _require(
            self.rounding == "stochastic" or self.num_random_bits == 16,
            "quantizer.num_random_bits",
            "has no effect with rounding 'rne'; remove it or set rounding: stochastic",
        )
        _require(
            not (is_fp8 and self.rounding == "stochastic"),
            "quantizer.rounding",
            f"must be 'rne' for {self.format}: stochastic rounding is defined for E2M1",
        )
        _require(
            self.rht is None or self.is_1d,
            "quantizer.rht",
            "needs blocks of one row: a tile serves two contraction axes and the transform only one",
        )
        _require(
            self.four_over_six is None
            or (self.format == "nvfp4" and self.rounding == "rne" and self.rht is None),
            "quantizer.four_over_six",
            "needs format nvfp4, rounding rne and no rht, as it is defined",
        )
        _require(
            self.num_terms in (1, 2), "quantizer.num_terms", f"must be 1 or 2, received {self.num_terms}"
        )
        _require(
            self.num_terms == 1 or self.rounding == "rne",
            "quantizer.num_terms",
            "must be 1 with stochastic rounding: the second term would take the noise away again",
        )
        _require(
            self.scale_rounding == "standard"
            or (self.scale_rounding == "even" and self.format == "mxfp4")
            or (self.scale_rounding == "up" and not is_fp8 and self.four_over_six is None),
            "quantizer.scale_rounding",
            f"must not be {self.scale_rounding!r} here: 'even' is defined for mxfp4, 'up' for nvfp4 and "
            "mxfp4 without four_over_six",
        )
        _require(
            not self.power_of_two_scales or (is_fp8 and self.block_shape is not None),
            "quantizer.power_of_two_scales",
            "needs an fp8 format with blocks",
        )

    def _require_choice(self, name: str) -> None:
        value, known = getattr(self, name), typing.get_args(typing.get_type_hints(type(self))[name])
        _require(
            value in known,
            f"quantizer.{name}",
            f"must be one of {', '.join(known)}, received {value!r}{nearest_name(str(value), known)}",
        )

    @property
    def is_1d(self) -> bool:
        """Whether a block lies in one row (or is the whole tensor)."""
        return self.block_shape is None or self.block_shape[0] == 1

    @property
    def has_tensor_amax(self) -> bool:
        """Whether a scale is made from the amax of the whole tensor, which ranks must agree on."""
        return self.format == "nvfp4" or self.block_shape is None

    @property
    def family(self) -> str:
        """What the two operands of a GEMM must share: nvfp4, mxfp4, or fp8 per tensor or per block."""
        if not self.format.startswith("fp8"):
            return self.format
        if self.block_shape is None:
            return "fp8 per tensor"
        return "fp8 blocks" + (", powers of two" if self.power_of_two_scales else "")

    @property
    def contraction_multiple(self) -> int:
        """What the contraction axis, and each rank's piece of it, must be a multiple of."""
        block = 16 if self.block_shape is None else self.block_shape[1]
        return max(block, 16 if self.rht is None else self.rht.size)


def _one_of(shapes: Any) -> str:
    return " or ".join("none" if shape is None else str(list(shape)) for shape in shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """The number of directions in a head: `fixed`, or `fraction` of the basis's own dimension within
    limits.
    """

    fixed: int | None = field(
        default=None,
        metadata={"range": "at least 1", "doc": "columns of the head; none: derived from fraction"},
    )
    fraction: float = field(
        default=1 / 64,
        metadata={
            "range": "above 0, up to 1",
            "doc": "of the dimension d the basis lives on (K for x and w, N for g)",
        },
    )
    multiple: int = field(
        default=16,
        metadata={"range": "at least 1", "doc": "the derived rank is rounded up to a multiple of this"},
    )
    minimum: int = field(
        default=16, metadata={"range": "1 to maximum", "doc": "lower limit of the derived rank, columns"}
    )
    maximum: int = field(
        default=64, metadata={"range": "at least minimum", "doc": "upper limit of the derived rank, columns"}
    )

    def __post_init__(self) -> None:
        _require(
            self.fixed is None or self.fixed >= 1,
            "rank.fixed",
            f"must be at least 1, received {self.fixed}; remove the split instead of asking for rank 0",
        )
        _require(0 < self.fraction <= 1, "rank.fraction", f"must lie in (0, 1], received {self.fraction}")
        _require(self.multiple >= 1, "rank.multiple", f"must be at least 1, received {self.multiple}")
        _require(
            1 <= self.minimum <= self.maximum,
            "rank.minimum",
            f"must lie in [1, maximum], received minimum {self.minimum} and maximum {self.maximum}",
        )

    def columns(self, dimension: int) -> int:
        """Return min(dimension, fixed or clamp(ceil(fraction * dimension / multiple) * multiple, minimum,
        maximum)).
        """
        if self.fixed is not None:
            return min(self.fixed, dimension)
        # Rounded first: 0.07 * 1600 is 112.00000000000001 in binary and must not become another multiple.
        wanted = math.ceil(round(dimension * self.fraction, 6) / self.multiple) * self.multiple
        return min(dimension, max(self.minimum, min(self.maximum, wanted)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """The split of one operand: x = 1 mu^T + P V^T + R, head in high precision, residual R quantised."""

    rank: RankConfig | None = field(
        default_factory=RankConfig,
        metadata={"doc": "how many directions the head holds; none: the mean alone"},
    )
    mean_first: bool = field(
        default=False,
        metadata={"doc": "take the mean over tokens off before the rank-r split; not for weights"},
    )
    head_format: Literal["bf16", "feedback", "two_term", "literal"] = field(
        default="bf16",
        metadata={
            "doc": "bf16: P and V rounded once, residual against the rounded ones. feedback: both factors "
            "quantised, residual against the quantised head. two_term: the same with two terms per factor. "
            "literal: both factors quantised, residual against the exact head, as the paper's equation "
            "reads; only for reproducing the paper"
        },
    )
    head_placement: Literal["apart", "merged"] = field(
        default="apart",
        metadata={
            "doc": "apart: the head enters products through thin GEMMs of its own. merged: it is added back "
            "to the decoded residual, x^ = bf16(x + (q(R) - R)), and one GEMM reads that: no thin GEMMs, but "
            "x's head meets the other operand's quantised values, and no FP4 hardware can multiply x^"
        },
    )
    head_quantizer: QuantizerConfig | None = field(
        default=None,
        metadata={"doc": "of P and V (blocks along the rank) unless head_format is bf16; none: nvfp4 1x16"},
    )

    def __post_init__(self) -> None:
        known = ("bf16", "feedback", "two_term", "literal")
        _require(
            self.head_format in known,
            "split.head_format",
            f"must be one of {', '.join(known)}, received "
            f"{self.head_format!r}{nearest_name(str(self.head_format), known)}",
        )
        _require(
            self.rank is not None or self.mean_first,
            "split.rank",
            "must be given unless mean_first is set; remove the split instead",
        )
        _require(
            self.head_format == "bf16" or self.rank is not None,
            "split.head_format",
            "must be 'bf16' without a rank: a mean is a bias vector and stays in bf16",
        )
        _require(
            self.head_placement in ("apart", "merged"),
            "split.head_placement",
            f"must be apart or merged, received {self.head_placement!r}",
        )
        _require(
            self.head_placement == "apart" or self.head_format == "bf16",
            "split.head_placement",
            f"must be 'apart' with head_format {self.head_format!r}: x less the residual is the bf16 head",
        )
        quantizer = self.head_quantizer
        _require(
            quantizer is None or self.head_format != "bf16",
            "split.head_quantizer",
            "has no effect with head_format 'bf16'; remove it or choose another head_format",
        )
        _require(
            quantizer is None or (quantizer.rounding == "rne" and quantizer.rht is None and quantizer.is_1d),
            "split.head_quantizer",
            "must round to nearest, in blocks of one row, without rht",
        )
        _require(
            quantizer is None or quantizer.num_terms == 1,
            "split.head_quantizer.num_terms",
            "must be 1; choose head_format: two_term for two terms",
        )

    @property
    def factor_quantizer(self) -> QuantizerConfig | None:
        """How P and V are quantised; None for a bf16 head."""
        if self.head_format == "bf16":
            return None
        return _factor_quantizer(self.head_quantizer, 2 if self.head_format == "two_term" else 1)


@lru_cache(maxsize=64)
def _factor_quantizer(quantizer: QuantizerConfig | None, num_terms: int) -> QuantizerConfig:
    """Made and checked once, not in every forward pass."""
    return dataclasses.replace(quantizer or QuantizerConfig(), num_terms=num_terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class CellConfig:
    """One operand of one GEMM: how it is split and how what is left is quantised."""

    quantizer: QuantizerConfig | None = field(default=None, metadata={"doc": "none: the compute dtype"})
    split: SplitConfig | None = field(default=None, metadata={"doc": "none: the operand is used whole"})

    @property
    def is_merged(self) -> bool:
        """Whether the head is added back to the decoded residual before the product."""
        return self.split is not None and self.split.head_placement == "merged"


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisConfig:
    """How the bases of all splits of a recipe are kept: sampled, projected, warm, strided (arXiv 2509.00404
    v4).
    """

    refresh_interval_steps: int = field(
        default=8,
        metadata={
            "range": "at least 1",
            "doc": "optimizer steps between refreshes, after the two cold ones at steps 0 and 1",
        },
    )
    row_sample_fraction: float = field(
        default=0.05,
        metadata={
            "range": "above 0, up to 1",
            "doc": "share of the tokens of a step whose rows enter the power step, (0, 1]",
        },
    )
    max_rows_per_column: int | None = field(
        default=64,
        metadata={
            "range": "at least 4",
            "doc": "limit of that share, rows per column of the sketch (rank + oversample); none: no limit",
        },
    )
    oversample: int = field(
        default=8, metadata={"range": "at least 0", "doc": "extra columns of the cold sketch, columns"}
    )
    num_pinned_rows: int = field(
        default=8,
        metadata={
            "range": "at least 0",
            "doc": "rows of largest amax per microbatch that always enter the power step",
        },
    )
    num_cold_steps: int = field(
        default=2,
        metadata={
            "range": "at least 1",
            "doc": "power steps of the cold start, one per optimizer step from step 0",
        },
    )
    num_canonical_chunks: int = field(
        default=8,
        metadata={
            "range": "power of two",
            "doc": "pieces of a feature axis summed in a fixed tree; a power of two, multiple of TP",
        },
    )
    tp_mode: Literal["exact", "fast", "local"] = field(
        default="exact",
        metadata={
            "doc": "over tensor-parallel ranks. exact: one basis, fixed summation order, the same codes for "
            "any TP; fast: one basis, fp32 sums in the library's order; local: a basis per rank, no messages"
        },
    )

    def __post_init__(self) -> None:
        _require(
            self.tp_mode in ("exact", "fast", "local"),
            "basis.tp_mode",
            f"must be one of exact, fast, local, received {self.tp_mode!r}",
        )
        _require(
            self.num_cold_steps >= 1,
            "basis.num_cold_steps",
            f"must be at least 1, received {self.num_cold_steps}",
        )
        _require(
            self.refresh_interval_steps >= 1,
            "basis.refresh_interval_steps",
            f"must be at least 1, received {self.refresh_interval_steps}",
        )
        _require(
            0 < self.row_sample_fraction <= 1,
            "basis.row_sample_fraction",
            f"must lie in (0, 1], received {self.row_sample_fraction}",
        )
        limit = self.max_rows_per_column
        _require(
            limit is None or limit >= 4,
            "basis.max_rows_per_column",
            f"must be at least 4, or none for no limit, received {limit}",
        )
        _require(
            self.oversample >= 0, "basis.oversample", f"must not be negative, received {self.oversample}"
        )
        _require(
            self.num_pinned_rows >= 0,
            "basis.num_pinned_rows",
            f"must not be negative, received {self.num_pinned_rows}",
        )
        chunks = self.num_canonical_chunks
        _require(
            chunks >= 1 and chunks & (chunks - 1) == 0,
            "basis.num_canonical_chunks",
            f"must be a power of two, received {chunks}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReparametrisationConfig:
    """Weights as W = U S V^T + W_R with all four trained; made once by SVD, never split again (arXiv
    2509.00404).
    """

    rank: RankConfig = field(
        default_factory=RankConfig, metadata={"doc": "columns of U and V; the dimension is K"}
    )
    factor_quantizer: QuantizerConfig | None = field(
        default=None,
        metadata={"doc": "of U (blocks along the rank) and V (blocks along K); none: the compute dtype"},
    )

    def __post_init__(self) -> None:
        quantizer = self.factor_quantizer
        _require(
            quantizer is None
            or (
                quantizer.rounding == "rne"
                and quantizer.rht is None
                and quantizer.is_1d
                and quantizer.num_terms == 1
            ),
            "reparametrisation.factor_quantizer",
            "must round to nearest in blocks of one row, one term, without rht: the factors are parameters, "
            "read in forward and backward",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralLearningRateConfig:
    """Adaptive spectral learning rate (arXiv 2509.00404 v1): the directions of g's head are scaled by fixed
    factors.

    stepped: `leading_factor` for the first `num_leading` Ritz directions, `head_factor` for the others,
    `residual_factor` for what no direction holds. smooth: 2 / (1 + sigma_i / sigma_1), residual 2.
    """

    schedule: Literal["stepped", "smooth"] = field(default="stepped", metadata={"doc": "stepped or smooth"})
    num_leading: int = field(
        default=5, metadata={"range": "at least 0", "doc": "stepped: directions that keep leading_factor"}
    )
    leading_factor: float = field(
        default=1.0, metadata={"range": "finite", "doc": "stepped: factor of the leading directions"}
    )
    head_factor: float = field(
        default=1.5, metadata={"range": "finite", "doc": "stepped: factor of the head's other directions"}
    )
    residual_factor: float = field(
        default=2.0, metadata={"range": "finite", "doc": "stepped: factor of the residual"}
    )
    apply_to: Literal["dw", "dw_and_dx"] = field(
        default="dw", metadata={"doc": "dw_and_dx also scales dx, which compounds over the layers"}
    )

    def __post_init__(self) -> None:
        for name, known in (("schedule", ("stepped", "smooth")), ("apply_to", ("dw", "dw_and_dx"))):
            _require(
                getattr(self, name) in known,
                f"spectral_learning_rate.{name}",
                f"must be one of {', '.join(known)}, received {getattr(self, name)!r}",
            )
        _require(
            self.num_leading >= 0,
            "spectral_learning_rate.num_leading",
            f"must not be negative, received {self.num_leading}",
        )
        for name in ("leading_factor", "head_factor", "residual_factor"):
            _require(
                math.isfinite(getattr(self, name)),
                f"spectral_learning_rate.{name}",
                f"must be finite, received {getattr(self, name)}",
            )
        stepped = (self.num_leading, self.leading_factor, self.head_factor, self.residual_factor)
        _require(
            self.schedule == "stepped" or stepped == (5, 1.0, 1.5, 2.0),
            "spectral_learning_rate",
            "num_leading and the factors have no effect with schedule 'smooth'; remove them",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DualRangeConfig:
    """Dual-range regulariser (arXiv 2509.00404 v1) of every weight w of numel entries, once per optimizer
    step:

    strength / numel * (square_weight * sum w^2 + inverse_weight * sum 1 / (w^2 + eps)).
    """

    strength: float = field(metadata={"range": "at least 0", "doc": "lambda, at least 0"})
    square_weight: float = field(
        default=1.0, metadata={"range": "at least 0", "doc": "a1, holds large weights down"}
    )
    inverse_weight: float = field(
        default=1.0, metadata={"range": "at least 0", "doc": "a2, keeps small weights off zero"}
    )
    eps: float = field(default=1e-3, metadata={"range": "above 0", "doc": "added to w^2, above 0"})

    def __post_init__(self) -> None:
        for name in ("strength", "square_weight", "inverse_weight"):
            _require(
                0 <= getattr(self, name) < math.inf,
                f"dual_range.{name}",
                f"must not be negative and must be finite, received {getattr(self, name)}",
            )
        _require(0 < self.eps < math.inf, "dual_range.eps", f"must be above 0, received {self.eps}")


CELL_AXES: Mapping[str, tuple[str, str]] = {
    "fprop_input": ("tokens", "in_features"),
    "fprop_weight": ("out_features", "in_features"),
    "dgrad_grad_output": ("tokens", "out_features"),
    "dgrad_weight": ("in_features", "out_features"),
    "wgrad_grad_output": ("out_features", "tokens"),
    "wgrad_input": ("in_features", "tokens"),
}
"""Rows and columns of the matrix that each cell's quantiser reads; columns are the contraction axis."""

CELL_NAMES = tuple(CELL_AXES)

GEMMS = (
    ("fprop", "fprop_input", "fprop_weight"),
    ("dgrad", "dgrad_grad_output", "dgrad_weight"),
    ("wgrad", "wgrad_grad_output", "wgrad_input"),
)
"""Name, left and right cell of each GEMM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one linear layer computes; the six cells and what belongs to the layer as a whole."""

    name: str = field(
        metadata={"range": "not empty", "doc": "shown in logs, compared when a checkpoint is loaded"}
    )
    fprop_input: CellConfig = field(default_factory=CellConfig, metadata={"doc": "x in y = x w^T"})
    fprop_weight: CellConfig = field(default_factory=CellConfig, metadata={"doc": "w in y = x w^T"})
    dgrad_grad_output: CellConfig = field(default_factory=CellConfig, metadata={"doc": "g in dx = g w"})
    dgrad_weight: CellConfig = field(default_factory=CellConfig, metadata={"doc": "w in dx = g w"})
    wgrad_grad_output: CellConfig = field(default_factory=CellConfig, metadata={"doc": "g in dw = g^T x"})
    wgrad_input: CellConfig = field(default_factory=CellConfig, metadata={"doc": "x in dw = g^T x"})
    basis: BasisConfig | None = field(
        default=None, metadata={"doc": "needed exactly when a cell has a split"}
    )
    reparametrisation: ReparametrisationConfig | None = field(
        default=None, metadata={"doc": "none: one master weight per linear"}
    )
    spectral_learning_rate: SpectralLearningRateConfig | None = field(
        default=None, metadata={"doc": "none: the gradient as it is; needs a split of the output gradient"}
    )
    dual_range: DualRangeConfig | None = field(
        default=None, metadata={"doc": "none: no regulariser of the weights' range"}
    )
    save_packed: bool = field(
        default=False,
        metadata={
            "doc": "keep the input for backward as wgrad's codes and scales; thin wgrad products then read "
            "the decoded residual"
        },
    )
    amax_scope: Literal["global", "te"] = field(
        default="global",
        metadata={
            "doc": "global: tensor amax reduced over all ranks that shard the tensor, codes do not depend on "
            "the layout; te: Transformer Engine's choice, rank-local for weights and feature-sharded operands"
        },
    )

    def __post_init__(self) -> None:
        _require(bool(self.name), "recipe.name", "must not be empty")
        _require(
            self.amax_scope in ("global", "te"),
            "recipe.amax_scope",
            f"must be 'global' or 'te', received {self.amax_scope!r}",
        )
        _require(
            self.amax_scope == "global" or self.has_tensor_amax,
            "recipe.amax_scope",
            "has no effect unless a cell makes a scale from the amax of the whole tensor; remove it",
        )
        self._check_splits()
        for gemm, left, right in GEMMS:
            self._check_gemm(gemm, getattr(self, left).quantizer, getattr(self, right).quantizer)
        where = f"recipe {self.name!r}"
        for name in ("wgrad_grad_output", "wgrad_input"):
            quantizer = getattr(self, name).quantizer
            _require(
                quantizer is None or quantizer.is_1d,
                f"{where}: {name}.quantizer.block_shape",
                "must be blocks of one row: wgrad operands are blocked along tokens",
            )
        _require(
            self.spectral_learning_rate is None
            or (self.wgrad_grad_output.split is not None and self.wgrad_grad_output.split.rank is not None),
            f"{where}: spectral_learning_rate",
            "needs wgrad_grad_output.split with a rank: it scales the directions of that head",
        )
        _require(
            self.spectral_learning_rate is None
            or self.spectral_learning_rate.apply_to == "dw"
            or (self.dgrad_grad_output.split is not None and self.dgrad_grad_output.split.rank is not None),
            f"{where}: spectral_learning_rate.apply_to",
            "needs dgrad_grad_output.split with a rank for 'dw_and_dx'; set apply_to: dw or split that cell",
        )
        _require(
            not self.save_packed or self.wgrad_input.quantizer is not None,
            f"{where}: save_packed",
            "needs wgrad_input.quantizer: it keeps that cell's codes",
        )
        _require(
            not self.save_packed or self.reparametrisation is None,
            f"{where}: save_packed",
            "must be off with reparametrisation: the factors' gradients read the whole input",
        )
        _require(
            not self.save_packed
            or self.wgrad_grad_output.split is None
            or self.wgrad_input.quantizer.rht is None,
            f"{where}: save_packed",
            "must be off with rht on wgrad_input and a split wgrad_grad_output: the thin product needs the "
            "residual unrotated",
        )
        _require(
            not self.save_packed or not self.wgrad_input.is_merged,
            f"{where}: save_packed",
            "must be off with wgrad_input.split.head_placement 'merged': codes do not hold what is "
            "multiplied",
        )
        _require(
            self.spectral_learning_rate is None
            or not (self.wgrad_grad_output.is_merged or self.dgrad_grad_output.is_merged),
            f"{where}: spectral_learning_rate",
            "needs split.head_placement 'apart' of the output gradient: it scales the head by itself",
        )

    def _check_splits(self) -> None:
        where = f"recipe {self.name!r}"
        _require(
            (self.basis is not None) == self.has_basis,
            f"{where}: basis",
            "must be given exactly when a cell has a split with a rank; add or remove the section",
        )
        for first, second in (
            ("fprop_input", "wgrad_input"),
            ("fprop_weight", "dgrad_weight"),
            ("dgrad_grad_output", "wgrad_grad_output"),
        ):
            a, b = getattr(self, first).split, getattr(self, second).split
            _require(
                a is None or b is None or a == b,
                f"{where}: {second}.split",
                f"must equal {first}.split or be absent: one tensor has one basis",
            )
        for name in CELL_NAMES:
            cell = getattr(self, name)
            _require(
                not cell.is_merged or cell.quantizer is not None,
                f"{where}: {name}.split.head_placement",
                "has no effect without a quantizer; remove it",
            )
        for name in ("fprop_weight", "dgrad_weight"):
            split = getattr(self, name).split
            _require(
                self.reparametrisation is None or split is None,
                f"{where}: {name}.split",
                "must be absent with reparametrisation: the head is then a parameter",
            )
            _require(
                split is None or not split.mean_first,
                f"{where}: {name}.split.mean_first",
                "must be off: the mean is one over tokens and a weight has none",
            )

    def _check_gemm(self, gemm: str, left: QuantizerConfig | None, right: QuantizerConfig | None) -> None:
        where = f"recipe {self.name!r}: {gemm}"
        _require(
            (left is None) == (right is None),
            where,
            "must quantise both operands or neither: a low-precision GEMM takes two such operands",
        )
        if left is None or right is None:
            return
        _require(
            left.rht == right.rht,
            where,
            "must rotate both operands (rht) in the same way or neither, else the rotation does not cancel",
        )
        _require(
            left.family == right.family,
            where,
            f"must have operands of one kind of format, received {left.family} and {right.family}",
        )

    @property
    def has_tensor_amax(self) -> bool:
        """Whether a cell or factor has a scale made from the whole tensor's amax (nvfp4, fp8 per tensor)."""
        quantizers = [getattr(self, name).quantizer for name in CELL_NAMES]
        splits = (getattr(self, name).split for name in CELL_NAMES)
        quantizers += [split.factor_quantizer for split in splits if split is not None]
        if self.reparametrisation is not None:
            quantizers.append(self.reparametrisation.factor_quantizer)
        return any(quantizer is not None and quantizer.has_tensor_amax for quantizer in quantizers)

    @property
    def has_basis(self) -> bool:
        """Whether any cell keeps a basis."""
        splits = (getattr(self, name).split for name in CELL_NAMES)
        return any(split is not None and split.rank is not None for split in splits)

    @property
    def has_merged_heads(self) -> bool:
        """Whether an operand is multiplied with its head added back."""
        return any(getattr(self, name).is_merged for name in CELL_NAMES)

    @property
    def is_high_precision(self) -> bool:
        """Whether this is the engine's own linear: nothing quantised, split or reparametrised."""
        return (
            all(getattr(self, name) == CellConfig() for name in CELL_NAMES)
            and self.reparametrisation is None
            and self.dual_range is None
        )

    @property
    def is_quantized(self) -> bool:
        """Whether any GEMM runs in a low-precision format."""
        return any(getattr(self, name).quantizer is not None for name in CELL_NAMES)

    def quantized_ranks(self, in_features: int, out_features: int) -> list[tuple[str, int, int]]:
        """Return (setting, columns, multiple) of every head whose factors are quantised along their rank."""
        found = []
        for operand, features in (
            ("input", in_features),
            ("weight", in_features),
            ("grad_output", out_features),
        ):
            split = getattr(self, f"{operand}_split")
            if split is not None and split.rank is not None and split.factor_quantizer is not None:
                multiple = split.factor_quantizer.contraction_multiple
                found.append((f"rank of the {operand} split", split.rank.columns(features), multiple))
        factors = self.reparametrisation
        if factors is not None and factors.factor_quantizer is not None:
            multiple = factors.factor_quantizer.contraction_multiple
            found.append(("reparametrisation.rank", factors.rank.columns(in_features), multiple))
        return found

    def axis_multiple(self, axis: str, forward_only: bool = False) -> int:
        """Return what `tokens`, `in_features` or `out_features` held by a rank must be a multiple of."""
        multiples = [1]
        for name, (rows, cols) in CELL_AXES.items():
            quantizer: QuantizerConfig | None = getattr(self, name).quantizer
            if quantizer is None or (forward_only and not name.startswith("fprop")):
                continue
            if axis == cols:
                multiples.append(quantizer.contraction_multiple)
            if axis == rows and not quantizer.is_1d:
                multiples.append(quantizer.block_shape[0])  # type: ignore[index]
        factors = None if self.reparametrisation is None else self.reparametrisation.factor_quantizer
        if factors is not None and axis == "in_features":
            multiples.append(factors.contraction_multiple)  # V is blocked along K
        return max(multiples)

    @property
    def input_split(self) -> SplitConfig | None:
        """The split of x, in fprop or wgrad."""
        return self.fprop_input.split or self.wgrad_input.split

    @property
    def weight_split(self) -> SplitConfig | None:
        """The split of w, in fprop or dgrad."""
        return self.fprop_weight.split or self.dgrad_weight.split

    @property
    def grad_output_split(self) -> SplitConfig | None:
        """The split of g, in dgrad or wgrad."""
        return self.dgrad_grad_output.split or self.wgrad_grad_output.split


def to_dict(value: Any) -> Any:
    """Return nested plain dicts and lists for a config value, ready for JSON or YAML."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    return value


def from_dict(cls: type[T], data: Any, where: str) -> T:
    """Build dataclass `cls` from nested plain data; an unknown key is an error that names the nearest known
    one.

    Raises ConfigError with `where` extended by the path of the offending key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(where, f"must be a mapping of settings, received {type(data).__name__}: {data!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, item in data.items():
        if key not in known:
            raise ConfigError(f"{where}.{key}", f"is not a known setting{nearest_name(str(key), known)}")
        values[key] = _coerce(hints[key], item, f"{where}.{key}")
    missing = [
        name
        for name, f in known.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(where, f"must set {', '.join(missing)}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.where}", error.message) from None


def _coerce(hint: Any, item: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if item is None else _coerce(inner[0], item, where)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if item not in allowed:
            raise ConfigError(
                where, f"must be one of {list(allowed)}, received {item!r}{nearest_name(str(item), allowed)}"
            )
        return item
    if dataclasses.is_dataclass(hint):
        if item is None:  # a section removed: what it is by default
            return hint()  # type: ignore[operator]
        return from_dict(hint, item, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(item, list | tuple) or not all(isinstance(part, int) for part in item):
            raise ConfigError(where, f"must be a list of whole numbers, received {item!r}")
        return tuple(item)
    if hint is float and isinstance(item, int) and not isinstance(item, bool):
        return float(item)
    if hint is float and isinstance(item, str) and _FLOAT_WITHOUT_POINT.fullmatch(item):
        return float(item)  # YAML 1.1 reads 1e-3 as text
    if not isinstance(item, hint) or (hint is not bool and isinstance(item, bool)):
        raise ConfigError(where, f"must be of type {hint.__name__}, received {item!r}")
    return item

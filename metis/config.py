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
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from metis.errors import ConfigError, nearest_name

BLOCK_SIZE = 16  # NVFP4: one E4M3 scale for 16 values along the contraction axis

T = TypeVar("T")


def _require(condition: bool, where: str, message: str) -> None:
    if not condition:
        raise ConfigError(where, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerConfig:
    """How one operand becomes NVFP4 (E2M1 codes, E4M3 block scales, one fp32 tensor scale)."""

    block_shape: tuple[int, int] = field(
        default=(1, 16), metadata={"doc": "(1, 16) along the contraction axis, or (16, 16) tiles"}
    )
    rounding: Literal["rne", "stochastic"] = field(
        default="rne", metadata={"doc": "of the E2M1 values; scales are always rounded to nearest even"}
    )
    num_random_bits: int = field(
        default=24, metadata={"doc": "bits per element of stochastic rounding: 8 or 24"}
    )
    rht: bool = field(
        default=False, metadata={"doc": "16-point random Hadamard transform along the contraction axis first"}
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_shape", tuple(self.block_shape))
        _require(
            self.block_shape in ((1, BLOCK_SIZE), (BLOCK_SIZE, BLOCK_SIZE)),
            "quantizer.block_shape",
            f"must be [1, 16] or [16, 16], received {list(self.block_shape)}; NVFP4 defines no other block",
        )
        _require(
            self.rounding in ("rne", "stochastic"),
            "quantizer.rounding",
            f"must be 'rne' or 'stochastic', received "
            f"{self.rounding!r}{nearest_name(self.rounding, ('rne', 'stochastic'))}",
        )
        _require(
            self.num_random_bits in (8, 24),
            "quantizer.num_random_bits",
            f"must be 8 or 24, received {self.num_random_bits}; 24 is free of visible bias",
        )
        _require(
            self.rounding == "stochastic" or self.num_random_bits == 24,
            "quantizer.num_random_bits",
            "has no effect with rounding 'rne'; remove it or set rounding: stochastic",
        )
        _require(
            not (self.rht and self.block_shape[0] != 1),
            "quantizer.rht",
            "needs block_shape [1, 16]: a 16x16 tile serves two contraction axes and the transform only one",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """The number of directions in a head: `fixed`, or `fraction` of the basis's own dimension within
    limits.
    """

    fixed: int | None = field(
        default=None, metadata={"doc": "columns of the head; none: derived from fraction"}
    )
    fraction: float = field(
        default=1 / 64, metadata={"doc": "of the dimension d the basis lives on (K for x and w, N for g)"}
    )
    multiple: int = field(
        default=16, metadata={"doc": "the derived rank is rounded up to a multiple of this"}
    )
    minimum: int = field(default=16, metadata={"doc": "lower limit of the derived rank, columns"})
    maximum: int = field(default=64, metadata={"doc": "upper limit of the derived rank, columns"})

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
        wanted = -(-int(-(-(dimension * self.fraction) // 1)) // self.multiple) * self.multiple
        return min(dimension, max(self.minimum, min(self.maximum, wanted)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """The spectral split of one operand: x = P V^T + R, head P V^T in high precision, residual R
    quantised.
    """

    rank: RankConfig = field(
        default_factory=RankConfig, metadata={"doc": "how many directions the head holds"}
    )
    head_format: Literal["bf16", "literal"] = field(
        default="bf16",
        metadata={
            "doc": "bf16: P and V rounded once, residual against the rounded ones. literal: both factors in "
            "NVFP4, residual against the exact head, as the paper's equation reads; only for reproducing the "
            "paper"
        },
    )

    def __post_init__(self) -> None:
        _require(
            self.head_format in ("bf16", "literal"),
            "split.head_format",
            f"must be 'bf16' or 'literal', received {self.head_format!r}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CellConfig:
    """One operand of one GEMM: how it is split and how what is left is quantised."""

    quantizer: QuantizerConfig | None = field(default=None, metadata={"doc": "none: the compute dtype"})
    split: SplitConfig | None = field(default=None, metadata={"doc": "none: the operand is used whole"})


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisConfig:
    """How the bases of all splits of a recipe are kept: sampled, projected, warm, strided (arXiv 2509.00404
    v4).
    """

    refresh_interval_steps: int = field(
        default=8,
        metadata={"doc": "optimizer steps between refreshes, after the two cold ones at steps 0 and 1"},
    )
    row_sample_fraction: float = field(
        default=0.05,
        metadata={"doc": "share of the tokens of a step whose rows enter the power step, (0, 1]"},
    )
    oversample: int = field(default=8, metadata={"doc": "extra columns of the cold sketch, columns"})
    num_pinned_rows: int = field(
        default=8, metadata={"doc": "rows of largest amax per microbatch that always enter the power step"}
    )
    num_canonical_chunks: int = field(
        default=8,
        metadata={"doc": "pieces of a feature axis summed in a fixed tree; a power of two, multiple of TP"},
    )

    def __post_init__(self) -> None:
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
            or (quantizer.rounding == "rne" and not quantizer.rht and quantizer.block_shape == (1, 16)),
            "reparametrisation.factor_quantizer",
            "must be 1x16 blocks, round to nearest, without rht: the factors are parameters, read in "
            "forward and backward",
        )


CELL_NAMES = (
    "fprop_input",
    "fprop_weight",
    "dgrad_grad_output",
    "dgrad_weight",
    "wgrad_grad_output",
    "wgrad_input",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one linear layer computes; the six cells and what belongs to the layer as a whole."""

    name: str = field(metadata={"doc": "shown in logs, compared when a checkpoint is loaded"})
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
            (self.basis is not None) == self.has_split,
            f"recipe {self.name!r}: basis",
            "must be given exactly when a cell has a split; add or remove the section",
        )
        for first, second in (
            ("fprop_input", "wgrad_input"),
            ("fprop_weight", "dgrad_weight"),
            ("dgrad_grad_output", "wgrad_grad_output"),
        ):
            a, b = getattr(self, first).split, getattr(self, second).split
            _require(
                a is None or b is None or a == b,
                f"recipe {self.name!r}: {second}.split",
                f"must equal {first}.split or be absent: one tensor has one basis",
            )
        for name in ("fprop_weight", "dgrad_weight"):
            _require(
                self.reparametrisation is None or getattr(self, name).split is None,
                f"recipe {self.name!r}: {name}.split",
                "must be absent with reparametrisation: the head is then a parameter",
            )
            split = getattr(self, name).split
            _require(
                split is None or split.head_format == "bf16",
                f"recipe {self.name!r}: {name}.split.head_format",
                "must be 'bf16': the head of a tracked weight enters the thin products unquantised",
            )
            quantizer = getattr(self, name).quantizer
            _require(
                quantizer is None or not (quantizer.rht or quantizer.rounding == "stochastic"),
                f"recipe {self.name!r}: {name}.quantizer",
                "must round to nearest without rht: a rotated or stochastically rounded weight is not "
                "defined by any recipe",
            )
        for gemm, left, right in (
            ("fprop", self.fprop_input, self.fprop_weight),
            ("dgrad", self.dgrad_grad_output, self.dgrad_weight),
            ("wgrad", self.wgrad_grad_output, self.wgrad_input),
        ):
            rotated = [cell.quantizer is not None and cell.quantizer.rht for cell in (left, right)]
            _require(
                rotated[0] == rotated[1],
                f"recipe {self.name!r}: {gemm}",
                "must rotate both operands (rht) or neither, else the rotation does not cancel",
            )
            _require(
                (left.quantizer is None) == (right.quantizer is None),
                f"recipe {self.name!r}: {gemm}",
                "must quantise both operands or neither: an FP4 GEMM takes two FP4 operands",
            )
        for name in ("wgrad_grad_output", "wgrad_input"):
            quantizer = getattr(self, name).quantizer
            _require(
                quantizer is None or quantizer.block_shape == (1, 16),
                f"recipe {self.name!r}: {name}.quantizer.block_shape",
                "must be [1, 16]: wgrad operands are blocked along tokens",
            )

    @property
    def has_split(self) -> bool:
        """Whether any cell keeps a basis."""
        return any(getattr(self, name).split is not None for name in CELL_NAMES)

    @property
    def is_high_precision(self) -> bool:
        """Whether this is the engine's own linear: nothing quantised, split or reparametrised."""
        return (
            all(getattr(self, name) == CellConfig() for name in CELL_NAMES) and self.reparametrisation is None
        )

    @property
    def is_quantized(self) -> bool:
        """Whether any GEMM runs in FP4."""
        return any(getattr(self, name).quantizer is not None for name in CELL_NAMES)

    def quantized_ranks(self, in_features: int, out_features: int) -> list[tuple[str, int]]:
        """Return (setting, columns) of every head whose factors are themselves quantised, K and N given."""
        found = []
        for operand, features in (
            ("input", in_features),
            ("weight", in_features),
            ("grad_output", out_features),
        ):
            split = getattr(self, f"{operand}_split")
            if split is not None and split.head_format == "literal":
                found.append((f"rank of the {operand} split", split.rank.columns(features)))
        factors = self.reparametrisation
        if factors is not None and factors.factor_quantizer is not None:
            found.append(("reparametrisation.rank", factors.rank.columns(in_features)))
        return found

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
        return from_dict(hint, item, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(item, list | tuple) or not all(isinstance(part, int) for part in item):
            raise ConfigError(where, f"must be a list of whole numbers, received {item!r}")
        return tuple(item)
    if hint is float and isinstance(item, int) and not isinstance(item, bool):
        return float(item)
    if not isinstance(item, hint) or (hint is not bool and isinstance(item, bool)):
        raise ConfigError(where, f"must be of type {hint.__name__}, received {item!r}")
    return item

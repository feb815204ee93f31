"""One operand of one GEMM: split off the head, then quantise what is left.

`quantize` and `decompose` know nothing of each other; they meet here. A matrix is described by its two axes:
an `Axis` knows which logical rows or columns this rank holds and which ranks hold the rest, so that tensor
amaxes, coefficients and random numbers are the same for every layout.

Shapes: M tokens, K in_features, N out_features, r rank; sizes in names are logical, a rank may hold a piece.
Dtypes: c is the compute dtype that quantisers read (fp32 or bf16); P and V are bf16; R is formed in float64
and rounded once to c. Source of the split: arXiv 2509.00404 v4, in projector form x = P V^T + R with P = x V.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metis.config import QuantizerConfig, SplitConfig
from metis.decompose.projector import chunk_partials, head_and_residual, num_chunks_for, tree_sum
from metis.errors import ConfigError
from metis.quantize import QuantizedTensor, quantize, random_hadamard_16, tensor_amax
from metis.rng import NoisePosition, random_words, stream_key


@lru_cache(maxsize=512)
def _run_indices(runs: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(first, first + length, device=device) for first, length in runs])


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A logical axis and the piece of it that this rank holds.

    size: logical length. runs: (first logical index, length) of each contiguous piece held, in local order;
    logical columns are in Hugging Face order, so that gate and up, q and k and v lie apart. parts: how many
    equal pieces the local axis is made of that are sharded separately (2 for gate|up), for canonical sums.
    group: the ranks that hold the other pieces (None on one rank).
    """

    size: int
    runs: tuple[tuple[int, int], ...]
    parts: int = 1
    num_shards: int = 1
    shard: int = 0
    group: Any = None

    @classmethod
    def whole(cls, size: int) -> Axis:
        """Return the axis of a rank that holds everything."""
        return cls(size=size, runs=((0, size),))

    @property
    def local_size(self) -> int:
        """Length of the piece held here."""
        return sum(length for _, length in self.runs)

    @property
    def is_sharded(self) -> bool:
        """Whether other ranks hold pieces of this axis."""
        return self.num_shards > 1

    def indices(self, device: torch.device) -> Tensor:
        """Return the logical index of every local position: int64 [local_size]."""
        return _run_indices(self.runs, device)

    def gather(self, value: Tensor) -> list[Tensor]:
        """Return `value` of every rank that holds a piece, in shard order."""
        if not self.is_sharded:
            return [value]
        pieces = [torch.empty_like(value) for _ in range(self.num_shards)]
        dist.all_gather(pieces, value.contiguous(), group=self.group)
        return pieces

    def gather_rows(self, value: Tensor) -> Tensor:
        """Return [size, ...] from every rank's [local_size, ...], parts kept together: the order of one
        rank.
        """
        if not self.is_sharded:
            return value
        pieces = [piece.unflatten(0, (self.parts, -1)) for piece in self.gather(value)]
        return torch.cat(pieces, dim=1).flatten(0, 1)

    def local_rows(self, value: Tensor) -> Tensor:
        """Return this rank's [local_size, ...] of a whole [size, ...]; inverse of `gather_rows`."""
        if not self.is_sharded:
            return value
        return value.unflatten(0, (self.parts, self.num_shards, -1))[:, self.shard].flatten(0, 1).contiguous()

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all pieces, in place on sharded axes."""
        if self.is_sharded:
            dist.all_reduce(value, group=self.group)
        return value

    def reduce_max(self, value: Tensor) -> Tensor:
        """Return the maximum over all pieces; NaN on any rank gives NaN (a library's MAX may drop it)."""
        if not self.is_sharded:
            return value
        return torch.stack(self.gather(value)).amax(dim=0)


def coefficients(x: Tensor, v: Tensor, features: Axis, num_chunks: int) -> Tensor:
    """Return x V over the whole feature axis: float64 [M, r], bitwise the same for any sharding of the axis.

    x: [M, K_local]; v: [K_local, r]. The axis is cut into canonical chunks whose float64 partial products
    are summed in a fixed binary tree: each rank sums its subtree, the subtree sums are gathered, and every
    rank finishes the tree.
    """
    total = num_chunks_for(features.size // features.parts, num_chunks)
    if total % features.num_shards:
        raise ConfigError(
            "basis.num_canonical_chunks",
            f"must be a multiple of the tensor-parallel size, received {total} chunks (of an axis of "
            f"{features.size}) and {features.num_shards} ranks; raise the setting or lower the parallel size",
        )
    partials = chunk_partials(x, v, total // features.num_shards, features.parts)
    return tree_sum(torch.stack(features.gather(tree_sum(partials))))


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMatrix:
    """A matrix as head plus residual: x = p v^T + residual; `p` and `v` are None where nothing is split off.

    residual: [rows, K_local] in c. p: [rows, r], v: [K_local, r]: the head's factors as they enter the thin
    products.
    """

    residual: Tensor
    p: Tensor | None = None
    v: Tensor | None = None


def split_matrix(
    x: Tensor,
    basis: Tensor | None,
    split: SplitConfig | None,
    rows: Axis,
    features: Axis,
    *,
    num_chunks: int,
    amax_scope: str,
    memo: dict[Any, Tensor] | None = None,
    memo_key: Any = None,
) -> SplitMatrix:
    """Split `x` [rows, features] along `basis` V (bf16 [features_local, r]); without basis or split, x is
    the residual.

    `bf16` head: P = bf16(x V), R = c(x - P V^T). `literal` head: R against the exact P = x V, and the factors
    that multiply are the NVFP4 ones (P and V^T both blocked along r). `memo` keeps P (the only part that
    costs messages between ranks) under `memo_key` for a second split of the same matrix by the same basis.
    """
    if basis is None or split is None:
        return SplitMatrix(residual=x)
    p = None if memo is None else memo.get(memo_key)
    if p is None:
        p = coefficients(x, basis, features, num_chunks)
        p = p.to(torch.bfloat16) if split.head_format == "bf16" else p
        if memo is not None:
            memo[memo_key] = p
    residual = head_and_residual(x, basis, p, x.dtype)
    if split.head_format == "bf16":
        return SplitMatrix(residual=residual, p=p, v=basis)
    rank_axis = Axis.whole(basis.shape[1])
    quantizer = QuantizerConfig()
    p_q = encode(p.to(x.dtype), quantizer, rows, rank_axis, amax_scope=amax_scope)
    v_q = encode(basis, quantizer, features, rank_axis, amax_scope=amax_scope)
    return SplitMatrix(residual=residual, p=p_q.dequantize(x.dtype), v=v_q.dequantize(x.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseStream:
    """Where the random bits of one operand come from: seed, layer, operand, and the position in training."""

    seed: int
    layer: str
    operand: str
    position: NoisePosition

    def words(self, tokens: Axis, features: Axis, device: torch.device) -> Tensor:
        """Return one 32-bit word per logical (token, feature): int64 [tokens_local, features_local]."""
        key = stream_key(self.seed, self.layer, self.operand)
        return random_words(key, self.position, tokens.indices(device), features.indices(device))


def encode(
    matrix: Tensor,
    quantizer: QuantizerConfig,
    rows: Axis,
    cols: Axis,
    *,
    amax_scope: str,
    noise: NoiseStream | None = None,
    tokens_are_cols: bool = False,
    amax: Tensor | None = None,
) -> QuantizedTensor:
    """Quantise `matrix` [rows, cols] with blocks along its columns, the contraction axis of its GEMM.

    Order: float64 (exact test mode) rounded once to fp32, Hadamard (rounded to bf16), tensor amax (reduced
    over the ranks that hold the rest of either axis when `amax_scope` is global), block scales, rounding.
    `tokens_are_cols` says that the matrix is a transposed copy, so that random bits are still looked up by
    (token, feature).
    """
    if matrix.dtype == torch.float64:
        matrix = matrix.to(torch.float32)
    if quantizer.rht:
        matrix = random_hadamard_16(matrix)
    if amax is None:
        amax = tensor_amax(matrix)
        if amax_scope == "global":
            amax = cols.reduce_max(rows.reduce_max(amax))
    words = None
    if quantizer.rounding == "stochastic":
        assert noise is not None, "stochastic rounding needs a noise stream"
        if tokens_are_cols:
            words = noise.words(cols, rows, matrix.device).t()
        else:
            words = noise.words(rows, cols, matrix.device)
    return quantize(
        matrix,
        block_shape=quantizer.block_shape,
        rounding=quantizer.rounding,
        amax=amax,
        noise_words=words,
        num_random_bits=quantizer.num_random_bits,
    )

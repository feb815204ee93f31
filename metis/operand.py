"""One operand of one GEMM: split off the head, then quantise what is left.

`quantize` and `decompose` know nothing of each other; they meet here. A matrix is described by its two axes:
an `Axis` knows which logical rows or columns this rank holds and which ranks hold the rest, so that tensor
amaxes, coefficients and random numbers are the same for every layout.

The mean over tokens is a direction like any other: `mean_first` puts a column of ones into P and the mean
into V, and every product that holds for any P and V holds with it.

Shapes: M tokens, K in_features, N out_features, r rank; sizes in names are logical, a rank may hold a piece.
Dtypes: c is the compute dtype that quantisers read (fp32 or bf16); P, V and the mean are bf16; R is formed in
float64 and rounded once to c. Source of the split: arXiv 2509.00404 v4, in projector form x = P V^T + R with
P = x V; of the mean: arXiv 2603.10444.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metis.config import QuantizerConfig, RhtConfig, SplitConfig
from metis.decompose.projector import chunk_partials, head_and_residual, num_chunks_for, tree_sum
from metis.errors import ConfigError
from metis.exchange import Exchange, start_scatter
from metis.fused import FusedTensor, KernelChoice, can_fuse, fused_amax, fused_quantize, sign_vector
from metis.kernels import KernelNoise
from metis.quantize import (
    QuantizedTensor,
    quantize,
    quantize_fp8,
    quantize_mxfp4,
    random_hadamard,
    tensor_amax,
)
from metis.rng import WORD_BITS_FOR, NoisePosition, random_words, stream_key


@lru_cache(maxsize=512)
def _run_indices(runs: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(first, first + length, device=device) for first, length in runs])


def _after(result: Tensor, work: Any) -> Callable[[], Tensor]:
    """Return what waits for a message and returns its result."""

    def finish() -> Tensor:
        work.wait()
        return result

    return finish


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A logical axis and the piece of it that this rank holds.

    size: logical length. runs: (first logical index, length) of each contiguous piece held, in local order;
    logical columns are in Hugging Face order, so that gate and up, q and k and v lie apart. parts: how many
    equal pieces the local axis is made of that are sharded separately (2 for gate|up), for canonical sums.
    group: the ranks that hold the other pieces (None on one rank). exchange: who carries rows between them
    beside products, where somebody does.
    """

    size: int
    runs: tuple[tuple[int, int], ...]
    parts: int = 1
    num_shards: int = 1
    shard: int = 0
    group: Any = None
    exchange: Exchange | None = field(default=None, compare=False)

    @classmethod
    def whole(cls, size: int) -> Axis:
        """Return the axis of a rank that holds everything."""
        return cls(size=size, runs=((0, size),))

    def alone(self) -> Axis:
        """Return the piece held here as an axis of its own, which nobody shares."""
        return replace(
            self,
            size=self.local_size,
            runs=((0, self.local_size),),
            num_shards=1,
            shard=0,
            group=None,
            exchange=None,
        )

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
        value = value.contiguous()
        pieces = [torch.empty_like(value) for _ in range(self.num_shards)]
        dist.all_gather(pieces, value, group=self.group)
        return pieces

    def gather_stacked(self, value: Tensor) -> Tensor:
        """Return `value` of every rank that holds a piece, in shard order: [num_shards, ...]."""
        return self._gathered(value, async_op=False)[0] if self.is_sharded else value[None]

    def start_gather_stacked(self, value: Tensor) -> Callable[[], Tensor]:
        """Start `gather_stacked`, by the exchange where there is one; the returned function waits for it.

        What an exchange brings lies where the next message does: use it up before.
        """
        if not self.is_sharded:
            return lambda: value[None]
        if self.exchange is None:
            return _after(*self._gathered(value, async_op=True))
        gathering = self.exchange.gather(value.reshape(-1))
        return lambda: gathering.wait().view(self.num_shards, *value.shape)

    def _gathered(self, value: Tensor, async_op: bool) -> tuple[Tensor, Any]:
        flat = value.reshape(-1)  # the one shape that all backends take
        whole = flat.new_empty(self.num_shards * flat.numel())
        work = dist.all_gather_into_tensor(whole, flat, group=self.group, async_op=async_op)
        return whole.view(self.num_shards, *value.shape), work

    def message(self, num_bytes: int, device: torch.device) -> Tensor:
        """Return memory, uint8 [num_bytes], for what `start_gather_stacked` is to send next."""
        if self.exchange is not None:
            return self.exchange.own_place(num_bytes, device)
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

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

    def start_sum(self, value: Tensor) -> Callable[[], Tensor]:
        """Start `sum`; the returned function waits for it."""
        if not self.is_sharded:
            return lambda: value
        return _after(value, dist.all_reduce(value, group=self.group, async_op=True))

    def scatter_sum(self, value: Tensor) -> Tensor:
        """Return this rank's [local_size, ...] rows of the sum of every rank's [size, ...]; one part only."""
        assert self.parts == 1
        if self.is_sharded and self.exchange is None:
            return self._scattered(value, async_op=False)[0]
        return self.start_scatter_sum(value)()

    def start_scatter_sum(self, value: Tensor) -> Callable[[], Tensor]:
        """Start `scatter_sum`, by the exchange where there is one; the returned function waits for the rows.
        `value` must stay as it is until then.
        """
        assert self.parts == 1
        if not self.is_sharded:
            return lambda: value
        if self.exchange is None:
            return _after(*self._scattered(value, async_op=True))
        return start_scatter(self.exchange, value.contiguous())

    def _scattered(self, value: Tensor, async_op: bool) -> tuple[Tensor, Any]:
        mine = value.new_empty((value.shape[0] // self.num_shards, *value.shape[1:]))
        return mine, dist.reduce_scatter_tensor(mine, value.contiguous(), group=self.group, async_op=async_op)

    def reduce_max(self, value: Tensor) -> Tensor:
        """Return the maximum over all pieces; NaN on any rank gives NaN (a library's MAX may drop it)."""
        if not self.is_sharded:
            return value
        return self.gather_stacked(value).amax(dim=0)


def coefficients(x: Tensor, v: Tensor, features: Axis, num_chunks: int, tp_mode: str = "exact") -> Tensor:
    """Return x V over the whole feature axis: float64 [M, r].

    x: [M, K_local]; v: [K_local, r]. `exact`: bitwise the same for any sharding of the axis, which is cut
    into canonical chunks whose float64 partial products are summed in a fixed binary tree: each rank sums its
    subtree, the subtree sums are gathered, and every rank finishes the tree. `fast`: fp32 products summed by
    the library in its own order. (`local` has no other shards: pass `features.alone()`.)
    """
    if tp_mode == "fast":
        return features.sum(x.to(torch.float32) @ v.to(torch.float32)).to(torch.float64)
    partials = chunk_partials(x, v, num_chunks_held(features, num_chunks), features.parts)
    return tree_sum(torch.stack(features.gather(tree_sum(partials))))


def num_chunks_held(features: Axis, num_chunks: int) -> int:
    """Return the canonical chunks of a feature axis that one of its ranks holds.

    Raises ConfigError where the ranks do not divide them.
    """
    total = num_chunks_for(features.size // features.parts, num_chunks)
    if total % features.num_shards:
        raise ConfigError(
            "basis.num_canonical_chunks",
            f"must be a multiple of the tensor-parallel size, received {total} chunks (of an axis of "
            f"{features.size}) and {features.num_shards} ranks; raise the setting or lower the parallel size",
        )
    return total // features.num_shards


def token_mean(x: Tensor, tokens: Axis) -> Tensor:
    """Return the mean row of x over all tokens of the microbatch, bf16 [K_local, 1], summed in float64."""
    total = tokens.sum(x.sum(dim=0, dtype=torch.float64))
    return (total / tokens.size).to(torch.bfloat16)[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMatrix:
    """A matrix as head plus residual: x = p v^T + residual; `p` and `v` are None where nothing is split off.

    residual: [rows, K_local] in c. p: [rows, r], v: [K_local, r]: the head's factors as they enter the thin
    products, with the ones and the mean as first columns under `mean_first`.
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
    tp_mode: str = "exact",
    memo: dict[Any, Tensor] | None = None,
    memo_key: Any = None,
) -> SplitMatrix:
    """Split `x` [rows, features] along `basis` V (bf16 [features_local, r]); without a head, x is the
    residual.

    `bf16` head: P = bf16(x V), R = c(x - P V^T). `feedback` and `two_term`: P and V quantised along r, R
    against those. `literal`: R against the exact P = x V, while the factors that multiply are the quantised
    ones. `mean_first`: x is centred first, P = (x - 1 mu^T) V. `memo` keeps P and mu (the only parts that
    cost messages between ranks) under `memo_key` for a second split of the same matrix by the same basis.
    """
    if split is None or (basis is None and not split.mean_first):
        return SplitMatrix(residual=x)
    memo = {} if memo is None else memo
    features = features.alone() if tp_mode == "local" else features
    mean = None
    if split.mean_first:
        mean = _remember(memo, (memo_key, "mean"), lambda: token_mean(x, rows))
    if basis is None or split.rank is None:
        return _with_head(x, x.new_empty(x.shape[0], 0), x.new_empty(x.shape[1], 0), mean)

    def project() -> Tensor:
        p = coefficients(x, basis, features, num_chunks, tp_mode)
        if mean is not None:
            p = p - coefficients(mean.t(), basis, features, num_chunks, tp_mode)
        return p if split.head_format == "literal" else p.to(torch.bfloat16)

    p, v = _remember(memo, (memo_key, "p"), project), basis
    quantizer = split.factor_quantizer
    if quantizer is None:
        return _with_head(x, p, v, mean)
    rank_axis = Axis.whole(basis.shape[1])
    p_q, v_q = (
        encode(factor, quantizer, axis, rank_axis, amax_scope=amax_scope).dequantize(x.dtype)
        for factor, axis in ((p.to(x.dtype), rows), (v, features))
    )
    if split.head_format != "literal":
        return _with_head(x, p_q, v_q, mean)
    exact = _with_head(x, p, v, mean)
    p_q, v_q = _with_mean(p_q, v_q, mean)
    return SplitMatrix(residual=exact.residual, p=p_q, v=v_q)


def _remember(memo: dict[Any, Tensor], key: Any, make: Any) -> Tensor:
    if key not in memo:
        memo[key] = make()
    return memo[key]


def _with_mean(p: Tensor, v: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return P and V with the mean as first direction: ones in P, the mean in V; as they are without one."""
    if mean is None:
        return p, v
    ones = p.new_ones((p.shape[0], 1))
    return torch.cat((ones, p), dim=1), torch.cat((mean.to(v.dtype), v), dim=1)


def _with_head(x: Tensor, p: Tensor, v: Tensor, mean: Tensor | None) -> SplitMatrix:
    """Return x with the head of p and v (and the mean) taken off, R in x's dtype."""
    p, v = _with_mean(p, v, mean)
    return SplitMatrix(residual=head_and_residual(x, v, p, x.dtype), p=p, v=v)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseStream:
    """Where the random bits of one operand come from: seed, layer, operand, and the position in training."""

    seed: int
    layer: str
    operand: str
    position: NoisePosition

    def words(self, rows: Axis, cols: Axis, device: torch.device, num_random_bits: int) -> Tensor:
        """Return one word per (row, column) held here, for so many random bits: int64 [rows, cols]."""
        key, num_bits = stream_key(self.seed, self.layer, self.operand), WORD_BITS_FOR[num_random_bits]
        return random_words(key, self.position, rows.indices(device), cols.indices(device), num_bits)

    def for_kernel(self, rows: Axis, cols: Axis, is_transposed: bool) -> KernelNoise:
        """Return the same stream as a kernel takes it, for a matrix [rows, cols]."""
        tokens, features = (cols, rows) if is_transposed else (rows, cols)
        return KernelNoise(
            key=stream_key(self.seed, self.layer, self.operand),
            position=self.position,
            tokens=tokens.runs,
            features=features.runs,
            tokens_are_cols=is_transposed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedMatrix:
    """A quantised matrix: the sum of one or two terms, all blocked along the columns."""

    terms: tuple[QuantizedTensor | FusedTensor, ...]

    @property
    def amax(self) -> Tensor:
        """Tensor amax of the first term, fp32 0-dim."""
        return self.terms[0].amax

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the decoded matrix in `dtype`, terms summed in fp32."""
        total = self.terms[0].dequantize(torch.float32)
        for term in self.terms[1:]:
            total = total + term.dequantize(torch.float32)
        return total.to(dtype)


def rotate(matrix: Tensor, rht: RhtConfig | None) -> Tensor:
    """Return the matrix rotated along its columns as `rht` says (bf16), or as it is."""
    return matrix if rht is None else random_hadamard(matrix, rht.size, sign_vector(rht))


def merged(source: Tensor, residual: Tensor, encoded: EncodedMatrix, rht: RhtConfig | None) -> Tensor:
    """Return an operand with its head added back, `x^ = bf16(x + (q(R) - R))`: bf16 [rows, cols].

    source: x, residual: R, both as the quantiser reads them (transposed copies for blocks along tokens), fp32
    or bf16 (float64, in the exact test mode, is rounded to fp32 as for the quantiser); both are rotated like
    the codes. q(R): terms of `value * block_scale` (one fp32 rounding where that is not exact) times tensor
    scale in fp32. Equal to bf16(P V^T + q(R)) but for the rounding of R, and to x where q(R) = R.
    """
    x, r = (
        rotate(matrix.to(torch.float32) if matrix.dtype == torch.float64 else matrix, rht).to(torch.float32)
        for matrix in (source, residual)
    )
    decoded = None
    for term in encoded.terms:
        number = term.operand(torch.float32)
        number = number * term.tensor_scale() if term.has_tensor_scale else number
        decoded = number if decoded is None else decoded + number
    return (x + (decoded - r)).to(torch.bfloat16)


def encode(
    matrix: Tensor,
    quantizer: QuantizerConfig,
    rows: Axis,
    cols: Axis,
    *,
    amax_scope: str,
    noise: NoiseStream | None = None,
    noise_is_transposed: bool = False,
    amax: Tensor | None = None,
    kernels: KernelChoice = "torch",
    want_bytes: bool = False,
    want_operand: bool = True,
    gather: Axis | None = None,
) -> EncodedMatrix:
    """Quantise `matrix` [rows, cols] with blocks along its columns, the contraction axis of its GEMM.

    Order: float64 (exact test mode) rounded once to fp32, Hadamard (rounded to bf16), tensor amax (reduced
    over the ranks that hold the rest of either axis when `amax_scope` is global), scales, rounding.
    `noise_is_transposed` says that the matrix is a transposed copy, so that random bits are still looked up
    by (row, column) of the original. A second term quantises what the first leaves, in fp32. kernels: who
    computes it, with the same bits; want_bytes: a kernel writes codes and scales too, want_operand: the
    decoded operand. gather: ranks whose codes will be put together with these; they share an amax in any
    scope.
    """
    shared = (rows, cols)
    if amax_scope != "global":
        shared = () if gather is None else (gather,)
    if matrix.dtype == torch.float64:
        matrix = matrix.to(torch.float32)
    if quantizer.num_terms == 1 and can_fuse(matrix, quantizer, kernels):
        if amax is None and quantizer.has_tensor_amax:
            amax = _over_ranks(fused_amax(matrix, quantizer), shared)
        words = None
        if quantizer.rounding == "stochastic":
            assert noise is not None, "stochastic rounding needs a noise stream"
            words = noise.for_kernel(rows, cols, noise_is_transposed)
        fused = fused_quantize(matrix, quantizer, amax, words, want_bytes, want_operand)
        return EncodedMatrix(terms=(fused,))
    matrix = rotate(matrix, quantizer.rht)
    words = None
    if quantizer.rounding == "stochastic":
        assert noise is not None, "stochastic rounding needs a noise stream"
        if noise_is_transposed:
            words = noise.words(cols, rows, matrix.device, quantizer.num_random_bits).t()
        else:
            words = noise.words(rows, cols, matrix.device, quantizer.num_random_bits)
    first = _quantize(matrix, quantizer, shared, words, amax)
    if quantizer.num_terms == 1:
        return EncodedMatrix(terms=(first,))
    left = matrix.to(torch.float32) - first.dequantize(torch.float32)
    return EncodedMatrix(terms=(first, _quantize(left, quantizer, shared, None, None)))


def _over_ranks(amax: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    for axis in axes:
        amax = axis.reduce_max(amax)
    return amax


def _quantize(
    matrix: Tensor,
    quantizer: QuantizerConfig,
    shared: tuple[Axis, ...],
    words: Tensor | None,
    amax: Tensor | None,
) -> QuantizedTensor:
    if amax is None and quantizer.has_tensor_amax:
        amax = _over_ranks(tensor_amax(matrix), shared)
    if quantizer.format == "nvfp4":
        assert quantizer.block_shape is not None
        return quantize(
            matrix,
            block_shape=quantizer.block_shape,
            rounding=quantizer.rounding,
            amax=amax,
            noise_words=words,
            num_random_bits=quantizer.num_random_bits,
            four_over_six=quantizer.four_over_six,
            scale_rounding=quantizer.scale_rounding,
        )
    if quantizer.format == "mxfp4":
        return quantize_mxfp4(
            matrix,
            rounding=quantizer.rounding,
            noise_words=words,
            num_random_bits=quantizer.num_random_bits,
            scale_rounding=quantizer.scale_rounding,
        )
    return quantize_fp8(
        matrix,
        element="e4m3" if quantizer.format == "fp8_e4m3" else "e5m2",
        block_shape=quantizer.block_shape,
        power_of_two_scales=quantizer.power_of_two_scales,
        amax=amax,
    )

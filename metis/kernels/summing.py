"""Thin products over the tokens: x^T P, of one matrix and its coefficients or of two in one launch.

One idea: the result is small (K x r), so the tokens are divided among the programs, and what each has summed
is left in a place of its own for `metis.kernels.placing` to add, scale and put where the product wants it.
Each matrix is read once.

The partial sums are formed on the tensor cores, bf16 times bf16 in fp32, in ascending order of the tokens.
How many there are depends on all sizes of a launch.

Shape letters: M tokens, K features, r columns, S partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis.errors import ShapeError
from metis.kernels.arguments import ceil_div, is_native
from metis.kernels.launching import Key, Launcher, Prepared, layout
from metis.kernels.projection import MAX_RANK, load_operand, padded

_BLOCK_TOKENS, _BLOCK_FEATURES, _NUM_WARPS, _NUM_STAGES = 64, 128, 4, 4
_NUM_PROGRAMS = 264
"""Two for each of the 132 multiprocessors of a Hopper GPU."""

_MAX_SUMS = 32
_MIN_BLOCKS = 4
"""Blocks of tokens that a program sums at least, where there are so many."""


@triton.jit
def _sum_one(
    x,
    p,
    sums,
    index,
    begin,
    end,
    num_tokens,
    num_features,
    stride_x,
    stride_p,
    rank,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tokens, columns = tl.arange(0, BLOCK_T), tl.arange(0, RANK)
    features = index * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K, RANK], dtype=tl.float32)
    x += begin.to(tl.int64) * stride_x
    p += begin.to(tl.int64) * stride_p
    for start in range(begin, end, BLOCK_T):
        inside = start + tokens < num_tokens
        turned = load_operand(x, features[:, None] + tokens[None, :] * stride_x,
                              (features < num_features)[:, None] & inside[None, :], True, NATIVE,
                              EVEN)  # fmt: skip
        coefficients = load_operand(p, tokens[:, None] * stride_p + columns[None, :],
                                    inside[:, None] & (columns < rank)[None, :], True, NATIVE,
                                    EVEN)  # fmt: skip
        x += BLOCK_T * stride_x
        p += BLOCK_T * stride_p
        total = tl.dot(turned, coefficients, total, input_precision="ieee")
    sums += tl.program_id(1).to(tl.int64) * num_features * rank
    tl.store(sums + features.to(tl.int64)[:, None] * rank + columns[None, :], total,
             mask=(features < num_features)[:, None] & (columns < rank)[None, :])  # fmt: skip


@triton.jit
def _token_sums_kernel(
    x_a,
    p_a,
    sums_a,
    x_b,
    p_b,
    sums_b,
    num_tokens,
    tokens_each,
    tiles_a,
    num_features_a,
    stride_x_a,
    stride_p_a,
    rank_a,
    num_features_b,
    stride_x_b,
    stride_p_b,
    rank_b,
    NATIVE: tl.constexpr,
    HAS_B: tl.constexpr,
    EVEN_A: tl.constexpr,
    EVEN_B: tl.constexpr,
    RANK_A: tl.constexpr,
    RANK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    index = tl.program_id(0)
    begin = tl.program_id(1) * tokens_each
    end = tl.minimum(begin + tokens_each, num_tokens)
    if index < tiles_a:
        _sum_one(x_a, p_a, sums_a, index, begin, end, num_tokens, num_features_a, stride_x_a, stride_p_a,
                 rank_a, NATIVE, EVEN_A, RANK_A, BLOCK_T, BLOCK_K)  # fmt: skip
    elif HAS_B:
        _sum_one(x_b, p_b, sums_b, index - tiles_a, begin, end, num_tokens, num_features_b, stride_x_b,
                 stride_p_b, rank_b, NATIVE, EVEN_B, RANK_B, BLOCK_T, BLOCK_K)  # fmt: skip


_token_sums = Launcher(_token_sums_kernel)

Pair = tuple[Tensor, Tensor]


def can_sum(x: Tensor, p: Tensor) -> bool:
    """Whether `token_sums` takes a pair."""
    return (
        x.dtype == p.dtype == torch.bfloat16
        and x.stride(1) == p.stride(1) == 1
        and 1 <= p.shape[1] <= MAX_RANK
    )


def token_sums(first: Pair, second: Pair | None = None) -> list[Tensor]:
    """Return the partial sums of x^T P of one or two pairs (x, P), fp32 [S, K, r] each.

    x: [M, K], P: [M, r], both bf16 and contiguous along their columns; M is the same for both pairs. S: a
    power of two up to 32. The sums are added by `place`.
    """
    pairs = (first,) if second is None else (first, second)
    key = tuple(layout(tensor) for pair in pairs for tensor in pair)
    num_sums = _num_sums(pairs)
    ready = _token_sums.ready(key) or _prepare(key, pairs, num_sums)
    sums = [
        torch.empty(num_sums, x.shape[1], p.shape[1], dtype=torch.float32, device=x.device) for x, p in pairs
    ]
    others = (None, None, None) if second is None else (*second, sums[1])
    ready((*first, sums[0], *others))
    return sums


def _num_sums(pairs: tuple[Pair, ...]) -> int:
    num_tiles = sum(ceil_div(x.shape[1], _BLOCK_FEATURES) for x, _ in pairs)
    num_blocks = ceil_div(pairs[0][0].shape[0], _BLOCK_TOKENS)
    num_sums = 1
    while (
        num_sums < _MAX_SUMS
        and num_sums * num_tiles < _NUM_PROGRAMS
        and num_blocks >= 2 * num_sums * _MIN_BLOCKS
    ):
        num_sums *= 2
    return num_sums


def _prepare(key: Key, pairs: tuple[Pair, ...], num_sums: int) -> Prepared:
    num_tokens = pairs[0][0].shape[0]
    numbers: list[int] = []
    evens, ranks = [], []
    for x, p in pairs:
        if not can_sum(x, p) or x.shape[0] != num_tokens or p.shape[0] != num_tokens:
            raise ShapeError(
                "token_sums",
                f"needs bf16 pairs of {num_tokens} tokens with up to {MAX_RANK} coefficients, contiguous "
                f"along their columns, received {x.dtype} {tuple(x.shape)} and {p.dtype} {tuple(p.shape)}",
            )
        rank = p.shape[1]
        numbers += [x.shape[1], x.stride(0), p.stride(0), rank]
        even = num_tokens % _BLOCK_TOKENS == 0 and x.shape[1] % _BLOCK_FEATURES == 0
        evens.append(even and rank == padded(rank))
        ranks.append(padded(rank))
    has_b = len(pairs) == 2
    tiles = [ceil_div(x.shape[1], _BLOCK_FEATURES) for x, _ in pairs]
    each = ceil_div(ceil_div(num_tokens, _BLOCK_TOKENS), num_sums) * _BLOCK_TOKENS
    if not has_b:
        numbers, evens, ranks = [*numbers, 0, 0, 0, 0], [*evens, False], [*ranks, 16]
    return _token_sums.prepare(
        key, (sum(tiles), num_sums), (num_tokens, each, tiles[0], *numbers),
        (is_native(pairs[0][0]), has_b, *evens, *ranks, _BLOCK_TOKENS, _BLOCK_FEATURES),
        num_warps=_NUM_WARPS, num_stages=_NUM_STAGES,
    )  # fmt: skip

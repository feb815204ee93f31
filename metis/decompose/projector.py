"""Split a tensor into a head and a residual: x = P V^T + R.

One idea: the split is an identity for *any* V and P, as long as the same rounded P and V enter the head and
R. So a basis that is stale, sampled or not quite orthonormal costs captured energy and never correctness. P
and V are rounded to bf16 once, and R is formed afterwards, from the rounded ones.

P = x V must not depend on how many ranks share the feature axis, because a P that differs in one bf16 bit
changes R and so FP4 codes. The feature axis is therefore cut into a fixed number of chunks; each chunk's
partial sum is one float64 matrix product of fixed shape, and the partials are added in a fixed binary tree:

    one rank:   coefficients(x, v)
    rank t/T:   s_t = tree_sum(chunk_partials(x_t, v_t, num_chunks // T)); tree_sum(all_gather(s_t))

Both orders of work are the same tree, since a rank's consecutive chunks are one of its subtrees. With T a
power of two that divides num_chunks the results are bitwise equal.

Traps:
* Fused projections store several logical matrices side by side (gate|up), and each rank holds a slice of
  every one. `parts` says how many; chunk c is the c-th slice of *every* part, so it means the same columns on
  every layout.
* Summing float32 partials with a library all-reduce instead flips about 5e-6 of the codes between 1 and 2
  ranks, a bf16 all-reduce 15 % and more. Rounding afterwards does not mend it.
* torch rounds float64 to bf16 through float32, the same way on every device. Rounding twice can move a value
  that sits on a tie by one bf16 ulp; for P this is harmless, because R is formed from the P that came out.

Shape letters: M tokens, K features of the axis the basis lives on (logical, or this rank's share), r columns
of V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis.errors import ShapeError

NUM_CANONICAL_CHUNKS = 8

_ROWS_PER_BLOCK = 4096
"""Rows whose float64 residual is in memory at once; rows are independent, so this changes no result."""


def num_chunks_for(size_per_part: int, requested: int = NUM_CANONICAL_CHUNKS) -> int:
    """Return the number of chunks: the largest power of two <= requested that divides the size.

    size_per_part: logical (unsharded) features of one part. A tensor-parallel size must divide the result;
    the caller refuses others. An odd size gives 1.

    Raises ShapeError if either number is below 1.
    """
    if size_per_part < 1 or requested < 1:
        raise ShapeError(
            "num_chunks_for",
            f"needs a size and a request of at least 1, received {size_per_part} and {requested}",
        )
    num_chunks = 1
    while 2 * num_chunks <= requested and size_per_part % (2 * num_chunks) == 0:
        num_chunks *= 2
    return num_chunks


def chunk_partials(x_MK: Tensor, v_Kr: Tensor, num_local_chunks: int, parts: int = 1) -> Tensor:
    """Return the partial sums of x V, one per chunk of the local feature axis.

    x_MK: [M, K] any float dtype, K = parts * width: `parts` matrices side by side. v_Kr: [K, r], bf16 in use.
    Returns [num_local_chunks, M, r] float64; entry c sums over the c-th of num_local_chunks equal slices of
    every part. Every chunk is copied to a dense float64 matrix first, so that the product sees the same shape
    and strides whatever rank it runs on.

    Raises ShapeError if K does not divide into parts and chunks or the feature axes differ.
    """
    num_features = x_MK.shape[-1]
    if x_MK.dim() != 2 or v_Kr.dim() != 2 or v_Kr.shape[0] != num_features:
        raise ShapeError(
            "chunk_partials",
            f"needs x [M, K] and v [K, r] over the same features, received {tuple(x_MK.shape)} and "
            f"{tuple(v_Kr.shape)}",
        )
    if parts < 1 or num_local_chunks < 1 or num_features % (parts * num_local_chunks):
        raise ShapeError(
            "chunk_partials",
            f"{num_features} features must divide into {parts} parts of {num_local_chunks} chunks; "
            f"num_chunks_for gives a count that fits",
        )
    width = num_features // parts
    chunk = width // num_local_chunks
    partials = x_MK.new_empty((num_local_chunks, x_MK.shape[0], v_Kr.shape[1]), dtype=torch.float64)
    for c in range(num_local_chunks):
        slices = [slice(p * width + c * chunk, p * width + (c + 1) * chunk) for p in range(parts)]
        x_chunk = torch.cat([x_MK[:, s] for s in slices], dim=1).to(torch.float64).contiguous()
        v_chunk = torch.cat([v_Kr[s] for s in slices], dim=0).to(torch.float64).contiguous()
        partials[c] = x_chunk @ v_chunk
    return partials


def tree_sum(partials: Tensor) -> Tensor:
    """Return the sum over the leading axis as a balanced binary tree over contiguous halves.

    partials: [n, ...], n a power of two. Returns [...], same dtype. Neighbours are added pairwise until one
    is left, so the sum of a contiguous, aligned power-of-two run of entries is a subtree and can be formed
    elsewhere. Raises ShapeError for another count.
    """
    count = partials.shape[0]
    if count < 1 or count & (count - 1):
        raise ShapeError("tree_sum", f"needs a power of two of partial sums, received {count}")
    while partials.shape[0] > 1:
        partials = partials[0::2] + partials[1::2]
    return partials[0]


def coefficients(x_MK: Tensor, v_Kr: Tensor, num_chunks: int, parts: int = 1) -> Tensor:
    """Return x V on one rank: `tree_sum(chunk_partials(x, v, num_chunks, parts))`.

    x_MK: [M, K] any float dtype, v_Kr: [K, r]. Returns [M, r] float64, not yet rounded: sketches read it as
    it is, P is `coefficients(...).to(torch.bfloat16)`.
    """
    return tree_sum(chunk_partials(x_MK, v_Kr, num_chunks, parts))


def head(p_Mr: Tensor, v_Kr: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the head P V^T, formed in float64 and rounded to `dtype`.

    p_Mr: [M, r], v_Kr: [K, r], bf16 in use. Returns [M, K]. Products of bf16 numbers are exact in float64 and
    so, short of extreme cancellation, is their sum over r: the order of summation does not show.
    """
    out_MK = p_Mr.new_empty((p_Mr.shape[0], v_Kr.shape[0]), dtype=dtype)
    v_rK = v_Kr.to(torch.float64).T
    for start in range(0, p_Mr.shape[0], _ROWS_PER_BLOCK):
        rows = slice(start, start + _ROWS_PER_BLOCK)
        out_MK[rows] = (p_Mr[rows].to(torch.float64) @ v_rK).to(dtype)
    return out_MK


def head_and_residual(x_MK: Tensor, v_Kr: Tensor, p_Mr: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Return the residual R = x - P V^T, formed in float64 from the rounded P and V, rounded to out_dtype.

    x_MK: [M, K] any float dtype; v_Kr: [K, r] and p_Mr: [M, r], the very bf16 tensors that make the head.
    out_dtype: the compute dtype c (fp32 or bf16); float64 keeps the identity x = P V^T + R to rounding.
    Returns [M, K]. On a feature shard, pass that shard of x and V and the complete P.

    Raises ShapeError if the three shapes do not fit.
    """
    num_tokens, num_features = x_MK.shape
    if p_Mr.shape[0] != num_tokens or v_Kr.shape[0] != num_features or p_Mr.shape[1] != v_Kr.shape[1]:
        raise ShapeError(
            "head_and_residual",
            f"needs x [M, K], v [K, r], p [M, r], received {tuple(x_MK.shape)}, {tuple(v_Kr.shape)}, "
            f"{tuple(p_Mr.shape)}",
        )
    residual_MK = x_MK.new_empty((num_tokens, num_features), dtype=out_dtype)
    v_rK = v_Kr.to(torch.float64).T
    for start in range(0, num_tokens, _ROWS_PER_BLOCK):
        rows = slice(start, start + _ROWS_PER_BLOCK)
        head_rows = p_Mr[rows].to(torch.float64) @ v_rK
        residual_MK[rows] = (x_MK[rows].to(torch.float64) - head_rows).to(out_dtype)
    return residual_MK

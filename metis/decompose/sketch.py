"""Sketches of sampled rows: what a power step adds up, in float64, for many bases at once.

One idea: bases of equal shape go through every product together, so that the number of operations does not
grow with the number of layers; on a GPU they are too small to be waited for one by one.

B = x V is summed over canonical chunks of the feature axis in a fixed tree, as coefficients are
(`metis.decompose.projector`), and Z = x^T B is formed chunk by chunk: a rank that holds some of the chunks
multiplies the same matrices as a rank that holds them all.

Shape letters: G bases, n rows, K features (of this rank: `parts` matrices side by side), C chunks held here,
q columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metis.decompose.projector import tree_sum


def sketch(x_nK: Tensor, b_nq: Tensor) -> tuple[Tensor, Tensor]:
    """Return (Z, gram) = (x_s^T B, B^T B) in float64.

    x_nK: [..., n, K] sampled rows, any float dtype, K may be a shard; b_nq: [..., n, q] = x_s V over the
    *whole* feature axis, float64. Returns [..., K, q] and [..., q, q] float64; n = 0 gives zeros. gram is the
    same on every rank that shares the features: count it once.
    """
    b_nq = b_nq.to(torch.float64)
    return x_nK.to(torch.float64).mT @ b_nq, b_nq.mT @ b_nq


def sketch_in_chunks(
    x_GnK: Tensor,
    v_GKq: Tensor,
    num_local_chunks: int,
    parts: int = 1,
    complete: Callable[[Tensor], Tensor] = lambda b_Gnq: b_Gnq,
) -> tuple[Tensor, Tensor]:
    """Return (Z, gram) of each of G bases, [G, K, q] and [G, q, q] float64.

    x_GnK: [G, n, K] rows, v_GKq: [G, K, q] directions, any float dtypes. num_local_chunks: chunks of the
    features held here. complete: turns this rank's part of B (its subtree) into the whole, [G, n, q].
    """
    num_bases, num_columns = v_GKq.shape[0], v_GKq.shape[2]
    x_cnk = _dense(x_GnK.unflatten(2, (parts, num_local_chunks, -1)).permute(0, 3, 1, 2, 4), 3)
    v_ckq = _dense(v_GKq.unflatten(1, (parts, num_local_chunks, -1)).permute(0, 2, 1, 3, 4), 2)
    partials = torch.bmm(x_cnk, v_ckq).unflatten(0, (num_bases, -1))
    b_Gnq = complete(tree_sum(partials.transpose(0, 1)))
    gram = torch.bmm(b_Gnq.mT, b_Gnq)
    # For every chunk the same B: copied, because a batch needs one distance from matrix to matrix.
    b_cnq = b_Gnq.repeat_interleave(num_local_chunks, dim=0)
    z = torch.bmm(x_cnk.mT, b_cnq).view(num_bases, num_local_chunks, parts, -1, num_columns)
    return z.transpose(1, 2).reshape(num_bases, -1, num_columns), gram


def _dense(pieces: Tensor, axis: int) -> Tensor:
    """Return pieces [G, C, ...] as one batch of float64 matrices; `axis` and the next become one."""
    dense = pieces.to(torch.float64, memory_format=torch.contiguous_format).contiguous()
    return dense.flatten(axis, axis + 1).flatten(0, 1)

"""Sketches of sampled rows: what a power step adds up, in float64, for many bases at once.

One idea: bases of equal shape go through every product together, so that the number of operations does not
grow with the number of layers; on a GPU they are too small to be waited for one by one.

B = x V is summed over canonical chunks of the feature axis in a fixed tree, as coefficients are
(`metis.decompose.projector`), and Z = x^T B is formed chunk by chunk: a rank that holds some of the chunks
multiplies the same matrices as a rank that holds them all.

Shape letters: G bases, n rows, K features (of this rank: `parts` matrices side by side), C chunks held here,
c chunks of all G bases, k features of a chunk, q columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metis.decompose.projector import tree_sum

MIN_RUN_ROWS = 2048
"""A chunk of Z is small (512 x 64 for 4096 features): few multiprocessors work on it, however many rows it
sums."""


def sketch(x_nK: Tensor, b_nq: Tensor) -> tuple[Tensor, Tensor]:
    """Return (Z, gram) = (x_s^T B, B^T B) in float64.

    x_nK: [..., n, K] sampled rows, any float dtype, K may be a shard; b_nq: [..., n, q] = x_s V over the
    *whole* feature axis, float64. Returns [..., K, q] and [..., q, q] float64; n = 0 gives zeros. gram is the
    same on every rank that shares the features: count it once.
    """
    b_nq = b_nq.to(torch.float64)
    return x_nK.to(torch.float64).mT @ b_nq, b_nq.mT @ b_nq


def directions_in_chunks(v_GKq: Tensor, num_local_chunks: int, parts: int = 1) -> Tensor:
    """Return the directions of every chunk as `sketch_in_chunks` takes them, float64 [G C, K / C, q].

    v_GKq: [G, K, q] any float dtype. num_local_chunks: C, of the features held here.
    """
    num_bases, _, num_columns = v_GKq.shape
    pieces = v_GKq if parts == 1 else v_GKq.unflatten(1, (parts, num_local_chunks, -1)).transpose(1, 2)
    return _dense(pieces).view(num_bases * num_local_chunks, -1, num_columns)


def in_chunks(x_GnK: Tensor, num_local_chunks: int, parts: int = 1) -> Tensor:
    """Return rows [G, n, K], any float dtype, as `sketch_in_chunks` takes them: float64 [G C, n, K / C]."""
    num_bases, num_rows, num_features = x_GnK.shape
    pieces = _dense(x_GnK.unflatten(2, (parts, num_local_chunks, -1)).permute(0, 3, 1, 2, 4))
    return pieces.view(num_bases * num_local_chunks, num_rows, num_features // num_local_chunks)


def sketch_in_chunks(
    x_cnk: Tensor,
    v_ckq: Tensor,
    num_bases: int,
    parts: int = 1,
    complete: Callable[[Tensor], Tensor] = lambda b_Gnq: b_Gnq,
) -> tuple[Tensor, Tensor]:
    """Return (Z, gram) of each of G bases, [G, K, q] and [G, q, q] float64.

    x_cnk: rows of `in_chunks`; v_ckq: `directions_in_chunks`. complete: turns this rank's part of B (its
    subtree) into the whole, [G, n, q].
    """
    num_rows = x_cnk.shape[1]
    num_pieces, chunk, num_columns = v_ckq.shape
    num_chunks = num_pieces // num_bases
    partials = torch.bmm(x_cnk, v_ckq).view(num_bases, num_chunks, num_rows, num_columns)
    b_Gnq = complete(tree_sum(partials.transpose(0, 1)))
    gram = torch.bmm(b_Gnq.mT, b_Gnq)
    # For every chunk the same B; copied where need be, as a batch has one distance from matrix to matrix.
    runs = num_runs(num_rows)
    height = num_rows // runs
    b_runs = b_Gnq.view(num_bases, 1, runs, height, num_columns).expand(-1, num_chunks, -1, -1, -1)
    b_runs = b_runs.reshape(num_pieces * runs, height, num_columns)
    z = torch.bmm(x_cnk.view(num_pieces * runs, height, chunk).mT, b_runs)
    if runs > 1:
        z = z.view(num_pieces, runs, chunk, num_columns).sum(dim=1)
    if parts > 1:
        z = z.view(num_bases, num_chunks, parts, -1, num_columns).transpose(1, 2)
    return z.reshape(num_bases, -1, num_columns), gram


def num_runs(num_rows: int) -> int:
    """Return into how many equal runs Z cuts its sum over n rows: a power of two, of MIN_RUN_ROWS at least.

    It depends on n alone and not on the chunks held here, so that ranks multiply the same matrices.
    """
    runs = 1
    while num_rows % (2 * runs) == 0 and num_rows >= 2 * runs * MIN_RUN_ROWS:
        runs *= 2
    return runs


def _dense(pieces: Tensor) -> Tensor:
    """Return pieces in float64, in the order in which they are given, by one copy."""
    return pieces.to(torch.float64, memory_format=torch.contiguous_format).contiguous()

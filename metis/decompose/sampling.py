"""Which rows of a microbatch the next basis is made from.

One idea: a row is in or out by a hash of its own coordinates (step, microbatch, row), so that every layout
samples the same rows, whoever holds them. Uniform samples forget a massive-activation token at the next
refresh, so the rows of largest amax are pinned.

The masks here are the definition, which a CPU runs; `metis.kernels.sampling` makes the same choice on a GPU
without asking the host how many rows there are.

Shape letters: M rows of a microbatch, R any of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metis.errors import ShapeError
from metis.rng import NoisePosition, uniform_hash

ROWS_PER_COLUMN = 4
"""Fewer sampled rows per sketch column make a poor basis; 96 rows for r = 16 and oversample 8."""

SAMPLE_MARGIN_SIGMAS = 4.0
"""Bernoulli sampling aims this far above the rows wanted, so that it falls short once in 3e4."""

MARK_COLUMNS = 16
"""Columns behind the features of picked rows: the first is one where the row counts, the others keep rows
aligned. A row that does not count is zero."""

_OVERFLOW_NATS = 41.5
"""Rows beyond `row_capacity` come with a probability below exp(-41.5) = 1e-18."""

_HASH_RANGE = 1 << 32


def minimum_rows(rank: int, oversample: int) -> int:
    """Return the rows below which token sketches wait for more: 4 (r + oversample)."""
    return ROWS_PER_COLUMN * (rank + oversample)


def num_sampled_rows(
    num_window_tokens: int,
    row_sample_fraction: float,
    rank: int,
    oversample: int,
    max_rows_per_column: int | None = None,
) -> int:
    """Return the rows wanted of the l tokens of a step: min(l, max(ceil(fraction l), 4 (r + oversample))).

    The share of the tokens is at most max_rows_per_column (r + oversample) rows; None: whatever it is.
    """
    # Rounded first: 0.07 * 100 is 7.000000000000001 in binary and must not become 8.
    by_fraction = math.ceil(round(row_sample_fraction * num_window_tokens, 6))
    if max_rows_per_column is not None:
        by_fraction = min(by_fraction, max_rows_per_column * (rank + oversample))
    return min(num_window_tokens, max(by_fraction, minimum_rows(rank, oversample)))


def sample_probability(num_rows: int, num_window_tokens: int) -> float:
    """Return the Bernoulli probability that samples at least n of the l tokens, except once in 3e4.

    min(1, (n + 4 sqrt(n)) / l). Aiming at n itself would fall short of the minimum, and delay a refresh,
    half of the time.
    """
    return min(1.0, (num_rows + SAMPLE_MARGIN_SIGMAS * math.sqrt(num_rows)) / num_window_tokens)


def hash_threshold(probability: float) -> int:
    """Return what a row's 32-bit word must be below to be sampled: probability * 2^32, rounded."""
    return round(probability * _HASH_RANGE)


def row_capacity(num_rows: int, probability: float, num_pinned_rows: int) -> int:
    """Return how many of `num_rows` rows are never exceeded (once in 1e18) by a sample and pinned rows.

    Bernstein's bound for l Bernoulli draws of probability p: the mean plus t, where t^2 = 2 a (v + t / 3),
    v = l p (1 - p), a = 41.5.
    """
    third = _OVERFLOW_NATS / 3
    variance = num_rows * probability * (1 - probability)
    excess = third + math.sqrt(third * third + 2 * _OVERFLOW_NATS * variance)
    return min(num_rows, math.ceil(num_rows * probability + excess) + num_pinned_rows)


def bernoulli_rows(key: tuple[int, int], position: NoisePosition, rows: Tensor, probability: float) -> Tensor:
    """Return the mask of rows whose hash of (step, microbatch, row) is below probability * 2^32.

    rows: [R] int64 global row indices, any subset in any order. Returns [R] bool; a row's fate is its own.
    """
    return uniform_hash(key, position, rows) < hash_threshold(probability)


def pinned_rows(rows: Tensor, row_amax: Tensor, num_pinned_rows: int) -> Tensor:
    """Return the mask of the num_pinned_rows rows of largest amax; equal amaxes go to the lower row index.

    rows: [M] int64 global row indices of one *whole* microbatch, any order; row_amax: [M], maxima over the
    whole feature axis (reduced over ranks that share it). Returns [M] bool.
    """
    by_index = torch.argsort(rows)
    by_amax = torch.argsort(row_amax[by_index], descending=True, stable=True)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    mask[by_index[by_amax[:num_pinned_rows]]] = True
    return mask


def sample_rows(
    key: tuple[int, int],
    position: NoisePosition,
    rows: Tensor,
    row_amax: Tensor,
    *,
    probability: float,
    num_pinned_rows: int,
) -> Tensor:
    """Return the mask of rows of one microbatch to sketch: a Bernoulli sample, or pinned by their amax.

    rows, row_amax: [M], the whole microbatch (see `pinned_rows`); a rank that holds some of the tokens
    gathers the amaxes (M numbers) and takes its rows of the mask. Returns [M] bool.
    """
    if rows.shape != row_amax.shape:
        raise ShapeError(
            "sample_rows",
            f"needs one amax per row, received {tuple(rows.shape)} rows and {tuple(row_amax.shape)} maxima",
        )
    return bernoulli_rows(key, position, rows, probability) | pinned_rows(rows, row_amax, num_pinned_rows)

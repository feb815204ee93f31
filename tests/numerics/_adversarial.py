"""Matrices whose every row is a small attack on a quantiser: many cases in one call.

One idea: a comparison of two quantisers costs the same for one row as for hundreds, so a case is a row. Each
row draws a pattern and an exponent from a seed; the patterns are those in which scales and rounding have
edges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis.formats import E2M1_MAGNITUDES, E2M1_MIDPOINTS
from metis.quantize.reference_formats import reference_element_values

_E2M1_EDGES = torch.tensor([*E2M1_MIDPOINTS, *E2M1_MAGNITUDES])
_SCALE_EDGES = torch.tensor([1.0, 1.5, 1.75, 1.0 + 2.0**-23, 1.5 + 2.0**-23, 1.75 - 2.0**-23, 2.0 - 2.0**-23])


def adversarial_rows(
    num_rows: int,
    width: int,
    seed: int,
    *,
    base_exponent: int = 0,
    exponent_spread: int = 0,
    finite: bool = True,
) -> Tensor:
    """Return fp32 [num_rows, width]; a row is a pattern times 2^(base - 0..spread), rounded to fp32.

    finite: leave out infinities and NaN (patterns of random bits and of one bad element).
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = [*_FINITE_PATTERNS] + ([] if finite else [_random_bits, _one_bad_element])
    choice = torch.randint(len(patterns), (num_rows,), generator=generator)
    shift = torch.randint(exponent_spread + 1, (num_rows, 1), generator=generator)
    # A power of two outside fp32's range is applied in two steps; float64 would hide double rounding of none.
    exponent = (base_exponent - shift).to(torch.float64)
    rows = torch.empty(num_rows, width)
    for index, pattern in enumerate(patterns):
        chosen = (choice == index).nonzero().flatten()
        made = pattern(len(chosen), width, generator)
        if pattern not in (_random_bits, _subnormals):
            made = (made.double() * torch.exp2(exponent[chosen])).float()
        rows[chosen] = made
    return rows.clamp(-3.4028234663852886e38, 3.4028234663852886e38) if finite else rows


def _gaussian(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, generator=generator)


def _heavy_tailed(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return _gaussian(rows, width, generator) * torch.exp(4 * _gaussian(rows, width, generator))


def _pick(values: Tensor, rows: int, width: int, generator: torch.Generator) -> Tensor:
    picked = values[torch.randint(len(values), (rows, width), generator=generator)]
    return torch.where(torch.rand(rows, width, generator=generator) < 0.5, picked, -picked)


def _e2m1_edges(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Midpoints and grid points, seen as such when the row's maximum is 6."""
    made = _pick(_E2M1_EDGES, rows, width, generator)
    made[:, 0] = 6.0
    return made


def _beside_e2m1_edges(rows: int, width: int, generator: torch.Generator) -> Tensor:
    away = torch.randint(-1, 2, (rows, width), generator=generator)
    return _e2m1_edges(rows, width, generator) * (1 + away * 2.0**-23)


def _fp8_edges(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Midpoints and grid points of E4M3 or E5M2 with the format's largest number: a scale of exactly 2^k."""
    made = torch.empty(rows, width)
    for row in range(rows):
        values = torch.tensor(reference_element_values("e5m2" if row % 2 else "e4m3"))
        edges = torch.cat((values, (values[1:] + values[:-1]) / 2))
        made[row] = _pick(edges, 1, width, generator)[0]
        made[row, 0] = values[-1]
    return made


def _scale_edges(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """One value per row, at or beside a boundary of the scale rules, and smaller ones."""
    made = _gaussian(rows, width, generator) * 0.1
    made[:, -1:] = _pick(_SCALE_EDGES, rows, 1, generator)
    return made


def _one_outlier(rows: int, width: int, generator: torch.Generator) -> Tensor:
    made = _gaussian(rows, width, generator) * 2.0**-12
    made[:, width // 2] = 1.0
    return made


def _zeros(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return _pick(torch.zeros(1), rows, width, generator)  # of both signs


def _constant(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return _gaussian(rows, 1, generator).expand(rows, width)


def _subnormals(rows: int, width: int, generator: torch.Generator) -> Tensor:
    bits = torch.randint(2**23, (rows, width), generator=generator, dtype=torch.int32)
    shift = torch.randint(23, (rows, 1), generator=generator, dtype=torch.int32)
    return _pick(torch.ones(1), rows, width, generator) * (bits >> shift).view(torch.float32)


def _random_bits(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Any fp32 number there is, NaN and infinities among them."""
    words = torch.randint(-(2**31), 2**31, (rows, width), generator=generator)
    return words.to(torch.int32).view(torch.float32)


def _one_bad_element(rows: int, width: int, generator: torch.Generator) -> Tensor:
    made = _gaussian(rows, width, generator)
    bad = torch.tensor([float("inf"), float("-inf"), float("nan")])
    made[:, 1] = bad[torch.randint(3, (rows,), generator=generator)]
    return made


_FINITE_PATTERNS = (
    _gaussian,
    _heavy_tailed,
    _e2m1_edges,
    _beside_e2m1_edges,
    _fp8_edges,
    _scale_edges,
    _one_outlier,
    _zeros,
    _constant,
    _subnormals,
)

"""The vocabulary of strictness for numerics tests, from the strictest down.

bitwise (same bits, NaN and sign of zero included) > ulp (n steps of the dtype) > sqnr floor (dB) > sigma
(statistics). A test states which one it uses by calling it; a tolerance is a named constant with the
measured worst case beside it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_bitwise_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Same shape, dtype and bits; a failure names how many differ and the first place with both values."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    different = _bits(actual) != _bits(expected)
    if not bool(different.any()):
        return
    first = tuple(different.nonzero()[0].tolist())
    raise AssertionError(
        f"{what}: {int(different.sum())} of {different.numel()} differ, first at {first}: "
        f"{actual[first].item()!r}, expected {expected[first].item()!r}"
    )


def assert_within_ulp(actual: Tensor, exact: Tensor, max_ulp: float, what: str) -> None:
    """|actual - exact| <= max_ulp units in the last place of actual's dtype at exact; `exact` is float64."""
    assert exact.dtype == torch.float64, f"{what}: the oracle must be float64, received {exact.dtype}"
    info = torch.finfo(actual.dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp(min=info.tiny)))
    ulp = info.eps * torch.exp2(exponent)
    worst = float(((actual.to(torch.float64) - exact).abs() / ulp).max())
    assert worst <= max_ulp, f"{what}: {worst:.3f} ulp of {actual.dtype}, allowed {max_ulp}"


def sqnr_db(actual: Tensor, exact: Tensor) -> float:
    """10 log10(sum exact^2 / sum (actual - exact)^2), in float64."""
    exact, actual = exact.to(torch.float64), actual.to(torch.float64)
    noise = float((actual - exact).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(float(exact.square().sum()) / noise)


def assert_sqnr_near(
    actual: Tensor, exact: Tensor, expected_db: float, tolerance_db: float, what: str
) -> None:
    """The signal-to-noise ratio is the known one: too good is a failure too (nothing was quantised)."""
    measured = sqnr_db(actual, exact)
    assert abs(measured - expected_db) <= tolerance_db, (
        f"{what}: {measured:.2f} dB, expected {expected_db} dB"
    )


def assert_within_sigma(observed: Tensor, mean: Tensor, sigma: Tensor, max_sigma: float, what: str) -> None:
    """Every |observed - mean| <= max_sigma * sigma; where sigma is zero the values must be equal."""
    excess = (observed - mean).abs() - max_sigma * sigma
    worst = int(excess.argmax())
    assert float(excess.max()) <= 0, (
        f"{what}: entry {worst} observed {observed.flatten()[worst].item()}, "
        f"mean {mean.flatten()[worst].item()}, sigma {sigma.flatten()[worst].item()}, "
        f"allowed {max_sigma} sigma"
    )


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_INTEGER_OF_WIDTH[x.element_size()])

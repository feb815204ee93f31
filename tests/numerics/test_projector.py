"""The projector x = P V^T + R: an identity for any V, exact products, and bits that no sharding changes.

Oracles: float64 algebra written out here, and the unsharded computation.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metis.decompose.projector import (
    chunk_partials,
    coefficients,
    head,
    head_and_residual,
    num_chunks_for,
    tree_sum,
)
from metis.errors import ShapeError

IDENTITY_RELATIVE_ERROR = 1e-15  # float64 R; measured worst 5e-17
PRODUCT_RELATIVE_ERROR = 1e-12  # float64 GEMMs of up to 160 terms; measured worst 7e-16
HEAD_ENERGY = 0.996


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _basis(num_features: int, rank: int, seed: int) -> Tensor:
    return torch.linalg.qr(_normal(num_features, rank, seed=seed))[0].to(torch.bfloat16)


def _split(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = coefficients(x, v, num_chunks_for(x.shape[1])).to(torch.bfloat16)
    return p, head_and_residual(x, v, p, torch.float64)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _spectral_matrix(num_tokens: int, num_features: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A rank-r head with 99.6 % of the energy plus a Gaussian tail orthogonal to it; and the exact V."""
    u = torch.linalg.qr(_normal(num_tokens, rank, seed=seed))[0]
    v = torch.linalg.qr(_normal(num_features, rank, seed=seed + 1))[0]
    tail = _normal(num_tokens, num_features, seed=seed + 2)
    tail = tail - u @ (u.T @ tail)
    tail = tail - (tail @ v) @ v.T
    x = (HEAD_ENERGY / rank) ** 0.5 * u @ v.T + (1 - HEAD_ENERGY) ** 0.5 * tail / tail.norm()
    return x * (num_tokens * num_features) ** 0.5, v


@pytest.mark.parametrize("kind", ["orthonormal", "stale", "not orthogonal", "zero", "huge"])
def test_split_is_an_identity_for_any_basis(kind: str) -> None:
    x = _normal(53, 96, seed=1)
    v = {
        "orthonormal": _basis(96, 8, 2),
        "stale": _basis(96, 8, 3),
        "not orthogonal": _normal(96, 8, seed=4).to(torch.bfloat16),
        "zero": torch.zeros(96, 8, dtype=torch.bfloat16),
        "huge": (1e3 * _normal(96, 8, seed=5)).to(torch.bfloat16),
    }[kind]
    p, residual = _split(x, v)
    whole = head(p, v, torch.float64)
    scale = max(float(x.norm()), float(whole.norm()))
    assert float((whole + residual - x).norm()) <= IDENTITY_RELATIVE_ERROR * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_is_rounded_once_from_the_rounded_factors(dtype: torch.dtype) -> None:
    x, v = _spectral_matrix(64, 96, 8, seed=10)
    x, v = x.to(dtype), v.to(torch.bfloat16)
    p = coefficients(x, v, 8).to(torch.bfloat16)
    residual = head_and_residual(x, v, p, dtype)
    exact = x.double() - p.double() @ v.double().T
    assert residual.dtype == dtype and torch.equal(residual, exact.to(dtype))
    # A residual of the unrounded P leaves the rounding error of the head in the sum.
    unmended = (x.double() - coefficients(x, v, 8) @ v.double().T).to(dtype)
    error = (head(p, v, torch.float64) + residual.double() - x.double()).norm()
    assert (head(p, v, torch.float64) + unmended.double() - x.double()).norm() > 5 * error


def test_residual_is_the_tail_and_the_head_holds_its_energy() -> None:
    x, v = _spectral_matrix(512, 256, 16, seed=20)
    _, residual = _split(x, v.to(torch.bfloat16))
    energy = float(coefficients(x, v, 8).square().sum() / x.square().sum())
    assert energy == pytest.approx(HEAD_ENERGY, rel=1e-12)
    # bf16 factors leave 2^-9 of the head behind, 3 % of a tail of 6 %; measured 1.0008.
    assert float(residual.norm() / x.norm()) == pytest.approx((1 - HEAD_ENERGY) ** 0.5, rel=0.01)


def test_residual_does_not_depend_on_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, v = _normal(50, 32, seed=30).float(), _basis(32, 4, 31)
    p = coefficients(x, v, 8).to(torch.bfloat16)
    residual, whole = head_and_residual(x, v, p, torch.float32), head(p, v, torch.float32)
    monkeypatch.setattr("metis.decompose.projector._ROWS_PER_BLOCK", 7)
    assert torch.equal(residual, head_and_residual(x, v, p, torch.float32))
    assert torch.equal(whole, head(p, v, torch.float32))


def test_three_products_are_exact_when_nothing_is_quantised() -> None:
    """y, dx and dw of a split linear equal the plain ones, with w whole and with w split too."""
    num_tokens, num_out, num_in, rank = 160, 96, 128, 8
    x, w, g = (
        _normal(num_tokens, num_in, seed=40),
        _normal(num_out, num_in, seed=41),
        _normal(num_tokens, num_out, seed=42),
    )
    bases = _basis(num_in, rank, 43), _basis(num_out, rank, 44), _basis(num_in, rank, 45)
    (p, r_x), (p_g, r_g), (u, w_r) = _split(x, bases[0]), _split(g, bases[1]), _split(w, bases[2])
    p, p_g, u, v_x, v_g, v_w = (t.double() for t in (p, p_g, u, *bases))

    y = p @ (v_x.T @ w.T) + r_x @ w.T
    dx = p_g @ (v_g.T @ w) + r_g @ w
    dw = v_g @ (p_g.T @ p) @ v_x.T + v_g @ (p_g.T @ r_x) + (r_g.T @ p) @ v_x.T + r_g.T @ r_x
    y_tracked = p @ (v_x.T @ w.T) + (r_x @ v_w) @ u.T + r_x @ w_r.T
    dx_tracked = p_g @ (v_g.T @ w) + (r_g @ u) @ v_w.T + r_g @ w_r

    for actual, expected in (
        (y, x @ w.T),
        (y_tracked, x @ w.T),
        (dx, g @ w),
        (dx_tracked, g @ w),
        (dw, g.T @ x),
    ):
        assert _relative_error(actual, expected) < PRODUCT_RELATIVE_ERROR
    # The check can fail: without the cross terms the products are visibly wrong.
    assert _relative_error(dw - v_g @ (p_g.T @ r_x), g.T @ x) > 0.05
    assert _relative_error(y_tracked - (r_x @ v_w) @ u.T, x @ w.T) > 0.05


def _shards(tensor: Tensor, num_ranks: int, parts: int, dim: int) -> list[Tensor]:
    """What each rank of a fused projection holds: its slice of every part, side by side."""
    pieces = [part.chunk(num_ranks, dim) for part in tensor.chunk(parts, dim)]
    return [torch.cat([piece[rank] for piece in pieces], dim) for rank in range(num_ranks)]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coefficients_are_bitwise_the_same_on_1_2_4_8_ranks(parts: int, dtype: torch.dtype) -> None:
    num_features = 16 * 24 * parts
    # Magnitudes over six decades, so that another order of summation would show.
    x = (_normal(37, num_features, seed=50) * torch.logspace(-3, 3, num_features, dtype=torch.float64)).to(
        dtype
    )
    v = _basis(num_features, 16, 51)
    num_chunks = num_chunks_for(num_features // parts)
    assert num_chunks == 8
    whole = coefficients(x, v, num_chunks, parts)
    for num_ranks in (1, 2, 4, 8):
        local = [
            tree_sum(chunk_partials(x_local, v_local, num_chunks // num_ranks, parts))
            for x_local, v_local in zip(
                _shards(x, num_ranks, parts, 1), _shards(v, num_ranks, parts, 0), strict=True
            )
        ]
        assert torch.equal(tree_sum(torch.stack(local)), whole)
    assert _relative_error(whole, x.double() @ v.double()) < PRODUCT_RELATIVE_ERROR
    if dtype == torch.float32:
        # Plain summation gives other bits. (bf16 products of this spread add up exactly.)
        assert not torch.equal(sum(chunk_partials(x, v, num_chunks, parts).unbind(0)), whole)


def test_tree_sum_is_a_balanced_tree_over_contiguous_halves() -> None:
    terms = _normal(8, 5, seed=60) * torch.logspace(0, 12, 8, dtype=torch.float64)[:, None]
    t = terms.unbind(0)
    expected = ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]))
    assert torch.equal(tree_sum(terms), expected)


def test_coefficients_ignore_strides() -> None:
    x, v = _normal(33, 64, seed=70).float(), _basis(64, 8, 71)
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(coefficients(strided, v, 8), coefficients(x, v, 8))


@pytest.mark.parametrize(
    ("size", "requested", "expected"),
    [(4096, 8, 8), (4096, 4, 4), (24, 8, 8), (20, 8, 4), (6, 8, 2), (7, 8, 1), (4096, 6, 4), (1, 8, 1)],
)
def test_num_chunks_is_the_largest_power_of_two_that_divides(
    size: int, requested: int, expected: int
) -> None:
    assert num_chunks_for(size, requested) == expected
    assert coefficients(torch.ones(3, size), torch.ones(size, 2), expected).eq(size).all()


def test_misfitting_shapes_are_refused() -> None:
    x, v = torch.ones(4, 12), torch.ones(12, 2)
    with pytest.raises(ShapeError, match="12 features must divide into 1 parts of 8 chunks"):
        chunk_partials(x, v, 8)
    with pytest.raises(ShapeError, match="over the same features"):
        coefficients(x, torch.ones(10, 2), 1)
    with pytest.raises(ShapeError, match="power of two"):
        tree_sum(torch.ones(3, 2))
    with pytest.raises(ShapeError, match=r"needs x \[M, K\]"):
        head_and_residual(x, v, torch.ones(4, 3), torch.float32)
    with pytest.raises(ShapeError, match="at least 1"):
        num_chunks_for(0)

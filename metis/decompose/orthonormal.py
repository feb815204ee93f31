"""Orthonormal columns from a tall thin matrix, in float64, at any scale and any rank.

One idea: CholeskyQR2 on column-scaled input. It reads the tall matrix through its r x r Gram matrix only, it
is continuous (rounding noise of one layout against another stays rounding noise in V), and it is nested: the
first j columns of V span the first j columns of Z, so a power step keeps the order of directions.

It is also easily fooled, hence the acceptance test and the fallback:
* A shifted Cholesky "succeeds" on zero or duplicate columns and returns garbage. V^T V = I alone does not
  tell: two passes blow the rounding noise of a duplicate up to a unit vector, another one on every layout. So
  a column must also keep more than noise of its own after the first pass.
* Any absolute epsilon destroys orthogonality at gradient scale (1e-6, squared twice). All thresholds are
  relative.
* A direction that is dropped never comes back by a power step, so V is refilled to full width with random
  directions.
* The eigenvectors of a scaled Gram matrix are those of almost an identity, decided by rounding noise. The
  fallback therefore rotates its columns by the energy they carry, which has gaps.

Shape letters: G matrices, K features (the whole logical axis, all ranks' rows gathered), q columns given, r
columns wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from metis.rng import NoisePosition, gaussian

GRAM_SHIFT = 1e-12
"""Keeps the first Cholesky positive on nearly dependent columns; the second, unshifted pass removes what the
shift distorts."""

MAX_ORTHOGONALITY_ERROR = 1e-6
"""Largest accepted |V^T V - I|: far above float64 rounding, far below bf16."""


@dataclass(frozen=True, slots=True)
class OrthonormalResult:
    """What `orthonormalize` found.

    v: [K, num_columns] float64 with orthonormal columns, or None when nothing usable was in Z.
    status: `cholesky` (the regular way), `eigh` (rank-deficient, refilled), `kept` (v is None: keep the old
    basis).
    """

    v: Tensor | None
    status: Literal["cholesky", "eigh", "kept"]


def orthonormalize(
    z_Kq: Tensor,
    *,
    refill_key: tuple[int, int],
    num_columns: int,
    position: NoisePosition | None = None,
) -> OrthonormalResult:
    """Return orthonormal columns that span Z, refilled with random directions up to num_columns.

    z_Kq: [K, q] float64, q <= num_columns <= K. refill_key, position: address of the random directions (one
    per basis and step, so that an unlucky draw is not repeated).

    Regular: D = diag(Z^T Z); L L^T = D^-1/2 Z^T Z D^-1/2 + 1e-12 I; V = Z D^-1/2 L^-T; the same again
    unshifted. Accepted if finite, max|V^T V - I| < 1e-6, and every column has more than 10 q eps of its
    energy outside the columns before it. Else the eigenvectors of the scaled Gram matrix with lambda > 10 q
    eps lambda_max, in descending order of the energy of Z. Zero or non-finite Z: `kept`.
    """
    num_features, num_given = z_Kq.shape
    assert z_Kq.dtype == torch.float64 and num_given <= num_columns <= num_features
    if num_given == 0 or not bool(torch.isfinite(z_Kq).all()) or not bool(z_Kq.any()):
        return OrthonormalResult(None, "kept")
    status: Literal["cholesky", "eigh"] = "cholesky"
    (v_1Kq,), ok = orthonormal_columns(z_Kq[None])
    v = v_1Kq[0]
    if not bool(ok):
        status = "eigh"
        z_Kq = _scale_to_one(z_Kq)
        norms_q = torch.linalg.vector_norm(z_Kq, dim=0)
        # A zero column stays zero, and is dropped.
        unit_Kq = z_Kq / torch.where(norms_q > 0, norms_q, torch.ones_like(norms_q))
        v = order_by_energy(_dominant_subspace(unit_Kq), z_Kq)
    if v.shape[1] < num_columns:
        v = _refill(v, num_columns, refill_key, position or NoisePosition(0, 0))
    return OrthonormalResult(v, status) if is_orthonormal(v) else OrthonormalResult(None, "kept")


def orthonormal_columns(*z_GKq: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return ([V], ok) of the regular way for many matrices at once, asking the host nothing.

    z_GKq: [G, K, q] float64; each may have its own G, K and q. Returns V [G, K, q] of each, and ok [sum of G]
    bool; V means nothing where ok is false, which is where `orthonormalize` falls back.

    The tall products are one for each argument. Gram matrices are all put together, those with fewer columns
    continued by the identity, whose factor is the identity.
    """
    shapes, device = tuple((z.shape[0], z.shape[2]) for z in z_GKq), z_GKq[0].device
    # By the largest entry first, so that squares neither under- nor overflow. Then a norm is at least one but
    # for a column of zeros, which stays one and fails below. NaN and infinity become NaN and fail as well.
    largest = [torch.linalg.vector_norm(z, ord=torch.inf, dim=-2, keepdim=True) for z in z_GKq]
    torch._foreach_clamp_min_(largest, torch.finfo(torch.float64).tiny)
    vs = [z / scale for z, scale in zip(z_GKq, largest, strict=True)]
    identity, least_share = _identity(max(q for _, q in shapes), device), _least_shares(shapes, device)
    grams = identity.repeat(least_share.numel(), 1, 1)
    blocks = _blocks(grams, shapes)
    _gram_matrices(vs, blocks)
    norms = grams.diagonal(dim1=-2, dim2=-1).sqrt().clamp_(min=1.0)
    scaled = grams / (norms[:, :, None] * norms[:, None, :])
    scaled.diagonal(dim1=-2, dim2=-1).add_(GRAM_SHIFT)
    inverse, first_failure = _inverse_factor(scaled, identity)
    vs = _multiplied(vs, _blocks(inverse.div_(norms[:, None, :]), shapes))
    _gram_matrices(vs, blocks)
    # A column with a share rho of its own has the squared norm rho / (rho + GRAM_SHIFT) after the first pass.
    ok = grams.diagonal(dim1=-2, dim2=-1).amin(dim=-1) > least_share
    inverse, failure = _inverse_factor(grams, identity)
    vs = _multiplied(vs, _blocks(inverse, shapes))
    _gram_matrices(vs, blocks)
    ok &= (first_failure | failure) == 0
    return vs, ok.logical_and_(_are_identities(grams, identity))


@lru_cache(maxsize=256)
def _identity(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.eye(size, dtype=torch.float64, device=device)


@lru_cache(maxsize=256)
def _least_shares(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return what the squared norm of every column must exceed after the first pass, for each matrix."""
    noise = [noise_level(q) for num_matrices, q in shapes for _ in range(num_matrices)]
    with torch.inference_mode(False):
        values = [value / (value + GRAM_SHIFT) for value in noise]
        return torch.tensor(values, dtype=torch.float64, device=device)


def _blocks(matrices: Tensor, shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Return the leading [G, q, q] that belong to each argument, as views of all matrices put together."""
    pieces = matrices.split([num_matrices for num_matrices, _ in shapes])
    return [piece[:, :q, :q] for piece, (_, q) in zip(pieces, shapes, strict=True)]


def _gram_matrices(vs: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    for v, gram in zip(vs, out, strict=True):
        torch.bmm(v.mT, v, out=gram)


def _inverse_factor(grams: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """Return L^-1 of gram = L L^T, and what is zero where there is such an L.

    A triangle of q x q is inverted and the tall matrix multiplied, which is what devices are fast at; what it
    costs in accuracy in the first pass, the second mends.
    """
    factor, failure = torch.linalg.cholesky_ex(grams)
    return torch.linalg.solve_triangular(factor, identity, upper=False), failure


def _multiplied(vs: Sequence[Tensor], inverses: Sequence[Tensor]) -> list[Tensor]:
    return [torch.bmm(v, inverse.mT) for v, inverse in zip(vs, inverses, strict=True)]


def is_orthonormal(v_Kr: Tensor) -> bool:
    """Return whether V is finite and max|V^T V - I| < 1e-6."""
    return bool(_are_identities(v_Kr.mT @ v_Kr, _identity(v_Kr.shape[1], v_Kr.device)))


def _are_identities(grams: Tensor, identity: Tensor) -> Tensor:
    # A NaN or infinity anywhere makes the comparison false.
    error = torch.linalg.vector_norm(grams - identity, ord=torch.inf, dim=(-2, -1))
    return error < MAX_ORTHOGONALITY_ERROR


def order_by_energy(v_Kr: Tensor, z_Kq: Tensor) -> Tensor:
    """Rotate orthonormal columns into the left singular vectors of Z within their span, strongest first.

    v_Kr: [K, r] float64 orthonormal; z_Kq: [K, q] float64, any q. Returns [K, r].
    With C = V^T Z = A S B^T the result is V A; signs as `with_fixed_signs`.
    """
    left = torch.linalg.svd(v_Kr.T @ z_Kq, full_matrices=True)[0]
    return v_Kr @ with_fixed_signs(left)


def with_fixed_signs(vectors: Tensor) -> Tensor:
    """Return the columns, each with its component of largest magnitude (the first of equals) made positive.

    An eigenvector's sign is the library's whim; a fixed one lets a basis be the same on every layout and
    device.
    """
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def noise_level(num_columns: int) -> float:
    """Share of the energy of a q x q Gram matrix that may be rounding: 10 q eps."""
    return 10 * num_columns * torch.finfo(torch.float64).eps


def _scale_to_one(z: Tensor) -> Tensor:
    """Bring max|z| into [1/2, 1) by an exact power of two, so that squares neither under- nor overflow."""
    exponent = math.frexp(float(z.abs().max()))[1]
    half = exponent // 2
    return z * 2.0**-half * 2.0 ** (half - exponent)


def _dominant_subspace(unit_Kq: Tensor) -> Tensor:
    """Orthonormal basis [K, k] of the numerical range of columns of norm one (or zero), 1 <= k <= q."""
    eigenvalues, eigenvectors = torch.linalg.eigh(unit_Kq.T @ unit_Kq)
    keep = eigenvalues > noise_level(unit_Kq.shape[1]) * eigenvalues[-1]
    # Columns of small lambda carry a cancellation error of eps / lambda; Householder mends it.
    return torch.linalg.qr(unit_Kq @ (eigenvectors[:, keep] * eigenvalues[keep].rsqrt()))[0]


def _refill(v_Kk: Tensor, num_columns: int, key: tuple[int, int], position: NoisePosition) -> Tensor:
    """Append random directions, addressed by global feature and column, orthogonal to V and to each other."""
    num_features, num_given = v_Kk.shape
    rows = torch.arange(num_features, dtype=torch.int64, device=v_Kk.device)
    cols = torch.arange(num_given, num_columns, dtype=torch.int64, device=v_Kk.device)
    extra = gaussian(key, rows, cols, position)
    for _ in range(2):  # "twice is enough": the second pass removes what cancellation left of V in the first
        extra = extra - v_Kk @ (v_Kk.T @ extra)
        extra, upper = torch.linalg.qr(extra)
        extra = extra * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(extra.dtype)
    return torch.cat((v_Kk, extra), dim=1)

"""`metis.gemm.cublas.gemm` against float64: orientations, output types, alpha on the device, accumulation.

    python tests/gpu/products.py

Ends with a JSON object of relative errors by case; the exit status is 1 when one exceeds its limit or where
`alpha * sum`, rounded once, is not what `torch.mm` into fp32 and a product give.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from metis.gemm import cublas

SHAPES = ((256, 512, 384), (16, 4096, 768), (8192, 4096, 1024), (48, 1000, 64),
          (1, 512, 64), (64, 512, 1), (64, 1, 48))  # fmt: skip
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-3}
"""Of the relative Frobenius error: fp32 sums of up to 4096 terms; one rounding to bf16."""


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of what is expected."""
    return float((actual.double() - expected).norm() / expected.norm())


def operand(rows: int, cols: int, transposed: bool, extra: int) -> Tensor:
    """Return a bf16 matrix that is a view of a wider one, contiguous along its columns or its rows."""
    if transposed:
        return torch.randn(cols, rows + extra, device="cuda").bfloat16()[:, :rows].t()
    return torch.randn(rows, cols + extra, device="cuda").bfloat16()[:, :cols]


def main() -> int:
    torch.manual_seed(0)
    errors: dict[str, float] = {}
    failed = []
    for (m, k, n), extras in itertools.product(SHAPES, ((64, 32), (0, 0))):
        for a_turned in (False, True):
            for b_turned in (False, True):
                a, b = operand(m, k, a_turned, extras[0]), operand(n, k, b_turned, extras[1])
                alpha = torch.tensor(0.37, device="cuda")
                exact = (a.double() @ b.double().t()) * 0.37
                for dtype, limit in LIMITS.items():
                    for accumulate in (False, True):
                        before = torch.randn(m, n, device="cuda").to(dtype)
                        out = torch.full((m, n + 16), 7.0, dtype=dtype, device="cuda")
                        out[:, :n] = before
                        cublas.gemm(a, b, out[:, :n], alpha=alpha, accumulate=accumulate)
                        expected = exact + before.double() if accumulate else exact
                        name = f"{m}x{k}x{n} {extras} {a_turned} {b_turned} {dtype} {accumulate}"
                        errors[name] = relative(out[:, :n], expected)
                        beside = bool((out[:, n:] == 7.0).all())
                        if not errors[name] <= limit or not beside:
                            failed.append(name)
    print(json.dumps({"cases": len(errors), "failed": failed, "largest": max(errors.values())}))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

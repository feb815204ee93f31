"""The Triton kernels around the linears, under Triton's interpreter: `tests/gpu/step_kernels.py` in a process
of its own, because Triton reads TRITON_INTERPRET when it is first imported.

Errors are against float64, in units of the last place; `plain` is what torch's or megatron-core's unfused
functions give for the same inputs. On a GPU the same script gives the same figures, with other sums.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# In ulps of the length of the rotated pair; measured worst case in brackets.
ROTARY_FUSED_FP32 = 2.5  # [1.42] three roundings under the interpreter, two with FMA
ROTARY_FUSED = 0.501  # [0.5] bf16 and fp16: one rounding
ROTARY_APART = 2.0  # [2.0] from the plain function, whose own error reaches 1.51

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "tests/gpu/step_kernels.py", "--device", "cpu"], cwd=REPOSITORY, env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_rotary_is_rounded_once_and_closer_to_float64_than_the_plain_function(
    measured: dict[str, Any],
) -> None:
    cases = measured["rotary"]
    assert len(cases) == 3 * 4 * 2
    for name, error in cases.items():
        limit = ROTARY_FUSED_FP32 if name.startswith("fp32") else ROTARY_FUSED
        assert error["fused"] <= limit and error["apart"] <= ROTARY_APART, (name, error)
        if not name.startswith("fp32"):
            assert error["fused"] < error["plain"] and error["fused_rms"] < error["plain_rms"], name

"""Which rows are picked: the size of the places they get, and the kernels that pick them.

The masks themselves are tested in test_basis.py. Kernels run under Triton's interpreter in a process of their
own, because Triton reads TRITON_INTERPRET when it is first imported.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metis.decompose.sampling import row_capacity, sample_probability

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_OVERFLOW = 1e-18
LARGEST_MARGIN = 2.5  # places over the mean, for a mean of 58 and more; measured worst 2.47


def _tail(num_rows: int, probability: float, above: int) -> float:
    """P(binomial > above), summed term by term."""
    if above >= num_rows:
        return 0.0
    log = math.lgamma
    terms = (
        log(num_rows + 1) - log(k + 1) - log(num_rows - k + 1)
        + k * math.log(probability) + (num_rows - k) * math.log1p(-probability)
        for k in range(above + 1, num_rows + 1)
    )  # fmt: skip
    return math.fsum(math.exp(term) for term in terms if term > -700)


@pytest.mark.parametrize("num_rows", [16, 256, 2048, 8192, 32768])
@pytest.mark.parametrize("mean", [1, 58, 450, 1800])
def test_a_sample_does_not_exceed_its_places(num_rows: int, mean: int) -> None:
    probability = min(0.999, mean / num_rows)
    places = row_capacity(num_rows, probability, 0)
    assert _tail(num_rows, probability, places) < MAX_OVERFLOW
    assert row_capacity(num_rows, probability, 8) == min(num_rows, places + 8)
    if mean >= 58:
        assert places < LARGEST_MARGIN * num_rows * probability


def test_places_for_every_row_where_every_row_is_sampled() -> None:
    assert row_capacity(96, sample_probability(96, 96), 8) == 96
    assert row_capacity(64, 1.0, 0) == 64


def _run(*arguments: str, interpret: bool) -> dict[str, Any]:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, "tests/gpu/sampling_bits.py", *arguments], cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip(), done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_kernels_pick_the_rows_of_the_masks_and_bases_do_not_see_a_difference() -> None:
    found = _run("--device", "cpu", interpret=True)
    assert found["different"] == [] and found["checks"] >= 250
    assert set(found["bases"]) == {"metis", "centred"}
    for recipe, differing in found["bases"].items():
        assert set(differing) == {"input", "weight", "grad_output"} and not any(differing.values()), recipe


def test_kernels_compile_once_for_all_steps() -> None:
    assert _run("--compile", interpret=False) == {"first": 3, "later": 0}

"""The linear on kernels computes what `metis.functional` defines: see fused_linear_cases.py.

Its tests need Triton's interpreter, which must be chosen before Triton is first imported: they run in a
pytest of their own, and are reported here group by group.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = "tests/numerics/fused_linear_cases.py"

MINIMAL_CASES = {
    "test_the_named_recipes_that_run_here_are_known": 1,
    "test_without_a_split_results_are_those_of_the_definition": 12,
    "test_with_a_split_every_term_is_there": 13,
    "test_splitting_in_one_launch_changes_no_bit_of_p_r_and_codes": 4,
    "test_merged_heads_leave_one_product_of_plain_matrices": 3,
    "test_merged_and_other_heads_do_not_mix_on_kernels": 1,
    "test_a_weight_kept_as_codes_changes_no_bit_and_takes_less_memory": 9,
    "test_a_backend_says_what_its_linears_keep": 1,
    "test_small_weights_are_kept_as_operands_and_large_ones_as_codes": 1,
    "test_ranks_that_keep_codes_of_their_weights_change_no_bit": 4,
    "test_the_main_gradient_takes_the_sum_of_microbatches": 3,
    "test_the_weight_is_encoded_once_per_step_and_again_after_any_change": 1,
    "test_evaluation_after_training_reads_the_new_weight": 1,
    "test_a_weight_that_is_written_unseen_for_an_evaluation_is_read": 1,
    "test_an_inference_tensor_can_be_a_weight": 1,
    "test_products_get_what_cublas_takes": 3,
    "test_layers_can_be_copied_and_pickled_in_mid_step": 1,
    "test_recomputation_gives_the_same_bits": 2,
    "test_what_is_not_covered_falls_back_to_the_definition": 3,
    "test_special_numbers_bring_no_nan_that_the_definition_lacks": 4,
    "test_special_numbers_in_a_weight_survive_in_its_codes": 3,
    "test_the_watch_sees_weights_in_every_microbatch": 1,
    "test_an_observer_sees_the_same_operands": 4,
    "test_layouts_change_no_bit_of_p_r_and_codes": 15,
    "test_under_sequence_parallelism_a_rank_works_on_its_own_tokens_only": 2,
    "test_messages_travel_beside_dgrad_and_are_gone_at_wgrad": 2,
    "test_amaxes_travel_once": 1,
}
"""Cases that must pass per test: fewer means that a test lost inputs."""


Report = tuple[str, Counter[str], Counter[str]]


def run_cases(selection: str) -> Report:
    """Return the output and how many cases of each test have passed and failed."""
    done = subprocess.run(
        [sys.executable, *"-m pytest -rA -p no:cacheprovider --tb=short -m".split(), selection, CASES],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    found = {
        word: Counter(re.findall(rf"^{word} {re.escape(CASES)}::(\w+)", done.stdout, re.MULTILINE))
        for word in ("PASSED", "FAILED", "ERROR")
    }
    assert found["PASSED"], done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout, found["PASSED"], found["FAILED"] + found["ERROR"]


@pytest.fixture(scope="module")
def report() -> Report:
    return run_cases("not long")


@pytest.mark.parametrize("name", MINIMAL_CASES)
def test_linear_on_kernels(name: str, report: Report):
    output, passed, failed = report
    assert not failed[name], "\n".join(re.findall(rf"^(?:FAILED|ERROR) .*::{name}.*$", output, re.MULTILINE))
    assert passed[name] >= MINIMAL_CASES[name]


def test_every_case_is_reported(report: Report):
    _, passed, failed = report
    assert set(passed) | set(failed) == set(MINIMAL_CASES)


@pytest.mark.long
def test_linear_on_kernels_for_more_recipes():
    output, passed, failed = run_cases("long")
    assert not failed, "\n".join(re.findall(r"^(?:FAILED|ERROR) .*$", output, re.MULTILINE))
    assert sum(passed.values()) >= 20

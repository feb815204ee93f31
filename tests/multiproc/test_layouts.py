"""Layouts change nothing beyond floating-point summation order: whole runs on 2 and 4 ranks against one rank.

What is promised comes in four steps; (a), equal codes for equal tensors, is checked operand by operand in
`test_parallel_operands.py`. Here, with initial weights that do not depend on the layout:

(b) one step: loss to 1e-4 and gradient norm to 1e-2 (bf16 recipe: 1e-5 both); (c) `--exact-reductions`: the
20-step curve to 1e-6; (d) plain fp32: the 20-step curve to 1e-2 (bf16 recipe: 1e-5); `--bf16`: 1e-2, four
layers 2e-2 (bf16 recipe: 1e-3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.multiproc._trainer_runs import FOUR_RANKS, ONE_RANK, RECIPES, TWO_RANKS, make_data, run_cases

NUM_STEPS = 20
CORE_RECIPES = ("bf16", "nvfp4", "metis")
OVERLAPPED_LAYOUT = "tp2_sp_overlap"
OVERLAPPED = {OVERLAPPED_LAYOUT: f"{TWO_RANKS['tp2_sp']} --tp-comm-overlap"}
LAYOUTS = (*TWO_RANKS, *OVERLAPPED, *FOUR_RANKS)
CONTEXT_PARALLEL = {"cp2": "--context-parallel-size 2"}

# Tolerances are the promise.
FIRST_LOSS = {"bf16": 1e-5, "fp4": 1e-4}
FIRST_GRAD_NORM = {"bf16": 1e-5, "fp4": 1e-2}
EXACT_CURVE = 1e-6  # 1.8e-15 seen, nvfp4 and metis, 12 steps
PLAIN_CURVE = {"bf16": 1e-5, "fp4": 1e-2}
LOW_PRECISION_CURVE = {"bf16": 1e-3, "fp4": 1e-2}
LOW_PRECISION_CURVE_DEEP = {"bf16": 1e-3, "fp4": 2e-2}
"""Of the four-layer model (vpp2): 7.4e-3, 6.6e-3 and 1.07e-2 seen, metis, nvfp4 and nvfp4_direct, each at the
nineteenth batch; equal to four digits for the first two to eight steps."""

EXACT, PLAIN, LOW = "--exact-reductions", "", "--bf16"


def _kind(recipe: str) -> str:
    return "bf16" if recipe in ("bf16", "bf16_reparametrised") else "fp4"


def _wanted(recipe: str, mode: str, layout: str, everything: bool) -> bool:
    """Choose what runs by default; `--long` runs every combination."""
    if everything:
        return True
    if layout == OVERLAPPED_LAYOUT:
        return (recipe == "bf16" and mode == PLAIN) or (recipe == "metis" and mode == EXACT)
    if mode == EXACT:
        return recipe in CORE_RECIPES or layout in ("tp2_sp", "dp2_zero")
    if recipe == "bf16":
        return mode == PLAIN or layout == "tp2_sp"
    if recipe == "metis" and layout == "tp2_sp":
        return True
    return recipe in CORE_RECIPES and mode == PLAIN and layout in ("vpp2", "dp2_zero")


def _has_company(recipe: str, mode: str, everything: bool) -> bool:
    """Whether anything is compared with one rank; recipes are with each other in plain fp32."""
    return mode == PLAIN or any(_wanted(recipe, mode, layout, everything) for layout in LAYOUTS)


def _key(recipe: str, mode: str, layout: str) -> str:
    return f"{recipe}.{mode.strip('-') or 'plain'}.{layout}"


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """All runs of this module, one process group per world size."""
    folder: Path = tmp_path_factory.mktemp("layouts")
    data = make_data(folder)
    everything = "not long" not in request.config.getoption("markexpr")
    results: dict[str, Any] = {}
    for world_size, layouts in (
        (1, ONE_RANK),
        (2, TWO_RANKS | OVERLAPPED | CONTEXT_PARALLEL),
        (4, FOUR_RANKS),
    ):
        cases = {}
        for recipe in RECIPES:
            for mode in (EXACT, PLAIN, LOW):
                for layout, arguments in layouts.items():
                    if layout == "cp2" and not _wanted_cp(recipe, mode):
                        continue
                    if layout == "one_deep" and not _wanted(recipe, mode, "vpp2", everything):
                        continue
                    if layout == "one" and not _has_company(recipe, mode, everything):
                        continue
                    if world_size > 1 and layout != "cp2" and not _wanted(recipe, mode, layout, everything):
                        continue
                    cases[_key(recipe, mode, layout)] = (
                        f"--recipe {recipe} --train-iters {NUM_STEPS} {mode} {arguments}"
                    )
        results |= run_cases(world_size, data, cases, folder / f"world{world_size}", timeout=3600)
    return results


def _wanted_cp(recipe: str, mode: str) -> bool:
    return recipe in CORE_RECIPES and (mode == PLAIN or (mode == EXACT and recipe == "bf16"))


def _compare(curves: dict[str, Any], recipe: str, mode: str, layout: str) -> dict[str, list[float]]:
    key = _key(recipe, mode, layout)
    if key not in curves:
        pytest.skip("runs under tests/run.sh --long")
    one, other = curves[_key(recipe, mode, "one_deep" if layout == "vpp2" else "one")], curves[key]
    assert len(one["loss"]) == len(other["loss"]) == NUM_STEPS
    return {
        "loss": [abs(a - b) for a, b in zip(one["loss"], other["loss"], strict=True)],
        "grad_norm": [abs(a - b) / a for a, b in zip(one["grad_norm"], other["grad_norm"], strict=True)],
    }


@pytest.mark.parametrize("layout", [*LAYOUTS, "cp2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_first_step_in_plain_fp32_equals_one_rank(curves: dict[str, Any], recipe: str, layout: str) -> None:
    if layout == "cp2" and recipe != "bf16":
        pytest.skip("context parallelism promises (b) for bf16 only")
    difference = _compare(curves, recipe, PLAIN, layout)
    assert difference["loss"][0] <= FIRST_LOSS[_kind(recipe)]
    assert difference["grad_norm"][0] <= FIRST_GRAD_NORM[_kind(recipe)]


@pytest.mark.parametrize("layout", [*LAYOUTS, "cp2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_curve_with_exact_reductions_equals_one_rank(
    curves: dict[str, Any], recipe: str, layout: str
) -> None:
    if layout == "cp2" and recipe != "bf16":
        pytest.skip("context parallelism promises (c) for bf16 only")
    assert max(_compare(curves, recipe, EXACT, layout)["loss"]) <= EXACT_CURVE


@pytest.mark.parametrize("layout", [*LAYOUTS, "cp2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_curve_in_plain_fp32_stays_close_to_one_rank(
    curves: dict[str, Any], recipe: str, layout: str
) -> None:
    if layout == "cp2" and recipe not in CORE_RECIPES:
        pytest.skip("not run")
    assert max(_compare(curves, recipe, PLAIN, layout)["loss"]) <= PLAIN_CURVE[_kind(recipe)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_curve_in_bf16_stays_close_to_one_rank(curves: dict[str, Any], recipe: str, layout: str) -> None:
    limits = LOW_PRECISION_CURVE_DEEP if layout == "vpp2" else LOW_PRECISION_CURVE
    assert max(_compare(curves, recipe, LOW, layout)["loss"]) <= limits[_kind(recipe)]


def test_recipes_differ_from_bf16(curves: dict[str, Any]) -> None:
    """FP4 is on: every recipe has a curve of its own, so nothing above compares bf16 with itself."""
    one = {recipe: curves[_key(recipe, PLAIN, "one")]["loss"] for recipe in RECIPES}
    for recipe in RECIPES:
        if _kind(recipe) == "fp4":
            assert all(a != b for a, b in zip(one[recipe][1:], one["bf16"][1:], strict=True)), recipe
    assert len({tuple(curve) for curve in one.values()}) == len(RECIPES)

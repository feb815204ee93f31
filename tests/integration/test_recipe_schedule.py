"""`--recipe-schedule` in whole runs: resume, layouts, what each phase computes, what a checkpoint refuses.

The schedule passes through everything that can happen to a basis: it grows and shrinks (step 3), loses its
operand (5), goes with the last split (7) and comes back (9). Oracles: the uninterrupted run, the run without
a schedule up to the first change, the engine's own linears for a phase in bf16, one rank for two.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.integration._trainer import Outcome, data_options, read_metrics, run_in_process, write_data

LAST = 11
BOUNDARIES = (3, 5, 7, 9)
STOPS = (2, 3, 4, 5, 6, 7, 8, 9, 10)  # before, at and after each boundary
PHASES = [
    {
        "at_step": 3,
        "change": {
            "name": "other_ranks",
            "fprop_input": {"split": {"rank": {"fixed": 32}}},
            "wgrad_input": {"split": {"rank": {"fixed": 32}}},
            "fprop_weight": {"split": {"rank": {"fixed": 8}}},
            "dgrad_weight": {"split": {"rank": {"fixed": 8}}},
        },
    },
    {"at_step": 5, "recipe": "nvfp4_forward_bf16"},
    {"at_lr_fraction": 0.4, "recipe": "bf16"},  # step 7 of 11 with these learning rates
    {"at_step": 9, "recipe": "metis"},
]
ZERO = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
EXACT_CURVE = 1e-6  # the promise for --exact-reductions; 8.9e-16 seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schedule")
    (path / "phases.json").write_text(json.dumps({"phases": PHASES}))
    healing = [{"at_step": 0, "recipe": "bf16"}, {"at_step": 3, "recipe": "nvfp4"}]
    (path / "healing.json").write_text(json.dumps({"phases": healing}))
    return path


@pytest.fixture(scope="module")
def line(folder: Path) -> str:
    """What all runs have in common; one block, all of it quantised."""
    data = data_options(write_data(folder / "data"))
    evaluation = "--eval-iters 1 --eval-interval 2"
    return f"{data} --data-cache-path {folder}/cache --num-layers 1 --policy all {evaluation}"


@pytest.fixture(scope="module")
def runs(folder: Path, line: str) -> dict[str, Outcome]:
    """All runs on one rank, in one process; the metrics of each lie in `folder`."""
    scheduled = f"{line} --recipe metis --recipe-schedule {folder}/phases.json --train-iters {LAST}"
    metis = f"{line} --recipe metis --train-iters {LAST}"
    stored, skip = f"--load {folder}/ckpt", "--ckpt-step 6 --skip-train"
    cases = {
        "whole": f"{scheduled} --save {folder}/ckpt --save-interval 1",
        "constant": f"{metis} --exit-interval 4",
        "forgotten": f"{metis} {stored}",
        "finetune": f"{metis} {stored} --finetune --exit-interval 1",
        "evaluate": f"{scheduled} {stored} {skip}",
        "in_force": f"{line} --recipe nvfp4_forward_bf16 --train-iters {LAST} {stored} {skip}",
        "not_in_force": f"{metis} {stored} {skip}",
    }
    cases |= {f"from_{k}": f"{scheduled} {stored} --ckpt-step {k}" for k in STOPS}
    cases["exact_tp1"] = f"{scheduled} --exact-reductions"  # last: it changes how later runs of a process sum
    return run_in_process(
        {name: f"{options} --metrics-file {folder}/{name}.jsonl" for name, options in cases.items()}
    )


@pytest.fixture(scope="module")
def runs_on_two(folder: Path, line: str) -> dict[str, Outcome]:
    """All runs on two ranks."""
    layout = f"{line} --tensor-model-parallel-size 2 --train-iters"
    scheduled = f"--recipe metis --recipe-schedule {folder}/phases.json"
    zero = f"{line} --train-iters {LAST} {scheduled} {ZERO}"
    cases = {
        "healed": f"{layout} 4 --sequence-parallel --recipe-schedule {folder}/healing.json",
        "engine": f"{layout} 4 --sequence-parallel --recipe bf16",
        "zero": f"{zero} --save {folder}/zero --save-interval 5",
        "zero_from_5": f"{zero} --load {folder}/zero --ckpt-step 5",
        "exact_tp2": f"{layout} {LAST} {scheduled} --exact-reductions",
    }
    return run_in_process(
        {name: f"{options} --metrics-file {folder}/{name}.jsonl" for name, options in cases.items()}, 2
    )


def _curve(folder: Path, name: str, first: int = 0) -> list[tuple[Any, ...]]:
    """Return (iteration, loss, gradient norm) after iteration `first`, then (iteration, validation loss)."""
    train = [(v["iteration"], v["lm_loss"], v["grad_norm"]) for v in read_metrics(folder / f"{name}.jsonl")]
    lines = read_metrics(folder / f"{name}.jsonl", "validation")
    valid = [(v["iteration"], v["validation_loss"]) for v in lines]
    return [line for line in train + valid if line[0] > first]


def test_the_phases_begin_where_they_should(runs: dict[str, Outcome], folder: Path) -> None:
    assert runs["whole"].error == ""
    names = ["other_ranks", "nvfp4_forward_bf16", "bf16", "metis"]
    for index, (name, step) in enumerate(zip(names, BOUNDARIES, strict=True), start=2):
        change = f"after {step} iterations: phase {index} of 5 of the recipe schedule, recipe {name}"
        assert f"{change} (from step {step} on)" in runs["whole"].stdout
    stored = {
        k: json.loads((folder / f"ckpt/iter_{k:07d}/run_config.json").read_text()) for k in (3, 4, 7, 8)
    }
    assert [stored[k]["recipe"]["name"] for k in stored] == [
        "metis",
        "other_ranks",
        "nvfp4_forward_bf16",
        "bf16",
    ]
    assert all(config["recipe_schedule"]["start_steps"] == [0, *BOUNDARIES] for config in stored.values())


@pytest.mark.parametrize("k", STOPS)
def test_resume_around_every_boundary_is_bitwise(runs: dict[str, Outcome], folder: Path, k: int) -> None:
    assert runs[f"from_{k}"].error == ""
    resumed = _curve(folder, f"from_{k}")
    assert resumed == _curve(folder, "whole", k)
    assert len([line for line in resumed if len(line) == 3]) == LAST - k


def test_a_change_has_its_effect_at_its_step(runs: dict[str, Outcome], folder: Path) -> None:
    whole, constant = (
        [line for line in _curve(folder, name) if len(line) == 3] for name in ("whole", "constant")
    )
    assert whole[:3] == constant[:3]
    assert whole[3][1] != constant[3][1]  # already the first loss: the grown basis is in use at once


def test_evaluation_uses_the_phase_in_force(runs: dict[str, Outcome], folder: Path) -> None:
    """`--skip-train` needs the recipe of the checkpoint's phase only, by schedule or by name."""
    assert runs["evaluate"].error == runs["in_force"].error == ""
    assert "phase 3 of 5 of the recipe schedule, recipe nvfp4_forward_bf16" in runs["evaluate"].stdout
    evaluate, in_force = (
        re.findall(r"on validation set \| lm loss value: (\S+)", runs[name].stdout)
        for name in ("evaluate", "in_force")
    )
    assert len(evaluate) == 1 and evaluate == in_force
    assert "is a checkpoint of another recipe: basis stored None, requested" in runs["not_in_force"].error


def test_a_checkpoint_belongs_to_its_schedule(runs: dict[str, Outcome]) -> None:
    assert (
        "is a checkpoint of another recipe schedule: start_steps stored [0, 3, 5, 7, 9], requested [0]"
        in runs["forgotten"].error
    )
    assert "--finetune" in runs["forgotten"].error
    assert runs["finetune"].error == ""


def test_two_ranks_follow_one_rank_through_every_phase(
    runs: dict[str, Outcome], runs_on_two: dict[str, Outcome], folder: Path
) -> None:
    assert runs["exact_tp1"].error == runs_on_two["exact_tp2"].error == ""
    one, two = _curve(folder, "exact_tp1"), _curve(folder, "exact_tp2")
    assert [line[0] for line in one] == [line[0] for line in two]
    worst = max(abs(a[1] - b[1]) for a, b in zip(one, two, strict=True))
    assert worst <= EXACT_CURVE, worst


def test_a_phase_in_bf16_is_the_engines_own_linear_bitwise(
    runs_on_two: dict[str, Outcome], folder: Path
) -> None:
    assert runs_on_two["healed"].error == runs_on_two["engine"].error == ""
    healed, engine = (
        [line for line in _curve(folder, name) if len(line) == 3] for name in ("healed", "engine")
    )
    assert healed[:3] == engine[:3]
    assert healed[3][1] != engine[3][1]


def test_phases_change_under_the_hooks_of_overlapped_gathers(
    runs_on_two: dict[str, Outcome], folder: Path
) -> None:
    assert runs_on_two["zero"].error == runs_on_two["zero_from_5"].error == ""
    whole = _curve(folder, "zero")
    assert _curve(folder, "zero_from_5") == [line for line in whole if line[0] > 5]
    assert len([line for line in whole if len(line) == 3]) == LAST

"""`--log-quantization-interval` through the whole trainer: what is measured when, where it is written, and
that layouts do not change it. The formulas themselves: `tests/unit/test_diagnostics.py`.

Oracles: exact singular values and QR angles of the run's own tensors, one rank for several, and a run without
measuring for one with it (bitwise).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from metis.config import CELL_NAMES
from metis.training.metrics_file import MetricsFile
from tests._distributed import run_ranks
from tests.integration._trainer import Outcome, data_options, read_metrics, run_case, write_data

LAYOUT_TOLERANCE = 1e-6  # relative, as promised for exact reductions
DRIFT_TOLERANCE = 1e-6
GROWTH_TOLERANCE = 2e-2  # of a ratio made from captured_energy: V is orthonormal up to bf16
TRAIN = "--train-iters 4 --eval-iters 0 --num-layers 2 --policy all"
METIS, EXACT = "--recipe metis", "--exact-reductions --log-quantization-interval 2"
LINEARS = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
LAYERS = [f"decoder.layers.{block}.{linear}" for block in (0, 1) for linear in LINEARS]

Key = tuple[int, str, str]


def _run(rank: int, world_size: int, cases: dict[str, str]) -> dict[str, tuple[Outcome, dict[Any, float]]]:
    """Run every case; return its outcome and what was seen of bases and residual weights from outside."""
    from metis.training import quantization_log, step

    seen: dict[Any, float] = {}
    end_step, advance = quantization_log.QuantizationLog.end_step, step.advance_model_bases

    def watched_end_step(log: Any) -> None:
        for layer, linear in log._linears.items():
            if world_size == 1 and linear.is_reparametrized:
                value = float(torch.linalg.svdvals(linear.weight.detach().double())[0])
                seen[log._clock.step + 1, layer] = value
        end_step(log)

    def watched_advance(linears: Any, number: int, group: Any, compute: Any) -> None:
        def bases() -> dict[Any, Any]:
            return {
                (linear.layer_name, name): None if basis.active is None else basis.active.double()
                for linear in linears
                for name, basis in linear.core.bases.items()
            }

        before = bases() if world_size == 1 else {}
        advance(linears, number, group, compute)
        for key, new in (bases() if before else {}).items():
            if before[key] is not None and new is not None and not torch.equal(before[key], new):
                cosines = torch.linalg.svdvals(torch.linalg.qr(before[key])[0].t() @ torch.linalg.qr(new)[0])
                seen[(number + 1, *key)] = math.degrees(math.acos(min(1.0, float(cosines[-1]))))

    quantization_log.QuantizationLog.end_step = watched_end_step
    step.advance_model_bases = watched_advance
    outcomes = {}
    for name, line in cases.items():
        seen = {}
        outcomes[name] = (run_case(world_size, line), seen)
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantization")


def _lines(folder: Path, cases: dict[str, str]) -> dict[str, str]:
    data = data_options(write_data(folder / "text"))
    return {
        name: f"{data} {TRAIN} {line} --metrics-file {folder}/{name}.jsonl" for name, line in cases.items()
    }


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, tuple[Outcome, dict[Any, float]]]:
    """All runs of one rank."""
    cases = {
        "off": METIS,
        "each": f"{METIS} --log-quantization-interval 1 --tensorboard-dir {folder}/events",
        "last": f"{METIS} --log-quantization-interval 4 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
        "metis": f"{METIS} {EXACT}",
        "nvfp4": f"--recipe nvfp4 {EXACT}",
        "paper": f"--recipe metis_paper {EXACT}",
    }
    results = run_ranks(_run, 1, _lines(folder, cases), timeout=300)[0]
    assert not any(outcome.error for outcome, _ in results.values()), results
    return results


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> None:
    """All runs of two ranks."""
    del one
    tp, sp = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel"
    cases = {
        "metis_tp": f"{METIS} {EXACT} {sp}",
        "metis_pp": f"{METIS} {EXACT} --pipeline-model-parallel-size 2",
        "metis_dp": f"{METIS} {EXACT} --use-distributed-optimizer",
        "nvfp4_tp": f"--recipe nvfp4 {EXACT} {sp}",
        "paper_tp": f"--recipe metis_paper {EXACT} {tp}",
    }
    results = run_ranks(_run, 2, _lines(folder, cases), timeout=300)
    assert not any(outcome.error for rank in results for outcome, _ in rank.values()), results


def measured(folder: Path, name: str) -> dict[Key, dict[str, float]]:
    """Return (iteration, layer, cell) -> metrics of a metrics file, each once, in the order of the file."""
    lines = read_metrics(folder / f"{name}.jsonl", "quantization")
    keys = [(line["iteration"], line["layer"], line["cell"]) for line in lines]
    assert len(set(keys)) == len(keys), "an operand appears twice"
    names = ("kind", "iteration", "layer", "cell")
    return {
        key: {k: v for k, v in line.items() if k not in names} for key, line in zip(keys, lines, strict=True)
    }


def test_off_by_default_and_without_effect_on_the_run_when_on(one: dict[str, Any], folder: Path):
    assert measured(folder, "off") == {} and "quantization at" not in one["off"][0].stdout
    for name in ("lm_loss", "grad_norm"):
        columns = [
            [line[name] for line in read_metrics(folder / f"{run}.jsonl")] for run in ("off", "each", "last")
        ]
        assert columns[0] == columns[1] == columns[2] and len(columns[0]) == 4


def test_one_line_per_measured_iteration_layer_and_cell_in_order(one: dict[str, Any], folder: Path):
    keys = list(measured(folder, "metis"))
    order = sorted(LAYERS, key=lambda layer: (layer.split(".")[2], layer))
    assert keys == [(number, layer, cell) for number in (2, 4) for layer in order for cell in CELL_NAMES]
    assert {number for number, _, _ in measured(folder, "last")} == {4}


def test_recomputed_activations_are_measured_once_and_alike(one: dict[str, Any], folder: Path):
    each, last = measured(folder, "each"), measured(folder, "last")
    assert last == {key: metrics for key, metrics in each.items() if key[0] == 4}


def test_growth_compares_with_the_first_step_of_the_basis(one: dict[str, Any], folder: Path):
    """Bases are made after steps 0 and 1, so iteration 3 is new and iteration 4 compares with it, also in a
    run that measures iteration 4 only.
    """
    each = measured(folder, "each")
    assert not any("residual_growth" in metrics for key, metrics in each.items() if key[0] == 1)
    for (iteration, layer, cell), metrics in each.items():
        if iteration in (2, 3):
            assert metrics["residual_growth"] == 1.0
        elif iteration == 4:
            new, now = each[3, layer, cell]["captured_energy"], metrics["captured_energy"]
            expected = math.sqrt((1.0 - now) / (1.0 - new))
            assert metrics["residual_growth"] == pytest.approx(expected, rel=GROWTH_TOLERANCE)


def test_drift_is_the_largest_angle_of_the_last_refresh(one: dict[str, Any], folder: Path):
    angles = one["each"][1]
    lines = [(key, metrics) for key, metrics in measured(folder, "each").items() if key[0] == 3]
    assert len(lines) == 8 * 6
    for (_, layer, cell), metrics in lines:
        expected = angles[2, layer, cell.split("_", 1)[1]]  # refreshed after iteration 2
        assert metrics["drift_degrees"] == pytest.approx(expected, rel=DRIFT_TOLERANCE), (layer, cell)


def test_residual_weights_report_their_largest_singular_value(one: dict[str, Any], folder: Path):
    exact, lines = one["paper"][1], measured(folder, "paper")
    found = {key[:2]: metrics for key, metrics in lines.items() if key[2] == "weight_residual"}
    assert len(found) == 2 * len(LAYERS)
    for key, metrics in found.items():
        assert metrics == {"residual_top_singular_value": pytest.approx(exact[key], rel=1e-10)}


@pytest.mark.parametrize("name", ["metis_tp", "metis_pp", "metis_dp", "nvfp4_tp", "paper_tp"])
def test_layouts_measure_the_same_whole_operands(name: str, one: dict[str, Any], two: None, folder: Path):
    expected, received = measured(folder, name.split("_")[0]), measured(folder, name)
    assert list(received) == list(expected) and expected
    for key, metrics in expected.items():
        assert list(received[key]) == list(metrics), key
        for metric, value in metrics.items():
            assert received[key][metric] == pytest.approx(value, rel=LAYOUT_TOLERANCE), (key, metric)


def test_summary_names_the_worst_operand_of_each_metric(one: dict[str, Any], folder: Path):
    (line,) = [text for text in one["last"][0].stdout.splitlines() if "quantization at" in text]
    assert line.startswith(" quantization at iteration 4, worst of 48 operands | relative_error: ")
    lines = measured(folder, "last")
    for metric, worst in (("sqnr_db", min), ("tail_error", max), ("captured_energy", min)):
        key = worst(lines, key=lambda key, metric=metric: lines[key][metric])
        value, layer, cell = re.search(rf"\| {metric}: (\S+) \((\S+) (\S+)\)", line).groups()
        assert (layer, cell) == key[1:] and float(value) == pytest.approx(lines[key][metric], rel=1e-3)


def test_tensorboard_has_every_metric_under_its_layer_and_cell(one: dict[str, Any], folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0})
    events.Reload()
    lines = measured(folder, "each")
    written = {tag for tag in events.Tags()["scalars"] if tag.startswith("quantization/")}
    assert written == {
        f"quantization/{layer}/{cell}/{metric}"
        for (_, layer, cell), metrics in lines.items()
        for metric, value in metrics.items()
        if value is not None
    }
    tag = f"quantization/{LAYERS[0]}/wgrad_input/tail_error"
    for point in events.Scalars(tag):
        expected = lines[point.step, LAYERS[0], "wgrad_input"]["tail_error"]
        assert point.value == pytest.approx(expected, rel=1e-6)
    assert [point.step for point in events.Scalars(tag)] == [1, 2, 3, 4]


def test_resume_removes_lines_of_iterations_that_are_made_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for resume in (0, 2):
        metrics = MetricsFile(path, resume)
        for iteration in (2, 4) if not resume else (4,):
            metrics.quantization(iteration=iteration, layer="a", cell="b", metrics={"sqnr_db": 1 / 3})
        metrics.close()
    lines = read_metrics(path, "quantization")
    assert [line["iteration"] for line in lines] == [2, 4] and lines[1]["sqnr_db"] == 1 / 3

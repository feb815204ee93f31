"""A run that is killed, stopped or limited goes on as if nothing had happened.

Oracle: an uninterrupted run of the same command, compared line by line through the metrics files, bitwise.
Processes are real ones: torchrun and its ranks are killed with SIGKILL at a random moment, after the first
save and in the middle of later work.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metis.training.retention import TRACKER_NAME, list_iterations
from metis.training.signals import EXITED_CLEANLY
from tests.integration._trainer import (
    SHAPE,
    data_options,
    kill_tree,
    read_metrics,
    start_trainer,
    write_data,
)

TIMEOUT_SECONDS = 600.0  # for a loaded machine; an idle one needs a tenth
FOUR_RANKS = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --recipe metis "
    "--train-iters 11 --eval-interval 5 --eval-iters 1"
)
SAVE_INTERVAL = 3
LATEST_KILL = 8  # before the last iteration, and past the basis refresh at 8
TIMES = ("tokens_per_second", "step_seconds")


def _wait_until(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"timeout\n{log.read_text()[-3000:]}"
        time.sleep(0.02)


def _run(line: str, log: Path, num_ranks: int = 1) -> str:
    """Run the trainer to its end; return what it printed."""
    process = start_trainer(line, log, num_ranks)
    try:
        process.wait(timeout=TIMEOUT_SECONDS)
    finally:
        kill_tree(process)
    assert process.returncode == 0, log.read_text()[-3000:]
    return log.read_text()


def _numbers(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of `kind` without what a clock decides."""
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_metrics(path, kind)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return data_options(write_data(tmp_path_factory.mktemp("data") / "text"))


def test_four_ranks_killed_after_a_save_resume_bitwise(tmp_path: Path, data: str) -> None:
    """TP=2 x PP=2 with sequence parallelism, recipe metis: weights, optimizer, bases, random state, data."""
    line = f"{SHAPE} {data} {FOUR_RANKS} --metrics-file"
    _run(f"{line} {tmp_path}/whole.jsonl", tmp_path / "whole.log", 4)

    moment = random.Random(time.time_ns())
    last_iteration, delay = moment.randint(SAVE_INTERVAL + 1, LATEST_KILL), moment.uniform(0.0, 0.2)
    metrics, checkpoints, log = tmp_path / "killed.jsonl", tmp_path / "checkpoints", tmp_path / "killed.log"
    line = f"{line} {metrics} --save {checkpoints} --load {checkpoints} --save-interval {SAVE_INTERVAL}"
    process = start_trainer(line, log, 4)
    try:
        _wait_until(lambda: len(read_metrics(metrics)) >= last_iteration, process, log)
        time.sleep(delay)
    finally:
        kill_tree(process)
    reached = len(read_metrics(metrics))
    saved = int((checkpoints / TRACKER_NAME).read_text())
    print(f"killed {delay:.3f} s after iteration {last_iteration}, at {reached}, saved {saved}")
    assert not (checkpoints / EXITED_CLEANLY).exists() and SAVE_INTERVAL <= saved <= reached

    printed = _run(line, log, 4)
    assert f"loading distributed checkpoint from {checkpoints} at iteration {saved}" in printed
    assert "starts fresh" not in printed and "ignored" not in printed
    assert "Warning" not in printed  # a user can do nothing about those of torch and megatron-core
    whole = _numbers(tmp_path / "whole.jsonl", "train")
    assert [values["iteration"] for values in whole] == list(range(1, 12))
    assert _numbers(metrics, "train") == whole
    validations = _numbers(tmp_path / "whole.jsonl", "validation")
    assert [values["iteration"] for values in validations] == [5, 10, 11]
    assert _numbers(metrics, "validation") == validations
    assert (checkpoints / EXITED_CLEANLY).read_text().startswith("11\tfinished")
    assert list_iterations(checkpoints)[-1] == 11


def test_sigterm_saves_and_leaves_cleanly_and_the_run_goes_on_bitwise(tmp_path: Path, data: str) -> None:
    line = f"{SHAPE} {data} --recipe nvfp4 --eval-iters 0 --exit-signal-handler"
    metrics, checkpoints, log = tmp_path / "m.jsonl", tmp_path / "checkpoints", tmp_path / "log"
    saving = f"--metrics-file {metrics} --save {checkpoints} --load {checkpoints} --save-interval 100000"
    schedule = "--lr-decay-iters 100"
    process = start_trainer(f"{line} {saving} {schedule} --train-iters 100000", log)
    try:
        _wait_until(lambda: len(read_metrics(metrics)) >= 2, process, log)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=TIMEOUT_SECONDS)
    finally:
        kill_tree(process)
    assert process.returncode == 0, log.read_text()[-3000:]
    assert "exiting program after receiving SIGTERM." in log.read_text()
    reached = len(read_metrics(metrics))
    assert int((checkpoints / TRACKER_NAME).read_text()) == reached
    assert (checkpoints / EXITED_CLEANLY).read_text().startswith(f"{reached}\t")

    last = reached + 2
    printed = _run(f"{line} {saving} {schedule} --train-iters 100000 --exit-interval {last}", log)
    assert f"exiting program at iteration {last}" in printed
    assert int((checkpoints / TRACKER_NAME).read_text()) == last
    whole = tmp_path / "whole.jsonl"
    _run(f"{line} {schedule} --train-iters 100000 --exit-interval {last} --metrics-file {whole}", log)
    assert _numbers(metrics, "train") == _numbers(whole, "train")
    assert len(_numbers(whole, "train")) == last

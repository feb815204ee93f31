"""Log lines, scalars, the metrics file, memory, progress and exit conditions, against the reference
trainer's texts.

The oracle of the training line is one that the reference trainer (core_v0.16.1) has printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import signal
import sys
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from metis.errors import ConfigError
from metis.training import outputs, signals
from metis.training.metrics_file import MetricsFile
from metis.training.state import TrainState
from metis.training.step import StepRunner
from metis.training.telemetry import (
    LM_LOSS,
    StepReport,
    TrainingLog,
    format_training_line,
    format_validation_block,
)
from tests._distributed import run_ranks

REFERENCE_LINE = (
    " [2026-11-22 05:55:51.931405] iteration        4/       6 | consumed samples:           32 | "
    "elapsed time per iteration (ms): 89.8 | throughput per GPU (TFLOP/s/GPU): 0.0 | "
    "learning rate: 5.500000E-04 | global batch size:     8 | lm loss: 5.441817E+00 | loss scale: 1.0 | "
    "grad norm: 0.947 | num zeros: 3345.0 | params norm: 18.863 | "
    "number of skipped iterations:   0 | number of nan iterations:   0 |"
)
LINE_FIELDS: dict[str, Any] = {
    "time": datetime(2026, 11, 22, 5, 55, 51, 931405),
    "iteration": 4,
    "train_iters": 6,
    "consumed_samples": 32,
    "skipped_samples": 0,
    "elapsed_milliseconds": 89.8,
    "throughput_tflops": 0.001,
    "learning_rate": 5.5e-4,
    "global_batch_size": 8,
    "losses": {"lm loss": 5.441817},
    "loss_scale": 1.0,
    "grad_norm": 0.947,
    "num_zeros": 3345.0,
    "params_norm": 18.863,
    "skipped_iterations": 0,
    "nan_iterations": 0,
}


def line(**changes: Any) -> str:
    return format_training_line(**{**LINE_FIELDS, **changes})


def test_training_line_equals_the_reference_trainers() -> None:
    assert line() == REFERENCE_LINE


def test_training_line_leaves_out_what_is_absent_and_appends_ours() -> None:
    short = line(
        throughput_tflops=None, grad_norm=None, num_zeros=None, params_norm=None, losses={"lm loss": math.nan}
    )
    assert not re.search("throughput|grad norm|zeros|params|lm loss|nan \\|", short)
    assert line(losses={"lm loss": 0.0}).find("lm loss") == -1
    assert "| consumed samples:           32 | skipped samples:            8 | elapsed" in line(
        skipped_samples=8
    )
    ours = line(extra={"tokens per second per GPU": "12.5"})
    assert ours == REFERENCE_LINE + " tokens per second per GPU: 12.5 |"


def test_validation_block() -> None:
    ruler, text, last = format_validation_block("iteration 10 on test set", {"lm loss": 2.0})
    assert text == (
        " validation loss at iteration 10 on test set | lm loss value: 2.000000E+00 | "
        "lm loss PPL: 7.389056E+00 | "
    )
    assert ruler == last == "-" * (len(text) + 1)
    assert f"PPL: {math.exp(20.0):.6E}" in format_validation_block("x", {"lm loss": 50.0})[1]


# ----------------------------------------------------------------------------------------------- metrics file


def write_steps(path: Path, first: int, last: int, resume: int = 0) -> None:
    metrics = MetricsFile(path, resume)
    for iteration in range(first, last + 1):
        metrics.train(
            iteration=iteration,
            lm_loss=1.0 / 3.0 + iteration,
            grad_norm=0.1,
            learning_rate=1e-3,
            consumed_tokens=64 * iteration,
            tokens_per_second=10.0,
            step_seconds=6.4,
        )
        if iteration % 2 == 0:
            metrics.validation(iteration=iteration, validation_loss=2.0 / 3.0)
    metrics.close()


def test_metrics_file_after_resume_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "deep" / "resumed.jsonl"
    write_steps(whole, 1, 6)
    write_steps(resumed, 1, 5)
    with open(resumed, "a") as stream:
        stream.write('{"kind": "train", "iteration": 6, "lm_lo')  # a kill in the middle of a line
    write_steps(resumed, 3, 6, resume=2)
    assert resumed.read_bytes() == whole.read_bytes()
    records = [json.loads(text) for text in whole.read_text().splitlines()]
    assert [record["kind"] for record in records].count("validation") == 3
    train = [record for record in records if record["kind"] == "train"]
    assert set(train[0]) == {
        "kind", "iteration", "lm_loss", "grad_norm", "learning_rate", "consumed_tokens", "tokens_per_second",
        "step_seconds",
    }  # fmt: skip
    validation = [record for record in records if record["kind"] == "validation"]
    assert set(validation[0]) == {"kind", "iteration", "validation_loss"}
    write_steps(resumed, 1, 6)  # a new run starts the file anew
    assert resumed.read_bytes() == whole.read_bytes()


@given(st.floats())
def test_metrics_file_numbers_read_back_to_the_same_double(value: float) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"metrics_{os.getpid()}.jsonl"
    metrics = MetricsFile(path)
    metrics.validation(iteration=1, validation_loss=value)
    metrics.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    (record,) = (json.loads(text, parse_constant=refuse) for text in path.read_text().splitlines())
    path.unlink()
    assert record["validation_loss"] == (value if math.isfinite(value) else None)


def test_metrics_file_refuses_foreign_files_and_unwritable_places(tmp_path: Path) -> None:
    foreign = tmp_path / "notes.txt"
    foreign.write_text("not json\nnor this\n")
    with pytest.raises(ConfigError, match=r"--metrics-file: .*line 1 must be a JSON object"):
        MetricsFile(foreign)
    assert foreign.read_text() == "not json\nnor this\n"
    with pytest.raises(ConfigError, match="must be writable"):
        MetricsFile(foreign / "below")


def test_metrics_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m.jsonl")
    metrics.validation(iteration=3, validation_loss=1.5)
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {
        "kind": "validation", "iteration": 3, "validation_loss": 1.5
    }  # fmt: skip
    metrics.close()


# ------------------------------------------------------------------------------------------------ training
# log


def log_arguments(folder: str, **changes: Any) -> Namespace:
    values: dict[str, Any] = {
        "seq_length": 16, "train_iters": 6, "log_interval": 3, "tensorboard_log_interval": 1, 
        "log_throughput": True, "log_timers_to_tensorboard": True, "log_loss_scale_to_tensorboard": True,
        "log_world_size_to_tensorboard": True,
        "log_memory_to_tensorboard": True, "log_validation_ppl_to_tensorboard": True, "save": folder,
        "tensorboard_dir": f"{folder}/tensorboard", "tensorboard_queue_size": 10, "log_progress": True,
    }  # fmt: skip
    return Namespace(**{**values, **changes})


def _train(rank: int, world_size: int, folder: str) -> str:
    """Six iterations on two ranks: the fifth is skipped with a NaN loss; validation after the sixth."""
    from megatron.core.timers import Timers

    args = log_arguments(folder)
    last = rank == world_size - 1
    outputs.configure_logging()
    timers = Timers(2, "minmax")
    metrics = MetricsFile(f"{folder}/metrics.jsonl") if last else None
    text, state = io.StringIO(), TrainState()
    with contextlib.redirect_stdout(text):
        progress = outputs.ProgressFile(args, state)
        log = TrainingLog(args, timers, writer=outputs.open_tensorboard(args), metrics=metrics)
        log.start()
        for iteration in range(1, 7):
            timers("forward-backward", log_level=1).start()
            timers("forward-backward").stop()
            skipped = iteration == 5
            state.iteration, state.consumed_train_samples = iteration, 8 * iteration
            report = StepReport(
                iteration=iteration,
                losses={"lm loss": math.nan if skipped else float(iteration)} if last else {},
                learning_rate=1e-3,
                global_batch_size=8,
                grad_norm=0.5,
                num_zeros=3.0,
                params_norm=2.0,
                skipped=skipped,
                num_floating_point_operations=1e12,
                extras={"snr": 20.4},
            )
            log.record(report, state)
        state.num_floating_point_operations = 6e12
        with log.excluded():
            log.validation({"lm loss": 2.0} if last else {}, state)
        log.validation({"lm loss": 9.0} if last else {}, state, where="on test set", to_metrics=False)
        progress.saved(state)
        outputs.report_memory("here")
        outputs.print_rank_0("hello from the first")
        outputs.print_datetime("before the start of training step")
        log.close()
    return text.getvalue()


def test_training_log_on_two_ranks(tmp_path: Path) -> None:
    first, last = run_ranks(_train, 2, str(tmp_path))
    lines = [text for text in last.splitlines() if "iteration " in text and "consumed samples" in text]
    assert [int(re.search(r"iteration +(\d+)/", text).group(1)) for text in lines] == [1, 3, 6]
    # The line after the first iteration does not end the interval; the skipped step is not in the mean.
    assert ["lm loss: 1.000000E+00" in lines[0], "lm loss: 2.000000E+00" in lines[1]] == [True, True]
    assert (
        "lm loss: 5.000000E+00" in lines[2]
        and "skipped iterations:   1 | number of nan iterations:   1" in lines[2]
    )
    assert all(
        re.search(r"nan iterations: +\d+ \| tokens per second per GPU: \d+\.\d \|$", text) for text in lines
    )
    assert "consumed samples" not in first
    assert re.search(r"\(min, max\) time across ranks \(ms\):\n    forward-backward \.+: \(", last)
    assert " validation loss at iteration 6 | lm loss value: 2.000000E+00" in last
    assert "hello from the first" in first and "hello" not in last
    assert re.search(
        r"\[before the start of training step\] datetime: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", first
    )
    assert re.search(r"\[Rank 0\] here memory \(MB\) \| resident: \d+\.\d \| max resident: \d+\.\d", first)
    assert first.count("(after 1 iterations) memory") == 1 and first.count("(after 6 iterations) memory") == 0

    records = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    assert [record["iteration"] for record in train] == [1, 2, 3, 4, 5, 6]
    assert [record["lm_loss"] for record in train] == [1.0, 2.0, 3.0, 4.0, None, 6.0]
    assert [record["consumed_tokens"] for record in train] == [128 * n for n in range(1, 7)]
    assert all(math.isclose(record["tokens_per_second"] * record["step_seconds"], 128) for record in train)
    assert [record for record in records if record["kind"] == "validation"] == [
        {"kind": "validation", "iteration": 6, "validation_loss": 2.0}
    ]
    progress = (tmp_path / "progress.txt").read_text().splitlines()
    assert [text.split("\t")[3] for text in progress] == ["Starting job", "Saved checkpoint"]
    assert "\tIteration: 6\t" in progress[1] and "Floating-point operations: 6.00e+12" in progress[1]
    check_tensorboard(tmp_path / "tensorboard")


def check_tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    twinned = ("learning-rate", "batch-size", "lm loss", "loss-scale", "grad-norm", "num-zeros",
               "params-norm", "world-size", "lm loss validation", "lm loss validation ppl")  # fmt: skip
    single = {
        "iteration-time",
        "throughput",
        "forward-backward-time",
        "metis/snr",
        "metis/tokens-per-second-per-gpu",
    }
    assert tags == {*twinned, *(f"{tag} vs samples" for tag in twinned), *single}
    assert [(event.step, event.value) for event in events.Scalars("lm loss")][:2] == [(1, 1.0), (2, 2.0)]
    assert [event.step for event in events.Scalars("lm loss vs samples")][:2] == [8, 16]
    assert "seq_length/text_summary" in events.Tags()["tensors"]


def test_wandb_is_refused_when_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="--wandb-exp-name"):
        outputs.open_wandb(Namespace(wandb_project="p", wandb_exp_name=""))
    with pytest.raises(ConfigError, match="needs the wandb package"):
        outputs.open_wandb(Namespace(wandb_project="p", wandb_exp_name="e"))
    assert outputs.open_wandb(Namespace(wandb_project=None)) is None


@pytest.mark.parametrize(
    ("dtype", "distributed", "bytes_per_parameter"),
    [("bf16", False, 18.0), ("bf16", True, 6 + 12 / 8), ("fp32", False, 16.0), ("fp32", True, 8 + 8 / 8)],
)
def test_theoretical_memory(dtype: str, distributed: bool, bytes_per_parameter: float) -> None:
    args = Namespace(
        params_dtype_name=dtype,
        use_distributed_optimizer=distributed,
        data_parallel_size=4,
        context_parallel_size=2,
    )
    text = outputs.theoretical_memory_line(args, 1024 * 1024, num_buffer_bytes=1024 * 1024)
    assert f"weight and optimizer={bytes_per_parameter:.2f} MB ({bytes_per_parameter:.2f} bytes per" in text
    assert f"total without activations={bytes_per_parameter + 1:.2f} MB" in text


# ------------------------------------------------------------------------------------------------ state,
# exits


def test_train_state_restores_in_place_and_ignores_unknown_names() -> None:
    state = TrainState()
    state.restore({"iteration": 7, "num_floating_point_operations": 10, "from_the_future": 1})
    assert state == TrainState(iteration=7, num_floating_point_operations=10.0)
    assert TrainState(**state.to_dict()) == state


def exit_arguments(folder: Path | str | None, **changes: Any) -> Namespace:
    values = {
        "save": str(folder) if folder else None, "save_interval": 10, "exit_interval": None, "device": "cpu",
        "exit_duration_in_mins": None, "exit_signal_handler": True, "exit_signal": "SIGUSR1",
    }  # fmt: skip
    return Namespace(**{**values, **changes})


def test_exit_conditions_in_order(tmp_path: Path) -> None:
    args = exit_arguments(tmp_path, exit_interval=4)
    with signals.ExitWatcher(args) as watcher:
        assert signals.exit_reason(args, 3, watcher) == signals.ExitDecision(save=False, message=None)
        assert signals.exit_reason(args, 10, watcher) == signals.ExitDecision(save=True, message=None)
        interval = signals.ExitDecision(save=True, message="exiting program at iteration 8")
        assert signals.exit_reason(args, 8, watcher) == interval
        (tmp_path / signals.EXIT_NOW).touch()
        assert "EXIT_NOW" in signals.exit_reason(args, 8, watcher).message
        os.kill(os.getpid(), signal.SIGUSR1)
        decision = signals.exit_reason(args, 8, watcher)
        assert decision == signals.ExitDecision(save=True, message="exiting program after receiving SIGUSR1.")
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    late = exit_arguments(None, exit_duration_in_mins=5, exit_interval=8)
    watcher = signals.ExitWatcher(late, start_seconds=0.0)
    decision = signals.exit_reason(late, 8, watcher)
    assert not decision.save and re.fullmatch(r"exiting program after \d+\.\d minutes", decision.message)


def test_exit_files(tmp_path: Path) -> None:
    save = tmp_path / "save"
    signals.mark_exited_cleanly(str(save), 12, "exiting program at iteration 12")
    assert (save / signals.EXITED_CLEANLY).read_text() == "12\texiting program at iteration 12\n"
    (save / signals.EXIT_NOW).touch()
    signals.mark_started(str(save))
    assert list(save.iterdir()) == []
    signals.mark_started(None)


@pytest.mark.parametrize("value", ["SIGTERM", "Signals.SIGTERM", 15, "15", signal.SIGTERM])
def test_signals_are_accepted_by_name_and_number(value: str | int) -> None:
    assert signals.parse_signal(value) is signal.SIGTERM


def _signal_on_one_rank(rank: int, world_size: int, folder: str) -> signals.ExitDecision:
    args = exit_arguments(folder)
    with signals.ExitWatcher(args) as watcher:
        before = signals.exit_reason(args, 1, watcher)
        assert before.message is None
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return signals.exit_reason(args, 2, watcher)


def test_a_signal_on_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    decisions = run_ranks(_signal_on_one_rank, 2, str(tmp_path))
    assert (
        decisions == [signals.ExitDecision(save=True, message="exiting program after receiving SIGUSR1.")] * 2
    )


def test_memory_report_is_silent_about_gpus_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("the CPU's report")
    outputs.report_memory("(after 1 iterations)")
    assert "allocated" not in capsys.readouterr().out


def test_an_evaluation_of_an_old_checkpoint_keeps_what_came_after_it(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = [f'{{"kind": "{kind}", "iteration": {i}}}\n' for i in (2, 4) for kind in ("train", "validation")]
    path.write_text("".join(lines) + '{"kind": "tr')
    MetricsFile(path, 2, keep_validation=False, keep_later=True).close()
    assert path.read_text() == lines[0] + lines[2] + lines[3]


def test_a_spiky_loss_is_found_in_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten times the largest of the job's own first hundred, also after a resume at step 150."""
    for first in (0, 150):
        steps = SimpleNamespace(args=Namespace(check_for_spiky_loss=True), largest_loss=0.0, num_losses=0)
        for iteration in range(first, first + 120):
            value = 500.0 if iteration - first == 110 else 5.0
            StepRunner._note_spike(steps, {LM_LOSS: value}, iteration)
        assert capsys.readouterr().out == f"spiky loss at iteration {first + 111}: 5.000000E+02\n"

"""What a run tells about itself while it trains: log lines, scalars, the metrics file.

One idea: `TrainingLog.record` is called once per iteration on every rank with the same plain numbers, and
everything else (interval means, the printed line, tags, the metrics file) follows from those calls. The
line is the reference trainer's field for field, because scripts search it; fields of ours come after its
last one, tags of ours under `metis/`.

Traps: the last rank prints and writes (it has the loss), rank 0 prints setup lines, so two lines can meet
on a terminal; parsers should search rather than anchor. The line after the first iteration of a job is
extra and does not end the interval. `record` is collective: it synchronises the interval timer. Timings
shown as `<timer>-time` are means over the log interval.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import torch

from metis.training.metrics_file import MetricsFile
from metis.training.outputs import print_rank_last, rank_and_size, report_memory
from metis.training.state import TrainState

if TYPE_CHECKING:
    from megatron.core.timers import Timers

    from metis.training.quantization_log import QuantizationRecord

LM_LOSS = "lm loss"
INTERVAL_TIMER = "interval-time"
TIMER_NAMES = (
    "forward-backward", "forward-compute", "backward-compute", "batch-generator", "forward-recv",
    "forward-send", "backward-recv", "backward-send", "forward-send-forward-recv",
    "forward-send-backward-recv", "backward-send-forward-recv", "backward-send-backward-recv",
    "forward-backward-send-forward-backward-recv", "layernorm-grads-all-reduce",
    "embedding-grads-all-reduce", "all-grads-sync", "params-all-gather", "optimizer-copy-to-main-grad",
    "optimizer-unscale-and-check-inf", "optimizer-clip-main-grad", "optimizer-count-zeros",
    "optimizer-inner-step", "optimizer-copy-main-to-model-params", "optimizer",
)  # fmt: skip
"""Timers of megatron-core's schedules and optimizers; a fixed list, since their report is a collective
call.
"""


def format_training_line(
    *,
    time: datetime,
    iteration: int,
    train_iters: int,
    consumed_samples: int,
    skipped_samples: int,
    elapsed_milliseconds: float,
    throughput_tflops: float | None,
    learning_rate: float | None,
    global_batch_size: int,
    losses: Mapping[str, float],
    loss_scale: float,
    grad_norm: float | None,
    num_zeros: float | None,
    params_norm: float | None,
    skipped_iterations: int,
    nan_iterations: int,
    extra: Mapping[str, str] | None = None,
) -> str:
    """Return the training line: the reference trainer's fields in its order, then `extra` as `name: text |`.

    Losses that are not above zero (NaN included) are left out, as are fields whose value is None and a zero
    `skipped_samples`.
    """
    fields = [
        f" [{time.strftime('%Y-%m-%d %H:%M:%S.%f')}] iteration {iteration:8d}/{train_iters:8d}",
        f"consumed samples: {consumed_samples:12d}",
        f"skipped samples: {skipped_samples:12d}" if skipped_samples > 0 else None,
        f"elapsed time per iteration (ms): {elapsed_milliseconds:.1f}",
        None if throughput_tflops is None else f"throughput per GPU (TFLOP/s/GPU): {throughput_tflops:.1f}",
        None if learning_rate is None else f"learning rate: {learning_rate:.6E}",
        f"global batch size: {global_batch_size:5d}",
        *(f"{name}: {value:.6E}" for name, value in losses.items() if value > 0.0),
        f"loss scale: {loss_scale:.1f}",
        None if grad_norm is None else f"grad norm: {grad_norm:.3f}",
        None if num_zeros is None else f"num zeros: {num_zeros}",
        None if params_norm is None else f"params norm: {params_norm:.3f}",
        f"number of skipped iterations: {skipped_iterations:3d}",
        f"number of nan iterations: {nan_iterations:3d}",
        *(f"{name}: {text}" for name, text in (extra or {}).items()),
    ]
    return " | ".join(item for item in fields if item is not None) + " |"


def format_validation_block(label: str, losses: Mapping[str, float]) -> list[str]:
    """Return the three lines of an evaluation: ruler, values with perplexity exp(min(20, loss)), ruler."""
    line = f" validation loss at {label} | "
    for name, value in losses.items():
        line += f"{name} value: {value:.6E} | {name} PPL: {math.exp(min(20.0, value)):.6E} | "
    ruler = "-" * (len(line) + 1)
    return [ruler, line, ruler]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One finished iteration, as plain numbers.

    `losses` holds means over the global batch (empty on pipeline stages without a loss); `learning_rate`,
    `grad_norm`, `num_zeros` and `params_norm` are None where not computed; `skipped` says that the update was
    not applied, `nonfinite` that this was because of a NaN or infinity; `num_floating_point_operations`
    counts model FLOPs of this step over all ranks; `extras` are additional TensorBoard scalars under
    `metis/`.
    """

    iteration: int
    losses: Mapping[str, float]
    learning_rate: float | None
    global_batch_size: int
    loss_scale: float = 1.0
    grad_norm: float | None = None
    num_zeros: float | None = None
    params_norm: float | None = None
    skipped: bool = False
    nonfinite: bool = False
    num_floating_point_operations: float = 0.0
    extras: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Interval:
    """Sums since the last regular log line."""

    advanced: int = 0
    skipped: int = 0
    nan: int = 0
    tokens: int = 0
    flops: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


class TrainingLog:
    """Turns step reports into the printed line, TensorBoard and wandb scalars, and the metrics file.

    `writer`, `wandb` and `metrics` exist on the last rank only (None elsewhere). `start` begins the clock;
    time spent in evaluation and saving is taken out with `excluded`.
    """

    def __init__(
        self,
        args: Namespace,
        timers: Timers,
        *,
        writer: Any = None,
        wandb: Any = None,
        metrics: MetricsFile | None = None,
    ) -> None:
        self._args, self._timers = args, timers
        self._writer, self._wandb, self._metrics = writer, wandb, metrics
        self._interval = _Interval()
        self._recorded = 0
        self._memory_reports = 0
        self._step_started = 0.0

    def start(self) -> None:
        """Start the interval and step clocks; collective, right before the first step."""
        self._timers(INTERVAL_TIMER, log_level=0).start(barrier=True)
        self._step_started = time.perf_counter()

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Keep what happens inside (evaluation, saving) out of the times; a collective call."""
        self._timers(INTERVAL_TIMER).stop()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._step_started += time.perf_counter() - began
            self._timers(INTERVAL_TIMER, log_level=0).start(barrier=True)

    def record(self, report: StepReport, state: TrainState) -> None:
        """Take in one iteration, whose samples `state` already counts; collective, on every rank."""
        now = time.perf_counter()
        step_seconds, self._step_started = now - self._step_started, now
        tokens = report.global_batch_size * self._args.seq_length
        self._accumulate(report, tokens)
        if self._metrics is not None:
            self._metrics.train(
                iteration=report.iteration,
                lm_loss=report.losses.get(LM_LOSS),
                grad_norm=report.grad_norm,
                learning_rate=report.learning_rate,
                consumed_tokens=state.consumed_train_samples * self._args.seq_length,
                tokens_per_second=tokens / step_seconds,
                step_seconds=step_seconds,
            )
        if report.iteration % self._args.tensorboard_log_interval == 0:
            self._write_step_scalars(report, state)
        self._recorded += 1
        regular = report.iteration % self._args.log_interval == 0
        if regular or self._recorded == 1:
            self._print_line(report, state, regular=regular)

    def _accumulate(self, report: StepReport, tokens: int) -> None:
        interval = self._interval
        interval.advanced += not report.skipped
        interval.skipped += report.skipped
        lost = any(not math.isfinite(value) for value in report.losses.values())
        interval.nan += report.nonfinite or lost
        interval.tokens += tokens
        interval.flops += report.num_floating_point_operations
        if not report.skipped:
            for name, value in report.losses.items():
                interval.losses[name] = interval.losses.get(name, 0.0) + value

    def _print_line(self, report: StepReport, state: TrainState, *, regular: bool) -> None:
        args, interval, world_size = self._args, self._interval, rank_and_size()[1]
        seconds = self._timers(INTERVAL_TIMER).elapsed(barrier=True, reset=regular)
        iterations = interval.advanced + interval.skipped
        tflops = interval.flops / (seconds * 1e12 * world_size)
        tokens_per_second = interval.tokens / (seconds * world_size)
        line = format_training_line(
            time=datetime.now(),
            iteration=report.iteration,
            train_iters=args.train_iters,
            consumed_samples=state.consumed_train_samples,
            skipped_samples=state.skipped_train_samples,
            elapsed_milliseconds=seconds * 1000.0 / iterations,
            throughput_tflops=tflops if args.log_throughput else None,
            learning_rate=report.learning_rate,
            global_batch_size=report.global_batch_size,
            losses={name: total / max(1, interval.advanced) for name, total in interval.losses.items()},
            loss_scale=report.loss_scale,
            grad_norm=report.grad_norm,
            num_zeros=report.num_zeros,
            params_norm=report.params_norm,
            skipped_iterations=interval.skipped,
            nan_iterations=interval.nan,
            extra={"tokens per second per GPU": f"{tokens_per_second:.1f}"},
        )
        print_rank_last(line)
        scalars = {"metis/tokens-per-second-per-gpu": tokens_per_second}
        if args.log_timers_to_tensorboard:
            scalars["iteration-time"] = seconds / iterations
            if args.log_throughput:
                scalars["throughput"] = tflops
        self._add_scalars(scalars, report.iteration)
        self._report_memory(report.iteration)
        if regular:
            names = list(TIMER_NAMES)
            if args.log_timers_to_tensorboard:
                self._timers.write(names, self._writer, report.iteration, normalizer=iterations, reset=False)
            self._timers.log(names, normalizer=iterations)
            self._interval = _Interval()

    def _report_memory(self, iteration: int) -> None:
        if self._memory_reports < 2:
            self._memory_reports += 1
            report_memory(f"(after {iteration} iterations)")

    def _write_step_scalars(self, report: StepReport, state: TrainState) -> None:
        if self._writer is None and self._wandb is None:
            return
        args = self._args
        optional = {
            "learning-rate": report.learning_rate,
            "batch-size": report.global_batch_size,
            **report.losses,
            "loss-scale": report.loss_scale if args.log_loss_scale_to_tensorboard else None,
            "world-size": rank_and_size()[1] if args.log_world_size_to_tensorboard else None,
            "grad-norm": report.grad_norm,
            "num-zeros": report.num_zeros,
            "params-norm": report.params_norm,
        }
        twinned = {name: float(value) for name, value in optional.items() if value is not None}
        self._add_scalars(twinned, report.iteration, samples=state.consumed_train_samples)
        single = {f"metis/{name}": value for name, value in report.extras.items()}
        if state.skipped_train_samples > 0:
            single["skipped-train-samples"] = state.skipped_train_samples
        if args.log_memory_to_tensorboard and torch.cuda.is_available():
            statistics = torch.cuda.memory_stats()
            single["mem-reserved-bytes"] = statistics["reserved_bytes.all.current"]
            single["mem-allocated-bytes"] = statistics["allocated_bytes.all.current"]
            single["mem-max-allocated-bytes"] = statistics["allocated_bytes.all.peak"]
            single["mem-allocated-count"] = statistics["allocation.all.current"]
        self._add_scalars(single, report.iteration)

    def _add_scalars(self, scalars: Mapping[str, float], iteration: int, samples: int | None = None) -> None:
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, iteration)
                if samples is not None:
                    self._writer.add_scalar(f"{name} vs samples", value, samples)
        if self._wandb is not None and scalars:
            self._wandb.log(dict(scalars), step=iteration)

    def validation(
        self, losses: Mapping[str, float], state: TrainState, *, where: str = "", to_metrics: bool = True
    ) -> None:
        """Report an evaluation made after `state.iteration` steps.

        `where` is appended to the printed label (`on validation set`, `on test set`); with `to_metrics` the
        language model loss goes to the metrics file (not for the test set).
        """
        label = f"iteration {state.iteration}" + (f" {where}" if where else "")
        for line in format_validation_block(label, losses):
            print_rank_last(line)
        scalars = {f"{name} validation": value for name, value in losses.items()}
        if self._args.log_validation_ppl_to_tensorboard:
            scalars |= {
                f"{name} validation ppl": math.exp(min(20.0, value)) for name, value in losses.items()
            }
        self._add_scalars(scalars, state.iteration, samples=state.consumed_train_samples)
        if to_metrics and self._metrics is not None and LM_LOSS in losses:
            self._metrics.validation(iteration=state.iteration, validation_loss=losses[LM_LOSS])

    def quantization(self, records: list[QuantizationRecord] | None, iteration: int) -> None:
        """Write what quantisation did to each operand (`--log-quantization-interval`); None: nothing was
        measured, or another rank has it.
        """
        if records is None:
            return
        from metis.training.quantization_log import summary

        print_rank_last(summary(records, iteration))
        scalars = {
            f"quantization/{record.layer}/{record.cell}/{name}": value
            for record in records
            for name, value in record.metrics.items()
            if math.isfinite(value)
        }
        self._add_scalars(scalars, iteration)
        for record in records if self._metrics is not None else ():
            self._metrics.quantization(
                iteration=iteration, layer=record.layer, cell=record.cell, metrics=record.metrics
            )

    def close(self) -> None:
        """Flush and close everything that this log writes to."""
        if self._writer is not None:
            self._writer.flush()
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._metrics is not None:
            self._metrics.close()

"""The learning rate and the samples read as functions of the arguments alone, without torch.

megatron-core's scheduler holds the learning rate as state that moves with every applied update. What must be
known before training, at which step the rate falls below a share of its maximum, follows from the same
formulas evaluated here at the samples read before a step. The engine's scheduler is built from the same
lengths, and a test compares the two rates step by step.

Trap: this is the planned rate. Updates that are not applied (an overflow in fp16, `--iterations-to-skip`)
leave the real one behind the plan, so a fraction of the maximum may be passed a few steps later than planned;
the planned step stands.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from metis.errors import ConfigError

RELATIVE_SLACK = 1e-12
"""A rate that equals the wanted one up to rounding counts as reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleLengths:
    """Lengths of the learning-rate and weight-decay schedules, all in samples; `wsd` is None without one."""

    warmup: float
    decay: int
    wsd: int | None
    total: int


def schedule_lengths(args: Namespace) -> ScheduleLengths:
    """Return the lengths that the arguments ask for, whichever unit they use.

    Raises ConfigError when neither `--train-iters` nor `--train-samples` is known.
    """
    if args.train_samples is not None:
        decay = args.lr_decay_samples or args.train_samples
        warmup: float = args.lr_warmup_samples
        wsd, total = args.lr_wsd_decay_samples, args.train_samples
    elif args.train_iters is not None:
        batch = args.global_batch_size
        decay = (args.lr_decay_iters or args.train_iters or 1) * batch  # none to train: --skip-train
        warmup = args.lr_warmup_iters * batch
        wsd = None if args.lr_wsd_decay_iters is None else args.lr_wsd_decay_iters * batch
        total = args.train_iters * batch
    else:
        raise ConfigError("--train-iters", "or --train-samples must be given, received neither")
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return ScheduleLengths(warmup=warmup, decay=decay, wsd=wsd, total=total)


def planned_learning_rate(args: Namespace, lengths: ScheduleLengths, num_samples: int) -> float:
    """Return the learning rate of the step before which `num_samples` samples have been read.

    Formulas of megatron-core 0.16.1 `OptimizerParamScheduler.get_lr`.
    """
    largest, smallest = float(args.lr), args.min_lr
    if lengths.warmup > 0 and num_samples <= lengths.warmup:
        return args.lr_warmup_init + (largest - args.lr_warmup_init) * num_samples / lengths.warmup
    if args.lr_decay_style == "constant":
        return largest
    if num_samples > lengths.decay:
        return smallest
    if args.lr_decay_style == "inverse-square-root":
        rate = largest * max(lengths.warmup, 1) ** 0.5 / max(num_samples, 1) ** 0.5
        return max(smallest, rate)
    share = (num_samples - lengths.warmup) / (lengths.decay - lengths.warmup)
    if args.lr_decay_style == "linear":
        coefficient = 1.0 - share
    elif args.lr_decay_style == "cosine":
        coefficient = 0.5 * (math.cos(math.pi * share) + 1.0)
    else:
        coefficient = _stable_then_decay(args.lr_wsd_decay_style, lengths, num_samples)
    return smallest + coefficient * (largest - smallest)


def _stable_then_decay(style: str, lengths: ScheduleLengths, num_samples: int) -> float:
    """Return the coefficient of WSD: 1 until the last `wsd` samples of the decay."""
    assert lengths.wsd is not None
    past = num_samples - (lengths.decay - lengths.wsd)
    if past <= 0:
        return 1.0
    share = past / lengths.wsd
    return {
        "linear": 1.0 - share,
        "cosine": 0.5 * (math.cos(math.pi * share) + 1.0),
        "exponential": 2.0 * 0.5**share - 1.0,
        "minus_sqrt": 1.0 - math.sqrt(share),
    }[style]


class SampleCount:
    """How many samples have been read before each step, with the batch-size ramp-up of megatron-core."""

    def __init__(self, args: Namespace) -> None:
        self.batch_size = args.global_batch_size
        self.in_ramp = [0]
        if not args.rampup_batch_size:
            return
        start, increment, ramp_samples = args.rampup_batch_size
        per_increment = ramp_samples / max(1, (self.batch_size - start) // increment)
        while self.in_ramp[-1] <= ramp_samples:
            steps = int(self.in_ramp[-1] / per_increment) if per_increment else self.batch_size
            self.in_ramp.append(self.in_ramp[-1] + min(self.batch_size, start + steps * increment))

    def before(self, step: int) -> int:
        """Return the samples read before step `step`, counted from 0."""
        last = len(self.in_ramp) - 1
        if step <= last:
            return self.in_ramp[step]
        return self.in_ramp[last] + (step - last) * self.batch_size

    def first_step_at(self, num_samples: float) -> int:
        """Return the first step before which at least `num_samples` samples have been read."""
        return _first(lambda step: self.before(step) >= num_samples, math.ceil(num_samples))


def step_at_lr_fraction(args: Namespace, fraction: float) -> int | None:
    """Return the first step after warm-up whose planned learning rate is at most `fraction` x `--lr`.

    None when the rate never falls so low. Raises ConfigError without `--lr` or the length of the training.
    """
    if args.lr is None:
        raise ConfigError("--lr", "must be given for a phase at a fraction of it, received nothing")
    lengths, samples = schedule_lengths(args), SampleCount(args)
    limit = fraction * args.lr * (1 + RELATIVE_SLACK)

    def reached(step: int) -> bool:
        count = samples.before(step)
        return count >= lengths.warmup and planned_learning_rate(args, lengths, count) <= limit

    # After warm-up the rate never rises, and past the decay it stays what it is.
    last = samples.first_step_at(lengths.decay + 1)
    return _first(reached, last) if reached(last) else None


def num_training_steps(args: Namespace) -> int | None:
    """Return the steps that the run is going to take, None while its length is unknown."""
    if args.train_samples is None:
        return args.train_iters
    samples = SampleCount(args)
    # A batch that does not fit into the samples is not read.
    return _first(lambda step: samples.before(step + 1) > args.train_samples, args.train_samples)


def _first(condition: Callable[[int], bool], last: int) -> int:
    """Return the first number up to `last` for which a condition that never turns false again is true."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if condition(middle) else (middle + 1, high)
    return low

"""One optimizer step and one evaluation, on megatron-core's forward/backward schedule.

What is ours: the loss and its normalisation, the logical microbatch that every forward announces to the
clock, and the renewal of the bases after the optimizer step. Sums of losses are float64, so that reports do
not depend on the layout.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.timers import Timers
from torch import Tensor, nn

from metis.clock import TrainingClock
from metis.mcore.penalties import add_weight_penalties
from metis.mcore.state import advance_model_bases, recipe_linears
from metis.renewal import Compute
from metis.schedule import all_uses
from metis.training.graphs import POSITION_WORDS, Schedule, StepGraphs, on_this_rank
from metis.training.model import recipes_by_phase
from metis.training.operand_guard import (
    Finding,
    NonFiniteError,
    OperandGuard,
    gradient_error,
    operand_error,
)
from metis.training.outputs import print_rank_last
from metis.training.quantization_log import QuantizationLog
from metis.training.telemetry import LM_LOSS

DUAL_RANGE_LOSS = "dual-range loss"
BATCH_FIELDS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Outcome of one step; mean losses exist on the last pipeline stage only.

    applied: the weights were updated. nonfinite: an operand held NaN or infinity, and the step was skipped.
    """

    losses: dict[str, float]
    applied: bool
    grad_norm: float | None
    num_zeros: float | None
    nonfinite: bool = False


def _loss(loss_mask: Tensor, per_token: bool, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return (loss, num_tokens, report) for per-token losses [b, s] of this rank's tokens.

    The engine divides the loss by num_tokens and averages over data- and context-parallel ranks. A
    context-parallel rank sees part of a sequence, so the divisor is the whole microbatch's token count and
    the sum is scaled by CP; with `--calculate-per-token-loss` the engine divides by the global count itself.
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    losses, mask = output.to(dtype).view(-1), loss_mask.view(-1).to(dtype)
    total = (losses * mask).sum(dtype=torch.float64 if dtype == torch.float64 else None)
    num_tokens = mask.sum()
    report = torch.stack([(losses.detach() * mask).sum(dtype=torch.float64), num_tokens.to(torch.float64)])
    cp_size = parallel_state.get_context_parallel_world_size()
    if cp_size > 1 and not per_token:
        num_tokens = num_tokens.clone()
        dist.all_reduce(num_tokens, group=parallel_state.get_context_parallel_group())
        total = total * cp_size
    return total, num_tokens.to(torch.int), {LM_LOSS: report}


class StepRunner:
    """Runs training steps and evaluations of one model; holds what does not change between them."""

    def __init__(
        self,
        args: Namespace,
        model: list[nn.Module],
        optimizer: Any,
        scheduler: Any,
        clock: TrainingClock,
        timers: Timers,
    ) -> None:
        self.args, self.model, self.clock, self.timers = args, model, clock, timers
        self.optimizer, self.scheduler = optimizer, scheduler
        uses = all_uses(recipes_by_phase(args)).values()
        self.has_penalties = any(recipe.dual_range is not None for recipe in uses)
        self.forward_backward = get_forward_backward_func()
        self.largest_loss, self.num_losses = 0.0, 0
        # Found once: a walk over all modules is slow, and would be one in every step.
        self._linears = recipe_linears(model)
        check_gradients = args.check_for_nan_in_loss_and_grad
        is_graphed = args.cuda_graph_impl == "local"
        self.guard = OperandGuard(
            args.nonfinite_operands, model, clock, check_gradients, engine_may_check=not is_graphed
        )
        self._launched = self._passes = partial(self._run_schedule, forward_only=False)
        self._renew: Compute | None = None
        if is_graphed:
            cores = [linear.core for linear in self._linears]
            graphs = StepGraphs(args, cores, clock, self._launched, args.cuda_graph_warmup_steps)
            self._passes, self._renew = self._timed(graphs), graphs.renewals
            self._launched = self._timed(self._launched)
        self.quantization = QuantizationLog(args.log_quantization_interval, model, clock)

    def _timed(self, passes: Schedule) -> Schedule:
        """Return passes with the timer around them that the engine, which may be captured, cannot have."""

        def run(data_iterator: Any, num_microbatches: int) -> list[dict]:
            self.timers("forward-backward", log_level=1).start()
            try:
                return passes(data_iterator, num_microbatches)
            finally:
                self.timers("forward-backward").stop()

        return run

    def _forward_step(self, data_iterator: Any, model: nn.Module) -> tuple[Tensor, Callable]:
        """Run one microbatch through one model chunk; middle stages get the microbatch's position only."""
        self.timers("batch-generator", log_level=2).start()
        batch = next(data_iterator)
        self.timers("batch-generator").stop()
        self.clock.begin_microbatch(
            int(batch["first_sample"]) // self.args.micro_batch_size, batch.get(POSITION_WORDS)
        )
        batch = on_this_rank(batch)
        fields = {name: batch.get(name) for name in BATCH_FIELDS}
        if self.args.device == "cuda":
            fields = {k: None if v is None else v.cuda(non_blocking=True) for k, v in fields.items()}
        output = model(
            fields["tokens"], fields["position_ids"], fields["attention_mask"], labels=fields["labels"]
        )
        return output, partial(_loss, fields["loss_mask"], self.args.calculate_per_token_loss)

    def _run_schedule(self, data_iterator: Any, num_microbatches: int, *, forward_only: bool) -> list[dict]:
        args = self.args
        return self.forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=data_iterator,
            model=self.model,
            num_microbatches=num_microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=args.seq_length,
            forward_only=forward_only,
        )

    def train_step(self, data_iterator: Any, iteration: int) -> StepResult:
        """Run optimizer step `iteration` (from 0): forward, backward, update, schedule, bases."""
        args = self.args
        num_microbatches = get_num_microbatches()
        batch_size = num_microbatches * args.micro_batch_size * args.data_parallel_size
        self.clock.begin_step(iteration, batch_size * args.seq_length)
        self._zero_gradients()
        is_watched = self.quantization.begin_step(iteration)
        try:
            reports = (self._launched if is_watched else self._passes)(data_iterator, num_microbatches)
        except RuntimeError as error:
            if "Unexpected result" in str(error) or "found NaN" in str(error):
                detail = re.search(r"message='([^']*)'", str(error))
                raise _non_finite(iteration, f"a gradient ({detail[1] if detail else error})") from None
            raise
        self.quantization.end_step()
        if args.empty_unused_memory_level >= 1 and args.device == "cuda":
            torch.cuda.empty_cache()
        losses = self._mean_losses(reports)
        finding = self.guard.after_backward()
        if finding.operands:
            return self._skip_step(finding, iteration, losses)
        if finding.gradients:
            raise gradient_error(finding, iteration)
        if args.check_for_nan_in_loss_and_grad and not all(abs(v) < float("inf") for v in losses.values()):
            raise _non_finite(iteration, f"the loss ({losses})")
        self._note_spike(losses, iteration)
        losses |= self._add_penalties()
        self.timers("optimizer", log_level=1).start(barrier=True)
        applied, grad_norm, num_zeros = self.optimizer.step()
        self.timers("optimizer").stop()
        applied = _all_ranks_agree(applied)
        if args.overlap_param_gather and self._tracks_weights():
            # The bases of the weights are renewed now, and this rank has updated its own part only so far.
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)
        token_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        advance_model_bases(self._linears, iteration, token_group, self._renew)
        if applied:
            self.scheduler.step(increment=batch_size)
        if args.empty_unused_memory_level >= 2 and args.device == "cuda":
            torch.cuda.empty_cache()
        return StepResult(
            losses=losses,
            applied=applied,
            grad_norm=_largest_of_ranks(grad_norm),
            num_zeros=_largest_of_ranks(num_zeros),
        )

    def _add_penalties(self) -> dict[str, float]:
        """Add what recipes put on their weights to the gradients; return its loss on the last pipeline
        stage.
        """
        if not self.has_penalties:
            return {}
        value = add_weight_penalties(self.model, float(self.optimizer.get_loss_scale()))
        return {DUAL_RANGE_LOSS: value} if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else {}

    def _tracks_weights(self) -> bool:
        return any("weight" in linear.core.bases for linear in self._linears)

    def _zero_gradients(self) -> None:
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _skip_step(self, finding: Finding, iteration: int, losses: dict[str, float]) -> StepResult:
        """Leave weights, bases and learning rate as they are, or raise unless told to skip such steps."""
        where = f"iteration {iteration + 1}"
        if self.guard.mode == "stop":
            raise operand_error(finding, where, iteration)
        print_rank_last(finding.warning(where, "the step is skipped"))
        self._zero_gradients()
        for linear in self._linears:
            for basis in linear.core.bases.values():
                basis.take_pending()
        return StepResult(losses=losses, applied=False, grad_norm=None, num_zeros=None, nonfinite=True)

    @torch.no_grad()
    def evaluate(self, data_iterator: Any, num_iterations: int, *, iteration: int) -> dict[str, float]:
        """Return token-weighted mean losses over `num_iterations` global batches, by the recipe's forward.

        iteration: steps that the weights have seen, for messages. A non-finite operand is an error or, unless
        `--nonfinite-operands stop`, a warning.
        """
        args = self.args
        for chunk in self.model:
            chunk.eval()
        num_microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
        reports: list[dict] = []
        try:
            for _ in range(num_iterations):
                reports += self._run_schedule(data_iterator, num_microbatches, forward_only=True)
        finally:
            for chunk in self.model:
                chunk.train()
        finding = self.guard.after_evaluation()
        if finding.operands:
            where = f"evaluation after iteration {iteration}"
            if self.guard.mode == "stop":
                raise operand_error(finding, where, None)
            print_rank_last(finding.warning(where, "its loss says nothing"))
        return self._mean_losses(reports)

    def skip_batch(self, data_iterator: Any) -> None:
        """Consume one global batch without using it (`--iterations-to-skip`)."""
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        for _ in range(get_num_microbatches()):
            for iterator in iterators:
                next(iterator)

    @staticmethod
    def _mean_losses(reports: list[dict]) -> dict[str, float]:
        """Return sum of losses / number of tokens over microbatches and data-parallel ranks, in float64."""
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True) or not reports:
            return {}
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        means = {}
        for name in reports[0]:
            total = torch.stack([report[name] for report in reports]).sum(dim=0)
            dist.all_reduce(total, group=group)
            means[name] = float(total[0] / total[1].clamp(min=1.0))
        return means

    def _note_spike(self, losses: dict[str, float], iteration: int) -> None:
        """Report a loss ten times the largest of this job's first 100 (`--check-for-spiky-loss`)."""
        if not self.args.check_for_spiky_loss or LM_LOSS not in losses:
            return
        value = losses[LM_LOSS]
        if self.num_losses >= 100 and value > 10 * self.largest_loss > 0:
            print(f"spiky loss at iteration {iteration + 1}: {value:.6E}", flush=True)
        elif self.num_losses < 100:
            self.largest_loss = max(self.largest_loss, value)
        self.num_losses += 1


def _non_finite(iteration: int, what: str) -> NonFiniteError:
    return NonFiniteError(
        f"iteration {iteration + 1}, rank {dist.get_rank()}",
        f"{what} must be finite; resume from the last checkpoint, skip the batch with --iterations-to-skip "
        f"{iteration}, or go on regardless with --no-check-for-nan-in-loss-and-grad",
    )


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _all_ranks_agree(value: bool) -> bool:
    flag = torch.tensor([int(value)], device=_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=parallel_state.get_model_parallel_group())
    return bool(flag.item())


def _largest_of_ranks(value: float | None) -> float | None:
    """Return the largest value over model-parallel ranks; None on all of them gives None."""
    number = torch.tensor([-1.0 if value is None else float(value)], dtype=torch.float64, device=_device())
    dist.all_reduce(number, op=dist.ReduceOp.MAX, group=parallel_state.get_model_parallel_group())
    return None if number.item() < 0.0 else number.item()

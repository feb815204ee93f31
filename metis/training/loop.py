"""A run from arguments to the last checkpoint: set up, resume, train, evaluate, save, leave.

The order at the end of an iteration is the reference trainer's: log, evaluate, exit checks (signal, periodic
save, duration, exit interval). Everything that a resumed run needs is in the checkpoint; the position in the
data is the number of consumed samples.
"""

from __future__ import annotations

import copy
import gc
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.timers import Timers
from megatron.core.utils import check_param_hashes_across_dp_replicas, get_model_config

from metis.clock import TrainingClock
from metis.mcore.state import num_basis_bytes
from metis.training import checkpointing, signals
from metis.training.accounting import flops_per_iteration
from metis.training.data import build_data_iterators
from metis.training.initialize import lower_timeout
from metis.training.metrics_file import MetricsFile
from metis.training.model import build_model
from metis.training.optimizer import build_optimizer, build_scheduler, learning_rate, parameter_norm
from metis.training.outputs import (
    ProgressFile,
    configure_logging,
    open_tensorboard,
    open_wandb,
    print_datetime,
    print_rank_0,
    theoretical_memory_line,
)
from metis.training.profiling import Profiler
from metis.training.recipe_phases import RecipePhases
from metis.training.state import TrainState
from metis.training.step import StepRunner
from metis.training.telemetry import StepReport, TrainingLog
from metis.training.tokenizer import build_tokenizer, padded_vocab_size


class Run:
    """Everything that a run is made of, built in order by `set_up`."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.state = TrainState()
        self.timers = Timers(args.timing_log_level, args.timing_log_option)
        self.clock = TrainingClock(seed=args.seed)
        self.async_queue = checkpointing.make_async_queue(args)

    def set_up(self) -> None:
        """Build tokenizer, model and optimizer, load a checkpoint, then open the data where it says."""
        args = self.args
        signals.mark_started(args.save)
        self.tokenizer = build_tokenizer(args)
        set_vocabulary(args, self.tokenizer.vocab_size)
        self.model = build_model(args, self.clock)
        self.optimizer = build_optimizer(args, self.model, self.timers)
        self.scheduler = build_scheduler(args, self.optimizer)
        self._connect_engine()
        self._report_theoretical_memory()
        print_datetime("after model, optimizer, and learning rate scheduler are built")
        trained = (None, None) if args.skip_train else (self.optimizer, self.scheduler)
        self.phases = RecipePhases(args, self.model)
        checkpointing.load_checkpoint(args, self.state, self.model, *trained, prepare=self.phases.restore)
        update_num_microbatches(self.state.consumed_train_samples, consistency_check=False)
        set_train_iterations(args, self.state)
        self.train_data, self.valid_data, self.test_data = build_data_iterators(
            args, self.state, self.tokenizer
        )
        print_datetime("after dataloaders are built")
        self.steps = StepRunner(args, self.model, self.optimizer, self.scheduler, self.clock, self.timers)
        self.log = self._open_log()
        self.progress = ProgressFile(args, self.state)
        print_rank_0("done with setup ...")

    def _connect_engine(self) -> None:
        """Give the engine its callbacks: gradient scale, gradient synchronisation, timers."""
        from megatron.core.distributed import finalize_model_grads

        args, model = self.args, self.model
        config = get_model_config(model[0])
        config.grad_scale_func = self.optimizer.scale_loss
        config.timers = self.timers if args.cuda_graph_impl == "none" else None  # they synchronise
        config.finalize_model_grads_func = finalize_model_grads

        def per_chunk(functions: list[Any]) -> Any:
            return functions[0] if len(functions) == 1 else functions

        if args.overlap_grad_reduce:
            config.no_sync_func = per_chunk([chunk.no_sync for chunk in model])
            if args.align_grad_reduce:
                config.grad_sync_func = per_chunk([chunk.start_grad_sync for chunk in model])
        if args.overlap_param_gather:
            config.param_sync_func = per_chunk([chunk.start_param_sync for chunk in model])

    def _report_theoretical_memory(self) -> None:
        if self.args.exact_reductions:
            return  # a test mode in float64, whose size says nothing about the model
        parameters = sum(parameter.numel() for chunk in self.model for parameter in chunk.parameters())
        print_rank_0(theoretical_memory_line(self.args, parameters, num_basis_bytes(self.model)))

    def _open_log(self) -> TrainingLog:
        args, iteration = self.args, self.state.iteration
        metrics = None
        if args.metrics_file and dist.get_rank() == dist.get_world_size() - 1:
            # Between two evaluation intervals only the evaluation at the end of a job can have left a line.
            keep_validation = not args.skip_train and iteration % args.eval_interval == 0
            metrics = MetricsFile(
                args.metrics_file, iteration, keep_validation=keep_validation, keep_later=args.skip_train
            )
        return TrainingLog(
            args,
            self.timers,
            writer=open_tensorboard(args, self.state.iteration),
            wandb=open_wandb(args),
            metrics=metrics,
        )

    def save(self) -> None:
        """Write a checkpoint of the current iteration, or hand it to the background writer."""
        state = copy.copy(self.state)  # an asynchronous save is complete when the run has moved on
        if self.async_queue is not None:
            self.progress.saved(state, scheduled=True)
        with self.complete_parameters():
            checkpointing.save_checkpoint(
                self.args,
                self.state,
                self.model,
                self.optimizer,
                self.scheduler,
                async_queue=self.async_queue,
                on_complete=lambda: self.progress.saved(state),
            )

    @contextmanager
    def complete_parameters(self) -> Iterator[None]:
        """Gather all parameters and keep them gathered inside: `--overlap-param-gather` leaves that to the
        next forward.
        """
        overlapped = self.args.overlap_param_gather
        for chunk in self.model if overlapped else ():
            chunk.disable_forward_pre_hook()
        try:
            yield
        finally:
            for chunk in self.model if overlapped else ():
                chunk.enable_forward_pre_hook()

    def evaluate(self, data: Any, *, where: str = "", to_metrics: bool = True) -> None:
        """Evaluate on `data` and report; the validation stream moves on."""
        args = self.args
        with self.complete_parameters():
            losses = self.steps.evaluate(data, args.eval_iters, iteration=self.state.iteration)
        if data is self.valid_data:
            self.state.consumed_valid_samples += args.eval_iters * args.global_batch_size
        self.log.validation(losses, self.state, where=where, to_metrics=to_metrics)


def set_vocabulary(args: Namespace, tokenizer_size: int) -> None:
    """Set `true_vocab_size` (the rows that mean something) and `padded_vocab_size` (the rows there are)."""
    args.true_vocab_size = max(tokenizer_size, args.vocab_size or 0)
    if args.tokenizer_type == "NullTokenizer":
        args.true_vocab_size = tokenizer_size
    if args.padded_vocab_size is None:
        args.padded_vocab_size = padded_vocab_size(
            args.true_vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
        )
    dummies = args.padded_vocab_size - args.true_vocab_size
    print_rank_0(
        f" > padded vocab (size: {args.true_vocab_size}) with {dummies} dummy tokens "
        f"(new size: {args.padded_vocab_size})"
    )


def set_train_iterations(args: Namespace, state: TrainState) -> None:
    """Derive `train_iters` from `--train-samples`: the iterations done, and those that the samples left fill,
    following the batch-size ramp-up.
    """
    if args.train_samples is None:
        return
    from metis.training.data_source import num_iterations

    args.train_iters = state.iteration + num_iterations(args, state.consumed_train_samples)
    print_rank_0(f"setting training iterations to {args.train_iters}")


def pretrain(args: Namespace) -> int:
    """Run the whole training that `args` describes; return the process's exit status.

    Needs `metis.training.initialize.initialize(args)` to have run. Collective: every rank calls it.
    """
    start_seconds = time.time()
    configure_logging(args.logging_level)
    run = Run(args)
    run.set_up()
    message = f"finished at iteration {run.state.iteration}"
    with signals.ExitWatcher(args, start_seconds) as watcher:
        if not args.skip_train and run.state.iteration < (args.train_iters or 0):
            message = _train(run, watcher) or f"finished at iteration {run.state.iteration}"
        if message.startswith("finished"):
            _final_evaluation(run)
    checkpointing.close_async_queue(run.async_queue, save=args.save)
    run.log.close()
    signals.mark_exited_cleanly(args.save, run.state.iteration, message)
    print_datetime(message)
    dist.barrier()
    return 0


def _train(run: Run, watcher: signals.ExitWatcher) -> str | None:
    """Train until the last iteration or a reason to leave; return that reason."""
    args, state = run.args, run.state
    for chunk in run.model:
        chunk.train()
    if args.manual_gc:
        gc.disable()
        gc.collect()
    print_datetime("before the start of training step")
    run.log.start()
    saved_at = started_at = state.iteration
    with Profiler(args) as profiler:
        while state.iteration < args.train_iters:
            checkpointing.finalize_async_saves(run.async_queue, save=args.save)
            _one_iteration(run)
            profiler.after_step(state.iteration)
            if state.iteration == started_at + 1:
                lower_timeout(args)
            decision = signals.exit_reason(args, state.iteration, watcher)
            if decision.save:
                with run.log.excluded():
                    run.save()
                saved_at = state.iteration
            if decision.message is not None:
                return decision.message
    if args.save and saved_at != state.iteration:
        run.save()
    return None


def _one_iteration(run: Run) -> None:
    """Run one step with its reporting, evaluation and periodic checks."""
    args, state = run.args, run.state
    update_num_microbatches(state.consumed_train_samples, consistency_check=True, verbose=True)
    batch_size = get_current_global_batch_size()
    flops = flops_per_iteration(args, batch_size)
    run.phases.enter(state.iteration)
    if state.iteration in args.iterations_to_skip:
        run.steps.skip_batch(run.train_data)
        state.iteration += 1
        state.consumed_train_samples += batch_size
        state.skipped_train_samples += batch_size
        return
    assert get_num_microbatches() * args.micro_batch_size * args.data_parallel_size == batch_size
    loss_scale = float(run.optimizer.get_loss_scale().item())
    step_learning_rate = learning_rate(run.optimizer)
    result = run.steps.train_step(run.train_data, state.iteration)
    state.iteration += 1
    state.consumed_train_samples += batch_size
    state.num_floating_point_operations += flops
    state.skipped_iterations += not result.applied
    params_norm = None
    if args.log_params_norm:
        with run.complete_parameters():
            params_norm = parameter_norm(run.model)
    report = StepReport(
        iteration=state.iteration,
        losses=result.losses,
        learning_rate=step_learning_rate,
        global_batch_size=batch_size,
        loss_scale=loss_scale,
        grad_norm=result.grad_norm,
        num_zeros=result.num_zeros,
        params_norm=params_norm,
        skipped=not result.applied,
        nonfinite=result.nonfinite,
        num_floating_point_operations=flops,
    )
    run.log.record(report, state)
    run.log.quantization(run.steps.quantization.collect(), state.iteration)
    _periodic(run)


def _periodic(run: Run) -> None:
    """Do what happens every so many iterations: evaluation, replica check, garbage collection."""
    args, iteration = run.args, run.state.iteration
    if run.valid_data is not None and args.eval_iters and iteration % args.eval_interval == 0:
        with run.log.excluded():
            if args.manual_gc and args.manual_gc_eval:
                gc.collect()
            run.evaluate(run.valid_data)
    interval = args.check_weight_hash_across_dp_replicas_interval
    if interval and iteration % interval == 0:
        with run.log.excluded(), run.complete_parameters():
            assert check_param_hashes_across_dp_replicas(run.model, cross_check=True)
            print_rank_0(f">>> weight hashes match across data-parallel replicas at iteration {iteration}")
    if args.manual_gc and args.manual_gc_interval and iteration % args.manual_gc_interval == 0:
        gc.collect()


def _final_evaluation(run: Run) -> None:
    """Evaluate on validation and test data after the last iteration, as the reference trainer does."""
    args, iteration = run.args, run.state.iteration
    if not args.eval_iters:
        return
    if run.valid_data is not None:
        recorded = not args.skip_train and iteration % args.eval_interval == 0
        run.evaluate(run.valid_data, where="on validation set", to_metrics=not recorded)
    if run.test_data is not None:
        args.eval_iters = args.test_eval_iters  # --full-validation counts one pass over validation there
        run.evaluate(run.test_data, where="on test set", to_metrics=False)

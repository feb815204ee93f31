"""megatron-core's optimizer and schedule from Megatron's arguments; the unit of the schedule is samples."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

import megatron_patches
from metis.training.learning_rate import schedule_lengths
from metis.training.model import DTYPES
from metis.training.outputs import print_rank_0


def build_optimizer(args: Namespace, model: list[nn.Module], timers: Any) -> Any:
    """Return megatron-core's AdamW for the chunks, distributed with `--use-distributed-optimizer`."""
    config = OptimizerConfig(
        optimizer=args.optimizer,
        lr=args.lr,
        min_lr=args.min_lr,
        decoupled_lr=args.decoupled_lr,
        decoupled_min_lr=args.decoupled_min_lr,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        bf16=args.bf16,
        fp16=args.fp16,
        params_dtype=DTYPES[args.params_dtype_name],
        loss_scale=args.loss_scale,
        initial_loss_scale=args.initial_loss_scale,
        min_loss_scale=args.min_loss_scale,
        loss_scale_window=args.loss_scale_window,
        hysteresis=args.hysteresis,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_param_gather=args.overlap_param_gather,
        clip_grad=args.clip_grad,
        log_num_zeros_in_grad=args.log_num_zeros_in_grad,
        timers=timers,
    )
    overrides = get_standard_config_overrides(config)
    fuse = args.device == "cuda" and not (args.no_optimizer_fusion or args.exact_reductions)
    if fuse:
        megatron_patches.patch_optimizer_passes()
    optimizer = get_megatron_optimizer(
        config, model, config_overrides=overrides, use_gloo_process_groups=True
    )
    if fuse:
        fused = "fused" if fuse_adamw(optimizer) else "Transformer Engine's or Apex's"
        print_rank_0(f" > optimizer: {fused} AdamW; gradient norm, clipping and copies in one pass each")
    return optimizer


def fuse_adamw(optimizer: Any) -> int:
    """Let torch's AdamW inside megatron-core's optimizer step in one pass; return how many there are.

    With Transformer Engine or Apex megatron-core takes their fused one, and there is nothing to do. The flag
    is set for the time of a step only: parameter groups are saved and loaded, and a checkpoint should say
    nothing about the device that wrote it.
    """
    inner = [each.optimizer for each in getattr(optimizer, "chained_optimizers", [optimizer])]
    found = [each for each in inner if isinstance(each, torch.optim.AdamW | torch.optim.Adam)]
    for adam in found:
        adam.register_step_pre_hook(_before_step)
        adam.register_step_post_hook(_after_step)
    return len(found)


def _before_step(adam: torch.optim.Optimizer, *_step_arguments: Any) -> None:
    """Ask for the fused kernel, which reads each parameter's step count beside it."""
    for group in adam.param_groups:
        group["fused"] = True
        for parameter in group["params"]:
            state = adam.state.get(parameter)
            if state and state["step"].device != parameter.device:
                state["step"] = state["step"].to(parameter.device)


def _after_step(adam: torch.optim.Optimizer, *_step_arguments: Any) -> None:
    for group in adam.param_groups:
        group["fused"] = None


def build_scheduler(args: Namespace, optimizer: Any) -> OptimizerParamScheduler:
    """Return the learning-rate and weight-decay schedule, in samples whichever unit the arguments use."""
    lengths = schedule_lengths(args)
    constant = args.weight_decay_incr_style == "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=lengths.warmup,
        lr_decay_steps=lengths.decay,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay if constant else args.start_weight_decay,
        end_wd=args.weight_decay if constant else args.end_weight_decay,
        wd_incr_steps=lengths.total,
        wd_incr_style=args.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        wsd_decay_steps=lengths.wsd,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )


def learning_rate(optimizer: Any) -> float | None:
    """Return the learning rate of the first group that is not decoupled, or None without parameters."""
    for group in optimizer.param_groups:
        if group["params"] and not group.get("is_decoupled_lr", False):
            return float(group["lr"])
    return float(optimizer.param_groups[0]["lr"]) if optimizer.param_groups else None


def parameter_norm(model: list[nn.Module]) -> float:
    """Return the l2 norm over all parameters of all model-parallel ranks, each counted once."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    device = next(model[0].parameters()).device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for chunk in model:
        for parameter in chunk.parameters():
            if param_is_not_tensor_parallel_duplicate(parameter) and param_is_not_shared(parameter):
                squares += parameter.detach().to(torch.float64).square().sum()
    torch.distributed.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    return float(squares.sqrt())

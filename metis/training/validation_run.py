"""Argument checks of everything but layout and shape: length, schedule, precision, recompute, data,
checkpoints.

Each function checks one concern, fills in what follows from it as Megatron-LM's trainer does, and raises one
`ConfigError` at the option to change. `validation.validate_args` calls them in order.

Trap: `--print-config` may be asked before data and schedule are decided, so their absence is an error only
for a run.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace

from metis.training.validation_checks import require, warn

MEGATRON_LEGACY_SPLIT = "969, 30, 1"


def check_training_length(args: Namespace) -> None:
    """Length in iterations or in samples, never mixed."""
    by_iters, by_samples = args.train_iters is not None, args.train_samples is not None
    require(
        not (by_iters and by_samples),
        "--train-samples",
        "must not be combined with --train-iters; keep one of them",
    )
    if not by_iters and not by_samples:
        require(
            args.skip_train or args.print_config,
            "--train-iters",
            "must be given (or --train-samples), received nothing",
        )
        if args.skip_train:
            args.train_iters = 0
    other = "iterations" if by_samples else "samples"
    clashes = (
        ("--lr-decay-iters", args.lr_decay_iters is not None, by_samples),
        ("--lr-warmup-iters", args.lr_warmup_iters != 0, by_samples),
        ("--lr-wsd-decay-iters", args.lr_wsd_decay_iters is not None, by_samples),
        ("--lr-decay-samples", args.lr_decay_samples is not None, by_iters),
        ("--lr-warmup-samples", args.lr_warmup_samples != 0, by_iters),
        ("--lr-wsd-decay-samples", args.lr_wsd_decay_samples is not None, by_iters),
        ("--rampup-batch-size", args.rampup_batch_size is not None, by_iters),
    )
    for option, present, clash in clashes:
        counted = "samples" if by_samples else "iterations"
        require(
            not (present and clash),
            option,
            f"counts {other}, but training is counted in {counted}; use "
            f"--train-{'iters' if by_samples else 'samples'}"
            " or its twin option",
        )


def check_schedule(args: Namespace) -> None:
    """Learning rate, weight decay and Adam constants as the scheduler and optimizer require them."""
    require(
        args.lr is not None or args.skip_train or args.print_config, "--lr", "must be given, received nothing"
    )
    require(
        args.lr is None or 0 <= args.lr <= 1e30,
        "--lr",
        f"must lie in [0, 1e30], where Adam's fp32 arithmetic can hold it, received {args.lr}",
    )
    if args.lr is None and args.skip_train:
        args.lr = args.min_lr  # nobody will use it
    for low, high in (("min_lr", "lr"), ("lr_warmup_init", "lr"), ("decoupled_min_lr", "decoupled_lr")):
        small, large = getattr(args, low), getattr(args, high)
        require(
            small is None or large is None or small <= large,
            f"--{low.replace('_', '-')}",
            f"must not exceed --{high.replace('_', '-')} {large}, received {small}",
        )
    require(
        args.decoupled_min_lr is None or args.decoupled_lr is not None,
        "--decoupled-min-lr",
        "needs --decoupled-lr; give both",
    )
    kind = "samples" if args.train_samples is not None else "iters"
    length = getattr(args, f"train_{kind}")
    decay = getattr(args, f"lr_decay_{kind}") or length
    warmup = getattr(args, f"lr_warmup_{kind}")
    if args.lr_warmup_fraction is not None:
        require(
            warmup == 0,
            "--lr-warmup-fraction",
            f"must not be combined with --lr-warmup-{kind}; keep one of them",
        )
        require(args.lr_warmup_fraction < 1, "--lr-warmup-fraction", "must be below 1, received 1")
    require(
        not length or warmup < decay,
        f"--lr-warmup-{kind}",
        f"must be shorter than the decay of {decay} {kind}, received {warmup}",
    )
    wsd = getattr(args, f"lr_wsd_decay_{kind}")
    require(
        args.lr_decay_style != "WSD" or wsd is not None, f"--lr-wsd-decay-{kind}", "must be given with WSD"
    )
    require(
        not (args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler),
        "--override-opt-param-scheduler",
        "must not be combined with --use-checkpoint-opt-param-scheduler; keep one of them",
    )
    start, end = args.start_weight_decay, args.end_weight_decay
    if args.weight_decay_incr_style == "constant":
        require(
            (start is None and end is None) or start == end == args.weight_decay,
            "--start-weight-decay",
            "and --end-weight-decay need --weight-decay-incr-style linear or cosine",
        )
        args.start_weight_decay = args.end_weight_decay = args.weight_decay
    else:
        require(
            start is not None and end is not None and end >= start,
            "--weight-decay-incr-style",
            f"needs --start-weight-decay not above --end-weight-decay, received {start} and {end}",
        )
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(args, name)
        require(value < 1, f"--{name.replace('_', '-')}", f"must be below 1, received {value}")


def check_precision(args: Namespace) -> None:
    """One low precision at most; sets params_dtype_name and fp32 gradients for bf16."""
    require(not (args.bf16 and args.fp16), "--fp16", "must not be combined with --bf16; keep one of them")
    low = "--bf16" if args.bf16 else "--fp16"
    require(
        not (args.exact_reductions and (args.bf16 or args.fp16)),
        "--exact-reductions",
        f"is for fp32 runs: sums are rounded once to fp32; remove {low}",
    )
    require(
        not args.grad_reduce_in_bf16 or args.bf16,
        "--grad-reduce-in-bf16",
        "needs --bf16; add it or remove this",
    )
    require(
        not (args.grad_reduce_in_bf16 and args.accumulate_allreduce_grads_in_fp32),
        "--grad-reduce-in-bf16",
        "must not be combined with --accumulate-allreduce-grads-in-fp32; keep one of them",
    )
    require(
        args.loss_scale is None or 0 < args.loss_scale < float("inf"),
        "--loss-scale",
        f"must be above 0 and finite, received {args.loss_scale}; leave it out for a dynamic scale",
    )
    if args.fp16 and args.loss_scale is None:
        # Overflows are how a dynamic loss scale learns its size: such steps are skipped, not fatal.
        args.check_for_nan_in_loss_and_grad = False
    if args.bf16 and not args.grad_reduce_in_bf16:
        args.accumulate_allreduce_grads_in_fp32 = True
    names = {"bf16": args.bf16, "fp16": args.fp16, "fp64": args.exact_reductions}
    args.params_dtype_name = next((name for name, chosen in names.items() if chosen), "fp32")


def check_graphs(args: Namespace) -> None:
    """A captured step asks the device nothing and is whole on every rank."""
    if args.cuda_graph_impl == "none":
        for name in ("cuda_graph_scope", "cuda_graph_warmup_steps"):
            if name in args.given:
                warn(args, f"--{name.replace('_', '-')} has no effect without --cuda-graph-impl local")
        return
    reason = "must not be combined with --cuda-graph-impl local"
    for option, is_there, why in (
        ("--device", args.device == "cpu", "which needs a GPU"),
        ("--pipeline-model-parallel-size", args.pipeline_model_parallel_size > 1, "which captures no stages"),
        ("--recompute-granularity", args.recompute_granularity is not None, "which saves no random states"),
        ("--attention-dropout", args.attention_dropout > 0.0, "which draws no random numbers; set it to 0"),
        ("--hidden-dropout", args.hidden_dropout > 0.0, "which draws no random numbers; set it to 0"),
        ("--fp16", args.fp16, "which scales no losses; use --bf16"),
        ("--overlap-grad-reduce", args.overlap_grad_reduce, "which runs no hooks in backward"),
        ("--overlap-param-gather", args.overlap_param_gather, "which runs no hooks in forward"),
        ("--calculate-per-token-loss", args.calculate_per_token_loss, "which reads no token counts"),
        ("--check-for-large-grads", args.check_for_large_grads, "which looks at no gradients in backward"),
        ("--timing-log-level", args.timing_log_level > 1, "which times no part of a step; lower it"),
        ("--quantize-kernels", args.quantize_kernels == "torch", "whose plain PyTorch asks the device"),
    ):
        require(not is_there, option, f"{reason}, {why}")


def check_recompute(args: Namespace) -> None:
    """Full recomputation needs a method and a number, selective takes modules."""
    if args.recompute_activations:
        require(
            args.recompute_granularity in (None, "selective"),
            "--recompute-activations",
            "means --recompute-granularity selective; remove one of them",
        )
        args.recompute_granularity = "selective"
    full = args.recompute_granularity == "full"
    require(
        not full or args.recompute_method is not None,
        "--recompute-method",
        "must be uniform or block with --recompute-granularity full, received nothing",
    )
    for option, value in (
        ("--recompute-method", args.recompute_method),
        ("--recompute-num-layers", args.recompute_num_layers),
    ):
        require(value is None or full, option, "needs --recompute-granularity full; remove it or add that")
    require(
        args.recompute_method is None or args.recompute_num_layers is not None,
        "--recompute-num-layers",
        f"must be given with --recompute-method {args.recompute_method}, received nothing",
    )
    require(
        args.recompute_modules is None or args.recompute_granularity == "selective",
        "--recompute-modules",
        "needs --recompute-granularity selective; remove it or add that",
    )


def check_environment(args: Namespace) -> None:
    """Options that need a device or an installed package."""
    require(
        not (args.device == "cpu" and args.distributed_backend == "nccl"),
        "--distributed-backend",
        "must be gloo or auto with --device cpu: NCCL moves GPU memory only",
    )
    require(
        args.transformer_impl != "transformer_engine"
        or importlib.util.find_spec("transformer_engine") is not None,
        "--transformer-impl",
        "asks for transformer_engine, which is not installed; pip install transformer-engine[pytorch] or "
        "use local",
    )
    require(
        args.attention_backend not in ("fused", "unfused")
        or (args.transformer_impl != "local" and importlib.util.find_spec("transformer_engine") is not None),
        "--attention-backend",
        f"{args.attention_backend} belongs to Transformer Engine; use auto, flash or local without it",
    )
    require(
        not (args.cross_entropy_loss_fusion and args.no_cross_entropy_loss_fusion),
        "--no-cross-entropy-loss-fusion",
        "contradicts --cross-entropy-loss-fusion; remove one of them",
    )
    require(
        args.wandb_project is None or importlib.util.find_spec("wandb") is not None,
        "--wandb-project",
        "needs the package wandb; pip install wandb or remove the option",
    )
    require(
        not args.wandb_project or args.wandb_exp_name,
        "--wandb-exp-name",
        "must be given with --wandb-project",
    )
    require(
        not args.use_pytorch_profiler or not args.profile or args.tensorboard_dir is not None,
        "--use-pytorch-profiler",
        "writes into --tensorboard-dir; give that directory",
    )
    require(
        not args.profile or args.profile_step_end > args.profile_step_start,
        "--profile-step-end",
        f"must exceed --profile-step-start {args.profile_step_start}, received {args.profile_step_end}",
    )


def check_data(args: Namespace) -> None:
    """Exactly one data source, a split, and a tokenizer with its model."""
    per_split = any((args.train_data_path, args.valid_data_path, args.test_data_path))
    sources = {
        "--data-path": bool(args.data_path),
        "--data-args-path": args.data_args_path is not None,
        "--train-data-path": per_split,
        "--per-split-data-args-path": args.per_split_data_args_path is not None,
        "--mock-data": args.mock_data,
    }
    used = [option for option, present in sources.items() if present]
    require(
        len(used) <= 1, used[-1] if used else "", f"is one data source too many: {', '.join(used)}; keep one"
    )
    require(
        bool(used) or args.print_config,
        "--data-path",
        "or another data source must be given, e.g. --mock-data",
    )
    if used and used[0] in ("--data-path", "--data-args-path") and args.split is None:
        warn(args, f"--split is not given; using {MEGATRON_LEGACY_SPLIT!r}")
        args.split = MEGATRON_LEGACY_SPLIT
    if args.split is not None:
        require(
            not per_split and args.per_split_data_args_path is None,
            "--split",
            "belongs to --data-path; remove it, every split has its own data here",
        )
        split_shares(args.split)
    require(
        bool(args.tokenizer_type) or not used,
        "--tokenizer-type",
        "must be given, received nothing; e.g. SentencePieceTokenizer or NullTokenizer",
    )
    require(
        args.tokenizer_type in (None, "NullTokenizer") or args.tokenizer_model is not None,
        "--tokenizer-model",
        f"must name the model of the {args.tokenizer_type}, received nothing",
    )
    require(
        args.tokenizer_type != "NullTokenizer" or args.vocab_size is not None,
        "--vocab-size",
        "must be given with --tokenizer-type NullTokenizer, received nothing",
    )
    args.dataloader_type = args.dataloader_type or "single"


def split_shares(split: str) -> list[float]:
    """Return the shares of `--split`, between commas or slashes as megatron-core reads them.

    Raises:
        ConfigError: other than one to three shares in digits and points, or none above 0.
    """
    parts = [part.strip() for part in split.replace("/", ",").split(",")]
    try:
        shares = [float(part) for part in parts if set(part) <= set(".0123456789")]
    except ValueError:
        shares = []
    require(
        1 <= len(shares) == len(parts) <= 3 and 0 < sum(shares) < float("inf"),
        "--split",
        "must be one to three shares in digits and points such as 99,1,0 with a positive sum, "
        f"received {split!r}; correct it",
    )
    return shares


def check_checkpoint(args: Namespace) -> None:
    """Saving, retention and loading options that need each other."""
    if args.save is not None:
        require(
            args.save_interval is not None, "--save-interval", "must be given with --save, received nothing"
        )
    if args.save_retain_interval is not None:
        require(
            args.save_interval is not None and args.save_retain_interval % args.save_interval == 0,
            "--save-retain-interval",
            f"must be a multiple of --save-interval {args.save_interval}, received "
            f"{args.save_retain_interval}",
        )
    for option, value in (
        ("--save-interval", args.save_interval),
        ("--keep-last-checkpoints", args.keep_last_checkpoints),
        ("--async-save", args.async_save or None),
        ("--log-progress", args.log_progress or None),
    ):
        require(value is None or args.save is not None, option, "needs --save DIR; add it or remove this")
    for option, value in (
        ("--ckpt-step", args.ckpt_step),
        ("--exit-on-missing-checkpoint", args.exit_on_missing_checkpoint or None),
    ):
        known = args.load is not None or args.pretrained_checkpoint is not None
        require(value is None or known, option, "needs --load DIR; add it or remove this")
    require(
        not args.use_persistent_ckpt_worker or args.async_save,
        "--use-persistent-ckpt-worker",
        "needs --async-save; add it or remove this",
    )
    require(
        not (args.use_persistent_ckpt_worker and args.device == "cpu"),
        "--use-persistent-ckpt-worker",
        "works on GPUs only; remove it, --async-save forks a writer on CPUs",
    )
    require(
        not args.use_mp_args_from_checkpoint_args or args.use_checkpoint_args,
        "--use-mp-args-from-checkpoint-args",
        "needs --use-checkpoint-args; add it or remove this",
    )

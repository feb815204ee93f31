"""Argument checks of the parallel layout: ranks, tensor and pipeline divisibility, interleaving, batch sizes.

Each function checks one concern, fills in what follows from it as Megatron-LM's trainer does, and raises one
`ConfigError` at the option to change. `validation.validate_args` calls them in order.

Trap: interleaving over two stages needs overlapped messages. The batched kind exchanges two tensors with the
same peer at once and mixes them up without an error (megatron-core 0.16.1), so `batch_p2p_comm` is off
whenever virtual stages are on, and `--no-overlap-p2p-communication` is refused for two stages.
"""

from __future__ import annotations

from argparse import Namespace

from metis.errors import ConfigError
from metis.training.validation_checks import require, warn


def check_parallel(args: Namespace, world_size: int) -> None:
    """Fit the world to TP x PP x CP, and each option to the groups it needs; sets data_parallel_size."""
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    model_ranks = tp * pp * cp
    if world_size % model_ranks:
        largest = world_size // model_ranks * model_ranks
        remedy = f"start {largest or model_ranks} ranks or choose sizes whose product divides {world_size}"
        raise ConfigError(
            "--tensor-model-parallel-size",
            f"x pipeline x context size must divide the number of ranks, received {tp} x {pp} x {cp} = "
            f"{model_ranks} for a world size of {world_size}; {remedy}",
        )
    args.data_parallel_size = world_size // model_ranks
    require(
        args.seq_length % (2 * cp) == 0 or cp == 1,
        "--seq-length",
        f"must be a multiple of 2 x context parallel size = {2 * cp}, received {args.seq_length}",
    )
    if args.sequence_parallel and tp == 1:
        warn(args, "--sequence-parallel is off because the tensor parallel size is 1")
        args.sequence_parallel = False
    require(
        not args.sequence_parallel or args.seq_length // cp % tp == 0,
        "--sequence-parallel",
        f"needs a sequence per context rank divisible by the tensor parallel size {tp}, received "
        f"{args.seq_length // cp} tokens; change --seq-length",
    )
    if args.tp_comm_overlap and tp == 1:
        warn(args, "--tp-comm-overlap is off because the tensor parallel size is 1")
        args.tp_comm_overlap = False
    for option, missing in (
        ("--sequence-parallel", not args.sequence_parallel),
        ("--transformer-impl local", args.transformer_impl == "transformer_engine"),
        ("no --spec", args.spec is not None),
    ):
        require(
            not (args.tp_comm_overlap and missing), "--tp-comm-overlap", f"needs {option}; change one of them"
        )
    require(
        not (cp > 1 and args.reset_attention_mask),
        "--reset-attention-mask",
        "must not be combined with context parallelism: its attention knows the causal mask only",
    )
    require(
        not args.overlap_param_gather or args.use_distributed_optimizer,
        "--overlap-param-gather",
        "needs --use-distributed-optimizer; add it",
    )
    require(
        not args.overlap_param_gather or args.overlap_grad_reduce,
        "--overlap-param-gather",
        "needs --overlap-grad-reduce; add it",
    )
    require(
        not (args.ddp_num_buckets and args.ddp_bucket_size),
        "--ddp-num-buckets",
        "must not be combined with --ddp-bucket-size; keep one of them",
    )


def check_tensor_parallel(args: Namespace) -> None:
    """Heads, query groups, MLP width and a given vocabulary must divide by TP."""
    tp = args.tensor_model_parallel_size
    for option, size, what in (
        ("--num-attention-heads", args.num_attention_heads, "heads"),
        ("--num-query-groups", args.num_query_groups, "query groups"),
        ("--ffn-hidden-size", args.ffn_hidden_size, "channels"),
        ("--padded-vocab-size", args.padded_vocab_size or 0, "rows"),
    ):
        require(
            size % tp == 0,
            option,
            f"must be divisible by --tensor-model-parallel-size {tp}, received {size} {what}; change one of "
            "them",
        )


def check_pipeline(args: Namespace) -> None:
    """Turn the options for virtual and uneven stages into a layout; sets the virtual pipeline size."""
    pp, layers = args.pipeline_model_parallel_size, args.num_layers
    per_stage, per_rank = (
        args.num_layers_per_virtual_pipeline_stage,
        args.num_virtual_stages_per_pipeline_rank,
    )
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    extra = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    uneven = first is not None or last is not None
    require(
        per_stage is None or per_rank is None,
        "--num-layers-per-virtual-pipeline-stage",
        "must not be combined with --num-virtual-stages-per-pipeline-rank; keep one of them",
    )
    require(
        not (uneven and extra),
        "--decoder-first-pipeline-num-layers",
        "and -last- must not be combined with --account-for-...-in-pipeline-split; keep one kind",
    )
    require(
        per_stage is None or not uneven,
        "--num-layers-per-virtual-pipeline-stage",
        "must not be combined with --decoder-first/-last-pipeline-num-layers; use "
        "--num-virtual-stages-per-pipeline-rank",
    )
    virtual = per_rank or 1
    if per_stage is not None:
        units = layers + extra
        require(
            units % (pp * per_stage) == 0,
            "--num-layers-per-virtual-pipeline-stage",
            f"x --pipeline-model-parallel-size must divide the number of layers, received {per_stage} x "
            f"{pp} for "
            f"{units} layers",
        )
        virtual = units // (pp * per_stage)
    _check_even_stages(args, virtual)
    args.virtual_pipeline_model_parallel_size = virtual if virtual > 1 else None
    _check_interleaving(args, virtual)


def _check_even_stages(args: Namespace, virtual: int) -> None:
    """Each stage gets the same number of blocks, apart from the first and last where they are given."""
    pp, rest, stages = args.pipeline_model_parallel_size, args.num_layers, args.pipeline_model_parallel_size
    for option, count in (
        ("--decoder-first-pipeline-num-layers", args.decoder_first_pipeline_num_layers),
        ("--decoder-last-pipeline-num-layers", args.decoder_last_pipeline_num_layers),
    ):
        if count is not None:
            require(pp > 1, option, "needs --pipeline-model-parallel-size of at least 2, received 1")
            require(
                count % virtual == 0,
                option,
                f"must be divisible by the {virtual} virtual stages of a rank, received {count}",
            )
            rest, stages = rest - count, stages - 1
    rest += args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    if stages == 0:
        require(rest == 0, "--num-layers", f"must equal the layers given per stage, {rest} are left over")
        return
    require(
        rest > 0 and rest % (stages * virtual) == 0,
        "--num-layers",
        f"must split evenly into {stages} pipeline stages x {virtual} virtual stages, received {rest} "
        "layers to "
        "split; change --num-layers, --pipeline-model-parallel-size or the virtual stages",
    )


def _check_interleaving(args: Namespace, virtual: int) -> None:
    pp = args.pipeline_model_parallel_size
    if virtual == 1:
        args.overlap_p2p_comm = False
        args.batch_p2p_comm = True
        args.align_param_gather = False
        return
    require(
        pp > 1,
        "--num-virtual-stages-per-pipeline-rank",
        "needs --pipeline-model-parallel-size of at least 2, received 1",
    )
    require(
        args.overlap_p2p_comm or pp > 2,
        "--no-overlap-p2p-communication",
        "must not be combined with virtual stages on 2 pipeline stages: batched messages between the same "
        "two ranks "
        "get mixed up; remove it",
    )
    args.batch_p2p_comm = not args.overlap_p2p_comm
    args.align_param_gather = args.overlap_param_gather


def check_batch(args: Namespace) -> None:
    """The global batch, and each batch of a ramp-up, must hold whole micro batches on every rank."""
    unit = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size is None:
        args.global_batch_size = unit
    described = (
        f"--micro-batch-size x data parallel size = {args.micro_batch_size} x {args.data_parallel_size}"
    )
    require(
        args.global_batch_size % unit == 0,
        "--global-batch-size",
        f"must be a multiple of {described} = {unit}, received {args.global_batch_size}",
    )
    sizes = [args.global_batch_size]
    if args.rampup_batch_size is not None:
        start, increment, _ = args.rampup_batch_size
        where = "--rampup-batch-size"
        require(increment > 0, where, f"needs a positive increment, received {increment}")
        require(
            start % unit == 0 and increment % unit == 0 and start > 0,
            where,
            f"start and increment must be multiples of {described} = {unit}, received {start} and "
            f"{increment}",
        )
        rise = args.global_batch_size - start
        require(
            rise >= 0 and rise % increment == 0,
            where,
            f"must reach --global-batch-size {args.global_batch_size} in whole increments, received start "
            f"{start} "
            f"and increment {increment}",
        )
        sizes += range(start, args.global_batch_size, increment)
    pp = args.pipeline_model_parallel_size
    for size in sizes if args.virtual_pipeline_model_parallel_size else ():
        require(
            size // unit % pp == 0,
            "--global-batch-size",
            f"must hold a multiple of {pp} micro batches per rank with virtual stages (the pipeline size), "
            "received "
            f"{size // unit}; choose a multiple of {unit * pp}",
        )

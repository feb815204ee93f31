"""Cross-checks between arguments and the values that follow from them, before anything slow is imported.

One idea: `validate_args` is a list of small checks, one per concern, run in order; each may fill in derived
values (FFN width, data parallel size, virtual stages, ...) as Megatron-LM's trainer does, and each violation
is one `ConfigError` at the option to change. What Megatron asserts later in a run (batch sizes, schedules,
divisibility) is decided here. This file holds the order and what concerns the model and its recipe.

Traps: derived values overwrite arguments in place, as in Megatron; call it once. `num_query_groups` becomes
the number of heads without `--group-query-attention`. The padded vocabulary needs the tokenizer unless it is
the NullTokenizer; `preflight` fills it in.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from typing import Any

from metis.training.accounting import linear_shards, linear_sizes
from metis.training.gemm_backend import TRANSFORMER_ENGINE, check_gemm_backend, check_quantize_kernels
from metis.training.learning_rate import num_training_steps, step_at_lr_fraction
from metis.training.validation_checks import require, warn
from metis.training.validation_layout import (
    check_batch,
    check_parallel,
    check_pipeline,
    check_tensor_parallel,
)
from metis.training.validation_run import (
    check_checkpoint,
    check_data,
    check_environment,
    check_graphs,
    check_precision,
    check_recompute,
    check_schedule,
    check_training_length,
)


def validate_args(args: Namespace, world_size: int) -> None:
    """Check `args` for a world of `world_size` ranks and fill in what follows from them.

    Derived: data_parallel_size, global_batch_size, ffn_hidden_size, kv_channels, num_query_groups,
    padded_vocab_size (when known without the tokenizer), virtual_pipeline_model_parallel_size,
    overlap_p2p_comm, batch_p2p_comm, sequence_parallel, params_dtype_name, split, recompute_granularity,
    start/end_weight_decay, resolved_recipe (of step 0), resolved_schedule, resolved_policy, factored_linears
    and others as in Megatron-LM.

    Raises ConfigError at the first violation.
    """
    args.world_size = world_size
    _check_required(args)
    _check_shape(args)
    check_parallel(args, world_size)
    check_tensor_parallel(args)
    check_pipeline(args)
    check_batch(args)
    check_training_length(args)
    check_schedule(args)
    check_precision(args)
    check_recompute(args)
    check_graphs(args)
    check_environment(args)
    check_data(args)
    check_checkpoint(args)
    _check_vocabulary(args)
    _check_recipe(args)


def _check_required(args: Namespace) -> None:
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings"):
        option = f"--{name.replace('_', '-')}"
        require(
            getattr(args, name) is not None, option, "must be given (or choose a --preset), received nothing"
        )
    require(args.micro_batch_size is not None, "--micro-batch-size", "must be given, received nothing")


def _check_shape(args: Namespace) -> None:
    if args.ffn_hidden_size is None:
        width = 4 * args.hidden_size
        args.ffn_hidden_size = width * 2 // 3 // 64 * 64 if args.swiglu else width
        require(
            args.ffn_hidden_size > 0,
            "--ffn-hidden-size",
            f"must be given: 8/3 of hidden size {args.hidden_size} rounded down to 64 is 0",
        )
    if args.kv_channels is None:
        require(
            args.hidden_size % args.num_attention_heads == 0,
            "--num-attention-heads",
            f"must divide --hidden-size {args.hidden_size}, received {args.num_attention_heads}; "
            "or give --kv-channels",
        )
        args.kv_channels = args.hidden_size // args.num_attention_heads
    if not args.group_query_attention:
        if "num_query_groups" in args.given and args.num_query_groups != args.num_attention_heads:
            warn(args, "--num-query-groups has no effect without --group-query-attention")
        args.num_query_groups = args.num_attention_heads
    require(
        args.num_attention_heads % args.num_query_groups == 0,
        "--num-query-groups",
        f"must divide --num-attention-heads {args.num_attention_heads}, received {args.num_query_groups}",
    )
    require(
        args.max_position_embeddings >= args.seq_length,
        "--max-position-embeddings",
        f"must be at least --seq-length {args.seq_length}, received {args.max_position_embeddings}; raise it",
    )
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    rotated = args.kv_channels * args.rotary_percent
    require(
        args.position_embedding_type != "rope" or (rotated >= 2 and rotated % 2 == 0),
        "--kv-channels",
        f"times --rotary-percent must be a positive even number of channels, received {rotated:g}",
    )
    if args.position_embedding_type != "rope":
        require(not args.use_rope_scaling, "--use-rope-scaling", "needs --position-embedding-type rope")
        args.apply_rope_fusion = False
    if args.add_bias_linear:
        args.add_qkv_bias = True
    else:
        args.bias_gelu_fusion = False


def _check_vocabulary(args: Namespace) -> None:
    """Set padded_vocab_size where the command line alone decides it; `preflight` does the rest."""
    if args.vocab_size is None:
        return
    if args.tokenizer_type in (None, "NullTokenizer"):
        set_padded_vocab_size(args, args.vocab_size + (args.tokenizer_type == "NullTokenizer"))


def set_padded_vocab_size(args: Namespace, tokenizer_vocab_size: int) -> None:
    """Set args.padded_vocab_size for a tokenizer of `tokenizer_vocab_size` ids, or check the one that was
    given.

    The model has at least `--vocab-size` rows, rounded up to a multiple of `--make-vocab-size-divisible-by` x
    TP. Raises ConfigError when a given size is smaller than the tokenizer.
    """
    from metis.training.tokenizer import padded_vocab_size

    for option, size in (
        ("--padded-vocab-size", args.padded_vocab_size),
        ("--vocab-size", None if args.tokenizer_type == "NullTokenizer" else args.vocab_size),
    ):
        require(
            size is None or size >= tokenizer_vocab_size,
            option,
            f"is a vocabulary too small: must be at least the tokenizer's {tokenizer_vocab_size} ids, "
            f"received {size}",
        )
    if args.padded_vocab_size is None:
        args.padded_vocab_size = padded_vocab_size(
            max(tokenizer_vocab_size, args.vocab_size or 0),
            args.make_vocab_size_divisible_by,
            args.tensor_model_parallel_size,
        )


def _check_recipe(args: Namespace) -> None:
    from metis.policy import resolve_policy
    from metis.recipes import recipe_to_dict, resolve_recipe
    from metis.schedule import Schedule, all_uses, read_schedule

    if args.fp4 is not None:
        require(
            "recipe" not in args.given or args.recipe == args.fp4_recipe,
            "--fp4-format",
            f"with --fp4-recipe {args.fp4_recipe} means --recipe {args.fp4_recipe}, received --recipe "
            f"{args.recipe}; "
            "keep one of them",
        )
        args.recipe = args.fp4_recipe
    recipe = resolve_recipe(args.recipe)
    by_count = args.first_last_layers_bf16 or bool(
        {"num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"} & set(args.given)
    )
    args.first_last_layers_bf16 = by_count
    start = args.num_layers_at_start_in_bf16 if by_count else None
    end = args.num_layers_at_end_in_bf16 if by_count else None
    policy = resolve_policy(args.policy, args.num_layers, start, end)
    schedule, args.resolved_schedule = Schedule.constant(recipe), None
    if args.recipe_schedule is not None:
        schedule = read_schedule(args.recipe_schedule, recipe, partial(step_at_lr_fraction, args))
        args.resolved_schedule = schedule.to_dict()
        _check_phases(args, schedule.start_steps)
    args.resolved_recipe = recipe_to_dict(schedule.recipe_at(0))
    args.resolved_policy = policy.to_dict()
    args.factored_linears = {}
    phases = schedule.recipes_by_phase(policy, args.num_layers)
    for recipes in phases.values():
        for path, used in recipes.items():
            _check_ranks(args, path, used)
            _check_linear(args, path, used)
    local = [r.name for r in all_uses(phases).values() if r.basis is not None and r.basis.tp_mode == "local"]
    require(
        args.cuda_graph_impl == "none" or args.tensor_model_parallel_size == 1 or not local,
        "--cuda-graph-impl",
        "must be none where every tensor-parallel rank renews bases of its own, in steps of its own (basis."
        f"tp_mode: local), received recipe {', '.join(sorted(set(local)))}",
    )
    check_gemm_backend(args, all_uses(phases))
    check_quantize_kernels(args, all_uses(phases))
    if args.spec is not None:
        _check_spec(args, all_uses(phases))


def _check_phases(args: Namespace, start_steps: list[int]) -> None:
    """Say which phases of the recipe schedule this run does not reach; refuse what cannot change recipes."""
    require(
        args.gemm_backend != TRANSFORMER_ENGINE or len(start_steps) == 1,
        "--gemm-backend",
        f"{TRANSFORMER_ENGINE} must not be combined with --recipe-schedule: its linears keep one recipe; use "
        "scaled_mm, emulated or auto",
    )
    num_steps = num_training_steps(args)
    late = [step for step in start_steps if num_steps is not None and step >= num_steps]
    if late and not args.skip_train:
        warn(
            args,
            f"--recipe-schedule: the phase from step {late[0]} on does not begin within the {num_steps} "
            "iterations of this run",
        )


def _check_spec(args: Namespace, recipes: Mapping[str, Any]) -> None:
    require(
        len(args.spec) == 2,
        "--spec",
        f"must be a module and a name, received {' '.join(args.spec) or 'nothing'}",
    )
    ours = next((used.name for used in recipes.values() if not used.is_high_precision), None)
    require(
        ours is None,
        "--spec",
        f"replaces the layers that compute by a recipe, received recipe {ours} as well; use --recipe bf16",
    )


def _check_ranks(args: Namespace, path: str, recipe: Any) -> None:
    """Check the ranks of the heads of the linear at `path`, and note the columns of trained factors.

    `args.factored_linears` maps the path of each reparametrised linear to its rank: which parameters there
    are, as compared when a checkpoint is loaded.
    """
    where = f"{path} (recipe {recipe.name})"
    in_features, out_features = linear_sizes(args)[path.split(".", 3)[3]]
    for setting, rank, multiple in recipe.quantized_ranks(in_features, out_features):
        require(
            rank % multiple == 0,
            where,
            f"must have a {setting} divisible by {multiple}, since blocks run along it, received {rank}",
        )
    if recipe.reparametrisation is not None:
        rank, most = recipe.reparametrisation.rank.columns(in_features), min(in_features, out_features)
        require(
            rank <= most,
            where,
            f"must have reparametrisation.rank of at most min(K, N) = {most}, received {rank}; lower "
            "rank.fixed or rank.minimum",
        )
        args.factored_linears[path] = rank
    if recipe.basis is not None:
        tp, chunks = args.tensor_model_parallel_size, recipe.basis.num_canonical_chunks
        require(
            chunks % tp == 0 or recipe.basis.tp_mode != "exact",
            where,
            f"must have basis.num_canonical_chunks a multiple of the tensor parallel size {tp}, received "
            f"{chunks}",
        )


def _check_linear(args: Namespace, path: str, recipe: Any) -> None:
    """Check that the operands of the linear at `path` consist of whole blocks under `recipe` on one rank."""
    if not recipe.is_quantized and recipe.axis_multiple("in_features") == 1:
        return
    where = f"{path} (recipe {recipe.name})"
    require(
        not args.fp16,
        "--fp16",
        f"must not be combined with recipe {recipe.name}, which computes in bf16 or fp32",
    )
    tp = args.tensor_model_parallel_size
    for axis, size, options in linear_shards(args)[path.split(".", 3)[3]]:
        multiple = recipe.axis_multiple("in_features" if axis.endswith("K") else "out_features")
        require(
            size % multiple == 0,
            where,
            f"must have {axis} per tensor parallel rank divisible by {multiple}, received {size} at TP={tp}; "
            "change "
            f"{options} or --tensor-model-parallel-size, or keep this layer in bf16 with --policy",
        )
    cp = args.context_parallel_size
    pieces = 1 if cp == 1 else 2 * cp  # a context parallel rank holds two pieces of the sequence, apart
    tokens = args.micro_batch_size * args.seq_length // pieces
    multiple = recipe.axis_multiple("tokens")
    require(
        tokens % multiple == 0,
        where,
        f"must have tokens per micro batch {'and context piece ' if cp > 1 else ''}divisible by {multiple}, "
        f"received {tokens} = {args.micro_batch_size} x {args.seq_length} / {pieces}; change --seq-length or "
        "--micro-batch-size",
    )

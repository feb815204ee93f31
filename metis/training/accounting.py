"""What a run is in numbers, from the arguments alone: shapes, parameters, FLOPs, the resolved configuration.

One idea: counts are arithmetic on the arguments, so they need neither torch nor a model and can be printed
before a job is queued (`--print-config`). FLOPs follow Megatron-LM 0.16's formula, so that TFLOP/s compare
with its logs: causal attention counted half, recomputation not counted, the padded vocabulary counted, a
backward pass as two forwards.

Traps: counts are of the plain model; recipes that reparametrise weights add factors on top. The vocabulary is
unknown until the tokenizer has been read, and then so are parameters and FLOPs.
"""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any


def linear_shards(args: Namespace) -> dict[str, list[tuple[str, int, str]]]:
    """Return, for each linear of a block, (axis, size on one tensor parallel rank, options that set it).

    Column-parallel linears (QKV, FC1) shard N, row-parallel ones (projection, FC2) shard K. Gate and up count
    apart: each is a matrix of its own to blocks.
    """
    tp = args.tensor_model_parallel_size
    heads, groups, channels = args.num_attention_heads, args.num_query_groups, args.kv_channels
    hidden = ("--hidden-size", args.hidden_size)
    attention = "--num-attention-heads or --kv-channels"
    ffn = args.ffn_hidden_size // tp
    return {
        "self_attention.linear_qkv": [
            ("input features K", hidden[1], hidden[0]),
            ("query features N", heads * channels // tp, attention),
            ("key (and value) features N", groups * channels // tp, "--num-query-groups or --kv-channels"),
        ],
        "self_attention.linear_proj": [
            ("input features K", heads * channels // tp, attention),
            ("output features N", hidden[1], hidden[0]),
        ],
        "mlp.linear_fc1": [
            ("input features K", hidden[1], hidden[0]),
            ("gate (and up) features N" if args.swiglu else "output features N", ffn, "--ffn-hidden-size"),
        ],
        "mlp.linear_fc2": [
            ("input features K", ffn, "--ffn-hidden-size"),
            ("output features N", hidden[1], hidden[0]),
        ],
    }


def linear_sizes(args: Namespace) -> dict[str, tuple[int, int]]:
    """Return (in_features K, out_features N) of each linear of a block, whole."""
    hidden, ffn = args.hidden_size, args.ffn_hidden_size
    query, key = args.num_attention_heads * args.kv_channels, args.num_query_groups * args.kv_channels
    return {
        "self_attention.linear_qkv": (hidden, query + 2 * key),
        "self_attention.linear_proj": (query, hidden),
        "mlp.linear_fc1": (hidden, ffn * (2 if args.swiglu else 1)),
        "mlp.linear_fc2": (ffn, hidden),
    }


def count_parameters(args: Namespace) -> int:
    """Return the number of trainable parameters of the whole model (all ranks), padded vocabulary included.

    Needs validated `args` with `padded_vocab_size`.
    """
    hidden, ffn, vocab = args.hidden_size, args.ffn_hidden_size, args.padded_vocab_size
    query, key = args.num_attention_heads * args.kv_channels, args.num_query_groups * args.kv_channels
    gates = 2 if args.swiglu else 1
    per_channel = 2 if args.normalization == "LayerNorm" else 1
    block = hidden * (query + 2 * key) + query * hidden + (gates + 1) * hidden * ffn
    block += 2 * per_channel * hidden + (2 * per_channel * args.kv_channels if args.qk_layernorm else 0)
    if args.add_qkv_bias or args.add_bias_linear:
        block += query + 2 * key
    if args.add_bias_linear:
        block += hidden + gates * ffn + hidden
    total = args.num_layers * block + per_channel * hidden
    total += vocab * hidden * (2 if args.untie_embeddings_and_output_weights else 1)
    if args.position_embedding_type == "learned_absolute":
        total += args.max_position_embeddings * hidden
    return total


def flops_per_iteration(args: Namespace, batch_size: int) -> float:
    """Return the model FLOPs of one iteration over `batch_size` samples, summed over all ranks.

    3 * 2 * batch * s * [L (h (q + 2 kv) + q s + q h + h f G) + h V], with q = heads * channels, kv = groups *
    channels, G = 3 for a gated MLP else 2, V the padded vocabulary. The two attention matmuls cost 2 q s per
    token, halved because the mask is causal.
    """
    hidden, sequence = args.hidden_size, args.seq_length
    query, key = args.num_attention_heads * args.kv_channels, args.num_query_groups * args.kv_channels
    matrices = 3 if args.swiglu else 2
    block = hidden * (query + 2 * key) + query * sequence + query * hidden
    block += hidden * args.ffn_hidden_size * matrices
    per_token = args.num_layers * block + hidden * args.padded_vocab_size
    return 3.0 * 2.0 * batch_size * sequence * per_token


_MODEL_FIELDS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "seq_length", "max_position_embeddings", "position_embedding_type", "rotary_base", "use_rope_scaling",
    "rope_scaling_factor", "normalization", "layernorm_epsilon", "swiglu", "add_bias_linear", "add_qkv_bias",
    "untie_embeddings_and_output_weights", "vocab_size", "padded_vocab_size",
)  # fmt: skip
_PARALLEL_FIELDS = (
    "world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size", "context_parallel_size", "data_parallel_size",
    "sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather",
    "overlap_p2p_comm", "tp_comm_overlap",
)  # fmt: skip
_TRAINING_FIELDS = (
    "micro_batch_size", "global_batch_size", "rampup_batch_size", "train_iters", "train_samples", "lr",
    "min_lr", "lr_decay_style", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "seed",
    "params_dtype_name", "exact_reductions", "recompute_granularity", "device", "distributed_backend",
    "transformer_impl", "gemm_backend", "quantize_kernels", "weight_cache", "nonfinite_operands",
)  # fmt: skip


def resolved_config(args: Namespace) -> dict[str, Any]:
    """Return the resolved run as nested plain values: what `--print-config` shows.

    Needs validated `args`. `parameters` and `flops_per_iteration` are None while the vocabulary is unknown.
    """
    from metis.config import CELL_NAMES, to_dict
    from metis.policy import linear_paths, resolve_policy
    from metis.schedule import schedule_of

    def select(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names}

    counts = args.first_last_layers_bf16
    policy = resolve_policy(
        args.policy,
        args.num_layers,
        args.num_layers_at_start_in_bf16 if counts else None,
        args.num_layers_at_end_in_bf16 if counts else None,
    )
    schedule = schedule_of(args.resolved_schedule, args.recipe)
    run_recipe = schedule.recipe_at(0)
    paths = linear_paths(args.num_layers)
    phases = schedule.recipes_by_phase(policy, args.num_layers)
    recipes = phases[0]
    quantized = [path for path in paths if recipes[path].is_quantized]
    tokens = args.global_batch_size * args.seq_length
    known = args.padded_vocab_size is not None
    iterations = args.train_iters
    if args.train_samples is not None:
        iterations = args.train_samples // args.global_batch_size
    return {
        "model": {"preset": args.preset, **select(_MODEL_FIELDS)},
        "parameters": count_parameters(args) if known else None,
        "parallel": select(_PARALLEL_FIELDS),
        "training": select(_TRAINING_FIELDS),
        "tokens_per_iteration": tokens,
        "tokens_total": None if iterations is None else iterations * tokens,
        "flops_per_iteration": flops_per_iteration(args, args.global_batch_size) if known else None,
        "recipe": {
            "name": run_recipe.name,
            "cells": {name: args.resolved_recipe[name] for name in CELL_NAMES},
            **{key: value for key, value in args.resolved_recipe.items() if key not in (*CELL_NAMES, "name")},
        },
        "recipe_schedule": [
            {
                "start_step": phase.start_step,
                "recipe": to_dict(phase.recipe),
                "num_quantized_linears": sum(used.is_quantized for used in phases[phase.start_step].values()),
            }
            for phase in schedule.phases
        ],
        "policy": args.resolved_policy,
        "num_linears": len(paths),
        "num_quantized_linears": len(quantized),
        "quantized_linears": quantized,
        "recipe_of_other_linears": {path: recipes[path].name for path in paths if path not in quantized},
    }


def print_config(args: Namespace) -> None:
    """Print `resolved_config(args)` as JSON on standard output, with the tokenizer's size."""
    from metis.training.preflight import resolve_vocabulary

    resolve_vocabulary(args)
    print(json.dumps(resolved_config(args), indent=2), flush=True)

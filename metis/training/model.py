"""From arguments to the model on this rank: engine config, chunks, initial weights, precision and
data-parallel wraps.

The only place that knows both Megatron's argument names and megatron-core's config fields. Initial weights
are keyed by parameter name and global index (`metis.mcore.initialization`), so that layouts and recipes start
from the same numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from metis.clock import TrainingClock
from metis.config import Recipe
from metis.diagnostics import describe
from metis.errors import ConfigError
from metis.exchange import Exchange
from metis.gemm import GemmBackend
from metis.mcore.initialization import initialize_parameters
from metis.mcore.layer_spec import block_spec
from metis.mcore.model import LlamaModel
from metis.mcore.state import recipe_linears
from metis.policy import resolve_policy
from metis.schedule import all_uses, schedule_of
from metis.training.fusions import Fusions, resolve_fusions
from metis.training.gemm_backend import TRANSFORMER_ENGINE, edge_counts, resolve_gemm_backend
from metis.training.outputs import print_rank_0
from metis.training.overlap import resolve_exchange

SHARDED_DIMS = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
ENGINE_LINEARS = ("TELayerNormColumnParallelLinear", "TEColumnParallelLinear", "TERowParallelLinear")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def uses_transformer_engine(args: Namespace) -> bool:
    """Resolve `--transformer-impl`: `auto` means Transformer Engine where it can be imported on a GPU.

    Raises ConfigError when Transformer Engine is asked for and cannot be used; `auto` prints its choice and
    why.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if args.transformer_impl == "local":
        return False
    if args.transformer_impl == "transformer_engine":
        if not installed or args.device != "cuda" or args.exact_reductions:
            raise ConfigError(
                "--transformer-impl",
                "transformer_engine needs Transformer Engine, a GPU and no --exact-reductions, received "
                f"installed={installed}, device={args.device}; install the extra [te] or use local",
            )
        return True
    use = installed and args.device == "cuda" and not args.exact_reductions
    print_rank_0(
        f"transformer implementation: {'transformer_engine' if use else 'local'} "
        f"(auto: Transformer Engine installed={installed}, device={args.device})"
    )
    args.transformer_impl = "transformer_engine" if use else "local"
    return use


def recipes_by_phase(args: Namespace) -> dict[int, dict[str, Recipe]]:
    """Return the recipe of every linear by global path, for each phase, keyed by its first step."""
    counts = args.first_last_layers_bf16
    policy = resolve_policy(
        args.policy,
        args.num_layers,
        args.num_layers_at_start_in_bf16 if counts else None,
        args.num_layers_at_end_in_bf16 if counts else None,
    )
    schedule = schedule_of(getattr(args, "resolved_schedule", None), args.recipe)
    return schedule.recipes_by_phase(policy, args.num_layers)


def recipes_of(args: Namespace) -> dict[str, Recipe]:
    """Return the recipe of every linear by global path at step 0."""
    return recipes_by_phase(args)[0]


def transformer_config(
    args: Namespace,
    use_transformer_engine: bool,
    bf16_edges: tuple[int, int] | None = None,
    fusions: Fusions = Fusions(),  # noqa: B008 - frozen
) -> TransformerConfig:
    """Return megatron-core's config for these arguments.

    bf16_edges: blocks at start and end that stay in bf16 while Transformer Engine computes all others in FP4;
    None: FP4 is not the engine's business. fusions: what `resolve_fusions` found.
    """
    dtype = DTYPES[args.params_dtype_name]
    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels,
        attention_dropout=args.attention_dropout,
        hidden_dropout=args.hidden_dropout,
        layernorm_epsilon=args.layernorm_epsilon,
        normalization=args.normalization,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        bias_activation_fusion=args.bias_swiglu_fusion
        if args.swiglu
        else args.bias_gelu_fusion and args.add_bias_linear,
        bias_dropout_fusion=args.bias_dropout_fusion,
        masked_softmax_fusion=args.masked_softmax_fusion,
        apply_rope_fusion=fusions.rotary,
        fused_single_qkv_rope=fusions.rotary_qkv,
        gradient_accumulation_fusion=fusions.weight_gradients,
        cross_entropy_loss_fusion=fusions.cross_entropy,
        persist_layer_norm=fusions.norm and not use_transformer_engine,
        rotary_interleaved=args.rotary_interleaved,
        qk_layernorm=args.qk_layernorm,
        attention_softmax_in_fp32=args.attention_softmax_in_fp32,
        attention_backend=AttnBackend[args.attention_backend],
        init_method_std=args.init_method_std,
        perform_initialization=False,
        use_cpu_initialization=args.device == "cpu",
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        cp_comm_type="all_gather" if args.context_parallel_size > 1 else None,
        sequence_parallel=args.sequence_parallel,
        overlap_p2p_comm=args.overlap_p2p_comm,
        batch_p2p_comm=not args.overlap_p2p_comm,
        # Gloo still reads an output that overlapped sending frees; NCCL's streams keep the order.
        deallocate_pipeline_outputs=args.distributed_backend == "nccl",
        num_layers_in_first_pipeline_stage=args.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=args.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=args.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=args.account_for_loss_in_pipeline_split,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=args.bf16,
        fp16=args.fp16,
        calculate_per_token_loss=args.calculate_per_token_loss,
        deterministic_mode=args.deterministic_mode,
        recompute_granularity=args.recompute_granularity,
        recompute_method=args.recompute_method,
        recompute_num_layers=args.recompute_num_layers,
        recompute_modules=args.recompute_modules,
        **_engine_fp4(bf16_edges),
    )


def _engine_fp4(bf16_edges: tuple[int, int] | None) -> dict[str, Any]:
    """Return megatron-core's own FP4 switches, for linears that are Transformer Engine's."""
    if bf16_edges is None:
        return {}
    return {
        "fp4": "e2m1",
        "fp4_recipe": "nvfp4",
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": bf16_edges[0],
        "num_layers_at_end_in_bf16": bf16_edges[1],
    }


def build_model(
    args: Namespace, clock: TrainingClock, *, wrap: bool = True, initialize: bool = True
) -> list[nn.Module]:
    """Return this rank's model chunks (one per virtual pipeline stage), initialised, on the device, wrapped.

    wrap: add `Float16Module` and megatron-core's data parallelism (training); without it plain modules come
    back. initialize: without it parameters hold what memory held, for a caller that sets every one of them.
    """
    phases = recipes_by_phase(args)
    recipes = phases[0]
    ours = {path for used in phases.values() for path, recipe in used.items() if not recipe.is_high_precision}
    backend = resolve_gemm_backend(args, all_uses(phases))
    use_te = uses_transformer_engine(args)
    edges = edge_counts(recipes) if backend is None else None
    config = transformer_config(args, use_te, edges, resolve_fusions(args, use_te))
    exchange = resolve_exchange(args, use_te)
    num_chunks = args.virtual_pipeline_model_parallel_size or 1
    chunks: list[nn.Module] = []
    for stage in range(num_chunks):
        vp_stage = stage if args.virtual_pipeline_model_parallel_size else None
        spec = _layer_spec(args, config, recipes, ours, clock, use_te, backend, vp_stage, exchange)
        chunks.append(_chunk(args, config, spec, vp_stage, exchange))
    if args.device == "cuda":
        chunks = [chunk.cuda() for chunk in chunks]
    _mark_sharded_weights(chunks)
    if initialize:
        initialize_parameters(chunks, seed=args.seed, config=config)
    for chunk in chunks:
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    _report(args, chunks, recipes, ours)
    if args.bf16 or args.fp16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    return _data_parallel(args, config, chunks) if wrap else chunks


def _mark_sharded_weights(chunks: list[nn.Module]) -> None:
    """Record on each weight how tensor parallelism cuts it; the engine does so only when it fills weights."""
    for chunk in chunks:
        for module in chunk.modules():
            dim = next((dim for cls, dim in SHARDED_DIMS.items() if isinstance(module, cls)), None)
            if dim is not None and module.weight is not None and not hasattr(module.weight, "partition_dim"):
                tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def _layer_spec(
    args: Namespace,
    config: TransformerConfig,
    recipes: dict[str, Recipe],
    ours: set[str],
    clock: TrainingClock,
    use_te: bool,
    backend: GemmBackend | None,
    vp_stage: int | None,
    exchange: Exchange | None,
) -> Any:
    if args.spec:
        return _imported_spec(args, config, vp_stage)
    return block_spec(
        config,
        recipes,
        clock,
        use_transformer_engine=use_te,
        backend=backend,
        vp_stage=vp_stage,
        ours=ours,
        exchange=exchange,
    )


def _imported_spec(args: Namespace, config: TransformerConfig, vp_stage: int | None) -> Any:
    """Return what `--spec MODULE FUNCTION` gives: a spec, or a function of (config, vp_stage)."""
    try:
        found = getattr(importlib.import_module(args.spec[0]), args.spec[1])
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "--spec", f"must name something importable, received {' '.join(args.spec)}: {error}"
        ) from None
    spec = found(config, vp_stage) if callable(found) else found
    if not isinstance(spec, ModuleSpec | TransformerBlockSubmodules):
        raise ConfigError(
            "--spec",
            f"must give a ModuleSpec or TransformerBlockSubmodules, received {type(spec).__name__} from "
            f"{' '.join(args.spec)}; a function is called with (config, vp_stage)",
        )
    return spec


def _chunk(
    args: Namespace,
    config: TransformerConfig,
    spec: Any,
    vp_stage: int | None,
    exchange: Exchange | None,
) -> LlamaModel:
    return LlamaModel(
        config,
        spec,
        args.padded_vocab_size,
        args.max_position_embeddings,
        true_vocab_size=args.true_vocab_size,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
        exchange=exchange,
    )


def _data_parallel(args: Namespace, config: TransformerConfig, chunks: list[nn.Module]) -> list[nn.Module]:
    bucket_size = args.ddp_bucket_size
    if args.ddp_num_buckets is not None:
        numel = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        bucket_size = -(-numel // args.ddp_num_buckets)
    if bucket_size is None:
        bucket_size = max(
            40_000_000, 1_000_000 * parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        )
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        use_distributed_optimizer=args.use_distributed_optimizer,
        check_for_nan_in_grad=args.check_for_nan_in_loss_and_grad,
        check_for_large_grads=args.check_for_large_grads,
        average_in_collective=args.ddp_average_in_collective,
        bucket_size=bucket_size if args.overlap_grad_reduce else None,
    )
    wrapped: list[nn.Module] = [
        DistributedDataParallel(
            config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def _report(args: Namespace, chunks: list[nn.Module], recipes: dict[str, Recipe], ours: set[str]) -> None:
    """Print parameter counts per model-parallel rank, and how many linears each recipe computes."""
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        count = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        tp, pp = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        print(
            f" > number of parameters on (tensor, pipeline) model parallel rank ({tp}, {pp}): {count}",
            flush=True,
        )
    by_recipe: dict[str, int] = {}
    for recipe in recipes.values():
        by_recipe[recipe.name] = by_recipe.get(recipe.name, 0) + 1
    # Counted in the model that was built, over all stages, and compared with what the policy says.
    linears = recipe_linears(chunks)
    if args.gemm_backend == TRANSFORMER_ENGINE:
        count = _num_engine_fp4_linears(chunks)
    else:
        count = sum(linear.recipe.is_quantized for linear in linears)
    counted = torch.tensor([count], device=args.device)
    dist.all_reduce(counted, group=parallel_state.get_pipeline_model_parallel_group())
    quantized, wanted = int(counted.item()), sum(recipe.is_quantized for recipe in recipes.values())
    assert args.spec or quantized == wanted, f"{quantized} quantised linears built, {wanted} asked for"
    listed = ", ".join(f"{name}: {count}" for name, count in by_recipe.items())
    print_rank_0(f" > quantised linears: {quantized} of {len(recipes)} ({listed})")
    if dist.get_rank() == 0:
        for recipe in {recipe.name: recipe for recipe in recipes.values() if recipe.is_quantized}.values():
            print(f" > recipe {recipe.name},{describe(recipe).removeprefix(' >')}", flush=True)
    built = {linear.layer_name for linear in linears}
    assert args.spec or built <= ours, sorted(built - ours)


def _num_engine_fp4_linears(chunks: list[nn.Module]) -> int:
    """Return how many of Transformer Engine's linears lie in blocks that the engine's FP4 context covers."""
    count = 0
    for block in (module for chunk in chunks for module in chunk.modules()):
        if not isinstance(block, TransformerLayer):
            continue
        config, index = block.config, block.layer_number - 1
        if config.num_layers_at_start_in_bf16 <= index < config.num_layers - config.num_layers_at_end_in_bf16:
            count += sum(type(module).__name__ in ENGINE_LINEARS for module in block.modules())
    return count

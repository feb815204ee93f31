"""The transformer block as a list of layer specs: which class computes each linear, norm and attention.

A policy gives every linear its recipe by global path. Linears that are `bf16` for the whole run are the
engine's own classes (with an exchange, those that overlap their messages); all others are ours with the
recipe, the path and the run's clock bound in. Neither the model nor the layers mention FP4.

Trap: megatron-core 0.16.1 calls `linear_qkv` of a spec directly and builds the other linears through
`build_module`, so the first is a `functools.partial` and the others are `ModuleSpec`s with parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from metis.clock import TrainingClock
from metis.config import Recipe
from metis.exchange import Exchange
from metis.gemm import GemmBackend
from metis.mcore.attention import SdpaCoreAttention
from metis.mcore.linear import MetisColumnParallelLinear, MetisRowParallelLinear
from metis.mcore.norm import norm_class
from metis.mcore.overlapped_linear import OverlappedColumnParallelLinear, OverlappedRowParallelLinear

STATE_DICT_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def block_spec(
    config: TransformerConfig,
    recipes: Mapping[str, Recipe],
    clock: TrainingClock,
    *,
    use_transformer_engine: bool,
    backend: GemmBackend | None,
    vp_stage: int | None = None,
    ours: Collection[str] | None = None,
    exchange: Exchange | None = None,
) -> TransformerBlockSubmodules:
    """Return the specs of the layers that this pipeline stage builds.

    recipes: recipe of every linear by global path, at the start of the run. ours: the paths that are built as
    our classes because their recipe is, or will be, another than the engine's linear (None: those whose
    recipe is now). use_transformer_engine: norms and attention are Transformer Engine's, and so are the
    linears of layers that are entirely bf16. backend: who multiplies the FP4 operands of our linears; None:
    all linears are Transformer Engine's, and the config's FP4 switches say which of them quantise. exchange:
    of the tensor-parallel group, for linears whose messages run beside their products.
    """
    if ours is None:
        ours = {path for path, recipe in recipes.items() if not recipe.is_high_precision}
    first = get_transformer_layer_offset(config, vp_stage)
    count = get_num_layers_to_build(config, vp_stage)
    specs = [
        _layer_spec(config, index, recipes, ours, clock, use_transformer_engine, backend, exchange)
        for index in range(first, first + count)
    ]
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=specs, layer_norm=TENorm)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm_class(config.normalization))


def _layer_spec(
    config: TransformerConfig,
    index: int,
    recipes: Mapping[str, Recipe],
    ours: Collection[str],
    clock: TrainingClock,
    use_transformer_engine: bool,
    backend: GemmBackend | None,
    exchange: Exchange | None,
) -> ModuleSpec:
    assert backend is not None or use_transformer_engine
    paths = {
        name: f"decoder.layers.{index}.{name}"
        for name in (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
    }
    norm, attention = norm_class(config.normalization), SdpaCoreAttention
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        if backend is None or not any(path in ours for path in paths.values()):
            return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        norm, attention = TENorm, TEDotProductAttention

    def linear(name: str) -> tuple[type, dict[str, Any]]:
        path = paths[name]
        is_column = name.endswith(("linear_qkv", "linear_fc1"))
        if path in ours:
            cls = MetisColumnParallelLinear if is_column else MetisRowParallelLinear
            how = {"recipe": recipes[path], "layer": path, "clock": clock, "backend": backend}
            return cls, how | {"exchange": exchange}
        if exchange is None:
            return (ColumnParallelLinear if is_column else RowParallelLinear), {}
        cls = OverlappedColumnParallelLinear if is_column else OverlappedRowParallelLinear
        return cls, {"exchange": exchange}

    def spec(name: str) -> ModuleSpec:
        cls, params = linear(name)
        return ModuleSpec(module=cls, params=params)

    qkv_class, qkv_params = linear("self_attention.linear_qkv")
    qk_norm = norm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=functools.partial(qkv_class, **qkv_params),
                    core_attention=attention,
                    linear_proj=spec("self_attention.linear_proj"),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=spec("mlp.linear_fc1"), linear_fc2=spec("mlp.linear_fc2")
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=STATE_DICT_KEYS,
        ),
    )

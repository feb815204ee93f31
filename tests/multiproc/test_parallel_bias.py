"""The bias of a parallel linear is added once, whatever the layout: y(b) - y(0) = b, db = sum of g over
tokens.

With tensor parallelism a row-parallel linear that adds its bias on every rank counts it once per rank, and so
does one that adds it both in the product and after the reduction. Oracle: the same linear with a zero bias.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests._distributed import run_ranks

TOKENS, BATCH, HIDDEN = 32, 2, 64
RECIPES = ("bf16", "nvfp4", "metis")
BIAS_TOLERANCE = 1e-4  # of biases up to 64, after sums in fp32; worst measured 4e-6


def _differences(rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    """Return {case: (|y(b) - y(0) - b|, |db - sum g|)}, the worst over ranks' own pieces."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from metis.clock import TrainingClock
    from metis.mcore.linear import MetisColumnParallelLinear, MetisRowParallelLinear
    from metis.recipes import RECIPES as NAMED

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1)
    found = {}
    for sequence_parallel in (False, True) if world_size > 1 else (False,):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            tensor_model_parallel_size=world_size,
            sequence_parallel=sequence_parallel,
            gradient_accumulation_fusion=False,
        )
        for recipe in RECIPES:
            for kind, cls in (("column", MetisColumnParallelLinear), ("row", MetisRowParallelLinear)):
                options: dict[str, Any] = (
                    {"gather_output": False} if kind == "column" else {"input_is_parallel": True}
                )
                linear = cls(
                    HIDDEN,
                    HIDDEN,
                    recipe=NAMED[recipe],
                    layer="decoder.layers.0.self_attention.linear_proj",
                    clock=TrainingClock(seed=1, num_tokens_per_step=TOKENS * BATCH),
                    config=config,
                    init_method=config.init_method,
                    bias=True,
                    skip_bias_add=False,
                    **options,
                )
                found[f"{kind} {recipe} sp={sequence_parallel}"] = _one(
                    linear, kind, sequence_parallel, world_size
                )
    return found


def _one(linear: Any, kind: str, sequence_parallel: bool, world_size: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(3)
    shard_tokens = sequence_parallel and kind == "column"
    tokens = TOKENS // world_size if shard_tokens else TOKENS
    width = HIDDEN // world_size if kind == "row" else HIDDEN
    x = torch.randn(tokens, BATCH, width, generator=generator)
    with torch.no_grad():
        linear.bias.zero_()
        without = linear(x)[0]
        linear.bias.copy_(torch.arange(1.0, linear.bias.numel() + 1))
    y = linear(x)[0]
    g = torch.randn(y.shape, generator=generator)
    y.backward(g)
    bias_grad = linear.bias.grad if linear.bias.grad is not None else linear.bias.main_grad
    return (
        float((y.detach() - without - linear.bias.detach()).abs().max()),
        float((bias_grad - g.sum(dim=(0, 1))).abs().max()),
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_bias_is_added_once_whatever_the_layout(world_size: int) -> None:
    for rank, found in enumerate(run_ranks(_differences, world_size)):
        assert len(found) == 2 * len(RECIPES) * world_size
        for case, (output, gradient) in found.items():
            assert output <= BIAS_TOLERANCE, f"rank {rank}, {case}: y is off by {output}"
            assert gradient <= BIAS_TOLERANCE, f"rank {rank}, {case}: db is off by {gradient}"

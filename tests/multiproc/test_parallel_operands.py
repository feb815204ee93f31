"""Given the same full tensors, every layout makes the same codes, block scales and amaxes, bitwise.

Real process groups: each rank encodes its piece of x, w and g through the six cells of a recipe, for a
column-parallel qkv, a column-parallel gate|up and a row-parallel projection; the pieces put together equal
what one rank makes. So do the sketches and the bases that come of them.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from metis.clock import TrainingClock
from metis.config import CELL_NAMES, CellConfig, Recipe
from metis.functional import LinearPlan, is_transposed
from metis.mcore.axes import qkv_axis, sharded_axis
from metis.nn import LinearCore, advance_bases
from metis.operand import Axis, EncodedMatrix
from metis.recipes import RECIPES, with_overrides
from metis.rng import NoisePosition, gaussian, stream_key
from tests._distributed import run_ranks

TOKENS, HIDDEN = 64, 128
GROUPS, HEADS_PER_GROUP, HEAD_DIM = 4, 2, 16
QKV = GROUPS * (HEADS_PER_GROUP + 2) * HEAD_DIM
FC1 = 512
LAYERS = ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
RECIPE_NAMES = ("nvfp4", "metis", "metis_paper")


def _axes(layer: str, rank: int, world_size: int) -> tuple[Axis, Axis]:
    """Return the input and output axis that `rank` of `world_size` tensor-parallel ranks holds."""
    shard = {"shard": rank, "num_shards": world_size, "group": dist.group.WORLD if world_size > 1 else None}
    if layer.endswith("linear_qkv"):
        return Axis.whole(HIDDEN), qkv_axis(GROUPS, HEADS_PER_GROUP, HEAD_DIM, **shard)
    if layer.endswith("linear_fc1"):
        return Axis.whole(HIDDEN), sharded_axis(FC1, parts=2, **shard)
    return sharded_axis(FC1, **shard), Axis.whole(HIDDEN)


@functools.cache
def _full(name: str, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the same heavy-tailed matrix on every rank, with one strong direction and one outlier."""
    index = torch.arange(max(rows, cols))
    x = gaussian(stream_key(1, name), index[:rows], index[:cols])
    x = x * torch.exp(0.3 * gaussian(stream_key(2, name), index[:rows], index[:1])) + 4 * x[:, :1] * x[:1]
    x[3, 5] = 60.0
    return x.to(dtype)


def _local(full: torch.Tensor, rows: Axis, cols: Axis) -> torch.Tensor:
    return cols.local_rows(rows.local_rows(full).t().contiguous()).t()


def _whole(local: torch.Tensor, rows: Axis, cols: Axis) -> torch.Tensor:
    return cols.gather_rows(rows.gather_rows(local).t().contiguous()).t()


def _encode_everything(rank: int, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return codes, block scales and amax of every cell of every layer, put together over the ranks."""
    found: dict[str, Any] = {}
    tokens = Axis.whole(TOKENS)
    for recipe_name in RECIPE_NAMES:
        for layer in LAYERS:
            features_in, features_out = _axes(layer, rank, world_size)
            recipe = RECIPES[recipe_name]
            plan = LinearPlan(
                recipe=recipe,
                layer=layer,
                tokens=tokens,
                in_features=features_in,
                out_features=features_out,
                position=NoisePosition(step=3, microbatch=5),
                **_bases(recipe, layer, features_in, features_out),
            )
            for cell_name in CELL_NAMES:
                found[f"{recipe_name}.{layer}.{cell_name}"] = _one_cell(plan, cell_name, dtype)
    return found


def _bases(recipe: Recipe, layer: str, features_in: Axis, features_out: Axis) -> dict[str, torch.Tensor]:
    """Return any fixed bases; that they are not orthonormal does not matter here."""
    bases = {}
    for operand, axis in (("input", features_in), ("weight", features_in), ("grad_output", features_out)):
        if getattr(recipe, f"{operand}_split") is not None:
            full = gaussian(stream_key(7, layer, operand), torch.arange(axis.size), torch.arange(16))
            bases[f"v_{operand}"] = axis.local_rows((full / axis.size**0.5).to(torch.bfloat16))
    return bases


def _one_cell(plan: LinearPlan, cell_name: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    tokens, features_in, features_out = plan.tokens, plan.in_features, plan.out_features
    operand = cell_name.split("_", 1)[1]
    rows, cols = {
        "input": (tokens, features_in),
        "weight": (features_out, features_in),
        "grad_output": (tokens, features_out),
    }[operand]
    local = _local(_full(operand, rows.size, cols.size, dtype), rows, cols)
    if is_transposed(cell_name):
        rows, cols = cols, rows
    encoded = plan.open(local, cell_name, None).encode_here()
    assert isinstance(encoded, EncodedMatrix)
    (encoded,) = encoded.terms
    scales = encoded.block_scale_bytes()
    tile = encoded.block_shape[0]
    per_element = scales.repeat_interleave(tile, 0).repeat_interleave(16, 1)
    return _whole(encoded.codes(), rows, cols), _whole(per_element, rows, cols), encoded.amax


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_operands_have_the_codes_of_one_rank(world_size: int, dtype: torch.dtype) -> None:
    one = _encode_everything(0, 1, dtype)
    for rank, sharded in enumerate(run_ranks(_encode_everything, world_size, dtype, timeout=300)):
        for name, parts in one.items():
            for what, expected, received in zip(
                ("codes", "scales", "amax"), parts, sharded[name], strict=True
            ):
                assert torch.equal(expected, received), f"{what} of {name} on rank {rank}"


def test_rank_local_amaxes_would_be_seen() -> None:
    """The comparison can fail: with rank-local amaxes the codes do depend on the layout."""
    differing = run_ranks(_count_te_differences, 2, timeout=300)
    assert all(count > 0 for count in differing)


def _count_te_differences(rank: int, world_size: int) -> int:
    different = 0
    recipe = with_overrides(RECIPES["nvfp4"], amax_scope="te")
    for size in (1, world_size):
        features_in, features_out = _axes("mlp.linear_fc2", rank if size > 1 else 0, size)
        plan = LinearPlan(
            recipe=recipe,
            layer="x",
            tokens=Axis.whole(TOKENS),
            in_features=features_in,
            out_features=features_out,
        )
        codes = _one_cell(plan, "fprop_input", torch.float32)[0]
        if size == 1:
            whole = codes
    different += int((whole != codes).sum())
    return different


def _bases_after_steps(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Train three steps on fixed gradients; return every basis put together over the ranks."""
    found: dict[str, torch.Tensor] = {}
    for layer in LAYERS:
        clock = TrainingClock(seed=11, num_tokens_per_step=2 * TOKENS)
        features_in, features_out = _axes(layer, rank, world_size)
        core = LinearCore(
            recipe=RECIPES["metis"],
            layer=layer,
            in_features=features_in,
            out_features=features_out,
            clock=clock,
        )
        w = torch.nn.Parameter(
            _local(_full("w", features_out.size, features_in.size, torch.float32), features_out, features_in)
        )
        for step in range(3):
            clock.begin_step(step, 2 * TOKENS)
            for microbatch in range(2):
                clock.begin_microbatch(microbatch)
                tokens = Axis.whole(TOKENS)
                x = _full(f"x{step}{microbatch}", TOKENS, features_in.size, torch.float32)
                g = _full(f"g{step}{microbatch}", TOKENS, features_out.size, torch.float32)
                core(_local(x, tokens, features_in), w, tokens).backward(_local(g, tokens, features_out))
            advance_bases([(core, w)], step)
        for operand, basis in core.bases.items():
            found[f"{layer}.{operand}"] = basis.features.gather_rows(basis.state.v)
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_bases_do_not_depend_on_tensor_parallelism(world_size: int) -> None:
    one = _bases_after_steps(0, 1)
    for sharded in run_ranks(_bases_after_steps, world_size, timeout=300):
        for name, expected in one.items():
            assert torch.equal(expected, sharded[name]), name


def test_cells_without_quantizer_are_not_encoded() -> None:
    plan = LinearPlan(
        recipe=Recipe(name="plain", fprop_input=CellConfig()),
        layer="x",
        tokens=Axis.whole(16),
        in_features=Axis.whole(32),
        out_features=Axis.whole(16),
    )
    x = torch.ones(16, 32)
    assert plan.open(x, "fprop_input", None).factors() == (x,)

"""Given the same full tensors, every layout makes the same codes, block scales and amaxes, bitwise.

Real process groups: each rank encodes its piece of x, w and g through the six cells of a recipe, for a
column-parallel qkv, a column-parallel gate|up and a row-parallel projection; the pieces put together equal
what one rank makes. So do the sketches and the bases that come of them.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from metis.clock import TrainingClock
from metis.config import (
    CELL_NAMES,
    BasisConfig,
    CellConfig,
    QuantizerConfig,
    Recipe,
    RhtConfig,
    SplitConfig,
)
from metis.functional import LinearPlan, is_transposed, operand_of
from metis.mcore.axes import qkv_axis, sharded_axis
from metis.nn import LinearCore, SequenceShard, advance_bases
from metis.operand import Axis
from metis.quantize import QuantizedTensor
from metis.recipes import RECIPES, with_overrides
from metis.rng import NoisePosition, gaussian, stream_key
from tests._distributed import run_ranks

TOKENS, HIDDEN = 64, 128
GROUPS, HEADS_PER_GROUP, HEAD_DIM = 4, 2, 16
QKV = GROUPS * (HEADS_PER_GROUP + 2) * HEAD_DIM
FC1 = 512
LAYERS = ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def _with_input(recipe: Recipe, name: str, split: SplitConfig) -> Recipe:
    """Return `recipe` with another split of x and g."""
    cells = {
        cell: replace(getattr(recipe, cell), split=split)
        for cell in CELL_NAMES
        if not cell.endswith("weight")
    }
    return replace(recipe, name=name, **cells)


_ROTATED = CellConfig(quantizer=QuantizerConfig(rht=RhtConfig(size=32, sign_seed=3)))
VARIANTS = (
    *(RECIPES[name] for name in ("nvfp4", "metis", "metis_paper", "mxfp4", "fp8", "mean_split")),
    RECIPES["nvfp4_4over6"],
    _with_input(RECIPES["metis"], "feedback", SplitConfig(head_format="feedback", mean_first=True)),
    _with_input(RECIPES["metis"], "two_term", SplitConfig(head_format="two_term")),
    replace(RECIPES["nvfp4"], name="rht32", wgrad_input=_ROTATED, wgrad_grad_output=_ROTATED),
)
FLOAT64_TOLERANCE = 1e-12
FP32_TOLERANCE = 2e-6
"""Of products without quantisation; measured 3.6e-7."""
MAX_FAST_FLIPS = 1e-4
"""Share of codes that tp_mode fast may flip between layouts; measured 0 here, 3.2e-7 at K = 1024."""


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


def _sequence_shard(layer: str, rank: int, world_size: int) -> SequenceShard | None:
    """Return the token shard of sequence parallelism, None on one rank."""
    if world_size == 1:
        return None
    axis = sharded_axis(TOKENS, shard=rank, num_shards=world_size, group=dist.group.WORLD)
    operand = "grad_output" if layer.endswith("linear_fc2") else "input"
    return SequenceShard(operand=operand, tokens=axis, gather=axis)


def _plan(recipe: Recipe, layer: str, rank: int, world_size: int, sequence: bool = False) -> LinearPlan:
    features_in, features_out = _axes(layer, rank, world_size)
    shard = _sequence_shard(layer, rank, world_size) if sequence else None
    return LinearPlan(
        recipe=recipe,
        layer=layer,
        tokens=Axis.whole(TOKENS),
        in_features=features_in,
        out_features=features_out,
        position=NoisePosition(step=3, microbatch=5),
        token_shard=None if shard is None else shard.tokens,
        gather=None if shard is None else shard.gather,
        gathered_operand="" if shard is None else shard.operand,
        **_bases(recipe, layer, features_in, features_out),
    )


def _encode_everything(
    rank: int, world_size: int, dtype: torch.dtype, sequence: bool = False
) -> dict[str, Any]:
    """Return codes, block scales and amax of every cell of every layer, put together over the ranks."""
    found: dict[str, Any] = {}
    for recipe in VARIANTS:
        if sequence and (TOKENS // world_size) % recipe.axis_multiple("tokens"):
            continue
        for layer in LAYERS:
            plan = _plan(recipe, layer, rank, world_size, sequence)
            for cell_name in CELL_NAMES:
                found[f"{recipe.name}.{layer}.{cell_name}"] = _one_cell(plan, cell_name, dtype)
    return found


def _bases(recipe: Recipe, layer: str, features_in: Axis, features_out: Axis) -> dict[str, torch.Tensor]:
    """Return any fixed bases; that they are not orthonormal does not matter here."""
    bases = {}
    for operand, axis in (("input", features_in), ("weight", features_in), ("grad_output", features_out)):
        split = getattr(recipe, f"{operand}_split")
        if split is not None and split.rank is not None:
            full = gaussian(stream_key(7, layer, operand), torch.arange(axis.size), torch.arange(16))
            bases[f"v_{operand}"] = axis.local_rows((full / axis.size**0.5).to(torch.bfloat16))
    return bases


def _one_cell(plan: LinearPlan, cell_name: str, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Return (codes, a scale per element, amax) of each term, whole."""
    operand = operand_of(cell_name)
    is_shard = operand == plan.gathered_operand
    tokens = plan.token_shard if is_shard else plan.tokens
    rows, cols = {
        "input": (tokens, plan.in_features),
        "weight": (plan.out_features, plan.in_features),
        "grad_output": (tokens, plan.out_features),
    }[operand]
    local = _local(_full(operand, rows.size, cols.size, dtype), rows, cols)
    if is_shard:  # what leaves is gathered already
        rows = plan.tokens
    if is_transposed(cell_name):
        rows, cols = cols, rows
    found = []
    for term in plan.open(local, cell_name, None).factors():
        assert isinstance(term, QuantizedTensor)
        codes = _whole(term.packed() if term.format.startswith("fp8") else term.codes(), rows, cols)
        scales = term.block_scale
        if scales is not None:
            tall, wide = term.block_shape
            scales = _whole(scales.repeat_interleave(tall, 0).repeat_interleave(wide, 1), rows, cols)
        has_amax = term.format == "nvfp4" or term.block_shape is None
        found.append((codes, scales, term.amax if has_amax else None))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_operands_have_the_codes_of_one_rank(world_size: int, dtype: torch.dtype) -> None:
    one = _encode_everything(0, 1, dtype)
    for rank, sharded in enumerate(run_ranks(_encode_everything, world_size, dtype, timeout=300)):
        _assert_same_cells(one, sharded, rank)
        assert set(sharded) == set(one)


def _assert_same_cells(one: dict[str, Any], sharded: dict[str, Any], rank: int) -> None:
    for name, terms in sharded.items():
        for index, (expected, received) in enumerate(zip(one[name], terms, strict=True)):
            for what, a, b in zip(("codes", "scales", "amax"), expected, received, strict=True):
                same = a is b is None or torch.equal(a, b)
                assert same, f"{what} of term {index} of {name} on rank {rank}"


@pytest.mark.parametrize("world_size", [2, 4])
def test_token_shards_encoded_before_the_gather_have_the_codes_of_one_rank(world_size: int) -> None:
    """Sequence parallelism: x (column-parallel) and g (row-parallel) are quantised where they lie."""
    one = _encode_everything(0, 1, torch.float32)
    for rank, sharded in enumerate(
        run_ranks(_encode_everything, world_size, torch.float32, True, timeout=300)
    ):
        assert len(sharded) >= 3 * len(CELL_NAMES) * (len(VARIANTS) - 2)
        _assert_same_cells(one, sharded, rank)


def _train_with_token_shards(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Return y, dx, dw of two steps in float64, put together over the ranks, plain and with packed saves."""
    found: dict[str, torch.Tensor] = {}
    for base in (RECIPES["nvfp4"], RECIPES["metis"], RECIPES["mean_split"]):
        for recipe in (base, replace(base, name=f"{base.name} packed", save_packed=True)):
            for layer in LAYERS:
                clock = TrainingClock(seed=11, num_tokens_per_step=TOKENS)
                features_in, features_out = _axes(layer, rank, world_size)
                core = LinearCore(
                    recipe=recipe,
                    layer=layer,
                    in_features=features_in,
                    out_features=features_out,
                    clock=clock,
                )
                shard = _sequence_shard(layer, rank, world_size)
                w = _local(
                    _full("w", features_out.size, features_in.size, torch.float64), features_out, features_in
                )
                for step in range(3):
                    clock.begin_step(step, TOKENS)
                    found |= {
                        f"{recipe.name} {layer} step {step} {name}": value
                        for name, value in _forward_backward(core, w, shard, step).items()
                    }
                    advance_bases([(core, w)], step)
    return found


def _forward_backward(
    core: LinearCore, weight: torch.Tensor, shard: SequenceShard | None, step: int
) -> dict[str, torch.Tensor]:
    whole, w = Axis.whole(TOKENS), torch.nn.Parameter(weight.clone())
    rows = {
        name: shard.tokens if shard is not None and shard.operand == name else whole
        for name in ("input", "grad_output")
    }
    x = _full(f"x{step}", TOKENS, core.in_features.size, torch.float64)
    g = _full(f"g{step}", TOKENS, core.out_features.size, torch.float64) * 1e-3
    x = _local(x, rows["input"], core.in_features).contiguous().requires_grad_()
    y = core(x, w, whole, shard)
    y.backward(_local(g, rows["grad_output"], core.out_features))
    # A sum over ranks is still open where the contraction axis is sharded and nothing scattered it.
    dx = x.grad if shard is None or shard.operand == "input" else core.in_features.gather_rows(x.grad.t()).t()
    if shard is not None and shard.operand == "input":
        dx = shard.tokens.gather_rows(dx)
        y = core.out_features.gather_rows(y.detach().t().contiguous()).t()
    elif shard is not None:
        y = shard.tokens.gather_rows(y.detach())
    return {"y": y.detach(), "dx": dx, "dw": _whole(w.grad, core.out_features, core.in_features)}


def test_linears_on_token_shards_compute_what_one_rank_does() -> None:
    """Products, packed activations and three steps' bases included, in float64 to rounding."""
    one = _train_with_token_shards(0, 1)
    for sharded in run_ranks(_train_with_token_shards, 2, timeout=300):
        for name, expected in one.items():
            error = (sharded[name] - expected).norm() / expected.norm()
            assert error < FLOAT64_TOLERANCE, f"{name}: {error:.1e}"


def _fast_flips(rank: int, world_size: int) -> float:
    """Return the share of codes that tp_mode fast flips against one rank, over the cells that have a head."""
    recipe = replace(RECIPES["metis"], name="fast", basis=BasisConfig(tp_mode="fast"))
    flips = total = 0
    for layer in LAYERS:
        one, sharded = (
            {cell: _one_cell(_plan(recipe, layer, r, size), cell, torch.float32)[0][0] for cell in CELL_NAMES}
            for r, size in ((0, 1), (rank, world_size))
        )
        flips += sum(int((one[cell] != sharded[cell]).sum()) for cell in CELL_NAMES)
        total += sum(codes.numel() for codes in one.values())
    return flips / total


@pytest.mark.parametrize("world_size", [2, 4])
def test_tp_mode_fast_flips_few_codes(world_size: int) -> None:
    rates = run_ranks(_fast_flips, world_size, timeout=300)
    print(f"tp_mode fast, TP={world_size}: {rates[0]:.1e} of the codes differ from TP=1")
    assert len(set(rates)) == 1 and rates[0] < MAX_FAST_FLIPS


def _local_bases(rank: int, world_size: int) -> dict[str, Any]:
    """Train three steps with a basis per rank and no quantiser; return the bases and y put together."""
    cells = {cell: CellConfig(split=SplitConfig()) for cell in CELL_NAMES}
    recipe = Recipe(name="local", basis=BasisConfig(tp_mode="local"), **cells)
    clock = TrainingClock(seed=11, num_tokens_per_step=TOKENS)
    features_in, features_out = _axes("mlp.linear_fc2", rank, world_size)
    core = LinearCore(
        recipe=recipe, layer="l", in_features=features_in, out_features=features_out, clock=clock
    )
    full_w = _full("w", features_out.size, features_in.size, torch.float64)
    w = _local(full_w, features_out, features_in).contiguous().requires_grad_()
    full_x = _full("x", TOKENS, features_in.size, torch.float64)
    x = _local(full_x, Axis.whole(TOKENS), features_in).contiguous().requires_grad_()
    collectives = []
    patched = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}
    for name, original in patched.items():
        setattr(dist, name, lambda *a, n=name, o=original, **k: (collectives.append(n), o(*a, **k))[1])
    for step in range(3):
        clock.begin_step(step, TOKENS)
        y = core(x, w, Axis.whole(TOKENS))
        y.backward(_full("g", TOKENS, features_out.size, torch.float64))
        advance_bases([(core, w)], step)
    for name, original in patched.items():
        setattr(dist, name, original)
    total = features_in.sum(y.detach().clone())
    basis = core.bases["input"]
    return {
        "error": float((total - full_x @ full_w.t()).norm() / total.norm()),
        "v": basis.state.v.clone(),
        "collectives": collectives,
        "head": float(basis.state.v.float().norm()),
    }


def test_tp_mode_local_keeps_a_basis_per_rank_without_messages_and_the_same_product() -> None:
    first, second = run_ranks(_local_bases, 2, timeout=300)
    for found in (first, second):
        assert found["collectives"] == [] and found["head"] > 1.0
        assert found["error"] < FLOAT64_TOLERANCE, found["error"]
    assert first["v"].shape[0] == FC1 // 2 and not torch.equal(first["v"], second["v"])


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
        codes = _one_cell(plan, "fprop_input", torch.float32)[0][0]
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


def _under_sequence_parallelism(rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    """Return the relative errors of y and dw of a real column-parallel linear on token shards of x."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from metis.mcore.linear import MetisColumnParallelLinear

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        pipeline_dtype=torch.float32,
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=world_size,
        sequence_parallel=True,
        gradient_accumulation_fusion=False,
    )
    generator = torch.Generator().manual_seed(2)
    w, x, g = (torch.randn(*shape, generator=generator) for shape in ((64, 64), (64, 2, 64), (64, 2, 64)))
    x[:32] *= 20.0  # the ranks' token shards differ in amax
    found = {}
    for name, recipe in _sequence_parallel_recipes().items():
        clock = TrainingClock(seed=1, num_tokens_per_step=128)
        linear = MetisColumnParallelLinear(
            64, 64, recipe=recipe, layer="decoder.layers.0.mlp.linear_fc2", clock=clock, config=config,
            init_method=config.init_method, bias=False, gather_output=False,
        )  # fmt: skip
        linear.weight.data.copy_(w.chunk(world_size)[rank])
        for step in range(3):
            clock.begin_step(step, 128)
            linear.weight.grad = None
            shard = x.chunk(world_size)[rank].clone().requires_grad_()
            y, _ = linear(shard)
            mine = g.chunk(world_size, 2)[rank].contiguous()
            y.backward(mine)
            dw = linear.weight.grad.clone()
            advance_bases([(linear.core, linear.weight)], step)
        exact = x @ linear.weight.detach().t(), mine.reshape(128, -1).t() @ x.reshape(128, 64)
        errors = ((a - b).norm() / b.norm() for a, b in zip((y.detach(), dw), exact, strict=True))
        found[name] = tuple(float(error) for error in errors)
    return found


def _sequence_parallel_recipes() -> dict[str, Recipe]:
    cells = {cell: CellConfig(split=SplitConfig()) for cell in CELL_NAMES}
    return {
        **{
            mode: Recipe(name=mode, basis=BasisConfig(tp_mode=mode), **cells)
            for mode in ("exact", "fast", "local")
        },
        "global": RECIPES["nvfp4"],
        "te": with_overrides(RECIPES["nvfp4"], amax_scope="te"),
    }


def test_every_tp_mode_and_amax_scope_is_right_under_sequence_parallelism() -> None:
    """Bases of single ranks cannot be applied to gathered rows, nor rank-local amaxes to gathered codes."""
    for found in run_ranks(_under_sequence_parallelism, 2, timeout=300):
        for mode in ("exact", "fast", "local"):
            assert max(found[mode]) < FP32_TOLERANCE, (mode, found[mode])
        for scope in ("global", "te"):
            assert max(found[scope]) < 0.2, (scope, found[scope])


def _bases_of_data_parallel_ranks(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Train three steps of four microbatches, each rank on its own; return every basis."""
    clock = TrainingClock(seed=11, num_tokens_per_step=4 * TOKENS)
    features = Axis.whole(HIDDEN)
    core = LinearCore(
        recipe=RECIPES["metis"], layer="l", in_features=features, out_features=features, clock=clock
    )
    w = torch.nn.Parameter(_full("w", HIDDEN, HIDDEN, torch.float32).clone())
    for step in range(3):
        clock.begin_step(step, 4 * TOKENS)
        for microbatch in range(rank, 4, world_size):
            clock.begin_microbatch(microbatch)
            x, g = (_full(f"{n}{step}{microbatch}", TOKENS, HIDDEN, torch.float32) for n in "xg")
            core(x, w, Axis.whole(TOKENS)).backward(g)
        advance_bases([(core, w)], step, dist.group.WORLD if world_size > 1 else None)
    return {operand: basis.state.v.clone() for operand, basis in core.bases.items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_bases_are_the_same_on_data_parallel_ranks_and_for_any_number_of_them(world_size: int) -> None:
    """Sums over ranks are float64 and V is rounded to bf16 once, which hides their order."""
    one = _bases_of_data_parallel_ranks(0, 1)
    for found in run_ranks(_bases_of_data_parallel_ranks, world_size, timeout=300):
        for operand, expected in one.items():
            assert torch.equal(expected, found[operand]), operand


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

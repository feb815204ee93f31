"""The linear layer and what it remembers: bases that turn over on schedule, forward that is pure.

Oracles: `torch.nn.Linear` for `bf16`; the same layer without interruption, copy or recomputation for
everything that must not change a bit.
"""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_patches.recompute_context import rerun_in_first_context
from metis.clock import TrainingClock
from metis.config import CELL_NAMES, BasisConfig, CellConfig, QuantizerConfig, RankConfig, Recipe, SplitConfig
from metis.errors import ConfigError, ShapeError
from metis.nn import LinearCore, MetisLinear, advance_bases
from metis.operand import Axis
from metis.recipes import BF16, METIS, METIS_PAPER, NVFP4, NVFP4_DIRECT, RECIPES
from tests.numerics._assertions import assert_bitwise_equal

TOKENS, IN, OUT = 128, 64, 64
EVERY_RECIPE = pytest.mark.parametrize(
    "recipe",
    [recipe for recipe in RECIPES.values() if recipe.axis_multiple("in_features") <= IN],
    ids=lambda recipe: recipe.name,
)
"""All but fp8_blocks, whose tiles are larger than this layer (tests/numerics/test_worst_cases.py has it)."""
BF16_ULP = 2.0**-8  # of entries in [0.5, 1); measured 0
BASIS_QUALITY = 1.1  # residual over the optimal one; worst measured 1.03


def _layer(recipe: Recipe, dtype: torch.dtype = torch.float32, **options: object) -> MetisLinear:
    torch.manual_seed(0)
    options = {"bias": True, "name": "decoder.layers.0.mlp.linear_fc1", **options}
    layer = MetisLinear(IN, OUT, recipe=recipe, dtype=dtype, **options)
    layer.clock.num_tokens_per_step = TOKENS
    return layer


def _batch(step: int, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return (x, g) of a step: a few strong directions plus noise."""
    generator = torch.Generator().manual_seed(1000 + step)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    directions = torch.randn(4, IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = draw(tokens, 4) @ directions + 0.1 * draw(tokens, IN)
    return x.to(dtype), (1e-3 * draw(tokens, OUT)).to(dtype)


def _step(layer: MetisLinear, step: int, lr: float = 0.1, tokens: int = TOKENS) -> list[Tensor]:
    """One step of gradient descent; returns y, dx and the gradients of all parameters."""
    x, g = _batch(step, tokens, layer.weight.dtype)
    x.requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= lr * parameter.grad
    layer.after_step()
    return [y.detach(), x.grad, *grads]


def _assert_all_equal(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_bitwise_equal(a, e, f"{what}, tensor {index} of y, dx, gradients")


# --- Equal to torch where nothing is asked for, and the bias once ----------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_recipe_is_torchs_own_linear_bitwise(dtype: torch.dtype):
    ours = _layer(BF16, dtype)
    theirs = torch.nn.Linear(IN, OUT, dtype=dtype)
    theirs.load_state_dict({"weight": ours.weight.detach(), "bias": ours.bias.detach()})
    x, g = _batch(0, dtype=dtype)
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(g)
        results.append([y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad])
    _assert_all_equal(*results, "bf16")


@EVERY_RECIPE
def test_the_bias_is_added_once_and_its_gradient_is_the_column_sum(recipe: Recipe):
    layer, bare = _layer(recipe), _layer(recipe, bias=False)
    bare.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "bias"})
    x, g = _batch(0)
    with torch.no_grad():
        layer.bias.copy_(torch.arange(OUT) * 10.0)
    y = layer(x)
    assert torch.equal(y, bare(x) + layer.bias) or recipe.is_high_precision  # torch fuses its own addition
    torch.testing.assert_close(y, bare(x) + layer.bias)
    y.backward(g)
    torch.testing.assert_close(layer.bias.grad, g.sum(dim=0))


def test_leading_axes_are_flattened_to_tokens():
    layer = _layer(NVFP4)
    x, _ = _batch(0)
    folded = layer(x.view(8, TOKENS // 8, IN))
    assert folded.shape == (8, TOKENS // 8, OUT)
    assert_bitwise_equal(folded.flatten(0, 1), layer(x), "folded")


# --- The life of a basis ----------------------------------------


def _states(layer: MetisLinear) -> dict[str, object]:
    return {name: basis.state for name, basis in layer.core.bases.items()}


def test_bases_turn_over_on_schedule():
    """Cold after step 0, warm after step 1, then renewed after steps 7, 15, ...: the last of each window."""
    layer = _layer(METIS)
    assert set(layer.core.bases) == {"input", "weight", "grad_output"}
    last = []
    for step in range(17):
        _step(layer, step)
        states = _states(layer).values()
        phase = {0: "cold"}.get(step, "warm")
        assert {state.phase for state in states} == {phase}, step
        assert len({state.last_refresh_step for state in states}) == 1
        assert all(state.row_count == 0 for state in states), "a finished sketch starts anew"
        last.append(next(iter(states)).last_refresh_step)
    assert last == [0, *[1] * 6, *[7] * 8, 15, 15]


def test_step_zero_is_unsplit():
    """No basis, no split: bitwise the layer whose cells have no split."""
    cells = {name: replace(getattr(METIS, name), split=None) for name in CELL_NAMES}
    plain = replace(METIS, name="unsplit", basis=None, **cells)
    split_layer, plain_layer = _layer(METIS), _layer(plain)
    _assert_all_equal(_step(split_layer, 0), _step(plain_layer, 0), "step 0")
    later = zip(_step(split_layer, 1), _step(plain_layer, 1), strict=True)
    assert not all(torch.equal(a, b) for a, b in later), "the split never began"


def test_the_basis_finds_the_strong_directions():
    recipe = replace(
        METIS, **_split_cells(QuantizerConfig(), RankConfig(fixed=4), "fprop_input", "wgrad_input")
    )
    layer = _layer(recipe)
    for step in range(2):
        _step(layer, step)
    v = layer.core.bases["input"].active.double()
    x, _ = _batch(7)
    residual = (x.double() - (x.double() @ v) @ v.T).norm()
    optimal = torch.linalg.svdvals(x.double())[4:].norm()
    assert float(residual / optimal) < BASIS_QUALITY


def _split_cells(quantizer: QuantizerConfig, rank: RankConfig, *names: str) -> dict[str, CellConfig]:
    return dict.fromkeys(names, CellConfig(quantizer=quantizer, split=SplitConfig(rank=rank)))


def test_microbatches_of_a_step_share_one_sketch():
    """All rows sampled: two microbatches give the basis of the whole batch, up to float64 sums."""
    config = BasisConfig(row_sample_fraction=1.0, num_pinned_rows=0)
    recipe = replace(METIS, basis=config)
    bases = []
    for pieces in (1, 2):
        layer = _layer(recipe, clock=TrainingClock(num_tokens_per_step=TOKENS))
        x, g = _batch(0)
        layer.clock.begin_step(0, TOKENS)
        for index, (x_part, g_part) in enumerate(zip(x.chunk(pieces), g.chunk(pieces), strict=True)):
            layer.clock.begin_microbatch(index)
            layer(x_part).backward(g_part)
        layer.after_step()
        assert layer.core.bases["input"].state.phase == "cold"
        bases.append(layer.core.bases["input"].state.v)
    assert float((bases[0].double() - bases[1].double()).abs().max()) <= BF16_ULP


def test_few_tokens_wait_for_more_rows():
    """Rank above the tokens of a step: the sketch grows over steps, and until it is enough, no split."""
    layer = _layer(METIS)  # needs 4 * (16 + 8) = 96 rows
    layer.clock.num_tokens_per_step = 16
    counts = []
    for step in range(6):
        _step(layer, step, tokens=16)
        counts.append((layer.core.bases["input"].state.row_count, layer.core.bases["input"].state.phase))
        assert all(torch.isfinite(p).all() for p in layer.parameters())
    assert counts == [(16 * n, "empty") for n in range(1, 6)] + [(0, "cold")]


def test_no_sketch_without_gradients_or_in_evaluation():
    layer = _layer(METIS)
    x, g = _batch(0)
    with torch.no_grad():
        layer(x)
    layer.eval()
    layer(x).backward(g)
    layer.train()
    layer.after_step()
    for name in ("input", "grad_output"):
        assert layer.core.bases[name].state.phase == "empty" and layer.core.bases[name].state.row_count == 0


def test_float64_sums_survive_casts_of_the_module():
    layer = _layer(METIS)
    _step(layer, 0)
    before = copy.deepcopy(_states(layer))
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    for name, state in _states(layer).items():
        for field in ("v", "z", "gram"):
            assert_bitwise_equal(getattr(state, field), getattr(before[name], field), f"{name}.{field}")


def test_a_zero_gradient_keeps_everything_finite_and_the_old_basis():
    layer = _layer(METIS)
    x, g = _batch(0)
    for step in range(3):
        layer.zero_grad()
        y = layer(x)
        y.backward(torch.zeros_like(g))
        assert float(layer.weight.grad.abs().max()) == 0.0
        layer.after_step()
        state = layer.core.bases["grad_output"].state
        assert (state.phase, state.num_kept) == ("empty", step + 1)
    assert bool(torch.isfinite(layer(x)).all())


# --- Purity: copies, recomputation, resume ----------------------------------------


@EVERY_RECIPE
def test_forward_twice_gives_the_same_bits_and_remembers_nothing(recipe: Recipe):
    layer = _layer(recipe)
    for step in range(2):
        _step(layer, step)
    x, _ = _batch(5)
    before = copy.deepcopy(layer.state_dict())
    assert_bitwise_equal(layer(x), layer(x), "forward")
    for name, value in layer.state_dict().items():
        assert_bitwise_equal(value, before[name], name)


Runner = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def _gradients(layer: MetisLinear, run: Runner) -> list[Tensor]:
    """Two microbatches whose backwards both come after both forwards, as in a pipeline."""
    outputs, leaves = [], []
    layer.zero_grad()
    for microbatch in range(2):
        x, _ = _batch(10 + microbatch)
        layer.clock.begin_microbatch(microbatch)
        leaves.append(x.requires_grad_())
        outputs.append(run(layer, leaves[-1]))
    for microbatch, y in enumerate(outputs):
        y.backward(_batch(10 + microbatch)[1])
    layer.after_step()
    sketch = [value.clone() for name, value in layer.state_dict().items() if "bases" in name]
    return [*(leaf.grad for leaf in leaves), *(p.grad for p in layer.parameters()), *sketch]


@pytest.mark.parametrize("reentrant", [False, True])
@EVERY_RECIPE
def test_recomputation_gives_the_same_gradients_and_sketches(recipe: Recipe, reentrant: bool):
    """The recomputation comes when the clock is at a later microbatch; it must draw what its forward drew."""
    kept, recomputed = _layer(recipe), _layer(recipe)
    for layer in (kept, recomputed):
        for step in range(2):
            _step(layer, step)

    def with_recomputation(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return checkpoint(rerun_in_first_context(function), x, use_reentrant=reentrant)

    _assert_all_equal(
        _gradients(recomputed, with_recomputation),
        _gradients(kept, lambda function, x: function(x)),
        recipe.name,
    )


def _backward(y: Tensor, g: Tensor, in_a_thread: bool) -> None:
    """Walk back here, or in a thread as autograd does on a GPU."""
    if not in_a_thread:
        y.backward(g)
        return
    thread = threading.Thread(target=y.backward, args=(g,))
    thread.start()
    thread.join()


@pytest.mark.parametrize("in_a_thread", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "recipe", [NVFP4, METIS, replace(METIS, save_packed=True)], ids=["nvfp4", "metis", "packed"]
)
@pytest.mark.parametrize("clock", ["own", "announced"])
def test_plain_checkpoints_recompute_the_microbatch_of_their_forward(
    clock: str, recipe: Recipe, reentrant: bool, in_a_thread: bool
):
    """Nothing but torch's own checkpoint, microbatch after microbatch."""
    results = []
    for is_recomputed in (False, True):
        shared = TrainingClock(seed=3, num_tokens_per_step=3 * TOKENS)
        layer = _layer(recipe, **({} if clock == "own" else {"clock": shared}))
        function = layer if not is_recomputed else partial(checkpoint, layer, use_reentrant=reentrant)
        got: list[Tensor] = []
        for step in range(2):
            layer.zero_grad()
            for microbatch in range(3):
                if clock == "announced":
                    shared.begin_microbatch(microbatch)
                x, g = _batch(10 * step + microbatch)
                y = function(x.requires_grad_())
                _backward(y, g, in_a_thread)
                got += [y.detach(), x.grad]
            got += [parameter.grad.clone() for parameter in layer.parameters()]
            layer.after_step()
            if clock == "announced":
                shared.begin_step(step + 1, 3 * TOKENS)
        results.append([*got, *(v for n, v in layer.state_dict().items() if "bases" in n)])
    _assert_all_equal(results[1], results[0], "recomputed")


@pytest.mark.parametrize("steps_before", [1, 6, 8, 9])
@pytest.mark.parametrize("recipe", [NVFP4, METIS, METIS_PAPER], ids=lambda recipe: recipe.name)
def test_resume_from_a_state_dict_is_bitwise(recipe: Recipe, steps_before: int):
    """Saved inside, at and after a refresh window, through a file, into a layer built anew."""
    layer = _layer(recipe)
    for step in range(steps_before):
        _step(layer, step)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(99)
    resumed = MetisLinear(IN, OUT, recipe=recipe, name="decoder.layers.0.mlp.linear_fc1")
    resumed.load_state_dict(torch.load(buffer))
    resumed.clock.begin_step(steps_before, TOKENS)
    for step in range(steps_before, steps_before + 9):
        _assert_all_equal(_step(resumed, step), _step(layer, step), f"step {step}")


def test_a_state_dict_that_lacks_a_basis_is_refused():
    state = _layer(METIS).state_dict()
    del state["core.bases.input.z"]
    with pytest.raises(RuntimeError, match=r"core\.bases\.input\.z"):
        _layer(METIS).load_state_dict(state)
    state = _layer(METIS).state_dict()
    state["core.bases.input.v"] = torch.zeros(2 * IN, 24)
    with pytest.raises(RuntimeError, match="shape"):
        _layer(METIS).load_state_dict(state)


@pytest.mark.parametrize("recipe", [METIS, METIS_PAPER], ids=lambda recipe: recipe.name)
def test_a_deep_copy_is_independent(recipe: Recipe):
    layer = _layer(recipe)
    for step in range(3):
        _step(layer, step)
    clone = copy.deepcopy(layer)
    before = copy.deepcopy(layer.state_dict())
    trained = [_step(clone, step) for step in range(3, 12)]
    assert layer.clock.step == 3 and clone.clock.step == 12
    for name, value in layer.state_dict().items():
        assert_bitwise_equal(value, before[name], f"the original's {name}")
    for step in range(3, 12):
        _assert_all_equal(_step(layer, step), trained[step - 3], f"step {step}")


def test_a_copied_clock_keeps_its_position():
    clock = TrainingClock(seed=5)
    clock.begin_step(7, 64)
    clock.begin_microbatch(3)
    clone = copy.deepcopy(clock)
    clock.begin_step(8, 32)
    clock.begin_microbatch(4)
    assert (clone.seed, clone.num_tokens_per_step) == (5, 64)
    assert (clone.position.step, clone.position.microbatch) == (7, 3)


# --- Two layers do not share anything ----------------------------------------


def test_each_layer_keeps_its_own_recipe_and_bases():
    """Configuration on the class, or state keyed by `id()`, would make the last layer built win."""
    alone = _layer(METIS)
    first, second = _layer(METIS), _layer(NVFP4_DIRECT, name="other")
    assert first.core.recipe is METIS and second.core.recipe is NVFP4_DIRECT
    for step in range(4):
        _step(second, step)
        _assert_all_equal(_step(first, step), _step(alone, step), f"step {step}")


def test_layers_of_different_names_draw_different_noise_and_directions():
    one, other = _layer(METIS), _layer(METIS, name="decoder.layers.1.mlp.linear_fc1")
    assert not torch.equal(one.core.bases["input"].state.v, other.core.bases["input"].state.v)
    (_, dx, *_), (_, dx_other, *_) = _step(one, 0), _step(other, 0)
    assert not torch.equal(dx, dx_other)


@pytest.mark.parametrize(("recipe", "depends"), [(NVFP4, True), (METIS, True), (NVFP4_DIRECT, False)])
def test_another_seed_changes_stochastic_gradients_only(recipe: Recipe, depends: bool):
    results = []
    for seed in (1, 2):
        layer = _layer(recipe, clock=TrainingClock(seed=seed, num_tokens_per_step=TOKENS))
        results.append(_step(layer, 0))
    (y_1, dx_1, dw_1, _), (y_2, dx_2, dw_2, _) = results
    assert_bitwise_equal(y_1, y_2, "forward rounds to nearest")
    assert torch.equal(dx_1, dx_2) is not depends and torch.equal(dw_1, dw_2) is not depends


def test_every_step_and_microbatch_has_its_own_draw():
    layer = _layer(NVFP4, clock=TrainingClock(seed=1))
    x, g = _batch(0)
    grads = []
    for step, microbatch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        layer.clock.begin_step(step, TOKENS)
        layer.clock.begin_microbatch(microbatch)
        layer.zero_grad()
        layer(x).backward(g)
        grads.append(layer.weight.grad.clone())
    assert_bitwise_equal(grads[0], grads[3], "same position, same bits")
    assert len({tuple(grad.flatten().tolist()) for grad in grads}) == 3


def test_advance_bases_serves_many_layers_of_one_clock():
    clock = TrainingClock(num_tokens_per_step=TOKENS)
    whole = Axis.whole
    cores = [
        LinearCore(recipe=METIS, layer=f"l{i}", in_features=whole(IN), out_features=whole(OUT), clock=clock)
        for i in range(2)
    ]
    weights = [torch.randn(OUT, IN, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    x, g = _batch(0)
    for core, weight in zip(cores, weights, strict=True):
        core(x.clone().requires_grad_(), weight.requires_grad_(), whole(TOKENS)).backward(g)
    advance_bases(list(zip(cores, weights, strict=True)), clock.step)
    assert all(basis.state.phase == "cold" for core in cores for basis in core.bases.values())
    assert not torch.equal(cores[0].bases["weight"].state.v, cores[1].bases["weight"].state.v)


# --- Odd sizes and dtypes ----------------------------------------


@EVERY_RECIPE
def test_the_smallest_layer_and_bf16_inputs_stay_finite(recipe: Recipe):
    """One block, K = N = 16 unless blocks are larger: rank and sketch are cut to the axis."""
    size = max(16, *(recipe.axis_multiple(axis) for axis in ("tokens", "in_features", "out_features")))
    layer = MetisLinear(size, size, recipe=recipe, dtype=torch.bfloat16)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(size, size, generator=generator).bfloat16().requires_grad_()
        y = layer(x)
        assert y.dtype == torch.bfloat16
        y.square().sum().backward()
        assert x.grad.dtype == torch.bfloat16
        assert bool(torch.isfinite(x.grad).all()) and bool(torch.isfinite(layer.weight.grad).all())
        layer.after_step()


@EVERY_RECIPE
def test_one_token_generates_and_is_refused_in_training_where_wgrad_is_quantised(recipe: Recipe):
    layer = _layer(recipe)
    x, g = _batch(0, tokens=1)
    with torch.no_grad():
        assert bool(torch.isfinite(layer(x)).all())
    if recipe.wgrad_input.quantizer is None:
        layer(x).backward(g)
    else:
        multiple = recipe.axis_multiple("tokens")
        with pytest.raises(
            ShapeError, match=f"tokens per microbatch and rank must be a multiple of {multiple} "
        ):
            layer(x)


def test_wrong_sizes_are_refused_on_construction():
    with pytest.raises(ShapeError, match=r"in_features .* multiple of 16 .* received 24"):
        MetisLinear(24, 32, recipe=NVFP4)
    with pytest.raises(ShapeError, match=r"out_features .* received 40"):
        MetisLinear(32, 40, recipe=NVFP4)
    MetisLinear(24, 40, recipe=BF16)
    literal = SplitConfig(rank=RankConfig(fixed=8), head_format="literal")
    cell = CellConfig(quantizer=QuantizerConfig(), split=literal)
    rank_8 = replace(METIS_PAPER, fprop_input=cell, wgrad_input=cell)
    with pytest.raises(ConfigError, match=r"multiple of 16 columns .* received 8"):
        MetisLinear(64, 64, recipe=rank_8)


def test_a_two_part_basis_loads_from_the_form_that_checkpoints_keep():
    """Parallel linears store the basis of gate|up as [parts, width, columns], so that it can be resharded."""
    layer = _layer(METIS)
    for step in range(2):
        _step(layer, step)
    saved = layer.state_dict()
    stored = dict(saved)
    for name in ("v", "z"):
        key = f"core.bases.grad_output.{name}"
        stored[key] = saved[key].unflatten(0, (2, -1))
    other = _layer(METIS)
    other.load_state_dict(stored)
    for name, value in other.state_dict().items():
        assert_bitwise_equal(value, saved[name], name)


# --- A layer with a clock of its own ----------------------------------------------------------------------


def test_two_unnamed_layers_do_not_share_random_numbers_and_a_seed_repeats_them():
    torch.manual_seed(3)
    first, second = (MetisLinear(IN, OUT, recipe=METIS) for _ in range(2))
    assert first.clock.seed != second.clock.seed
    torch.manual_seed(3)
    assert MetisLinear(IN, OUT, recipe=METIS).clock.seed == first.clock.seed


def test_accumulated_microbatches_draw_their_own_noise():
    layer = _layer(NVFP4)
    x, g = _batch(0)
    grads = []
    for _ in range(2):
        layer.zero_grad()
        layer(x).backward(g)
        grads.append(layer.weight.grad.clone())
    assert not torch.equal(*grads)
    layer.after_step()
    assert layer.clock.num_tokens_per_step == 2 * TOKENS


def test_the_tokens_of_a_step_are_those_of_the_last_one():
    """A smaller batch samples as densely as it would from the start; evaluation does not count."""
    layer = _layer(NVFP4)
    for tokens, num_microbatches in ((TOKENS, 4), (32, 2), (64, 1)):
        for _ in range(num_microbatches):
            x, g = _batch(0, tokens)
            layer(x).backward(g)
        layer.eval()
        layer(x).backward(g)
        layer.train()
        layer.after_step()
        assert layer.clock.num_tokens_per_step == tokens * num_microbatches


def test_a_layer_that_starts_in_bf16_draws_its_seed_when_it_needs_one():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    plain = torch.nn.Linear(IN, OUT)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    first = MetisLinear(IN, OUT, recipe=BF16)
    assert torch.equal(torch.get_rng_state(), after) and set(first.state_dict()) == set(plain.state_dict())
    second = MetisLinear(IN, OUT, recipe=BF16)
    for layer in (first, second):
        layer.set_recipe(METIS)
    assert 0 != first.clock.seed != second.clock.seed != 0
    assert {basis.seed for _, basis in first.core.own_bases()} == {first.clock.seed}


def test_seed_and_step_survive_a_phase_in_bf16():
    layer = _layer(NVFP4)
    for step in range(3):
        _step(layer, step)
    layer.set_recipe(BF16)
    _step(layer, 3)
    resumed = MetisLinear(IN, OUT, recipe=BF16, name="decoder.layers.0.mlp.linear_fc1")
    resumed.load_state_dict(layer.state_dict())
    for one in (layer, resumed):
        one.set_recipe(NVFP4)
    assert (resumed.clock.seed, resumed.clock.step) == (layer.clock.seed, 4)
    _assert_all_equal(_step(resumed, 4), _step(layer, 4), "after bf16")


def test_loading_forgets_a_step_that_was_broken_off():
    layer = _layer(METIS)
    _step(layer, 0)
    state = copy.deepcopy(layer.state_dict())
    expected = [_step(layer, step) for step in (1, 2)]
    x, g = _batch(9)
    layer(x).backward(g)
    layer.load_state_dict(state)
    for step, those in zip((1, 2), expected, strict=True):
        _assert_all_equal(_step(layer, step), those, f"step {step}")
    assert layer.clock.num_tokens_per_step == TOKENS


@pytest.mark.parametrize("by_context", [False, True])
def test_a_layer_built_on_the_meta_device_takes_a_state_dict(by_context: bool):
    layer = _layer(METIS)
    _step(layer, 0)
    with torch.device("meta") if by_context else nullcontext():
        other = _layer(METIS, **({} if by_context else {"device": "meta"}))
    assert other.weight.is_meta
    other.to_empty(device="cpu").load_state_dict(layer.state_dict())
    for step in range(1, 9):
        _assert_all_equal(_step(other, step), _step(layer, step), f"step {step}")
    with pytest.raises(ConfigError, match=r"must not be meta under recipe 'metis_paper'"):
        MetisLinear(IN, OUT, recipe=METIS_PAPER, device="meta")


@pytest.mark.parametrize("steps_before", [1, 5, 9])
def test_a_layer_resumes_at_its_step_from_its_state_dict_alone(steps_before: int):
    layer = _layer(METIS)
    for step in range(steps_before):
        _step(layer, step)
    resumed = _layer(METIS)
    resumed.load_state_dict(layer.state_dict())
    for step in range(steps_before, steps_before + 4):
        _assert_all_equal(_step(resumed, step), _step(layer, step), f"step {step}")


def test_weights_of_a_plain_linear_load_strictly():
    layer = _layer(NVFP4)
    layer.load_state_dict(torch.nn.Linear(IN, OUT).state_dict())


def test_a_basis_of_another_rank_is_refused():
    wide, narrow = (
        _with_splits(METIS, SplitConfig(rank=RankConfig(fixed=rank)), oversample)
        for rank, oversample in ((20, 4), (16, 8))
    )
    layer = _layer(wide)
    with pytest.raises(RuntimeError, match="a basis of rank 16 is not one of rank 20"):
        layer.load_state_dict(_layer(narrow).state_dict())


def _with_splits(recipe: Recipe, split: SplitConfig, oversample: int) -> Recipe:
    cells = {name: replace(getattr(recipe, name), split=split) for name in CELL_NAMES}
    return replace(recipe, basis=replace(recipe.basis, oversample=oversample), **cells)


# --- Surroundings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metis", "nvfp4", "bf16_reparametrised"])
def test_autocast_does_not_reach_the_accumulation(name: str):
    layer = _layer(RECIPES[name])
    x, g = _batch(0)
    expected = _outputs(layer, x, g)
    layer = _layer(RECIPES[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _assert_all_equal(_outputs(layer, x, g), expected, "under autocast")


def _outputs(layer: MetisLinear, x: Tensor, g: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    return [y.detach(), x.grad, layer.weight.grad.clone()]


def test_a_second_derivative_is_refused():
    layer = _layer(NVFP4)
    x, _ = _batch(0)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        dx.sum().backward()


def test_a_graph_walked_twice_is_sketched_once():
    layer = _layer(METIS)
    x, g = _batch(0)
    y = layer(x.requires_grad_())
    y.backward(g, retain_graph=True)
    once = [rows.shape for rows in layer.core.bases["input"]._pending.rows]
    y.backward(g)
    assert [rows.shape for rows in layer.core.bases["input"]._pending.rows] == once and len(once) == 1


def test_wrong_dtypes_are_named_and_no_tokens_give_no_rows():
    layer = _layer(NVFP4)
    with pytest.raises(ShapeError, match=r"must have the weight's dtype.*received torch.bfloat16"):
        layer(torch.zeros(16, IN, dtype=torch.bfloat16))
    assert layer(torch.zeros(0, IN)).shape == (0, OUT)


def test_tiles_on_the_input_name_the_layer_when_tokens_do_not_fit():
    tiles = CellConfig(quantizer=QuantizerConfig(block_shape=(16, 16)))
    recipe = Recipe(name="tiles", fprop_input=tiles, fprop_weight=tiles)
    layer = _layer(recipe)
    with torch.no_grad(), pytest.raises(ShapeError, match=r"linear_fc1: tokens .* multiple of 16"):
        layer(torch.zeros(24, IN))


def test_both_terms_of_the_left_meet_one_encoding_of_the_right():
    seen = []
    two = CellConfig(quantizer=QuantizerConfig(num_terms=2))
    layer = _layer(Recipe(name="two", fprop_input=two, fprop_weight=two))
    layer.clock.watch.observer = lambda plan, cell, *_: seen.append(cell)
    layer(_batch(0)[0])
    assert seen == ["fprop_input", "fprop_weight"]

"""The six-cell table at work: each GEMM against a composition written out here, from the definitions.

Oracles: plain products in float64 when nothing is quantised (every head term must be there, once); float64
GEMMs of the very codes that each cell prescribes when everything is. A code taken along another axis, with
another tensor's scale or other random bits is wrong by percents and the tolerance is 1e-6.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metis.config import CELL_NAMES, BasisConfig, CellConfig, RankConfig, Recipe, SplitConfig
from metis.functional import LinearPlan, dgrad, fprop, is_transposed, operand_of, quantized_linear, wgrad
from metis.gemm import EmulatedGemm
from metis.operand import Axis
from metis.quantize import QuantizedTensor, gemm_alpha, quantize, random_hadamard
from metis.recipes import METIS, METIS_PAPER, NVFP4, NVFP4_DIRECT, RECIPES
from metis.rng import NoisePosition, random_words, stream_key
from tests.numerics._assertions import assert_bitwise_equal
from tests.numerics._simulated_ranks import Team, shard_of, use_simulated_collectives

IDENTITY = 1e-12  # relative; worst measured 4e-13, with a head far larger than the operand
FP32_SUM = 2e-6  # relative to the product's norm; worst measured 7e-8
HEADS_FP32 = 1e-5  # thin products in fp32 on top; worst measured 1e-7
ALPHA_FP32 = 2e-7  # two roundings of alpha; worst measured 4e-8
LAYER, SEED, POSITION = "decoder.layers.3.mlp.linear_fc2", 17, NoisePosition(step=4, microbatch=9)
TOKENS, IN, OUT, RANK = 48, 64, 32, 16


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, w, g whose rows and columns differ in size by orders, so that axis and scale matter."""
    x = _randn(TOKENS, IN, seed=1) * torch.logspace(-1, 1, IN) * torch.logspace(0, 2, TOKENS)[:, None]
    w = 0.02 * _randn(OUT, IN, seed=2) * torch.logspace(-1, 0, OUT)[:, None]
    g = 1e-4 * _randn(TOKENS, OUT, seed=3) * torch.logspace(0, 1, OUT) * torch.logspace(1, 0, TOKENS)[:, None]
    return x.to(dtype), w.to(dtype), g.to(dtype)


def _bases(kind: str = "stale") -> dict[str, Tensor]:
    """Return bases that fit nothing in particular: random orthonormal ones, or not even orthonormal."""
    bases = {}
    for seed, (name, size) in enumerate((("v_input", IN), ("v_weight", IN), ("v_grad_output", OUT))):
        v = _randn(size, RANK, seed=20 + seed)
        bases[name] = (torch.linalg.qr(v).Q if kind == "stale" else v).to(torch.bfloat16)
    return bases


def _plan(recipe: Recipe, **changes: object) -> LinearPlan:
    plan = LinearPlan(
        recipe=recipe,
        layer=LAYER,
        tokens=Axis.whole(TOKENS),
        in_features=Axis.whole(IN),
        out_features=Axis.whole(OUT),
        seed=SEED,
        position=POSITION,
    )
    return replace(plan, **changes)


def _assert_close(actual: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    error = float((actual.double() - exact).norm() / exact.norm())
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"


CELLS_OF = {
    "x": ("fprop_input", "wgrad_input"),
    "w": ("fprop_weight", "dgrad_weight"),
    "g": ("dgrad_grad_output", "wgrad_grad_output"),
}
SPLIT_CHOICES = [
    combination
    for size in range(1, 7)
    for combination in itertools.combinations(sorted(sum(CELLS_OF.values(), ())), size)
]


@pytest.mark.parametrize("kind", ["stale", "not orthonormal"])
def test_without_quantisation_every_combination_of_splits_is_the_plain_product(kind: str):
    """All 63 choices of split cells: a head that is dropped, doubled or of the wrong tensor shows at once."""
    x, w, g = _operands()
    split = CellConfig(split=SplitConfig(rank=RankConfig(fixed=RANK)))
    for cells in SPLIT_CHOICES:
        recipe = Recipe(name="identity", basis=BasisConfig(), **dict.fromkeys(cells, split))
        plan = _plan(recipe, **_bases(kind))
        _assert_close(fprop(x, w, plan, torch.float64), x @ w.T, IDENTITY, f"y, split {cells}")
        _assert_close(dgrad(g, w, plan, torch.float64), g @ w, IDENTITY, f"dx, split {cells}")
        _assert_close(wgrad(g, x, plan, torch.float64), g.T @ x, IDENTITY, f"dw, split {cells}")


def test_the_head_is_really_taken_out():
    """Guard for the test above: with a split the FP4 product alone is far from y."""
    x, w, _ = _operands()
    seen = []

    class Recorder(EmulatedGemm):
        def multiply(self, a: QuantizedTensor, b: QuantizedTensor, accumulate: torch.dtype) -> Tensor:
            seen.append(super().multiply(a, b, accumulate).clone())
            return seen[-1].clone()

    v = torch.linalg.svd(x).Vh[:RANK].T.to(torch.bfloat16)
    plan = _plan(METIS, v_input=v, backend=Recorder())
    fprop(x.float(), w.float(), plan, torch.float32)
    assert len(seen) == 1
    share = float(seen[0].norm() / (x @ w.T).norm())
    assert share < 0.5, f"the residual's product holds {share:.2f} of y"


def _words(cell: str, rows: int, cols: int) -> Tensor:
    return random_words(stream_key(SEED, LAYER, cell), POSITION, torch.arange(rows), torch.arange(cols), 16)


def _decoded_product(a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
    """The FP4 product by its definition: exact operands in float64, tensor scales afterwards."""
    alpha = (a.amax.double() / 2688) * (b.amax.double() / 2688)
    return (a.operand(torch.float64) @ b.operand(torch.float64).T) * alpha


def _quantized(matrix: Tensor, tiles: bool = False, words: Tensor | None = None) -> QuantizedTensor:
    return quantize(
        matrix,
        block_shape=(16, 16) if tiles else (1, 16),
        rounding="rne" if words is None else "stochastic",
        noise_words=words,
    )


def _nvfp4_by_hand(x: Tensor, w: Tensor, g: Tensor) -> dict[str, Tensor]:
    """arXiv 2509.25149 section 4: tiles for w, SR on both copies of g, rotation on the wgrad pair."""
    gt, xt = random_hadamard(g.t()), random_hadamard(x.t())
    g_rows = _quantized(g, words=_words("dgrad_grad_output", TOKENS, OUT))
    g_cols = _quantized(gt, words=_words("wgrad_grad_output", TOKENS, OUT).t())
    return {
        "y": _decoded_product(_quantized(x), _quantized(w, tiles=True)),
        "dx": _decoded_product(g_rows, _quantized(w.t(), tiles=True)),
        "dw": _decoded_product(g_cols, _quantized(xt)),
    }


def _direct_by_hand(x: Tensor, w: Tensor, g: Tensor) -> dict[str, Tensor]:
    return {
        "y": _decoded_product(_quantized(x), _quantized(w)),
        "dx": _decoded_product(_quantized(g), _quantized(w.t())),
        "dw": _decoded_product(_quantized(g.t()), _quantized(x.t())),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("recipe", "by_hand"), [(NVFP4, _nvfp4_by_hand), (NVFP4_DIRECT, _direct_by_hand)], ids=["nvfp4", "direct"]
)
def test_each_gemm_reads_the_codes_its_cells_prescribe(
    recipe: Recipe, by_hand: Callable[..., dict[str, Tensor]], dtype: torch.dtype
):
    x, w, g = _operands(dtype)
    plan = _plan(recipe)
    expected = by_hand(x, w, g)
    _assert_close(fprop(x, w, plan, torch.float32), expected["y"], FP32_SUM, "y")
    _assert_close(dgrad(g, w, plan, torch.float32), expected["dx"], FP32_SUM, "dx")
    _assert_close(wgrad(g, x, plan, torch.float32), expected["dw"], FP32_SUM, "dw")


def test_the_table_is_sensitive_to_every_axis_scale_and_draw():
    """Guard for the test above: each known mistake moves the result by far more than its tolerance."""
    x, w, g = _operands(torch.float32)
    right = _nvfp4_by_hand(x, w, g)
    # Quantised along tokens, then used along N (the axes of the two copies swapped).
    along_tokens = _quantized(g.t(), words=_words("dgrad_grad_output", TOKENS, OUT).t()).dequantize().t()
    wrong_axis = along_tokens.double() @ _quantized(w.t(), tiles=True).dequantize().double().T
    # The weight with the input's tensor scale.
    borrowed = quantize(w, block_shape=(16, 16), amax=x.abs().amax())
    wrong_scale = _decoded_product(_quantized(x), borrowed)
    # Another draw for the gradient.
    other = _quantized(g, words=_words("wgrad_grad_output", TOKENS, OUT))
    wrong_draw = _decoded_product(other, _quantized(w.t(), tiles=True))
    # One operand rotated alone.
    g_cols = _quantized(random_hadamard(g.t()), words=_words("wgrad_grad_output", TOKENS, OUT).t())
    wrong_rotation = _decoded_product(g_cols, _quantized(x.t()))
    for name, wrong in (("dx", wrong_axis), ("y", wrong_scale), ("dx", wrong_draw), ("dw", wrong_rotation)):
        assert float((wrong - right[name]).norm() / right[name].norm()) > 1000 * FP32_SUM


def _split_by_hand(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = (x.double() @ v.double()).to(torch.bfloat16).double()
    return p, (x.double() - p @ v.double().T).float()


def test_metis_is_its_equations_with_quantised_residuals():
    """Heads in float64, FP4 products of residual codes; W tracked, SR on the gradient's residual."""
    x, w, g = _operands(torch.float32)
    bases = _bases()
    v_x, v_w, v_g = (bases[name].double() for name in ("v_input", "v_weight", "v_grad_output"))
    (p_x, r_x), (u, r_w), (p_g, r_g) = (_split_by_hand(m, v) for m, v in ((x, v_x), (w, v_w), (g, v_g)))
    g_rows = _quantized(r_g, words=_words("dgrad_grad_output", TOKENS, OUT))
    g_cols = _quantized(r_g.t(), words=_words("wgrad_grad_output", TOKENS, OUT).t())
    y = p_x @ (v_x.T @ w.double().T) + (r_x.double() @ v_w) @ u.T
    dx = p_g @ (v_g.T @ w.double()) + (r_g.double() @ u) @ v_w.T
    dw = v_g @ (p_g.T @ p_x @ v_x.T + p_g.T @ r_x.double()) + (r_g.double().T @ p_x) @ v_x.T
    y += _decoded_product(_quantized(r_x), _quantized(r_w, tiles=True))
    dx += _decoded_product(g_rows, _quantized(r_w.t(), tiles=True))
    dw += _decoded_product(g_cols, _quantized(r_x.t()))
    plan = _plan(METIS, **bases)
    _assert_close(fprop(x, w, plan, torch.float32), y, HEADS_FP32, "y")
    _assert_close(dgrad(g, w, plan, torch.float32), dx, HEADS_FP32, "dx")
    _assert_close(wgrad(g, x, plan, torch.float32), dw, HEADS_FP32, "dw")


@pytest.mark.parametrize(
    "operands",
    [c for size in range(1, 4) for c in itertools.combinations(("input", "weight", "grad_output"), size)],
    ids="+".join,
)
def test_a_merged_head_makes_one_matrix_of_an_operand(operands: tuple[str, ...]):
    """x^ = bf16(x + (q(R) - R)) in the full-size product and x in thin ones; the other operands as before."""
    sources = dict(zip(("input", "weight", "grad_output"), _operands(torch.float32), strict=True))
    bases = _bases()
    x, w, g = (sources[name].double() for name in sources)
    heads: dict[str, tuple[Tensor, Tensor]] = {}
    remains: dict[str, Tensor] = {}
    number: dict[str, Tensor] = {}
    for name, source in sources.items():
        v = bases[f"v_{name}"].double()
        p, r = _split_by_hand(source, v)
        apart = name not in operands
        heads[name] = (p, v) if apart else (p * 0, v)
        remains[name] = r.double() if apart else source.double()
        for cell_name in CELL_NAMES:
            if operand_of(cell_name) != name:
                continue
            turned = is_transposed(cell_name)
            words = _words(cell_name, TOKENS, OUT) if name == "grad_output" else None
            read = r.t() if turned else r
            coded = _quantized(read, name == "weight", words.t() if words is not None and turned else words)
            if apart:
                number[cell_name] = coded.operand(torch.float64) * (coded.amax.double() / 2688)
                continue
            whole = source.t() if turned else source
            decoded = coded.operand(torch.float32) * (coded.amax / 2688)
            number[cell_name] = (whole + (decoded - read)).to(torch.bfloat16).double()
            assert float((number[cell_name] - whole.double()).norm()) > 0.01 * float(r.double().norm())
    (p_x, v_x), (u, v_w), (p_g, v_g) = heads.values()
    r_x, _, r_g = remains.values()
    y = number["fprop_input"] @ number["fprop_weight"].T + p_x @ (v_x.T @ w.T) + (r_x @ v_w) @ u.T
    dx = number["dgrad_grad_output"] @ number["dgrad_weight"].T + p_g @ (v_g.T @ w) + (r_g @ u) @ v_w.T
    dw = number["wgrad_grad_output"] @ number["wgrad_input"].T
    dw = dw + v_g @ (p_g.T @ p_x @ v_x.T + p_g.T @ r_x) + (r_g.T @ p_x) @ v_x.T
    cells = {
        name: replace(getattr(METIS, name), split=SplitConfig(head_placement="merged"))
        for name in CELL_NAMES
        if operand_of(name) in operands
    }
    plan = _plan(replace(METIS, name="some merged", **cells), **bases)
    x, w, g = sources.values()
    _assert_close(fprop(x, w, plan, torch.float32), y, HEADS_FP32, "y")
    _assert_close(dgrad(g, w, plan, torch.float32), dx, HEADS_FP32, "dx")
    _assert_close(wgrad(g, x, plan, torch.float32), dw, HEADS_FP32, "dw")


def test_what_a_merged_head_costs():
    """Operands lose nothing to speak of, products do: x's head then meets the quantised weight.

    Relative Frobenius errors; measured 0.008, 0.098 and, for nvfp4, 0.145.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, features, rank, energy = 512, 256, 16, 0.996
    u, v = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in (tokens, features))
    tail = torch.randn(tokens, features, generator=generator)
    tail -= u @ (u.T @ tail)
    tail -= (tail @ v) @ v.T
    x = (energy / rank) ** 0.5 * u @ v.T + (1 - energy) ** 0.5 * tail / tail.norm()
    x, w = x * (tokens * features) ** 0.5, torch.randn(features, features, generator=generator)
    bases = {"v_input": v.bfloat16(), "v_weight": torch.linalg.svd(w).Vh[:rank].T.bfloat16()}
    axes = {"tokens": tokens, "in_features": features, "out_features": features}
    errors = {}
    for name in ("metis", "metis_merged", "nvfp4"):
        plan = _plan(RECIPES[name], **bases, **{axis: Axis.whole(size) for axis, size in axes.items()})
        exact = x.double() @ w.double().T
        errors[name] = float((fprop(x, w, plan, torch.float32).double() - exact).norm() / exact.norm())
    assert errors["metis"] < 0.015
    assert 0.08 < errors["metis_merged"] < 0.12 < errors["nvfp4"]


def test_literal_heads_multiply_quantised_factors():
    x, w, _ = _operands(torch.float32)
    v = _bases()["v_input"]
    p = x.double() @ v.double()
    head = _quantized(p.float()).dequantize().double() @ (
        _quantized(v).dequantize().double().T @ w.double().T
    )
    residual = (x.double() - p @ v.double().T).float()
    expected = head + _decoded_product(_quantized(residual), _quantized(w))
    plan = _plan(METIS_PAPER, v_input=v)
    _assert_close(fprop(x, w, plan, torch.float32), expected, HEADS_FP32, "y")


def test_float64_inputs_are_quantised_as_fp32_and_summed_in_float64():
    """The exact test mode: the codes of an fp32 run, without its summation error."""
    x, w, g = _operands(torch.float32)
    expected = _nvfp4_by_hand(x, w, g)
    x64, w64 = x.double().requires_grad_(), w.double().requires_grad_()
    y = quantized_linear(x64, w64, _plan(NVFP4))
    y.backward(g.double())
    for name, actual in (("y", y.detach()), ("dx", x64.grad), ("dw", w64.grad)):
        assert actual.dtype == torch.float64
        _assert_close(actual, expected[name], ALPHA_FP32, name)


class TestEmulatedGemm:
    """The products are those of the FP4 tensor core; alpha meets the accumulator, not the operands."""

    a = _quantized((1e-3 * _randn(64, 256, seed=5)).float())
    b = _quantized((3e4 * _randn(48, 256, seed=6)).float(), tiles=True)

    def test_operands_are_exact_in_bf16(self):
        for operand in (self.a, self.b):
            exact = operand.operand(torch.float64)
            assert_bitwise_equal(operand.operand(torch.bfloat16).double(), exact, "operand")

    def test_the_product_is_the_float64_one_up_to_summation(self):
        result = EmulatedGemm().multiply(self.a, self.b, torch.float32)
        _assert_close(result, _decoded_product(self.a, self.b), FP32_SUM, "fp32")
        dequantized = self.a.dequantize().double() @ self.b.dequantize().double().T
        _assert_close(result, dequantized, FP32_SUM, "product of decoded numbers")

    def test_alpha_multiplies_the_accumulator(self):
        accumulator = self.a.operand(torch.float32) @ self.b.operand(torch.float32).T
        expected = accumulator * gemm_alpha(self.a, self.b)
        assert_bitwise_equal(EmulatedGemm().multiply(self.a, self.b, torch.float32), expected, "alpha last")
        folded = (self.a.operand(torch.float32) * (self.a.amax / 2688)) @ (
            self.b.operand(torch.float32) * (self.b.amax / 2688)
        ).T
        assert not torch.equal(folded, expected), "the data cannot tell where alpha is applied"


def test_backward_captures_the_position_of_forward():
    """The plan of forward is read again in backward: gradients are those of its own draw."""
    x, w, g = _operands(torch.float32)
    grads = []
    for position in (POSITION, NoisePosition(step=4, microbatch=10)):
        x_leaf = x.clone().requires_grad_()
        y = quantized_linear(x_leaf, w, _plan(NVFP4, position=position))
        y.backward(g)
        grads.append(x_leaf.grad)
        assert_bitwise_equal(x_leaf.grad, dgrad(g, w, _plan(NVFP4, position=position), torch.float32), "dx")
    assert not torch.equal(*grads)


def test_only_needed_gradients_are_computed():
    x, w, g = _operands(torch.float32)
    x.requires_grad_()
    quantized_linear(x, w, _plan(NVFP4)).backward(g)
    assert x.grad is not None and w.grad is None


def test_an_engine_main_grad_accumulates_in_fp32_and_the_hook_is_told():
    x, w, g = (t.bfloat16() for t in _operands(torch.float32))
    w = torch.nn.Parameter(w)
    w.main_grad = torch.ones(OUT, IN)
    w.grad_added_to_main_grad = False
    quantized_linear(x, w, _plan(NVFP4)).backward(g)
    expected = torch.ones(OUT, IN) + wgrad(g, x, _plan(NVFP4), torch.float32)
    assert_bitwise_equal(w.main_grad, expected, "main_grad")
    assert w.grad_added_to_main_grad is True
    assert w.grad.shape == w.shape and w.grad.data_ptr() != w.main_grad.data_ptr()


@pytest.mark.parametrize("mark", [None, "zero_out_wgrad"])
def test_what_stands_for_an_accumulated_gradient_is_zero_where_somebody_reads_it(mark: str | None):
    """Nobody's hook, or one that adds it all the same: the gradient must not count twice."""
    x, w, g = (t.bfloat16() for t in _operands(torch.float32))
    w = torch.nn.Parameter(w)
    w.main_grad = torch.zeros(OUT, IN)
    if mark is not None:
        w.grad_added_to_main_grad = False
        setattr(w, mark, True)
    quantized_linear(x, w, _plan(NVFP4)).backward(g)
    assert float(w.main_grad.abs().max()) > 0.0
    assert float(w.grad.abs().max()) == 0.0


@pytest.mark.parametrize("sharded", ["out_features", "in_features"])
@pytest.mark.parametrize(
    "recipe", [NVFP4, METIS, RECIPES["metis_merged"], METIS_PAPER], ids=lambda recipe: recipe.name
)
def test_tensor_parallel_shards_give_the_products_of_one_rank(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, sharded: str
):
    """Column parallel cuts N, row parallel K; what the engine would sum over ranks is summed here. float64,
    so that codes are equal and only float64 sums differ.
    """
    use_simulated_collectives(monkeypatch)
    x, w, g = (t.float().double() for t in _operands())
    bases = _bases()
    if recipe is METIS_PAPER:
        bases["v_weight"] = None
    whole_x, whole_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    whole_y = quantized_linear(whole_x, whole_w, _plan(recipe, **bases))
    whole_y.backward(g)
    team = Team(2)
    size = OUT if sharded == "out_features" else IN

    def work(shard: int) -> tuple[Tensor, Tensor, Tensor]:
        axis = shard_of(size, shard, team)
        here = slice(shard * size // 2, (shard + 1) * size // 2)
        mine = dict(bases)
        if sharded == "out_features":
            x_local, w_local, g_local = x.clone(), w[here].clone(), g[:, here]
            mine["v_grad_output"] = mine["v_grad_output"][here]
        else:
            x_local, w_local, g_local = x[:, here].clone(), w[:, here].clone(), g
            for name in ("v_input", "v_weight"):
                mine[name] = None if mine[name] is None else mine[name][here]
        x_local.requires_grad_(), w_local.requires_grad_()
        y = quantized_linear(x_local, w_local, _plan(recipe, **{sharded: axis}, **mine))
        y.backward(g_local)
        return y.detach(), x_local.grad, w_local.grad

    (y0, dx0, dw0), (y1, dx1, dw1) = team.run(work)
    if sharded == "out_features":
        joined = torch.cat([y0, y1], dim=1), dx0 + dx1, torch.cat([dw0, dw1], dim=0)
    else:
        joined = y0 + y1, torch.cat([dx0, dx1], dim=1), torch.cat([dw0, dw1], dim=1)
    for name, actual, expected in zip(
        ("y", "dx", "dw"), joined, (whole_y, whole_x.grad, whole_w.grad), strict=True
    ):
        _assert_close(actual, expected.detach(), IDENTITY, name)

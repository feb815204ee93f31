"""The split linear against the method's equations, forward and backward, through autograd.

The oracle is written from the method (arXiv 2509.00404 v4 in projector form, v1 for the spectral factors,
2603.10444 for the mean), in float64 and apart from `metis/functional.py`:

    y  = P_x V_x^T w^T + R_x V_w U^T + q(R_x) q(W_R)^T
    dx = P_g L V_g^T w + s R_g U V_w^T + s q(R_g) q(W_R)
    dw = V_g L (P_g^T P_x V_x^T + P_g^T R_x) + s R_g^T P_x V_x^T + s q(R_g)^T q(R_x)

with L = diag(factors) and s the spectral factors (1 without them). With q the identity it is exact to 1e-12;
with q on the signal-to-noise ratio is what the head format's error predicts. Where a setting changes codes
(two terms, rotations, 4 over 6, stochastic weights, packed inputs) the oracle multiplies decoded operands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metis.config import (
    CELL_NAMES,
    BasisConfig,
    CellConfig,
    QuantizerConfig,
    RankConfig,
    Recipe,
    RhtConfig,
    SpectralLearningRateConfig,
    SplitConfig,
)
from metis.functional import LinearPlan, SpectralFactors, quantized_linear, wgrad
from metis.nn import MetisLinear
from metis.operand import Axis, NoiseStream, encode
from metis.quantize import quantize, random_hadamard, seeded_sign_vector
from metis.recipes import METIS, NVFP4
from metis.rng import NoisePosition, random_words, stream_key
from tests.numerics._assertions import assert_bitwise_equal, assert_sqnr_near, sqnr_db
from tests.numerics._simulated_ranks import Team, shard_of, use_simulated_collectives
from tests.numerics.test_decisive_experiment import TABLE as HEAD_FORMAT_ERRORS
from tests.numerics.test_decisive_experiment import matrix as matrix_with_head

IDENTITY = 1e-12  # relative; worst measured 4e-16
FP32_SUM = 2e-6  # relative; worst measured 1.6e-7
HEADS_FP32 = 1e-5  # thin products in fp32 on top; worst measured 1.2e-7
PREDICTION_DB = 0.8  # 10 % of an error; worst measured 0.14
RITZ_VALUES = 1e-2  # relative to the largest; V is rounded to bf16; worst measured 1e-3
TOKENS, IN, OUT, RANK = 48, 64, 32, 16
LAYER, SEED, POSITION = "decoder.layers.1.self_attention.linear_proj", 5, NoisePosition(step=6, microbatch=2)
ROWS, SR = QuantizerConfig(), QuantizerConfig(rounding="stochastic")
EXACT_HEADS = ("bf16", "feedback", "two_term")
OPERANDS = ("input", "weight", "grad_output")


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _operands(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return x, w, g with a mean over tokens, and rows and columns of different size."""
    x = (_randn(TOKENS, IN, seed=1) + 1.0) * torch.logspace(-1, 1, IN)
    w = 0.02 * _randn(OUT, IN, seed=2) * torch.logspace(-1, 0, OUT)[:, None]
    g = 1e-4 * (_randn(TOKENS, OUT, seed=3) + 0.5) * torch.logspace(1, 0, TOKENS)[:, None]
    return {name: value.to(dtype) for name, value in zip(OPERANDS, (x, w, g), strict=True)}


def _bases() -> dict[str, Tensor]:
    sizes = {"input": IN, "weight": IN, "grad_output": OUT}
    return {
        f"v_{name}": torch.linalg.qr(_randn(size, RANK, seed=30 + seed)).Q.bfloat16()
        for seed, (name, size) in enumerate(sizes.items())
    }


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


def _computed(x: Tensor, w: Tensor, g: Tensor, plan: LinearPlan) -> dict[str, Tensor]:
    """Return y, dx and dw of the library through autograd."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = quantized_linear(x, w, plan)
    y.backward(g)
    assert x.grad is not None and w.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dw": w.grad}


def _assert_close(
    actual: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float, what: object
) -> None:
    for name, expected in exact.items():
        error = float((actual[name].double() - expected.double()).norm() / expected.norm())
        assert error <= tolerance, f"{name} of {what}: relative error {error:.2e}, allowed {tolerance:.0e}"


# --- The oracle --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One operand as the method sees it: matrix = p v^T + residual, all float64; rank 0 without a head."""

    p: Tensor
    v: Tensor
    residual: Tensor

    @property
    def has_head(self) -> bool:
        """Whether anything was split off."""
        return self.p.shape[1] > 0


def _nvfp4(matrix: Tensor) -> Tensor:
    return quantize(matrix.float(), block_shape=(1, 16)).dequantize().double()


def _two_terms(matrix: Tensor) -> Tensor:
    """What the first term leaves, in fp32, is the second; their sum is an fp32 number too."""
    first = _nvfp4(matrix).float()
    return (first + _nvfp4(matrix.float() - first).float()).double()


def parts_of(matrix: Tensor, basis: Tensor, split: SplitConfig | None) -> Parts:
    """Return an operand split by definition: mean first, P from what is left, factors in their format."""
    full = matrix.double()
    if split is None:
        rows, cols = full.shape
        return Parts(p=full.new_zeros(rows, 0), v=full.new_zeros(cols, 0), residual=full)
    v = basis.double()
    mean = full.mean(dim=0).bfloat16().double()[None] if split.mean_first else None
    centred = full if mean is None else full - mean
    p = (centred @ v).bfloat16().double()
    to_format = {"bf16": lambda factor: factor, "feedback": _nvfp4, "two_term": _two_terms}[split.head_format]
    p, v = to_format(p), to_format(v)
    if mean is not None:
        p, v = torch.cat((torch.ones_like(p[:, :1]), p), dim=1), torch.cat((mean.T, v), dim=1)
    return Parts(p=p, v=v, residual=full - p @ v.T)


def oracle(
    operands: dict[str, Tensor],
    bases: dict[str, Tensor],
    recipe: Recipe,
    spectral: SpectralFactors | None = None,
) -> dict[str, Tensor]:
    """Return y, dx, dw by the equations in the module docstring with q = identity, in float64."""
    w = operands["weight"].double()
    cells = {
        name: parts_of(
            operands[name.split("_", 1)[1]], bases[f"v_{name.split('_', 1)[1]}"], getattr(recipe, name).split
        )
        for name in CELL_NAMES
    }
    x, u = cells["fprop_input"], cells["fprop_weight"]
    y = x.p @ (x.v.T @ w.T) + (x.residual @ u.v) @ u.p.T + x.residual @ u.residual.T
    g, u = cells["dgrad_grad_output"], cells["dgrad_weight"]
    scale, s = _factors(spectral if spectral is not None and spectral.on_dx else None, g)
    dx = (g.p * scale) @ (g.v.T @ w) + s * ((g.residual @ u.p) @ u.v.T + g.residual @ u.residual)
    g, x = cells["wgrad_grad_output"], cells["wgrad_input"]
    scale, s = _factors(spectral, g)
    dw = (g.v * scale) @ (g.p.T @ x.p @ x.v.T + g.p.T @ x.residual)
    dw += s * ((g.residual.T @ x.p) @ x.v.T + g.residual.T @ x.residual)
    return {"y": y, "dx": dx, "dw": dw}


def _factors(spectral: SpectralFactors | None, g: Parts) -> tuple[Tensor, float]:
    """Return (the factor of every head column, that of the residual); the mean goes with the first one."""
    if spectral is None or not g.has_head:
        return torch.ones(g.p.shape[1], dtype=torch.float64), 1.0
    head = spectral.head.double()
    return torch.cat((head[:1].expand(g.p.shape[1] - head.numel()), head)), spectral.residual


# --- q = identity ------------------------------------------------------------------------------------------


def _combinations() -> Iterator[tuple[str, ...]]:
    for size in range(1, 7):
        yield from itertools.combinations(CELL_NAMES, size)


def _split_recipe(cells: tuple[str, ...], head_format: str, mean_first: bool) -> Recipe:
    def cell(name: str) -> CellConfig:
        mean = mean_first and not name.endswith("weight")
        split = SplitConfig(rank=RankConfig(fixed=RANK), head_format=head_format, mean_first=mean)
        return CellConfig(split=split)

    return Recipe(name="identity", basis=BasisConfig(), **{name: cell(name) for name in cells})


@pytest.mark.parametrize("mean_first", [False, True])
@pytest.mark.parametrize("head_format", EXACT_HEADS)
def test_without_quantisation_every_split_gives_the_plain_products(head_format: str, mean_first: bool):
    """All 63 choices of split cells, forward and backward: oracle, library and x w^T, g w, g^T x agree."""
    operands, bases = _operands(), _bases()
    x, w, g = operands.values()
    plain = {"y": x @ w.T, "dx": g @ w, "dw": g.T @ x}
    for cells in _combinations():
        recipe = _split_recipe(cells, head_format, mean_first)
        computed = _computed(x, w, g, _plan(recipe, **bases))
        _assert_close(computed, oracle(operands, bases, recipe), IDENTITY, cells)
        _assert_close(computed, plain, IDENTITY, cells)


def test_a_mean_alone_is_exact_too():
    operands = _operands()
    x, w, g = operands.values()
    mean = CellConfig(split=SplitConfig(rank=None, mean_first=True))
    for cells in itertools.chain(
        *(
            itertools.combinations(
                ("fprop_input", "wgrad_input", "dgrad_grad_output", "wgrad_grad_output"), n
            )
            for n in range(1, 5)
        )
    ):
        computed = _computed(x, w, g, _plan(Recipe(name="mean", **dict.fromkeys(cells, mean))))
        _assert_close(computed, {"y": x @ w.T, "dx": g @ w, "dw": g.T @ x}, IDENTITY, cells)


STEPPED = SpectralFactors(head=torch.tensor([1.0] * 5 + [1.5] * (RANK - 5)), residual=2.0, on_dx=False)
SMOOTH = SpectralFactors(head=2 / (1 + torch.linspace(1, 0.1, RANK)), residual=2.0, on_dx=False)


@pytest.mark.parametrize("apply_to", ["dw", "dw_and_dx"])
@pytest.mark.parametrize("factors", [STEPPED, SMOOTH], ids=["stepped", "smooth"])
def test_spectral_factors_scale_the_head_and_the_residual_of_g(factors: SpectralFactors, apply_to: str):
    operands, bases = _operands(), _bases()
    spectral = replace(factors, on_dx=apply_to == "dw_and_dx")
    config = SpectralLearningRateConfig(apply_to=apply_to)
    both = {"dgrad_grad_output", "wgrad_grad_output"}
    changed = set()
    for cells, head_format, mean_first in itertools.product(_combinations(), EXACT_HEADS, (False, True)):
        if not both <= set(cells):
            continue
        recipe = replace(_split_recipe(cells, head_format, mean_first), spectral_learning_rate=config)
        computed = _computed(*operands.values(), _plan(recipe, spectral=spectral, **bases))
        _assert_close(computed, oracle(operands, bases, recipe, spectral), IDENTITY, cells)
        plain = oracle(operands, bases, recipe)
        changed |= {name for name in plain if not torch.allclose(computed[name], plain[name], rtol=1e-3)}
    assert changed == ({"dw", "dx"} if apply_to == "dw_and_dx" else {"dw"})


def _layer_with_known_spectrum(config: SpectralLearningRateConfig, sigma: Tensor) -> MetisLinear:
    """Return a layer whose g has had the singular values `sigma` in every step, all rows sampled."""
    cell = CellConfig(split=SplitConfig(rank=RankConfig(fixed=sigma.numel())))
    recipe = Recipe(
        name="spectral",
        dgrad_grad_output=cell,
        wgrad_grad_output=cell,
        basis=BasisConfig(row_sample_fraction=1.0, refresh_interval_steps=1, oversample=0),
        spectral_learning_rate=config,
    )
    layer = MetisLinear(IN, OUT, bias=False, recipe=recipe, dtype=torch.float64)
    u, v = torch.linalg.qr(_randn(TOKENS, 8, seed=7)).Q, torch.linalg.qr(_randn(OUT, 8, seed=8)).Q
    for step in range(12):
        layer(_randn(TOKENS, IN, seed=step)).backward((u * sigma) @ v.T)
        layer.after_step()
    return layer


def test_factors_follow_the_ritz_values_in_descending_order():
    """v1: sigma_1..sigma_5 by 1, the rest by 1.5, what no direction holds by 2; smooth: 2 / (1 + s / s_1)."""
    sigma = torch.tensor([8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.5, 1.0], dtype=torch.float64)
    layer = _layer_with_known_spectrum(SpectralLearningRateConfig(), sigma)
    stepped = layer.core.plan(Axis.whole(TOKENS)).spectral
    assert stepped is not None and not stepped.on_dx
    assert stepped.head.tolist() == [1.0] * 5 + [1.5] * 3 and stepped.residual == 2.0
    # The order is that of V's columns: column i carries sigma_i of the gradient.
    v = layer.core.plan(Axis.whole(TOKENS)).v_grad_output
    assert v is not None
    exact_v = torch.linalg.qr(_randn(OUT, 8, seed=8)).Q
    carried = ((exact_v * sigma).T @ v.double()).norm(dim=0)
    assert float((carried - sigma).abs().max()) <= RITZ_VALUES * 8
    smooth = SpectralLearningRateConfig(schedule="smooth", apply_to="dw_and_dx")
    spectral = _layer_with_known_spectrum(smooth, sigma).core.plan(Axis.whole(TOKENS)).spectral
    assert spectral is not None and spectral.on_dx and spectral.residual == 2.0
    expected = 2 / (1 + sigma / sigma[0])
    assert float((spectral.head.double() - expected).abs().max()) <= RITZ_VALUES


def test_fewer_directions_than_leading_ones_are_all_leading():
    sigma = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2], dtype=torch.float64)
    config = SpectralLearningRateConfig(num_leading=20, leading_factor=1.25)
    spectral = _layer_with_known_spectrum(config, sigma).core.plan(Axis.whole(TOKENS)).spectral
    assert spectral is not None and spectral.head.tolist() == [1.25] * 8


# --- q on: the predicted signal-to-noise ratio -------------------------------------------------------------


def _predicted_db(variant: str) -> float:
    """Two operands quantised alike, independent errors; a literal head's own error is in the matrix alone."""
    error = HEAD_FORMAT_ERRORS[variant][0]
    if variant == "literal":
        tail = HEAD_FORMAT_ERRORS["bf16"][0]
        return -20 * math.log10(math.hypot(error, tail))
    return -20 * math.log10(math.sqrt(2) * error)


@pytest.mark.parametrize("operand", ["input", "grad_output"])
@pytest.mark.parametrize("variant", ["direct", *EXACT_HEADS, "literal"])
def test_products_have_the_noise_that_the_head_format_predicts(variant: str, operand: str):
    """A matrix with 99.6 % of its energy in the head times a Gaussian one, both in NVFP4."""
    tokens, features, rank = 512, 1024, 16
    data, v = matrix_with_head(
        tokens,
    )
    other = _randn(64, features, seed=9)
    split = None
    if variant != "direct":
        split = SplitConfig(rank=RankConfig(fixed=rank), head_format=variant)
    gemm = "fprop" if operand == "input" else "dgrad"
    cells = {
        f"{gemm}_{operand}": CellConfig(quantizer=ROWS, split=split),
        f"{gemm}_weight": CellConfig(quantizer=ROWS),
    }
    recipe = Recipe(name=variant, basis=None if split is None else BasisConfig(), **cells)
    plan = LinearPlan(
        recipe=recipe,
        layer=LAYER,
        tokens=Axis.whole(tokens),
        in_features=Axis.whole(features if operand == "input" else 64),
        out_features=Axis.whole(64 if operand == "input" else features),
        **({} if split is None else {f"v_{operand}": v.bfloat16()}),
    )
    exact = data @ other.T
    if operand == "input":
        actual = _computed(data.float(), other.float(), torch.ones(tokens, 64), plan)["y"]
    else:
        x = torch.ones(tokens, 64)
        actual = _computed(x, other.T.contiguous().float(), data.float(), plan)["dx"]
    assert_sqnr_near(actual, exact, _predicted_db(variant), PREDICTION_DB, variant)


# --- Codes by other settings: the product of decoded operands ----------------------------------------------


def _axes_of(matrix: Tensor) -> tuple[Axis, Axis]:
    return Axis.whole(matrix.shape[0]), Axis.whole(matrix.shape[1])


def _words(operand: str, position: NoisePosition, rows: int, cols: int) -> Tensor:
    key = stream_key(SEED, LAYER, operand)
    return random_words(key, position, torch.arange(rows), torch.arange(cols), 16)


def _uniform(quantizer: QuantizerConfig, **others: CellConfig) -> Recipe:
    return Recipe(name="uniform", **(dict.fromkeys(CELL_NAMES, CellConfig(quantizer=quantizer)) | others))


def _products(x: Tensor, w: Tensor, g: Tensor, decode: object) -> dict[str, Tensor]:
    """Return the three products of operands decoded by `decode(matrix)`, blocks along each contraction."""
    assert callable(decode)
    return {
        "y": decode(x) @ decode(w).T,
        "dx": decode(g) @ decode(w.T.contiguous()).T,
        "dw": decode(g.T.contiguous()) @ decode(x.T.contiguous()).T,
    }


def test_two_terms_multiply_every_term_with_every_other():
    x, w, g = _operands(torch.float32).values()
    computed = _computed(x, w, g, _plan(_uniform(QuantizerConfig(num_terms=2))))
    _assert_close(computed, _products(x, w, g, _two_terms), FP32_SUM, "two terms")
    exact = x.double() @ w.double().T
    once = _computed(x, w, g, _plan(_uniform(ROWS)))["y"]
    assert sqnr_db(computed["y"], exact) > sqnr_db(once, exact) + 18.0, "the second term adds about 20 dB"


@pytest.mark.parametrize("error", ["mae", "mse"])
def test_four_over_six_operands(error: str):
    x, w, g = _operands(torch.float32).values()

    def decode(matrix: Tensor) -> Tensor:
        return quantize(matrix, block_shape=(1, 16), four_over_six=error).dequantize().double()

    computed = _computed(x, w, g, _plan(_uniform(QuantizerConfig(four_over_six=error))))
    _assert_close(computed, _products(x, w, g, decode), FP32_SUM, error)


@pytest.mark.parametrize(("size", "seed"), [(16, None), (16, 3), (32, 3), (64, 3), (128, 3)])
def test_rotations_of_every_size_cancel_in_the_product(size: int, seed: int | None):
    """Codes of the rotated operands; with a rotation left out of one operand nothing would be left of y."""
    tokens = features = 128
    x, w, g = (_randn(tokens, features, seed=seed_).float() for seed_ in (1, 2, 3))
    signs = None if seed is None else seeded_sign_vector(seed, size)

    def decode(matrix: Tensor) -> Tensor:
        return quantize(random_hadamard(matrix, size, signs), block_shape=(1, 16)).dequantize().double()

    recipe = _uniform(QuantizerConfig(rht=RhtConfig(size=size, sign_seed=seed)))
    whole = Axis.whole(tokens)
    plan = _plan(recipe, tokens=whole, in_features=whole, out_features=whole)
    computed = _computed(x, w, g, plan)
    _assert_close(computed, _products(x, w, g, decode), FP32_SUM, size)
    # Two operands of 20.4 dB each, rounded to bf16 before.
    assert_sqnr_near(computed["y"], x.double() @ w.double().T, 17.4, PREDICTION_DB, f"rotation of {size}")


@pytest.mark.parametrize("block_shape", [(1, 16), (16, 16)])
def test_both_copies_of_a_stochastic_weight_share_one_draw_for_the_step(block_shape: tuple[int, int]):
    """A weight that is drawn afresh in backward has the gradient of another layer than the one that ran."""
    x, w, g = _operands(torch.float32).values()
    quantizer = QuantizerConfig(rounding="stochastic", block_shape=block_shape)
    weight = CellConfig(quantizer=quantizer)
    recipe = _uniform(ROWS, fprop_weight=weight, dgrad_weight=weight)
    words = _words("weight", NoisePosition(step=POSITION.step, microbatch=0), OUT, IN)

    def drawn(matrix: Tensor, bits: Tensor) -> Tensor:
        return (
            quantize(matrix, block_shape=block_shape, rounding="stochastic", noise_words=bits)
            .dequantize()
            .double()
        )

    along_in, along_out = drawn(w, words), drawn(w.T.contiguous(), words.T).T
    expected = {"y": _nvfp4(x) @ along_in.T, "dx": _nvfp4(g) @ along_out}
    if block_shape == (16, 16):
        assert_bitwise_equal(along_in.contiguous(), along_out.contiguous(), "tiles: one weight for both")
    for microbatch in (2, 3):
        plan = _plan(recipe, position=NoisePosition(step=POSITION.step, microbatch=microbatch))
        _assert_close(_computed(x, w, g, plan), expected, FP32_SUM, microbatch)
    later = _plan(recipe, position=NoisePosition(step=POSITION.step + 1, microbatch=2))
    assert sqnr_db(_computed(x, w, g, later)["y"], expected["y"]) < 40.0, "the next step draws again"


# --- Inputs kept as codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [NVFP4, _uniform(ROWS), _uniform(SR)], ids=["nvfp4", "direct", "sr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_input_gives_the_plain_results_bitwise_without_a_split(recipe: Recipe, dtype: torch.dtype):
    x, w, g = _operands(dtype).values()
    plain = _computed(x, w, g, _plan(recipe))
    packed = _computed(x, w, g, _plan(replace(recipe, save_packed=True)))
    for name, value in plain.items():
        assert_bitwise_equal(packed[name], value, name)


def test_a_packed_input_of_metis_multiplies_its_decoded_residual_in_the_thin_product():
    operands, bases = _operands(torch.float32), _bases()
    x, w, g = operands.values()
    p_x, v_x, r_x = _split_as_rounded(x, bases["v_input"])
    p_g, v_g, r_g = _split_as_rounded(g, bases["v_grad_output"])
    noise = NoiseStream(seed=SEED, layer=LAYER, operand="wgrad_grad_output", position=POSITION)
    g_codes = (
        encode(
            r_g.T,
            SR,
            Axis.whole(OUT),
            Axis.whole(TOKENS),
            amax_scope="global",
            noise=noise,
            noise_is_transposed=True,
        )
        .dequantize()
        .double()
    )
    x_codes = _nvfp4(r_x.T)
    kept = x_codes.T  # R_x as it comes out of its codes
    expected = (
        v_g @ (p_g.T @ p_x @ v_x.T + p_g.T @ kept) + (r_g.double().T @ p_x) @ v_x.T + g_codes @ x_codes.T
    )
    packed, plain = (
        _computed(x, w, g, _plan(replace(METIS, save_packed=flag), **bases)) for flag in (True, False)
    )
    _assert_close(packed, {"dw": expected}, HEADS_FP32, "packed")
    for name in ("y", "dx"):
        assert_bitwise_equal(packed[name], plain[name], name)
    assert not torch.equal(packed["dw"], plain["dw"])
    _assert_close(
        {"dw": wgrad(g, x, _plan(METIS, **bases), torch.float32)}, {"dw": plain["dw"]}, 0.0, "plain"
    )


def _split_as_rounded(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v = basis.double()
    p = (matrix.double() @ v).bfloat16().double()
    return p, v, (matrix.double() - p @ v.T).float()


@pytest.mark.parametrize(
    "recipe",
    [
        METIS,
        NVFP4,
        _uniform(QuantizerConfig(num_terms=2)),
        _uniform(QuantizerConfig(format="fp8_e4m3", block_shape=None)),
        _uniform(QuantizerConfig(four_over_six="mse")),
    ],
    ids=["metis", "nvfp4", "two_terms", "fp8", "four_over_six"],
)
def test_a_packed_input_survives_a_second_backward_and_makes_the_same_bases(recipe: Recipe):
    """Sketches read rows picked in forward; every format comes back from its bytes."""
    results = []
    for packed in (False, True):
        torch.manual_seed(0)
        layer = MetisLinear(IN, OUT, bias=False, recipe=replace(recipe, save_packed=packed))
        for step in range(3):
            x = _randn(112, IN, seed=step).float()
            y = layer(x)
            y.backward(_randn(112, OUT, seed=50 + step).float(), retain_graph=True)
            first = layer.weight.grad.clone()
            layer.zero_grad()
            if step == 2:
                y.backward(_randn(112, OUT, seed=50 + step).float())
                assert_bitwise_equal(layer.weight.grad, first, "second backward")
            layer.after_step()
        bases = {k: v for k, v in layer.state_dict().items() if "bases.input" in k}
        results.append((first, bases))
    for name, value in results[0][1].items():
        assert_bitwise_equal(results[1][1][name], value, name)
    if not results[0][1]:
        assert_bitwise_equal(results[1][0], results[0][0], "dw")


@pytest.mark.parametrize("recipe", [NVFP4, METIS], ids=lambda recipe: recipe.name)
def test_a_packed_shard_of_tokens_gives_the_weight_gradient_of_the_whole_input(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
):
    """Sequence parallelism: each rank keeps the codes of its tokens and gathers them in backward."""
    use_simulated_collectives(monkeypatch)
    tokens = 64
    x, w, g = (
        _randn(tokens, IN, seed=1).float(),
        _operands(torch.float32)["weight"],
        _randn(tokens, OUT, seed=3),
    )
    recipe = replace(recipe, save_packed=True)
    bases = _bases() if recipe.has_basis else {}
    plan = _plan(recipe, tokens=Axis.whole(tokens), **bases)

    def weight_grad(x_here: Tensor, plan: LinearPlan) -> Tensor:
        weight = w.clone().requires_grad_()
        quantized_linear(x_here, weight, plan).backward(g.float())
        assert weight.grad is not None
        return weight.grad

    whole = weight_grad(x, plan)
    team = Team(2)

    def work(shard: int) -> Tensor:
        axis = shard_of(tokens, shard, team)
        mine = replace(plan, token_shard=axis, gather=axis, gathered_operand="input")
        return weight_grad(x.chunk(2)[shard], mine)

    for dw in team.run(work):
        _assert_close({"dw": dw}, {"dw": whole}, FP32_SUM, recipe.name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", [NVFP4, METIS], ids=lambda recipe: recipe.name)
def test_a_packed_input_is_the_same_when_recomputed(recipe: Recipe, reentrant: bool):
    """Codes, picked rows and so the next bases: bitwise those of the run without recomputation."""
    results = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        layer = MetisLinear(IN, OUT, bias=False, recipe=replace(recipe, save_packed=True))
        for step in range(3):
            x = _randn(112, IN, seed=step).float().requires_grad_()
            y = checkpoint(layer, x, use_reentrant=reentrant) if recomputed else layer(x)
            layer.zero_grad()
            y.backward(_randn(112, OUT, seed=50 + step).float())
            layer.after_step()
        assert x.grad is not None and layer.weight.grad is not None
        results.append({"dx": x.grad, "dw": layer.weight.grad, **layer.state_dict()})
    for name, value in results[0].items():
        assert_bitwise_equal(results[1][name], value, name)

"""The linear on kernels against its definition: run by test_fused_linear.py under Triton's interpreter.

A recorder looks at what a pass splits and quantises. Where nothing is split the result is that of
`metis.functional`; where something is, P and R are compared with float64, codes with those of the recorded R,
and products with the formula in float64 over the recorded P, R and codes, which fails when any one of its
terms is left out.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metis import encoded_weight, fused_linear, fused_operand, fused_products
from metis.clock import OperandWatch, TrainingClock
from metis.config import CELL_NAMES, BasisConfig, QuantizerConfig, RankConfig, Recipe, RhtConfig, SplitConfig
from metis.encoded_weight import CHOICES, KEEP, encode_weight
from metis.errors import ConfigError, ShapeError
from metis.functional import LinearPlan, is_transposed, operand_of
from metis.functional import quantized_linear as definition
from metis.fused_linear import WeightCache, is_fusable, quantized_linear
from metis.gemm import EmulatedGemm, cublas, scaled_product
from metis.kernels import splitting
from metis.nn import MetisLinear
from metis.operand import Axis, EncodedMatrix, encode, merged
from metis.quantize import QuantizedTensor, gemm_alpha
from metis.recipes import RECIPES
from metis.rng import NoisePosition, gaussian, stream_key
from tests.numerics._simulated_ranks import Team, shard_of, use_simulated_collectives

TOKENS, IN_FEATURES, OUT_FEATURES = 64, 128, 64
PRODUCT_TOLERANCE = 4e-3
"""Relative Frobenius error of y, dx and dw (bf16) against the formula in float64; measured 2.3e-3."""
SUM_TOLERANCE = {"y": 8e-3, "dx": 8e-3, "dw": 1e-3}
"""Between layouts: each rank rounds its part of a sum over features to bf16; measured 2.8e-3, 3.7e-3, 0."""
DEFINED_TOLERANCE = 2e-2
"""Of y, dx and dw against `metis.functional`, whose P and R differ by roundings, and so do a few codes."""
SMALLEST_TERM = 2 * PRODUCT_TOLERANCE
BF16_ULP = 2.0**-7

warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of divisions by zero that are meant


def _split(recipe: Recipe, *operands: str, **options: Any) -> Recipe:
    """Return `recipe` with the cells of some operands split."""
    split = SplitConfig(**options)
    cells = {
        cell: replace(getattr(recipe, cell), split=split)
        for cell in CELL_NAMES
        if operand_of(cell) in operands and getattr(recipe, cell).quantizer is not None
    }
    return replace(recipe, name=f"{recipe.name} {'+'.join(operands)}", basis=BasisConfig(), **cells)


def _rotated(recipe: Recipe, gemm: str) -> Recipe:
    """Return `recipe` with both operands of one GEMM rotated by 32."""
    changes = {}
    for cell_name in CELL_NAMES:
        if cell_name.startswith(gemm):
            cell = getattr(recipe, cell_name)
            changes[cell_name] = replace(
                cell,
                quantizer=replace(cell.quantizer, block_shape=(1, 16), rht=RhtConfig(size=32, sign_seed=3)),
            )
    return replace(recipe, name=f"{recipe.name} rotated {gemm}", **changes)


EVERYTHING = ("input", "weight", "grad_output")
UNSPLIT = [
    recipe for recipe in RECIPES.values()
    if is_fusable(recipe, IN_FEATURES, OUT_FEATURES) and recipe.is_quantized and not recipe.has_basis
] + [_rotated(RECIPES["nvfp4_direct"], "fprop"), _rotated(RECIPES["nvfp4_direct"], "wgrad")]  # fmt: skip
SPLIT = [
    RECIPES["metis"],
    replace(_split(RECIPES["nvfp4_direct"], *EVERYTHING, rank=RankConfig(fixed=48)), name="rank 48"),
    _split(RECIPES["nvfp4"], *EVERYTHING),
    _split(RECIPES["mxfp4"], *EVERYTHING),
    _split(RECIPES["nvfp4_direct"], "input"),
    _split(RECIPES["nvfp4_direct"], "weight"),
    _split(RECIPES["nvfp4_4over6"], "grad_output"),
    _split(RECIPES["nvfp4_forward_bf16"], *EVERYTHING),
    _split(RECIPES["nvfp4_backward_bf16"], *EVERYTHING),
    _rotated(_split(RECIPES["nvfp4_direct"], *EVERYTHING), "dgrad"),
    replace(_split(RECIPES["nvfp4_direct"], *EVERYTHING, rank=RankConfig(fixed=24)), name="rank 24"),
]
_MERGED = {"head_placement": "merged"}
MERGED = [
    RECIPES["metis_merged"],
    _split(RECIPES["nvfp4"], *EVERYTHING, rank=RankConfig(fixed=48), **_MERGED),
    _split(RECIPES["mxfp4"], *EVERYTHING, **_MERGED),
    _split(RECIPES["nvfp4_direct"], "input", **_MERGED),
    _split(RECIPES["nvfp4_direct"], "weight", **_MERGED),
    _split(RECIPES["fp4_all_the_way"], "grad_output", **_MERGED),
    _split(RECIPES["nvfp4_forward_bf16"], *EVERYTHING, **_MERGED),
    _split(RECIPES["nvfp4_backward_bf16"], *EVERYTHING, **_MERGED),
]
PACKED = [
    replace(recipe, name=f"{recipe.name} packed", save_packed=True)
    for recipe in (
        RECIPES["nvfp4"], RECIPES["mxfp4"], RECIPES["nvfp4_forward_bf16"], RECIPES["metis"], *SPLIT[3:5],
    )
]  # fmt: skip


def named(recipes: list[Recipe], long: list[Recipe] | None = None) -> Any:
    """Run a test for recipes; for those in `long` in long runs only."""
    cases = [pytest.param(recipe, id=recipe.name.replace(" ", "-")) for recipe in recipes]
    for recipe in long or []:
        cases.append(pytest.param(recipe, id=recipe.name.replace(" ", "-"), marks=pytest.mark.long))
    return pytest.mark.parametrize("recipe", cases)


@dataclass
class Recorder:
    """What passes on kernels have split and quantised, by plan."""

    splits: list[tuple[LinearPlan, str, Tensor, Tensor, Tensor]] = field(default_factory=list)
    codes: list[tuple[LinearPlan, str, Tensor, Tensor | None, Tensor]] = field(default_factory=list)
    encoded: int = 0
    weights_decoded: int = 0
    ran: int = 0
    here: threading.local = field(default_factory=threading.local)

    def split_of(self, plan: LinearPlan, operand: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return (source, P, R) of an operand."""
        for its_plan, its_operand, *found in self.splits:
            if its_plan is plan and its_operand == operand:
                return tuple(found)  # type: ignore[return-value]
        return None

    def cells(self, plan: LinearPlan) -> dict[str, tuple[Tensor, Tensor | None, Tensor]]:
        """Return (matrix, amax, operand) by cell, as the quantiser reads it."""
        return {name: tuple(found) for its_plan, name, *found in self.codes if its_plan is plan}  # type: ignore[misc]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    decode = encoded_weight.decode_into
    split, noise, quantize = fused_operand.split, fused_operand._noise, fused_operand.kernel_quantize
    encode_weight, apply = encoded_weight.encode_weight, fused_linear._FusedLinear.apply

    def spy_split(x: Tensor, v: Tensor, features: Axis, plan: LinearPlan, **options: Any) -> Any:
        result = split(x, v, features, plan, **options)
        operand = next(name for name in EVERYTHING if getattr(plan, f"v_{name}") is v)
        recorder.splits.append((plan, operand, x.clone(), result[0].clone(), result[2].clone()))
        return result

    def spy_noise(quantizer: QuantizerConfig, plan: LinearPlan, cell_name: str) -> Any:
        recorder.here.cell = plan, cell_name
        return noise(quantizer, plan, cell_name)

    def spy_quantize(
        matrix: Tensor, quantizer: QuantizerConfig, amax: Tensor | None, *others: Any, **more: Any
    ):
        output = quantize(matrix, quantizer, amax, *others, **more)
        plan, cell_name = recorder.here.cell
        if output.operand is not None:
            operand = output.operand.clone()
        else:
            bytes_ = (output.packed, output.scale_bytes, torch.tensor(1.0), quantizer.block_shape)
            operand = QuantizedTensor.from_bytes(*bytes_, format=quantizer.format).operand(torch.bfloat16)
        recorder.codes.append((plan, cell_name, matrix.clone(), amax, operand))
        return output

    def spy_encode(*arguments: Any) -> Any:
        recorder.encoded += 1
        return encode_weight(*arguments)

    def spy_decode(*arguments: Any) -> None:
        recorder.weights_decoded += 1
        decode(*arguments)

    def spy_apply(*arguments: Any) -> Any:
        recorder.ran += 1
        return apply(*arguments)

    for module in (fused_products, encoded_weight):
        monkeypatch.setattr(module, "split", spy_split)
    monkeypatch.setattr(fused_operand, "_noise", spy_noise)
    monkeypatch.setattr(fused_operand, "kernel_quantize", spy_quantize)
    monkeypatch.setattr(encoded_weight, "encode_weight", spy_encode)
    monkeypatch.setattr(encoded_weight, "decode_into", spy_decode)
    monkeypatch.setattr(fused_linear._FusedLinear, "apply", spy_apply)
    return recorder


def matrix(name: str, rows: int, cols: int, scale: float = 1.0) -> Tensor:
    """Return a bf16 matrix with a few strong directions; x and w share theirs."""
    index, axis = torch.arange(max(rows, cols)), "k" if name[0] in "xw" else "n"
    noise = gaussian(stream_key(1, name), index[:rows], index[:cols])
    left = gaussian(stream_key(2, name), index[:rows], index[:4])
    right = gaussian(stream_key(3, axis), index[:cols], index[:4])
    return ((noise + 2.0 * left @ right.t()) * scale).to(torch.bfloat16)


def bases_of(recipe: Recipe, axes: dict[str, Axis]) -> dict[str, Tensor]:
    """Return orthonormal bases that hold part of the strong directions, and the local rows of each."""
    bases = {}
    for operand in EVERYTHING:
        split = getattr(recipe, f"{operand}_split")
        if split is None:
            continue
        axis = axes["out_features" if operand == "grad_output" else "in_features"]
        index = torch.arange(axis.size)
        strong = gaussian(stream_key(3, "n" if operand == "grad_output" else "k"), index, index[:4])
        # Half of the strong energy stays in R, or the terms that read R would not be seen.
        others = gaussian(stream_key(4, operand), index, torch.arange(split.rank.columns(axis.size)))
        others[:, :4] = strong + 1.5 * others[:, :4]
        bases[f"v_{operand}"] = axis.local_rows(torch.linalg.qr(others)[0].to(torch.bfloat16).contiguous())
    return bases


def plan_of(recipe: Recipe, kernels: str = "triton", keep: str = "operand", **changes: Any) -> LinearPlan:
    axes = {
        "tokens": Axis.whole(TOKENS),
        "in_features": Axis.whole(IN_FEATURES),
        "out_features": Axis.whole(OUT_FEATURES),
    }
    axes |= {name: value for name, value in changes.items() if name in axes}
    return LinearPlan(
        recipe=recipe,
        layer="l",
        seed=5,
        position=NoisePosition(step=3, microbatch=2),
        backend=EmulatedGemm(kernels=kernels),  # type: ignore[arg-type]
        weights=WeightCache(keep),
        **(axes | bases_of(recipe, axes) | changes),
    )


def tensors(
    tokens: int = TOKENS, in_features: int = IN_FEATURES, out_features: int = OUT_FEATURES
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        matrix("x", tokens, in_features),
        matrix("w", out_features, in_features, 0.05),
        matrix("g", tokens, out_features, 1e-3),
    )


def run(
    linear: Callable[..., Tensor], plan: LinearPlan, x: Tensor, w: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, dx, dw."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = linear(x, w, plan)
    y.backward(g)
    return y.detach(), x.grad, w.grad  # type: ignore[return-value]


def as_oracle(plan: LinearPlan, cell_name: str, residual: Tensor) -> QuantizedTensor:
    """Return what plain PyTorch makes of a residual for a cell, on one rank."""
    found = encode(
        residual.t() if is_transposed(cell_name) else residual,
        getattr(plan.recipe, cell_name).quantizer,
        *plan.axes(cell_name),
        amax_scope="global",
        noise=plan.noise(cell_name),
        noise_is_transposed=is_transposed(cell_name),
    )
    return found.terms[0]  # type: ignore[return-value]


def merges(plan: LinearPlan, cell_name: str) -> bool:
    return (
        getattr(plan.recipe, cell_name).is_merged and getattr(plan, f"v_{operand_of(cell_name)}") is not None
    )


def operand_of_residual(plan: LinearPlan, cell_name: str, source: Tensor, residual: Tensor) -> Tensor:
    """Return the bf16 matrix that plain PyTorch would multiply for a cell."""
    encoded = as_oracle(plan, cell_name, residual)
    if not merges(plan, cell_name):
        return encoded.operand(torch.bfloat16)
    sides = (matrix.t() if is_transposed(cell_name) else matrix for matrix in (source, residual))
    rht = getattr(plan.recipe, cell_name).quantizer.rht
    return merged(*sides, EncodedMatrix(terms=(encoded,)), rht)


def assert_codes_are_those_of_the_residuals(
    seen: Recorder, plan: LinearPlan, sources: dict[str, Tensor]
) -> None:
    cells = seen.cells(plan)
    wanted = {name for name in CELL_NAMES if getattr(plan.recipe, name).quantizer is not None}
    weights = plan.recipe.fprop_weight.quantizer, plan.recipe.dgrad_weight.quantizer
    if weights[0] == weights[1] and weights[0] is not None and not weights[0].is_1d:
        wanted.discard("dgrad_weight")  # tiles serve both
    assert set(cells) == wanted
    for name, (read, amax, operand) in cells.items():
        split = seen.split_of(plan, operand_of(name))
        residual = sources[operand_of(name)] if split is None else split[2]
        expected = as_oracle(plan, name, residual)
        assert torch.equal(read, residual.t() if is_transposed(name) else residual), name
        wanted_operand = operand_of_residual(plan, name, sources[operand_of(name)], residual)
        assert torch.equal(operand, wanted_operand), name
        if getattr(plan.recipe, name).quantizer.has_tensor_amax:
            assert amax is not None and torch.equal(amax, expected.amax), name


def test_the_named_recipes_that_run_here_are_known() -> None:
    names = {name for name, r in RECIPES.items() if r.is_quantized and is_fusable(r, 4096, 14336)}
    assert names == {
        "nvfp4", "metis", "metis_merged", "nvfp4_direct", "nvfp4_4over6", "nvfp4_forward_bf16",
        "nvfp4_backward_bf16", "fp4_all_the_way", "mxfp4",
    }  # fmt: skip
    assert len(UNSPLIT) == 9


@named([*UNSPLIT, *PACKED[:3]])
def test_without_a_split_results_are_those_of_the_definition(recipe: Recipe, seen: Recorder) -> None:
    x, w, g = tensors()
    plan = plan_of(recipe)
    found, expected = run(quantized_linear, plan, x, w, g), run(definition, plan_of(recipe, "torch"), x, w, g)
    assert seen.ran == 1
    assert_codes_are_those_of_the_residuals(seen, plan, {"input": x, "weight": w, "grad_output": g})
    for name, a, b in zip(("y", "dx", "dw"), found, expected, strict=True):
        assert torch.equal(a, b), name


def bf16_ulps(a: Tensor, b: Tensor) -> Tensor:
    """Return |a - b| in units of the last place of b as bf16."""
    exponent = torch.frexp(b.double().abs().clamp(min=1e-30))[1] - 1
    return (a.double() - b.double()).abs() / torch.ldexp(
        torch.full_like(b, BF16_ULP, dtype=torch.float64), exponent
    )


def assert_splits_are_accurate(seen: Recorder, plan: LinearPlan, sources: dict[str, Tensor]) -> None:
    for operand in EVERYTHING:
        found = seen.split_of(plan, operand)
        if found is None:
            continue
        source, p, residual = found
        v = getattr(plan, f"v_{operand}").double()
        assert torch.equal(source, sources[operand])
        exact_p = source.double() @ v
        noise = 2.0**-20 * (source.double().abs() @ v.abs())
        assert ((p.double() - exact_p).abs() <= BF16_ULP * exact_p.abs() + noise).all(), operand
        assert (bf16_ulps(p, exact_p.to(torch.bfloat16)) <= 1).double().mean() > 0.999
        exact_r = source.double() - p.double() @ v.t()
        noise = 2.0**-20 * (source.double().abs() + p.double().abs() @ v.abs().t())
        assert ((residual.double() - exact_r).abs() <= BF16_ULP * exact_r.abs() + noise).all(), operand
        assert (bf16_ulps(residual, exact_r.to(torch.bfloat16)) <= 2).double().mean() > 0.999


def formula(seen: Recorder, plan: LinearPlan, sources: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the terms of y, dx and dw in float64, from the recorded P, R and codes."""
    x, w, g = (sources[name].double() for name in EVERYTHING)
    recipe, cells = plan.recipe, seen.cells(plan)
    p, v, r = {}, {}, {"input": x, "weight": w, "grad_output": g}
    for operand in EVERYTHING:
        found = seen.split_of(plan, operand)
        if found is not None:
            p[operand], r[operand] = found[1].double(), found[2].double()
            v[operand] = getattr(plan, f"v_{operand}").double()

    def full(left: str, right: str) -> Tensor:
        if getattr(recipe, left).quantizer is None:
            a, b = (sources[operand_of(name)].double() for name in (left, right))
            return (a.t() if is_transposed(left) else a) @ (b if is_transposed(right) else b.t())
        a, b = (
            operand_of_residual(
                plan, name, sources[operand_of(name)], r[operand_of(name)].to(torch.bfloat16)
            ).double()
            for name in (left, right)
        )
        alpha, encoded = torch.ones(()).double(), []
        for name, operand in ((left, a), (right, b)):
            if name in cells:
                assert torch.equal(operand, cells[name][2].double())
            if not merges(plan, name):
                encoded.append(as_oracle(plan, name, r[operand_of(name)].to(torch.bfloat16)))
        if len(encoded) == 2:
            alpha = gemm_alpha(*encoded).double()
        elif encoded:
            alpha = encoded[0].tensor_scale().double()
        return alpha * (a @ b.t())

    merged_cells = {name for name in CELL_NAMES if merges(plan, name)}
    r_x = sources["input"].double() if "wgrad_input" in merged_cells else r["input"]
    if recipe.save_packed:
        r_x = as_oracle(plan, "wgrad_input", r_x.to(torch.bfloat16)).dequantize(torch.float32).t().double()
    splits = {
        name: getattr(recipe, name).split is not None and not getattr(recipe, name).is_merged
        for name in CELL_NAMES
    }
    y = {"q": full("fprop_input", "fprop_weight")}
    if splits["fprop_input"]:
        y["head of x"] = p["input"] @ (w @ v["input"]).t()
    if splits["fprop_weight"]:
        y["head of w"] = (r["input"] @ v["weight"]) @ p["weight"].t()
    dx = {"q": full("dgrad_grad_output", "dgrad_weight")}
    if splits["dgrad_grad_output"]:
        dx["head of g"] = p["grad_output"] @ (v["grad_output"].t() @ w)
    if splits["dgrad_weight"]:
        dx["head of w"] = (r["grad_output"] @ p["weight"]) @ v["weight"].t()
    dw = {"q": full("wgrad_grad_output", "wgrad_input")}
    if splits["wgrad_grad_output"]:
        dw["head of g"] = v["grad_output"] @ (p["grad_output"].t() @ r_x)
    if splits["wgrad_input"]:
        dw["head of x"] = (g.t() @ p["input"]) @ v["input"].t()
    return {"y": y, "dx": dx, "dw": dw}


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_products_are_the_formula(found: tuple[Tensor, ...], terms: dict[str, dict[str, Tensor]]) -> None:
    for (name, parts), value in zip(terms.items(), found, strict=True):
        total = sum(parts.values())
        error = difference(value, total)
        print(f"error {name} {error:.1e}")
        assert error < PRODUCT_TOLERANCE, f"{name}: {error:.1e}"
        for left_out, part in parts.items():
            mutated = difference(value, total - part)
            assert mutated > SMALLEST_TERM, f"{name} without {left_out}: {mutated:.1e} would not be seen"


@named([*SPLIT, *PACKED[3:]])
def test_with_a_split_every_term_is_there(recipe: Recipe, seen: Recorder) -> None:
    x, w, g = tensors()
    plan, sources = plan_of(recipe), {"input": x, "weight": w, "grad_output": g}
    assert is_fusable(recipe, IN_FEATURES, OUT_FEATURES)
    found = run(quantized_linear, plan, x, w, g)
    assert seen.ran == 1
    assert_splits_are_accurate(seen, plan, sources)
    assert_codes_are_those_of_the_residuals(seen, plan, sources)
    assert_products_are_the_formula(found, formula(seen, plan, sources))


@named([MERGED[0], MERGED[1], MERGED[3]], long=[MERGED[2], *MERGED[4:]])
def test_merged_heads_leave_one_product_of_plain_matrices(recipe: Recipe, seen: Recorder) -> None:
    """Against the formula and the definition; a head or a basis that is missing, in any operand, as well."""
    x, w, g = tensors()
    sources = {"input": x, "weight": w, "grad_output": g}
    assert is_fusable(recipe, IN_FEATURES, OUT_FEATURES)
    for missing in (None, *EVERYTHING):
        if missing is not None and getattr(recipe, f"{missing}_split") is None:
            continue
        changes = {} if missing is None else {f"v_{missing}": None}
        plan = plan_of(recipe, **changes)
        found = run(quantized_linear, plan, x, w, g)
        assert_splits_are_accurate(seen, plan, sources)
        assert_codes_are_those_of_the_residuals(seen, plan, sources)
        terms = formula(seen, plan, sources)
        assert all(list(parts) == ["q"] for parts in terms.values())
        expected = run(definition, plan_of(recipe, "torch", **changes), x, w, g)
        for (name, parts), value, defined in zip(terms.items(), found, expected, strict=True):
            assert difference(value, parts["q"]) < PRODUCT_TOLERANCE, (missing, name)
            assert difference(value, defined) < DEFINED_TOLERANCE, (missing, name)
    assert seen.ran == 1 + sum(getattr(recipe, f"{name}_split") is not None for name in EVERYTHING)


def test_merged_and_other_heads_do_not_mix_on_kernels() -> None:
    recipe = _split(RECIPES["nvfp4_direct"], *EVERYTHING, **_MERGED)
    assert is_fusable(recipe, IN_FEATURES, OUT_FEATURES)
    assert not is_fusable(_split(recipe, "weight"), IN_FEATURES, OUT_FEATURES)
    assert not is_fusable(_split(RECIPES["nvfp4_4over6"], "weight", **_MERGED), IN_FEATURES, OUT_FEATURES)


@named([RECIPES["metis"], RECIPES["metis_merged"], SPLIT[1], PACKED[3]])
def test_splitting_in_one_launch_changes_no_bit_of_p_r_and_codes(
    recipe: Recipe, seen: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, g = tensors()
    results, plans, launches = [], [], []
    original = splitting.split
    for min_rows in (splitting.MIN_ROWS, 1):
        monkeypatch.setattr(splitting, "MIN_ROWS", min_rows)
        monkeypatch.setattr(
            fused_operand.kernels, "split", lambda *a, **o: (launches.append(1), original(*a, **o))[1]
        )
        plans.append(plan_of(recipe))
        results.append(run(quantized_linear, plans[-1], x, w, g))
        assert len(launches) == (0 if min_rows > 1 else 3)
    for operand in EVERYTHING:
        for a, b in zip(*(seen.split_of(plan, operand) for plan in plans), strict=True):  # type: ignore[arg-type]
            assert torch.equal(a, b), operand
    for name, found in seen.cells(plans[0]).items():
        for a, b in zip(found, seen.cells(plans[1])[name], strict=True):
            assert torch.equal(a, b), name
    for name, a, b in zip(("y", "dx", "dw"), *results, strict=True):
        assert difference(a, b) < SUM_TOLERANCE[name], name


@pytest.mark.parametrize("name", ["nvfp4", "metis", "metis_merged"])
def test_the_main_gradient_takes_the_sum_of_microbatches(name: str, seen: Recorder) -> None:
    x, w, g = tensors()
    sums = []
    for batches in ((0,), (1,), (0, 1)):
        weight = torch.nn.Parameter(w.clone())
        weight.main_grad = torch.zeros(w.shape)  # type: ignore[attr-defined]
        plan = plan_of(RECIPES[name])
        for index in batches:
            quantized_linear(x.roll(index), weight, plan).backward(g.roll(index))
        assert weight.grad_added_to_main_grad and weight.grad.shape == w.shape  # type: ignore[attr-defined]
        sums.append(weight.main_grad)  # type: ignore[attr-defined]
    assert seen.ran == 4 and seen.encoded == 3
    assert torch.equal(sums[2], sums[0] + sums[1]) and sums[0].norm() > 0


def storages(value: Any) -> dict[int, int]:
    """Return the bytes of every storage that a value and what it is made of hold on to, by address."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if not dataclasses.is_dataclass(value):
        return {}
    found = {}
    for its_field in dataclasses.fields(value):
        found |= storages(getattr(value, its_field.name))
    return found


def sides_of(recipe: Recipe) -> tuple[int, int]:
    """Return how many products quantise the weight, and how many sets of codes they read."""
    quantizers = [q for q in (recipe.fprop_weight.quantizer, recipe.dgrad_weight.quantizer) if q is not None]
    tiles_serve_both = len(quantizers) == 2 and quantizers[0] == quantizers[1] and not quantizers[0].is_1d
    return len(quantizers), 1 if tiles_serve_both else len(quantizers)


@named([*UNSPLIT[:2], RECIPES["mxfp4"], SPLIT[0], *SPLIT[2:4], *SPLIT[6:9]], long=[*UNSPLIT[2:], *PACKED[3:]])
def test_a_weight_kept_as_codes_changes_no_bit_and_takes_less_memory(recipe: Recipe, seen: Recorder) -> None:
    """Two microbatches of one step, kept either way; each product decodes what it multiplies."""
    x, w, g = tensors()
    results, held = {}, {}
    for keep in KEEP:
        weight, plan = torch.nn.Parameter(w.clone()), plan_of(recipe, keep=keep)
        encoded, decoded = seen.encoded, seen.weights_decoded
        results[keep] = []
        for microbatch in range(2):
            plan = replace(plan, position=NoisePosition(step=3, microbatch=microbatch))
            source, weight.grad = x.roll(microbatch).requires_grad_(), None
            y = quantized_linear(source, weight, plan)
            y.backward(g.roll(microbatch))
            results[keep] += [y.detach(), source.grad, weight.grad]
        assert seen.encoded - encoded == 1
        products, sets = sides_of(recipe)
        assert seen.weights_decoded - decoded == (2 * products if keep == "codes" else 0)
        kept = storages(plan.weights._encoded)
        known = storages(weight) | storages(plan.v_weight)
        held[keep] = sum(size for place, size in kept.items() if place not in known)
    names = [f"{name} of microbatch {index}" for index in range(2) for name in ("y", "dx", "dw")]
    for name, a, b in zip(names, *results.values(), strict=True):
        assert torch.equal(a, b), name
    ranks = {name: 0 if basis is None else basis.shape[1] for name, basis in
             (("x", plan.v_input), ("w", plan.v_weight), ("g", plan.v_grad_output))}  # fmt: skip
    n, k = w.shape
    thin = 4 * (n * ranks["x"] + k * ranks["g"]) + 2 * n * ranks["w"] + 16
    assert held["codes"] <= sets * 0.5625 * n * k + thin
    assert held["operand"] >= sets * 2 * n * k


def test_a_backend_says_what_its_linears_keep() -> None:
    for keep in CHOICES:
        backend = EmulatedGemm(kernels="triton", weight_cache=keep)  # type: ignore[arg-type]
        layer = MetisLinear(64, 32, recipe=RECIPES["metis"], dtype=torch.bfloat16, backend=backend)
        for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert one.core.weights.keep == keep
    with pytest.raises(ConfigError, match="weight cache: must keep one of"):
        WeightCache("bytes")


def test_small_weights_are_kept_as_operands_and_large_ones_as_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    w, plan = tensors()[1], plan_of(RECIPES["metis"])
    for size, expected in ((w.numel() + 1, "operand"), (w.numel(), "codes")):
        monkeypatch.setattr(encoded_weight, "SMALL_WEIGHT", size)
        found, wanted = (storages(encode_weight(w, plan, keep)) for keep in ("auto", expected))
        assert sorted(found.values()) == sorted(wanted.values())


def small_layer(recipe: Recipe = RECIPES["metis"], **options: Any) -> MetisLinear:
    torch.manual_seed(0)
    clock = TrainingClock(seed=1, num_tokens_per_step=TOKENS)
    backend = EmulatedGemm(kernels="triton")
    return MetisLinear(64, 32, recipe=recipe, clock=clock, dtype=torch.bfloat16, backend=backend, **options)


def small_pass(layer: MetisLinear, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x = matrix(f"x{seed}", TOKENS, 64).requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(matrix(f"g{seed}", TOKENS, 32, 1e-3))
    return y.detach(), x.grad, layer.weight.grad  # type: ignore[return-value]


def train(layer: MetisLinear, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        layer.clock.begin_step(step, TOKENS)
        small_pass(layer, step)
        layer.after_step()
    layer.clock.begin_step(first + steps, TOKENS)


def test_the_weight_is_encoded_once_per_step_and_again_after_any_change(seen: Recorder) -> None:
    layer = small_layer()

    def passes(expected: int, why: str) -> None:
        before = seen.encoded
        for seed in range(2):
            small_pass(layer, seed)
        assert seen.encoded - before == expected, why

    passes(1, "first use")
    passes(0, "same step")
    train(layer, 2, first=0)
    assert layer.core.bases["weight"].active is not None
    passes(1, "another step, other bases")
    optimizer = torch.optim.SGD([layer.weight], lr=0.1)
    optimizer.step()
    passes(1, "optimizer step")
    with torch.no_grad():
        layer.weight.mul_(1.5)
    passes(1, "in place")
    layer.load_state_dict(layer.state_dict())
    passes(1, "load_state_dict")
    layer.weight.data = layer.weight.data.clone()
    passes(1, "other memory")
    layer.weight.data.mul_(0.5)  # no version counter sees this; the loop says when it has happened
    layer.after_step()
    passes(1, "after_step")
    layer.set_recipe(replace(RECIPES["metis"], name="other"))
    passes(1, "recipe")
    layer.clock.begin_step(7, TOKENS)
    passes(1, "step")


def test_evaluation_after_training_reads_the_new_weight(seen: Recorder) -> None:
    layer = small_layer()
    train(layer, 3)
    with torch.no_grad():
        layer.weight.data.add_(0.1)
    layer.after_step()
    x = matrix("x7", TOKENS, 64)
    fresh = small_layer()
    fresh.load_state_dict(layer.state_dict())
    for one in (layer, fresh):
        one.eval()
        one.clock.begin_step(4, TOKENS)
    with torch.no_grad():
        assert torch.equal(layer(x), fresh(x)) and torch.equal(layer(x[:48]), layer(x)[:48])


def test_a_weight_that_is_written_unseen_for_an_evaluation_is_read(seen: Recorder) -> None:
    """As averaged weights are, through `.data`, which no version counter sees: there, evaluate, and back."""
    layer, x = small_layer(RECIPES["nvfp4_direct"]), torch.randn(TOKENS, 64, dtype=torch.bfloat16)
    layer(x).sum().backward()
    layer.after_step()
    trained = layer.weight.detach().clone()
    layer.weight.data.copy_(4 * trained)
    with torch.no_grad():
        large = layer(x)
    layer.weight.data.copy_(trained)
    with torch.no_grad():
        small = layer(x)
    assert torch.equal(layer(x).detach(), small) and float((large - 4 * small).norm() / large.norm()) < 0.1


def test_an_inference_tensor_can_be_a_weight(seen: Recorder) -> None:
    with torch.inference_mode():
        layer = small_layer(RECIPES["nvfp4_direct"])
        x = torch.randn(TOKENS, 64, dtype=torch.bfloat16)
        assert bool(torch.isfinite(layer(x)).all())


@pytest.mark.parametrize("name", ["metis", "nvfp4_forward_bf16", "nvfp4_backward_bf16"])
def test_products_get_what_cublas_takes(name: str, seen: Recorder, monkeypatch) -> None:
    """Leading dimensions as large as what they lead, for a rank of one and rows that repeat or overlap."""
    number_of_products = 0

    def checked(a: Tensor, b: Tensor, out: Tensor, *more: Any, **options: Any) -> Tensor:
        nonlocal number_of_products
        number_of_products += 1
        for matrix, is_left in ((a, False), (b, True)):
            operation, leading = cublas._operation(matrix, is_left=is_left)
            is_by_rows = (operation == cublas._OP_T) == is_left
            assert leading >= matrix.shape[1 if is_by_rows else 0], (tuple(matrix.shape), matrix.stride())
        return scaled_product(a, b, out, *more, **options)

    for module in (encoded_weight, fused_products):
        monkeypatch.setattr(module, "scaled_product", checked)
    layer = small_layer(_split(RECIPES[name], *EVERYTHING, rank=RankConfig(fixed=1)))
    row = torch.randn(1, 64, dtype=torch.bfloat16)
    frames = torch.randn(8 * TOKENS + 64, dtype=torch.bfloat16).as_strided((TOKENS, 64), (8, 1))
    for step, x in enumerate((torch.randn(TOKENS, 64).bfloat16(), row.expand(TOKENS, 64), frames)):
        layer.clock.begin_step(step, TOKENS)
        layer(x).square().mean().backward()
        layer.after_step()
    assert layer.core.bases["weight" if name != "nvfp4_backward_bf16" else "input"].active.shape[1] == 1
    assert number_of_products >= 8
    with pytest.raises(ShapeError, match="must not overlap"):
        cublas._operation(row.expand(2, 64), is_left=True)


def test_layers_can_be_copied_and_pickled_in_mid_step(seen: Recorder) -> None:
    layer = small_layer()
    train(layer, 2)
    expected = small_pass(layer, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        before = seen.encoded
        for a, b in zip(small_pass(twin, 5), expected, strict=True):
            assert torch.equal(a, b)
        assert seen.encoded == before + 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_gives_the_same_bits(use_reentrant: bool, seen: Recorder) -> None:
    x, w, g = tensors()
    plan = plan_of(RECIPES["metis"])
    plain = run(quantized_linear, plan, x, w, g)
    again = run(lambda *a: checkpoint(quantized_linear, *a, use_reentrant=use_reentrant), plan, x, w, g)
    assert seen.ran == 3
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("what", ["fp32", "rank", "scope"])
def test_what_is_not_covered_falls_back_to_the_definition(what: str, seen: Recorder) -> None:
    if what == "rank":
        assert not is_fusable(replace(_split(RECIPES["nvfp4"], "input", rank=RankConfig(fixed=129))), 256, 64)
        assert is_fusable(replace(_split(RECIPES["nvfp4"], "input", rank=RankConfig(fixed=129))), 128, 64)
        assert not is_fusable(replace(RECIPES["metis"], basis=BasisConfig(num_canonical_chunks=64)), 4096, 64)
        recipe = _split(RECIPES["nvfp4"], "input", rank=RankConfig(fixed=144))
        layer = MetisLinear(
            160, 32, recipe=recipe, dtype=torch.bfloat16, backend=EmulatedGemm(kernels="triton")
        )
        assert layer.core.weights is None
        layer(torch.ones(16, 160, dtype=torch.bfloat16))
    else:
        x, w, _ = tensors()
        plan = plan_of(RECIPES["nvfp4"])
        if what == "fp32":
            assert quantized_linear(x.float(), w.float(), plan).dtype == torch.float32
        else:
            recipe = replace(RECIPES["nvfp4"], amax_scope="te")
            quantized_linear(x, w, plan_of(recipe, gather=Axis.whole(TOKENS), gathered_operand=""))
    assert seen.ran == 0


SPECIAL = {
    "zero x": lambda x, w, g: x.zero_(),
    "zero w": lambda x, w, g: w.zero_(),
    "zero g": lambda x, w, g: g.zero_(),
    "NaN in x": lambda x, w, g: x[3, 5:6].fill_(torch.nan),
    "NaN in w": lambda x, w, g: w[3, 5:6].fill_(torch.nan),
    "NaN in g": lambda x, w, g: g[3, 5:6].fill_(torch.nan),
    "infinity in x": lambda x, w, g: x[3, 5:6].fill_(torch.inf),
    "infinity in w": lambda x, w, g: w[3, 5:6].fill_(-torch.inf),
    "infinity in g": lambda x, w, g: g[3, 5:6].fill_(torch.inf),
    "gradients of 1e-30": lambda x, w, g: g.mul_(1e-27),
    "x of 1e-30": lambda x, w, g: x.mul_(1e-30),
    "w of 1e-36": lambda x, w, g: w.mul_(1e-36),
    "gradients below the normal range": lambda x, w, g: g.mul_(1e-36),
    "large x": lambda x, w, g: x.mul_(1e30),
}


@named([RECIPES["nvfp4"], RECIPES["mxfp4"], RECIPES["metis"], MERGED[0]], long=[SPLIT[3], PACKED[3]])
def test_special_numbers_bring_no_nan_that_the_definition_lacks(recipe: Recipe, seen: Recorder) -> None:
    axes = {name: Axis.whole(32) for name in ("tokens", "out_features")} | {"in_features": Axis.whole(64)}
    for what, change in SPECIAL.items():
        x, w, g = tensors(32, 64, 32)
        change(x, w, g)
        lists, values = [], []
        for linear, kernels in ((quantized_linear, "triton"), (definition, "torch")):
            plan = plan_of(recipe, kernels, watch=OperandWatch(), **axes)
            values.append(run(linear, plan, x, w, g))
            lists.append(plan.watch.take_nonfinite())  # type: ignore[union-attr]
        assert lists[0] == lists[1], (what, *lists)
        assert bool(lists[0]) == (what.startswith(("NaN", "infinity"))), what
        for name, a, b in zip(("y", "dx", "dw"), *values, strict=True):
            assert not (a.isnan() & ~b.isnan()).any(), f"{what}: {name}"
            assert not (a.isinf() & b.isfinite()).any(), f"{what}: {name}"


def test_the_watch_sees_weights_in_every_microbatch(seen: Recorder) -> None:
    x, w, g = tensors()
    w[0, 0] = torch.nan
    plan = plan_of(RECIPES["metis"], watch=OperandWatch())
    weight = torch.nn.Parameter(w)
    for _ in range(2):
        quantized_linear(x.clone().requires_grad_(), weight, plan).backward(g)
        cells = [cell for _, cell in plan.watch.take_nonfinite()]  # type: ignore[union-attr]
        assert cells[0] == "fprop_weight" and "dgrad_weight" in cells
    assert seen.encoded == 1


@named([RECIPES["nvfp4"], RECIPES["mxfp4"], RECIPES["metis"]])
def test_special_numbers_in_a_weight_survive_in_its_codes(recipe: Recipe, seen: Recorder) -> None:
    axes = {name: Axis.whole(32) for name in ("tokens", "out_features")} | {"in_features": Axis.whole(64)}
    for what in ("zero w", "NaN in w", "infinity in w", "w of 1e-36"):
        x, w, g = tensors(32, 64, 32)
        SPECIAL[what](x, w, g)
        one, other = (run(quantized_linear, plan_of(recipe, keep=keep, **axes), x, w, g) for keep in KEEP)
        for name, a, b in zip(("y", "dx", "dw"), one, other, strict=True):
            assert torch.equal(a.isnan(), b.isnan()), f"{what}: {name}"
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{what}: {name}"
    assert seen.weights_decoded > 0


@named([RECIPES["nvfp4"], RECIPES["metis"], RECIPES["metis_merged"], PACKED[3]])
def test_an_observer_sees_the_same_operands(recipe: Recipe, seen: Recorder) -> None:
    found: list[list[tuple[str, Tensor, Tensor]]] = []
    for linear, kernels in ((quantized_linear, "triton"), (definition, "torch")):
        watch, operands = OperandWatch(), []
        watch.observer = lambda plan, cell, source, split, encoded, to=operands: to.append(
            (cell, source.clone(), encoded.dequantize())
        )
        run(linear, plan_of(recipe, kernels, watch=watch), *tensors())
        found.append(operands)
    assert [cell for cell, *_ in found[0]] == [cell for cell, *_ in found[1]] and len(found[0]) == 6
    for (_, *a), (_, *b) in zip(*found, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let threads stand for ranks; the interpreter keeps its grid position in a global."""
    use_simulated_collectives(monkeypatch)
    lock, call = threading.RLock(), interpreter.GridExecutor.__call__

    def locked(self: Any, *arguments: Any, **options: Any) -> Any:
        with lock:
            return call(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", locked)
    yield


def layout(kind: str, shard: int, team: Team, sequence: bool) -> dict[str, Any]:
    """Return the axes of one rank. kind: column, gate|up (column-parallel in two parts) or row."""
    axes: dict[str, Any] = {}
    if kind == "row":
        axes["in_features"] = shard_of(IN_FEATURES, shard, team)
    else:
        axes["out_features"] = shard_of(OUT_FEATURES, shard, team, parts=2 if kind == "gate|up" else 1)
    if sequence:
        axes["token_shard"] = axes["gather"] = shard_of(TOKENS, shard, team)
        axes["gathered_operand"] = "grad_output" if kind == "row" else "input"
    return axes


def held(value: Tensor, rows: Axis, cols: Axis) -> Tensor:
    return cols.local_rows(rows.local_rows(value).t().contiguous()).t().contiguous()


def whole(pieces: list[Tensor], rows: list[Axis], cols: list[Axis]) -> Tensor:
    """Return a matrix from the pieces that ranks hold; axes that are whole are the same on all."""
    out = pieces[0].new_zeros(rows[0].size, cols[0].size)
    for piece, row, col in zip(pieces, rows, cols, strict=True):
        index = row.indices(out.device)[:, None], col.indices(out.device)[None, :]
        out[index] = piece
    return out


def parallel_pass(
    recipe: Recipe, kind: str, size: int, sequence: bool, keep: str = "operand"
) -> tuple[list[LinearPlan], list[Any]]:
    """Run a pass on `size` simulated ranks; returns every rank's plan and (y, dx, dw)."""
    team, (x, w, g) = Team(size), tensors()

    def one_rank(shard: int) -> tuple[LinearPlan, tuple[Tensor, Tensor, Tensor]]:
        plan = plan_of(recipe, keep=keep, **layout(kind, shard, team, sequence))
        tokens = {name: plan.axes(f"fprop_{name}" if name == "input" else f"dgrad_{name}")[0]
                  for name in ("input", "grad_output")}  # fmt: skip
        return plan, run(
            quantized_linear, plan, held(x, tokens["input"], plan.in_features),
            held(w, plan.out_features, plan.in_features), held(g, tokens["grad_output"], plan.out_features),
        )  # fmt: skip

    plans, results = zip(*team.run(one_rank), strict=True)
    return list(plans), list(results)


def put_together(plans: list[LinearPlan], results: list[Any], kind: str, sequence: bool) -> list[Tensor]:
    """Return y, dx and dw of the whole linear."""
    ys, dxs, dws = zip(*results, strict=True)
    out_axes, in_axes = [p.out_features for p in plans], [p.in_features for p in plans]
    tokens = [p.tokens for p in plans]
    shards = [p.token_shard for p in plans] if sequence else tokens
    if kind == "row":
        y = whole(list(ys), shards, out_axes) if sequence else sum(y.float() for y in ys)
        dx = whole(list(dxs), tokens, in_axes)
    else:
        y = whole(list(ys), tokens, out_axes)
        dx = whole(list(dxs), shards, in_axes) if sequence else sum(dx.float() for dx in dxs)
    return [y, dx, whole(list(dws), out_axes, in_axes)]  # type: ignore[list-item]


def skip_where_blocks_would_cross_ranks(recipe: Recipe, kind: str, size: int) -> None:
    width = OUT_FEATURES // size // (2 if kind == "gate|up" else 1)
    if kind != "row" and width % recipe.axis_multiple("out_features"):
        pytest.skip("blocks would cross ranks: a linear refuses this layout")


PARALLEL = [RECIPES["metis"], RECIPES["metis_merged"], PACKED[3]]
LONG_PARALLEL = [RECIPES["nvfp4"], PACKED[4], SPLIT[7], SPLIT[8]]


@pytest.mark.parametrize(
    ("kind", "size", "sequence"),
    [("column", 2, False), ("gate|up", 2, True), ("row", 4, False), ("row", 2, True), ("column", 4, True)],
)
@named(PARALLEL, long=LONG_PARALLEL)
def test_layouts_change_no_bit_of_p_r_and_codes(
    recipe: Recipe, kind: str, size: int, sequence: bool, seen: Recorder, ranks: None
) -> None:
    skip_where_blocks_would_cross_ranks(recipe, kind, size)
    (single,), expected = parallel_pass(recipe, kind, 1, False)
    plans, results = parallel_pass(recipe, kind, size, sequence)
    assert seen.ran == 1 + size
    for name, (read, amax, operand) in seen.cells(single).items():
        pieces = [seen.cells(plan)[name] for plan in plans]
        rows, cols = zip(*(plan.axes(name) for plan in plans), strict=True)
        assert torch.equal(whole([piece[0] for piece in pieces], rows, cols), read), f"R of {name}"
        assert torch.equal(whole([piece[2] for piece in pieces], rows, cols), operand), f"codes of {name}"
        if getattr(recipe, name).quantizer.has_tensor_amax:
            assert all(torch.equal(piece[1], amax) for piece in pieces), f"amax of {name}"
        found = seen.split_of(single, operand_of(name))
        if found is not None:
            ps = [seen.split_of(plan, operand_of(name))[1] for plan in plans]  # type: ignore[index]
            stored = cols if is_transposed(name) else rows
            columns = [Axis.whole(found[1].shape[1])] * size
            assert torch.equal(whole(ps, stored, columns), found[1]), f"P of {name}"
    for name, a, b in zip(
        ("y", "dx", "dw"), put_together(plans, results, kind, sequence), expected[0], strict=True
    ):
        error = difference(a, b)
        print(f"layout {name} {error:.1e}")
        assert error < SUM_TOLERANCE[name], f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("kind", "size", "sequence"),
    [
        ("gate|up", 2, True),
        ("row", 2, True),
        pytest.param("column", 4, True, marks=pytest.mark.long),
        pytest.param("row", 4, False, marks=pytest.mark.long),
    ],
)
@named([RECIPES["metis"], SPLIT[2]], long=[RECIPES["nvfp4"], *PACKED[3:5], SPLIT[7]])
def test_ranks_that_keep_codes_of_their_weights_change_no_bit(
    recipe: Recipe, kind: str, size: int, sequence: bool, seen: Recorder, ranks: None
) -> None:
    skip_where_blocks_would_cross_ranks(recipe, kind, size)
    results = {keep: parallel_pass(recipe, kind, size, sequence, keep)[1] for keep in KEEP}
    assert seen.ran == 2 * size and seen.weights_decoded == size * sides_of(recipe)[0]
    for shard, (one, other) in enumerate(zip(*results.values(), strict=True)):
        for name, a, b in zip(("y", "dx", "dw"), one, other, strict=True):
            assert torch.equal(a, b), f"{name} of rank {shard}"


@pytest.mark.parametrize("kind", ["column", "row"])
def test_under_sequence_parallelism_a_rank_works_on_its_own_tokens_only(
    kind: str, seen: Recorder, ranks: None
) -> None:
    plans, _ = parallel_pass(RECIPES["metis"], kind, 2, True)
    operand = plans[0].gathered_operand
    for plan in plans:
        assert seen.split_of(plan, operand)[0].shape[0] == TOKENS // 2  # type: ignore[index]
        for name, (read, _, _) in seen.cells(plan).items():
            if operand_of(name) == operand:
                features = IN_FEATURES if operand == "input" else OUT_FEATURES
                assert read.numel() == TOKENS // 2 * features, name


@pytest.mark.parametrize("kind", ["column", "row"])
def test_messages_travel_beside_dgrad_and_are_gone_at_wgrad(
    kind: str, seen: Recorder, ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wgrad's codes and sums leave before dgrad's product, and wgrad's product finds its operands only."""
    events: dict[int, list[str]] = {}
    alive: dict[int, list[weakref.ref[Tensor]]] = {}
    start_gather, start_sum, product = (
        Axis.start_gather_stacked,
        Axis.start_sum,
        fused_products.scaled_product,
    )

    def note(event: str, sent: Tensor | None = None) -> None:
        rank = threading.get_ident()
        events.setdefault(rank, []).append(event)
        if sent is not None:
            alive.setdefault(rank, []).append(weakref.ref(sent))

    def gathering(axis: Axis, value: Tensor) -> Callable[[], Tensor]:
        arrive = start_gather(axis, value)
        note("codes", arrive())
        return arrive

    def summing(axis: Axis, value: Tensor) -> Callable[[], Tensor]:
        note("sum", value)
        return start_sum(axis, value)

    def multiplied(left: Tensor, right: Tensor, out: Tensor, *more: Any) -> Tensor:
        if len(more) == 2:  # alpha, and whether to accumulate
            note("wgrad")
            gc.collect()
            assert not [sent for sent in alive[threading.get_ident()] if sent() is not None]
        elif out.shape[0] == TOKENS:
            note("fprop or dgrad")
        return product(left, right, out, *more)

    monkeypatch.setattr(Axis, "start_gather_stacked", gathering)
    monkeypatch.setattr(Axis, "start_sum", summing)
    monkeypatch.setattr(fused_products, "scaled_product", multiplied)
    parallel_pass(RECIPES["metis"], kind, 2, True)
    fprop = {"column": ["codes", "fprop or dgrad"], "row": ["fprop or dgrad"]}[kind]
    backward = {"column": ["codes", "sum"], "row": ["codes", "codes", "sum"]}[kind]
    assert list(events.values()) == 2 * [[*fprop, *backward, "fprop or dgrad", "wgrad"]]


def test_amaxes_travel_once(seen: Recorder, ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reduction of x, w and g each: the copies for backward use what forward has reduced."""
    reduced: list[int] = []
    original = Axis.reduce_max
    monkeypatch.setattr(Axis, "reduce_max", lambda axis, v: (reduced.append(v.numel()), original(axis, v))[1])
    for recipe, numbers in ((RECIPES["metis"], 1), (RECIPES["metis_merged"], 1), (RECIPES["nvfp4"], 2)):
        reduced.clear()
        parallel_pass(recipe, "row", 2, False)
        # Row-parallel: x and w are cut along K, g is whole on every rank.
        assert sorted(reduced) == sorted(2 * [1, numbers]), recipe.name

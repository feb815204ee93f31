"""The native FP4 backends: what they hand to torch, where they are refused, and what the engine is told.

No machine here has FP4 tensor cores, so `torch.nn.functional.scaled_mm` itself is replaced, and nothing
before it. The replacement passes its arguments, as meta tensors, to the real function (torch's own checks of
shapes, dtypes and strides) and then decodes them by the format's description alone: nibbles, E4M3 bits and
the 128 x 4 tiling are written out here once more. Oracle of the product: the emulated backend in float64.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metis.errors import USER_ERROR_EXIT_STATUS, ConfigError, ShapeError
from metis.gemm import EmulatedGemm
from metis.gemm.scaled_mm import ScaledMmGemm, native_gemm_available, scaled_mm_backend
from metis.nn import MetisLinear
from metis.policy import linear_paths, resolve_policy
from metis.quantize import QuantizedTensor, quantize
from metis.recipes import BF16, METIS, METIS_MERGED, NVFP4, NVFP4_DIRECT
from metis.training import gemm_backend
from metis.training.arguments import parse_args, validate_args
from metis.training.gemm_backend import edge_counts, resolve_gemm_backend
from tests._distributed import run_ranks
from tests.integration._trainer import REPOSITORY, SHAPE, TOKENIZER, environment, read_metrics, run_case
from tests.numerics._assertions import assert_bitwise_equal

REAL_SCALED_MM = torch.nn.functional.scaled_mm
F = torch.nn.functional

# Either alpha is formed with three fp32 roundings of 2^-24 each. Measured worst 1.03e-7.
ALPHA_TOLERANCE = 6 * 2.0**-24
# Outputs and gradients of a linear in fp32 (sizes up to 96), relative to the largest. Measured 8.3e-8.
LINEAR_TOLERANCE = 1e-6
# Loss of two steps in fp32, near 5.5. Measured 1.2e-8.
LOSS_TOLERANCE = 1e-4

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_e4m3(byte: int) -> float:
    """One sign, four exponent bits of bias 7, three mantissa bits; 0x7F is NaN."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    assert byte < 0x7F, "a scale is neither negative nor NaN"
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = torch.tensor([decode_e4m3(byte) for byte in range(0x7F)], dtype=torch.float64)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Return e2m1 * scale, float64 [R, K], of packed codes [R, K / 2] and flat, tiled scales."""
    assert codes.dtype == torch.float4_e2m1fn_x2 and scale.dtype == torch.float8_e4m3fn
    packed = codes.view(torch.uint8)
    nibbles = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).long()
    values = torch.tensor(E2M1, dtype=torch.float64)[nibbles & 7] * (1 - 2.0 * (nibbles >> 3))
    rows, blocks = nibbles.shape[0], nibbles.shape[1] // 16
    r, c = torch.arange(rows)[:, None], torch.arange(blocks)[None, :]
    tiles_across = -(-blocks // 4)
    offset = ((r // 128 * tiles_across + c // 4) * 32 + r % 32) * 16 + r % 128 // 32 * 4 + c % 4
    scales = E4M3[scale.view(torch.uint8)[offset].long()]
    return values * scales.repeat_interleave(16, dim=1)


class Recorder:
    """Stands in for `torch.nn.functional.scaled_mm`: checks by torch's own rules, keeps, multiplies."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, mat_a: Tensor, mat_b: Tensor, **options: Any) -> Tensor:
        def meta(value: Any) -> Any:
            if isinstance(value, list):
                return [meta(item) for item in value]
            return value.to("meta") if isinstance(value, Tensor) else value

        checked = REAL_SCALED_MM(meta(mat_a), meta(mat_b), **{name: meta(v) for name, v in options.items()})
        self.calls.append({"mat_a": mat_a, "mat_b": mat_b, **options})
        (scale_a, g_a), (scale_b, g_b) = options["scale_a"], options["scale_b"]
        result = decode(mat_a, scale_a) @ decode(mat_b.t(), scale_b).t() * (g_a * g_b).double()
        assert checked.shape == result.shape and checked.dtype == options["output_dtype"]
        return result.to(options["output_dtype"])


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    stub = Recorder()
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", stub)
    return stub


def operand(rows: int, cols: int, block_shape: tuple[int, int], seed: int, size: float) -> QuantizedTensor:
    """A quantised matrix whose blocks differ in size and of which one is zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * size
    x *= (
        torch.exp2(torch.randint(-6, 3, (rows // 16, cols // 16), generator=generator))
        .repeat_interleave(16, 0)
        .repeat_interleave(16, 1)
    )
    x[:16, :16] = 0
    return quantize(x, block_shape=block_shape)


# (M, N, K): one tile; several tiles and a ragged edge; K a multiple of 16 only; all ragged.
SHAPES = ((128, 128, 64), (272, 144, 320), (32, 16, 48), (144, 400, 208))
BLOCKS = (((1, 16), (16, 16)), ((1, 16), (1, 16)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_arguments_decode_to_the_operands_that_the_emulation_multiplies(
    shape: tuple[int, int, int], blocks: Any, recorder: Recorder
) -> None:
    m, n, k = shape
    a, b = operand(m, k, blocks[0], 1, 3.0), operand(n, k, blocks[1], 2, 0.02)
    ScaledMmGemm().multiply(a, b, torch.float32)
    (call,) = recorder.calls
    for x, mat, scale in ((a, call["mat_a"], call["scale_a"]), (b, call["mat_b"].t(), call["scale_b"])):
        decoded = decode(mat, scale[0])
        assert_bitwise_equal(decoded[:, :k], x.operand(torch.float64), "operand")
        assert not decoded[:, k:].any(), "padding along K must decode to zero"
        assert_bitwise_equal(mat.view(torch.uint8)[:, : k // 2], x.packed(), "codes")
        assert not mat.view(torch.uint8)[:, k // 2 :].any()
        assert_bitwise_equal(scale[1], (x.amax / torch.tensor(2688.0)).reshape(1), "tensor scale")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_product_is_the_emulated_one_up_to_the_rounding_of_alpha(
    shape: tuple[int, int, int], blocks: Any, recorder: Recorder
) -> None:
    m, n, k = shape
    a, b = operand(m, k, blocks[0], 3, 0.3), operand(n, k, blocks[1], 4, 40.0)
    ScaledMmGemm().multiply(a, b, torch.float32)
    (call,) = recorder.calls
    (scale_a, g_a), (scale_b, g_b) = call["scale_a"], call["scale_b"]
    exact = decode(call["mat_a"], scale_a) @ decode(call["mat_b"].t(), scale_b).t() * (g_a * g_b).double()
    emulated = EmulatedGemm().multiply(a, b, torch.float64)
    error = ((exact - emulated).abs() / emulated.abs().clamp(min=1e-300)).max().item()
    assert error <= ALPHA_TOLERANCE


def test_every_argument_of_the_call_is_what_two_level_nvfp4_takes(recorder: Recorder) -> None:
    a, b = operand(48, 96, (1, 16), 5, 1.0), operand(32, 96, (16, 16), 6, 1.0)
    for dtype in (torch.float32, torch.bfloat16):
        assert ScaledMmGemm().multiply(a, b, dtype).dtype == dtype
    for call, dtype in zip(recorder.calls, (torch.float32, torch.bfloat16), strict=True):
        expected = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
        assert call["scale_recipe_a"] == call["scale_recipe_b"] == expected
        expected = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
        assert call["swizzle_a"] == call["swizzle_b"] == expected
        assert call["output_dtype"] == dtype
        assert set(call) == {"mat_a", "mat_b", "scale_a", "scale_recipe_a", "scale_b", "scale_recipe_b",
                             "swizzle_a", "swizzle_b", "output_dtype"}  # fmt: skip
        assert call["mat_a"].stride() == (48, 1) and call["mat_b"].stride() == (1, 48)
        for scale, g in (call["scale_a"], call["scale_b"]):
            assert scale.shape == (128 * 8,) and scale.is_contiguous()
            assert g.shape == (1,) and g.dtype == torch.float32


def test_a_zero_tensor_multiplies_to_zero(recorder: Recorder) -> None:
    zero, b = quantize(torch.zeros(16, 32), block_shape=(1, 16)), operand(16, 32, (1, 16), 7, 1.0)
    assert_bitwise_equal(ScaledMmGemm().multiply(zero, b, torch.float32), torch.zeros(16, 16), "product")


def test_four_over_six_keeps_its_own_tensor_scale(recorder: Recorder) -> None:
    a = replace(operand(16, 32, (1, 16), 8, 1.0), scale_target=6 * 256.0)
    ScaledMmGemm().multiply(a, operand(16, 32, (1, 16), 9, 1.0), torch.float32)
    g = recorder.calls[0]["scale_a"][1]
    assert_bitwise_equal(g, (a.amax / torch.tensor(1536.0)).reshape(1), "tensor scale")


def test_what_the_native_gemm_cannot_take_is_refused_before_the_call(recorder: Recorder) -> None:
    a, odd = operand(16, 32, (1, 16), 10, 1.0), operand(16, 32, (1, 16), 11, 1.0)
    odd = replace(odd, values=odd.values[:8], block_scale=odd.block_scale[:8])
    with pytest.raises(ShapeError, match=r"N .* a multiple of 16, received 8"):
        ScaledMmGemm().multiply(a, odd, torch.float32)
    with pytest.raises(ShapeError, match=r"received torch\.float64; use the emulated backend"):
        ScaledMmGemm().multiply(a, a, torch.float64)
    with pytest.raises(ConfigError, match="NVFP4 operands only, received mxfp4"):
        ScaledMmGemm().multiply(a, replace(a, format="mxfp4"), torch.float32)
    assert not recorder.calls


@pytest.mark.parametrize("recipe", [NVFP4, NVFP4_DIRECT, METIS], ids=lambda recipe: recipe.name)
def test_a_linear_computes_all_three_gemms_with_its_backend(recipe: Any, recorder: Recorder) -> None:
    results = []
    for backend in (None, ScaledMmGemm()):
        torch.manual_seed(0)
        linear = MetisLinear(96, 48, bias=False, recipe=recipe, backend=backend)
        x = torch.randn(80, 96, requires_grad=True)
        y = linear(x)
        y.backward(torch.randn(80, 48))
        results.append((y.detach(), x.grad, linear.weight.grad))
    assert len(recorder.calls) == 3
    for emulated, native in zip(*results, strict=True):
        assert float((native - emulated).abs().max() / emulated.abs().max()) <= LINEAR_TOLERANCE


# --- where it is available ---------------------------------------------------------------------------------


def pretend(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], cuda: str | None
) -> None:
    """Let torch report a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    ("capability", "cuda", "available", "auto"),
    [
        ((9, 0), "13.0", False, "emulated"),
        ((10, 0), "12.8", True, "scaled_mm"),
        ((10, 3), "13.0", True, "scaled_mm"),
        ((12, 0), "13.0", True, "emulated"),
        ((10, 0), "12.6", False, "emulated"),
        ((12, 0), None, False, "emulated"),
    ],
)
def test_availability_is_compute_capability_and_cuda_version(
    capability: tuple[int, int],
    cuda: str | None,
    available: bool,
    auto: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    pretend(monkeypatch, "GPU X", capability, cuda)
    recipes = dict.fromkeys(linear_paths(2), NVFP4)
    found = native_gemm_available("cuda")
    assert found[0] is available
    assert cuda is None or f"GPU X of compute capability {capability[0]}.{capability[1]}" in found[1]
    args = Namespace(
        quantize_kernels="auto", weight_cache="operand", gemm_backend="auto", device="cuda",
        exact_reductions=False,
    )  # fmt: skip
    assert resolve_gemm_backend(args, recipes).name == auto == args.gemm_backend
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"GEMM backend: {auto} (auto: ") and found[1] in line
    args.gemm_backend = "scaled_mm"
    if available:
        assert isinstance(resolve_gemm_backend(args, recipes), ScaledMmGemm)
    else:
        with pytest.raises(ConfigError, match=r"--gemm-backend: scaled_mm needs a Blackwell GPU") as error:
            resolve_gemm_backend(args, recipes)
        assert f"received {found[1]}; use emulated or auto" in str(error.value)
    args.gemm_backend = "transformer_engine"
    if available and capability[0] == 10:
        assert resolve_gemm_backend(args, recipes) is None
    else:
        with pytest.raises(ConfigError, match="--gemm-backend: transformer_engine"):
            resolve_gemm_backend(args, recipes)


def test_this_machine_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"compute capability 10.0 or higher.* received device cpu; use"):
        scaled_mm_backend("cpu")


@pytest.mark.parametrize(("exact", "recipe"), [(True, NVFP4), (False, BF16), (False, METIS_MERGED)])
def test_auto_is_emulated_where_native_would_have_no_effect(
    exact: bool, recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pretend(monkeypatch, "GPU X", (10, 0), "13.0")
    args = Namespace(
        quantize_kernels="auto", weight_cache="codes", gemm_backend="auto", device="cuda",
        exact_reductions=exact,
    )  # fmt: skip
    backend = resolve_gemm_backend(args, dict.fromkeys(linear_paths(2), recipe))
    assert backend == EmulatedGemm(kernels="auto", weight_cache="codes")
    assert args.gemm_backend == "emulated"
    out = capsys.readouterr().out
    if recipe is METIS_MERGED:
        assert "(auto: metis_merged adds heads back into operands)" in out
    else:
        assert ("(auto: --exact-reductions)" in out) if exact else out == ""


# --- what the command line alone decides -------------------------------------------------------------------

RUN = f"{SHAPE} {TOKENIZER} --mock-data --train-iters 4"


def parsed(options: str) -> Namespace:
    args = parse_args([*RUN.replace("--device cpu", "--device auto").split(), *options.split()])
    validate_args(args, 1)
    return args


REFUSED = {
    "exact": ("--recipe nvfp4 --gemm-backend scaled_mm --exact-reductions",
              "scaled_mm must not be combined with --exact-reductions"),
    "te_exact": ("--recipe nvfp4 --gemm-backend transformer_engine --exact-reductions",
                 "transformer_engine must not be combined with --exact-reductions"),
    "cpu": ("--recipe nvfp4 --gemm-backend scaled_mm --device cpu", "received --device cpu; use emulated"),
    "te_metis": ("--recipe metis --gemm-backend transformer_engine --bf16",
                 "computes the recipe nvfp4 only, received 'metis' for "
                 "decoder.layers.0.self_attention.linear_qkv"),
    "te_bf16": ("--recipe bf16 --gemm-backend transformer_engine --bf16", "at least one nvfp4 linear"),
    "te_fp32": ("--recipe nvfp4 --gemm-backend transformer_engine", "needs --bf16"),
    "te_local": ("--recipe nvfp4 --gemm-backend transformer_engine --bf16 --transformer-impl local",
                 "must not be combined with --transformer-impl local"),
    "te_absent": ("--recipe nvfp4 --gemm-backend transformer_engine --bf16",
                  "needs Transformer Engine 2.7 or newer, received none installed"),
    "merged": ("--recipe metis_merged --gemm-backend scaled_mm",
               "keep heads apart, because it reads codes, received metis_merged"),
    "choice": ("--gemm-backend scaledmm", "received 'scaledmm'; did you mean 'scaled_mm'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_cannot_work_are_refused_without_torch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = REFUSED[case]
    monkeypatch.setattr(gemm_backend, "_te_version", lambda: None)
    with pytest.raises(ConfigError) as error:
        parsed(options)
    assert error.value.where == "--gemm-backend" and message in error.value.message


def test_codes_of_weights_that_have_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="--weight-cache: codes has no effect on metis_merged"):
        parsed("--recipe metis_merged --weight-cache codes")
    for options in ("--recipe metis_merged", "--recipe metis --weight-cache codes"):
        parsed(options)


def test_a_linear_whose_backend_reads_codes_keeps_heads_apart() -> None:
    class Native(EmulatedGemm):
        reads_bytes = True

    layer = MetisLinear(32, 32, recipe=METIS, backend=Native())
    with pytest.raises(ConfigError, match="must not be emulated, which multiplies codes"):
        layer.set_recipe(METIS_MERGED)
    with pytest.raises(ConfigError, match="whose heads are added back into operands"):
        MetisLinear(32, 32, recipe=METIS_MERGED, backend=Native())


def test_formats_beyond_nvfp4_are_emulated_and_refused_to_scaled_mm(tmp_path: Path) -> None:
    cell = "{quantizer: {format: mxfp4, block_shape: [1, 32]}}"
    path = tmp_path / "mx.yaml"
    path.write_text(f"name: mx\nfprop_input: {cell}\nfprop_weight: {cell}\n")
    with pytest.raises(ConfigError, match="must have recipes in nvfp4, received mxfp4; use emulated or auto"):
        parsed(f"--recipe {path} --gemm-backend scaled_mm")
    parsed(f"--recipe {path} --gemm-backend auto")


@pytest.mark.parametrize(("version", "works"), [("2.6.0", False), ("2.7.0.dev0", True), ("2.11.0", True)])
def test_transformer_engine_must_be_new_enough(
    version: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm_backend, "_te_version", lambda: version)
    options = "--recipe nvfp4 --bf16 --gemm-backend transformer_engine"
    if works:
        assert parsed(options).gemm_backend == "transformer_engine"
    else:
        with pytest.raises(ConfigError, match=r"2\.7 or newer, received 2\.6\.0"):
            parsed(options)


@pytest.mark.parametrize(
    ("start", "end", "by_file"),
    [(0, 1, False), (2, 3, False), (0, 0, True), (None, None, False)],
)
def test_edge_counts_reproduce_the_policy_by_the_engines_rule(
    start: int | None, end: int | None, by_file: bool
) -> None:
    """megatron-core: block i stays in bf16 when i < start or i >= num_layers - end."""
    num_layers = 8
    policy = resolve_policy(
        "all" if by_file else None, num_layers, *((None, None) if by_file else (start, end))
    )
    renamed = replace(NVFP4, name="mine")
    recipes = {path: policy.recipe_for(path, renamed) for path in linear_paths(num_layers)}
    first, last = edge_counts(recipes)
    for path, recipe in recipes.items():
        block = int(path.split(".")[2])
        assert (block < first or block >= num_layers - last) == recipe.is_high_precision, path


@pytest.mark.parametrize(
    "bf16_paths",
    [("decoder.layers.1.",), ("decoder.layers.0.mlp.",), ("decoder.layers.3.self_attention.linear_qkv",)],
)
def test_policies_that_two_counts_cannot_say_are_refused(bf16_paths: tuple[str, ...]) -> None:
    recipes = {path: BF16 if path.startswith(bf16_paths) else NVFP4 for path in linear_paths(4)}
    with pytest.raises(ConfigError, match="keeps whole blocks at the start and at the end in bf16"):
        edge_counts(recipes)


# --- through the trainer -----------------------------------------------------------------------------------

NUM_ITERS = 2
TRAINING = f"{TOKENIZER} --mock-data --recipe nvfp4 --train-iters {NUM_ITERS} --eval-iters 0"
TE_OPTIONS = (
    "--recipe nvfp4 --bf16 --gemm-backend transformer_engine --no-rope-fusion "
    "--num-layers-at-start-in-bf16 1 --num-layers-at-end-in-bf16 2"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process that knows megatron-core: two short runs, and the engine's config for two backends."""
    folder = tmp_path_factory.mktemp("native")
    (result,) = run_ranks(_train, 1, str(folder), timeout=120.0)
    for name in ("emulated", "native"):
        result[name]["losses"] = [line["lm_loss"] for line in read_metrics(folder / f"{name}.jsonl")]
    return result


def _train(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    from metis.gemm import scaled_mm
    from metis.training.model import recipes_of, transformer_config

    results: dict[str, Any] = {}
    recorder = torch.nn.functional.scaled_mm = Recorder()
    for name in ("emulated", "native"):
        outcome = run_case(world_size, f"{TRAINING} --metrics-file {folder}/{name}.jsonl")
        results[name] = {"stdout": outcome.stdout, "error": outcome.error, "calls": len(recorder.calls)}
        scaled_mm.native_gemm_available = lambda device: (True, "a pretended GPU")
        scaled_mm.is_training_family = lambda device: True
    gemm_backend._te_version = lambda: "2.9.0"
    args = parsed(TE_OPTIONS)
    args.distributed_backend = "nccl"
    names = ("fp4", "fp4_recipe", "fp4_param", "first_last_layers_bf16")
    names += ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    for name, edges in (("engine_fp4", edge_counts(recipes_of(args))), ("engine_plain", None)):
        config = transformer_config(args, True, edges)
        results[name] = {field: getattr(config, field) for field in names}
    return results


def test_a_run_multiplies_with_what_auto_chose_and_says_why(trained: dict[str, Any]) -> None:
    emulated, native = trained["emulated"], trained["native"]
    assert emulated["error"] == native["error"] == ""
    assert emulated["stdout"].count("GEMM backend: emulated (auto: device cpu, not Blackwell)") == 1
    assert native["stdout"].count("GEMM backend: scaled_mm (auto: a pretended GPU)") == 1
    num_linears, num_gemms, num_micro_batches = 12, 3, 2
    assert emulated["calls"] == 0
    assert native["calls"] == num_linears * num_gemms * num_micro_batches * NUM_ITERS
    assert len(native["losses"]) == NUM_ITERS
    worst = max(abs(a - b) for a, b in zip(emulated["losses"], native["losses"], strict=True))
    assert worst <= LOSS_TOLERANCE


def test_the_engine_is_told_fp4_and_the_edges(trained: dict[str, Any]) -> None:
    assert trained["engine_fp4"] == {
        "fp4": "e2m1",
        "fp4_recipe": "nvfp4",
        "fp4_param": False,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 2,
    }
    assert trained["engine_plain"]["fp4"] is None and not trained["engine_plain"]["first_last_layers_bf16"]


# --- through the entry script ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("auto", marks=pytest.mark.long)])
def test_the_entry_script_ends_in_one_line_before_training(device: str, tmp_path: Path) -> None:
    """`cpu` is refused before torch is imported, `auto` when the device is known."""
    if device == "auto" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    metrics = tmp_path / "metrics.jsonl"
    line = RUN.replace("--device cpu", f"--device {device} --metrics-file {metrics}")
    result = subprocess.run(
        [
            sys.executable,
            "pretrain_llama.py",
            *line.split(),
            "--recipe",
            "nvfp4",
            "--gemm-backend",
            "scaled_mm",
        ],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == USER_ERROR_EXIT_STATUS
    errors = [text for text in result.stderr.splitlines() if not text.startswith("WARNING: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    assert errors[0].startswith("error: --gemm-backend: scaled_mm needs a Blackwell GPU")
    assert errors[0].endswith("use emulated or auto") and "cpu" in errors[0]
    assert not metrics.exists()

"""CPU against GPU, bit by bit: random words, rotation, codes, scales, coefficients, residuals, bases.

The oracle is the CPU's result for the same tensors. Prints one line per check and ends with a JSON object;
the exit status is 1 when anything differs. What is floating-point by nature (a GEMM, an attention kernel) is
measured instead: error against float64, and whether a kernel repeats its own bits.

Trap: NaN payloads may differ between devices, so NaNs are compared as NaNs; codes and scale bytes never are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metis.config import QuantizerConfig, RhtConfig, SplitConfig
from metis.decompose import basis as algebra
from metis.gemm import EmulatedGemm
from metis.operand import Axis, NoiseStream, coefficients, encode, split_matrix
from metis.quantize import QuantizedTensor, gemm_alpha, quantize, random_hadamard, tensor_amax
from metis.rng import NoisePosition, gaussian, random_words, stream_key, uniform_hash

POSITION = NoisePosition(step=5, microbatch=3)
NUM_CHUNKS = 8
GEMM_TOLERANCE = 1e-5
"""Relative error (Frobenius) of exact operands with fp32 accumulation; worst case measured in LOG.md."""


class Ledger:
    """Collects the outcome of every comparison."""

    def __init__(self) -> None:
        self.different: dict[str, str] = {}
        self.count = 0
        self.measured: dict[str, object] = {}

    def same(self, name: str, on_gpu: Tensor, on_cpu: Tensor) -> None:
        """Compare two tensors bitwise, NaN equal to NaN."""
        self.count += 1
        actual, expected = on_gpu.detach().cpu(), on_cpu.detach()
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            self.different[name] = (
                f"{actual.dtype} {tuple(actual.shape)} and {expected.dtype} {tuple(expected.shape)}"
            )
            return
        unequal = _bits(actual) != _bits(expected)
        if actual.is_floating_point():
            unequal &= ~(actual.isnan() & expected.isnan())
        wrong = int(unequal.sum())
        if wrong:
            first = unequal.nonzero()[0].tolist() if unequal.dim() else []
            a, e = (float(t[tuple(first)]) for t in (actual, expected))
            self.different[name] = f"{wrong} of {unequal.numel()} differ, first at {first}: {a!r} not {e!r}"

    def expect(self, name: str, holds: bool, detail: str) -> None:
        """Record a condition that is not a comparison of bits."""
        self.count += 1
        if not holds:
            self.different[name] = detail


def _bits(x: Tensor) -> Tensor:
    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(widths[x.element_size()]) if x.is_floating_point() else x


def inputs(rows: int, cols: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, fp32 matrix): random, heavy-tailed, tiny, denormal, huge, zero, ties, NaN and inf."""
    generator = torch.Generator().manual_seed(20261122)
    normal = torch.randn(rows, cols, generator=generator)
    tail = normal / torch.randn(rows, cols, generator=generator).abs().clamp_(min=1e-3) ** 1.5
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(rows * cols // 8)
    with_zero_blocks = normal.clone()
    with_zero_blocks[::3, : cols // 2] = 0.0
    bad = {}
    for name, value in (("nan", float("nan")), ("inf", float("inf")), ("-inf", -float("inf"))):
        bad[name] = normal.clone()
        bad[name][rows // 2, cols // 3] = value
    yield from (
        ("gaussian", normal),
        ("heavy tails", tail),
        ("gradient scale", tail * 1e-7),
        ("denormal", normal * 1e-39),
        ("mixed denormal", torch.where(normal > 0.5, normal, normal * 1e-40)),
        ("huge", normal * 5e37),
        ("zero", torch.zeros(rows, cols)),
        ("zero blocks", with_zero_blocks),
        ("negative zero", torch.where(normal > 0, torch.tensor(-0.0), normal)),
        ("ties", ties.view(rows, cols) * torch.where(normal < 0, -1.0, 1.0)),
        *bad.items(),
    )


def check_random(ledger: Ledger, device: str) -> None:
    """Philox words, row hashes and Gaussians."""
    key = stream_key(7, "decoder.layers.3.mlp.linear_fc1", "wgrad_grad_output")
    rows = torch.arange(100, 612)
    for name, cols in (
        ("aligned", torch.arange(1024)),
        ("odd start", torch.arange(3, 515)),
        ("two runs", torch.cat([torch.arange(64, 192), torch.arange(1000, 1128)])),
    ):
        args = (key, POSITION, rows, cols)
        ledger.same(f"words {name}", random_words(key, POSITION, rows.to(device), cols.to(device)),
                    random_words(*args))  # fmt: skip
        ledger.same(f"gaussian {name}", gaussian(key, rows.to(device), cols.to(device)),
                    gaussian(key, rows, cols))  # fmt: skip
    ledger.same("row hash", uniform_hash(key, POSITION, rows.to(device)), uniform_hash(key, POSITION, rows))


def _parts(quantized: QuantizedTensor) -> dict[str, Tensor]:
    return {
        "codes": quantized.codes(),
        "scales": quantized.block_scale_bytes(),
        "amax": quantized.amax,
        "packed": quantized.packed(),
        "operand": quantized.operand(torch.bfloat16),
        "tensor scale": quantized.tensor_scale(),
    }


def check_quantize(ledger: Ledger, device: str, rows: int, cols: int) -> None:
    """Codes, scales and amax of every input, dtype, block shape and rounding; the rotation; 4-over-6."""
    key = stream_key(7, "layer", "dgrad_grad_output")
    words = random_words(key, POSITION, torch.arange(rows), torch.arange(cols))
    gpu_words = words.to(device)
    for name, x32 in inputs(rows, cols):
        for dtype in (torch.float32, torch.bfloat16):
            x = x32.to(dtype)
            label = f"{name} {str(dtype)[6:]}"
            ledger.same(f"rotation, {label}", random_hadamard(x.to(device)), random_hadamard(x))
            ledger.same(f"amax, {label}", tensor_amax(x.to(device)), tensor_amax(x))
            for block_shape in ((1, 16), (16, 16)):
                for mode, options in (
                    ("rne", {}),
                    ("sr24", {"rounding": "stochastic"}),
                    ("sr8", {"rounding": "stochastic", "num_random_bits": 8}),
                    ("4over6", {"four_over_six": "mse"}),
                ):
                    noise = {"noise_words": words} if "rounding" in options else {}
                    gpu_noise = {"noise_words": gpu_words} if "rounding" in options else {}
                    expected = quantize(x, block_shape=block_shape, **options, **noise)
                    actual = quantize(x.to(device), block_shape=block_shape, **options, **gpu_noise)
                    for part, value in _parts(expected).items():
                        ledger.same(f"{part}, {label} {block_shape} {mode}", _parts(actual)[part], value)


def _spiked(rows: int, cols: int, scale: float, seed: int) -> Tensor:
    """Return a matrix with a decaying spectrum and a few large rows, like an activation or a gradient."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, 32, generator=generator)
    right = torch.randn(32, cols, generator=generator)
    x = left * (30.0 * 0.7 ** torch.arange(32)) @ right + torch.randn(rows, cols, generator=generator)
    x[::97] *= 20.0
    return x * scale


def check_basis(ledger: Ledger, device: str, tokens: int, features: int, rank: int) -> None:
    """Sketch and refresh through all phases, from the same state on both devices; V in bf16, z in float64."""
    key = stream_key(7, "layer", "input", "directions")
    for label, dtype, scale in (("activation", torch.bfloat16, 1.0), ("gradient", torch.float32, 1e-7)):
        state = algebra.empty_state(key, features, rank, 8)
        chain = algebra.empty_state(key, features, rank, 8, device=device)
        ledger.same(f"directions, {label}", chain.v, state.v)
        axis = Axis.whole(features)
        for step in range(4):
            x = _spiked(tokens, features, scale, seed=step).to(dtype)
            state, same_start = _advance(x, state, axis, step), _advance(
                x.to(device), replace(state, v=state.v.to(device), z=state.z.to(device),
                                      gram=state.gram.to(device)), axis, step)  # fmt: skip
            chain = _advance(x.to(device), chain, axis, step)
            ledger.same(f"V after refresh {step}, {label}", same_start.v, state.v)
            ledger.same(f"V after refresh {step} in a chain, {label}", chain.v, state.v)
        check_split(ledger, device, label, x, state.v[:, :rank])


def _advance(x: Tensor, state: algebra.BasisState, axis: Axis, step: int) -> algebra.BasisState:
    b = coefficients(x, algebra.sketch_directions(state), axis, NUM_CHUNKS)
    z, gram = algebra.sketch(x, b)
    state = algebra.accumulate(state, z, gram, x.shape[0])
    return algebra.refresh(state, step, refill_key=stream_key(7, "layer", "input", "refill"))


def check_split(ledger: Ledger, device: str, label: str, x: Tensor, v: Tensor) -> None:
    """Coefficients and residual of a split, and the codes that the six cells make of the residual."""
    tokens, features = Axis.whole(x.shape[0]), Axis.whole(x.shape[1])
    options = {"num_chunks": NUM_CHUNKS, "amax_scope": "global"}
    here = split_matrix(x, v, SplitConfig(), tokens, features, **options)
    there = split_matrix(x.to(device), v.to(device), SplitConfig(), tokens, features, **options)
    ledger.same(f"coefficients P, {label}", there.p, here.p)
    ledger.same(f"residual R, {label}", there.residual, here.residual)
    noise = NoiseStream(seed=7, layer="layer", operand="wgrad_grad_output", position=POSITION)
    for mode, config, transposed in (
        ("fprop, rne", QuantizerConfig(), False),
        ("dgrad, sr", QuantizerConfig(rounding="stochastic"), False),
        ("wgrad, rht sr", QuantizerConfig(rounding="stochastic", rht=RhtConfig()), True),
        ("weight tiles", QuantizerConfig(block_shape=(16, 16)), False),
    ):
        axes = (features, tokens) if transposed else (tokens, features)
        encoded = [
            encode(r.t() if transposed else r, config, *axes, amax_scope="global", noise=noise,
                   noise_is_transposed=transposed)
            for r in (there.residual, here.residual)
        ]  # fmt: skip
        for part, value in _parts(encoded[1].terms[0]).items():
            ledger.same(f"{part} of R, {label}, {mode}", _parts(encoded[0].terms[0])[part], value)


def measure_gemm(ledger: Ledger, device: str, size: int) -> None:
    """Error of the emulated GEMM against the float64 product of the same decoded operands."""
    a, b = (quantize(_spiked(size, 2 * size, 1.0, s).to(device), block_shape=(1, 16)) for s in (1, 2))
    result = EmulatedGemm().multiply(a, b, torch.float32).double()
    exact = a.operand(torch.float64) @ b.operand(torch.float64).t() * gemm_alpha(a, b).double()
    error = float((result - exact).norm() / exact.norm())
    ledger.measured["emulated GEMM, error against float64"] = error
    ledger.expect("emulated GEMM", error < GEMM_TOLERANCE, f"relative error {error:.2e}")


def measure_attention(ledger: Ledger, device: str, sequence: int) -> None:
    """Time of forward + backward of each attention kernel, and whether five runs give the same bits."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, grad = (
        torch.randn(sequence, 1, heads, 64, generator=generator)
        .to(device, torch.bfloat16).permute(1, 2, 0, 3).requires_grad_(index < 3)
        for index, heads in enumerate((32, 8, 8, 32))
    )  # fmt: skip

    def run() -> list[Tensor]:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]

    every = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    cases: list[tuple[str, list[SDPBackend], bool]] = [
        ("cuDNN", [SDPBackend.CUDNN_ATTENTION], False),
        ("flash", [SDPBackend.FLASH_ATTENTION], False),
        ("cuDNN, deterministic algorithms", [SDPBackend.CUDNN_ATTENTION], True),
        ("flash, deterministic algorithms", [SDPBackend.FLASH_ATTENTION], True),
        ("as the trainer chooses", every, False),
        ("as the trainer chooses, deterministic algorithms", every, True),
    ]
    for name, backends, deterministic in cases:
        torch.use_deterministic_algorithms(deterministic)
        try:
            with sdpa_kernel(backends, set_priority=True):
                first, repeats = run(), [run() for _ in range(5)]
                equal = [all(torch.equal(f, r[i]) for r in repeats) for i, f in enumerate(first)]
                names = [n for n, same in zip(("out", "dq", "dk", "dv"), equal, strict=True) if not same]
                ledger.measured[f"attention {name}"] = f"{_milliseconds(run, device):.2f} ms, " + (
                    "repeats its bits" if not names else f"bits vary in {', '.join(names)}"
                )
        except RuntimeError as error:
            ledger.measured[f"attention {name}"] = f"not available: {str(error).splitlines()[0][:80]}"
        finally:
            torch.use_deterministic_algorithms(False)


def _milliseconds(call: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000.0 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    ledger, began = Ledger(), time.time()
    rows, cols = (512, 1024) if on_gpu else (32, 64)
    steps: list[tuple[str, Callable[[], None]]] = [
        ("random numbers", lambda: check_random(ledger, args.device)),
        ("quantisation", lambda: check_quantize(ledger, args.device, rows, cols)),
        ("bases and splits", lambda: check_basis(ledger, args.device, *((2048, 2048, 32) if on_gpu else (256, 128, 16)))),  # noqa: E501
        ("gemm", lambda: measure_gemm(ledger, args.device, 1024 if on_gpu else 64)),
        ("attention", lambda: measure_attention(ledger, args.device, 4096 if on_gpu else 64)),
    ]  # fmt: skip
    for name, check in steps:
        try:
            check()
        except Exception as error:  # one broken check must not hide the others
            ledger.different[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        print(f"{name}: {ledger.count} checks so far, {len(ledger.different)} different, "
              f"{time.time() - began:.1f} s")  # fmt: skip
    for name, what in list(ledger.different.items())[:40]:
        print(f"DIFFERENT {name}: {what}")
    for name, value in ledger.measured.items():
        print(f"measured {name}: {value}")
    print(json.dumps({"checks": ledger.count, "different": ledger.different, "measured": ledger.measured}))
    return 1 if ledger.different else 0


if __name__ == "__main__":
    sys.exit(main())

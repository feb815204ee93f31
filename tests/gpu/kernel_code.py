"""Compiles every kernel for a Hopper GPU on a machine that has none, and reads what came out.

Launches go through the public functions with CPU tensors; a driver that answers "compute capability 9.0"
stands in for CUDA, and nothing is launched. Ends with a JSON object: instructions that would change bits by
kernel (contraction into FMA, flushed denormals, approximate division), and how often a change of step
compiled. `--fuse` compiles with contraction allowed: what the reader must then find.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from metis import kernels
from metis.formats import RHT_SIGN_VECTOR
from metis.kernels import arguments, reduction
from metis.rng import NoisePosition, stream_key

FORBIDDEN = {
    # Of a product by 2^22, which is exact: written so, not contracted.
    "fma": r"fma(?!\.rn\.f32 \s*%\w+, %\w+, 0f[4C]A800000)",
    "open to contraction": r"\b(mul|add|sub)\.f32",
    "ftz": r"\.ftz",
    "approx": r"\.approx",
    "div.full": r"div\.full",
    "rcp": r"rcp(?!\.rn\.f32)",
}
"""In PTX. Without `.rn`, a product and a sum may still be contracted later."""
ROWS, COLS = 256, 512
STEPS = (0, 1, 2, 16, 17, 10**6, 2**31 + 5)


class HopperDriver:
    """Answers what Triton asks before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for_hardware() -> None:
    """Make launches of CPU tensors take the code that a GPU would run, with its own instructions."""
    for name, module in list(sys.modules.items()):
        for asked in ("is_native", "is_hopper"):
            if name.startswith("metis.kernels.") and hasattr(module, asked):
                setattr(module, asked, lambda x: True)


class Compiler:
    """Turns launches into compilations and keeps what they give."""

    def __init__(self, fuse: bool) -> None:
        self.compiled: dict[int, Any] = {}
        self.last: Any = None
        original = JITFunction.run

        def run(function: JITFunction, *args: Any, **options: Any) -> Any:
            options["warmup"] = True
            if fuse:
                options["enable_fp_fusion"] = True
            self.last = original(function, *args, **options)
            self.compiled[id(self.last)] = self.last
            return self.last

        JITFunction.run = run


def noise(
    step: int = 5, first: int = 0, tokens_are_cols: bool = False, words: torch.Tensor | None = None
) -> kernels.KernelNoise:
    """Return the noise of a [256, 512] matrix, or of its transpose."""
    return kernels.KernelNoise(
        key=stream_key(step, "layer"), position=NoisePosition(step, step + 1, words), tokens=((0, ROWS),),
        features=((first, COLS),), tokens_are_cols=tokens_are_cols,
    )  # fmt: skip


def launches(full: bool) -> dict[str, Callable[[], object]]:
    """Return every launch that has code of its own; the short list covers each device function."""
    x = torch.zeros(ROWS, COLS, dtype=torch.bfloat16)
    amax = torch.tensor(1.0)
    packed = torch.zeros(ROWS, COLS // 2, dtype=torch.uint8)
    scales = torch.zeros(ROWS, COLS // 16, dtype=torch.uint8)
    q, signs, sr = kernels.quantize_nvfp4, RHT_SIGN_VECTOR, {"rounding": "stochastic"}
    short: dict[str, Callable[[], object]] = {
        "amax, rotated": lambda: kernels.amax(x.t(), signs),
        "16x16, up, packed": lambda: q(x, amax, block_shape=(16, 16), scale_rounding="up", want_packed=True),
        "stochastic, rotated, transposed": lambda: q(
            x.t(), amax, noise=noise(tokens_are_cols=True), sign_vector=signs, **sr
        ),
        "stochastic, fp32": lambda: q(x.float(), amax, noise=noise(), want_packed=True, **sr),
        "stochastic, head added back, transposed": lambda: q(
            x.t(), amax, noise=noise(tokens_are_cols=True), whole=x.t(), **sr
        ),
        "4over6": lambda: q(x, amax, four_over_six="mse", block_shape=(16, 16), want_packed=True),
        "mxfp4": lambda: kernels.quantize_mxfp4(x, scale_rounding="up", want_packed=True),
        "dequantize": lambda: kernels.dequantize(packed, scales, amax, dtype=torch.bfloat16),
    }
    if not full:
        return short
    return short | {
        "amax": lambda: kernels.amax(x),
        "1x16": lambda: q(x, amax),
        "1x16, fp16": lambda: q(x.half(), amax, want_packed=True),
        "1x16, transposed": lambda: q(x.t(), amax, want_packed=True),
        "16x16, transposed": lambda: q(x.t(), amax, block_shape=(16, 16), want_packed=True),
        "stochastic, 8 bits": lambda: q(x, amax, noise=noise(), num_random_bits=8, **sr),
        "stochastic, unaligned": lambda: q(x, amax, noise=noise(first=3), **sr),
        "4over6, mae": lambda: q(x, amax, four_over_six="mae", want_packed=True),
        "mxfp4, standard": lambda: kernels.quantize_mxfp4(x),
        "mxfp4, even, transposed": lambda: kernels.quantize_mxfp4(x.t(), scale_rounding="even"),
        "rotation of 128": lambda: kernels.rotate(x.t(), (1,) * 128),
        "rotated by 64 and quantised": lambda: q(x, amax, sign_vector=(1,) * 64),
        "decode": lambda: kernels.decode_operand(packed, scales),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="every variant instead of every device function")
    parser.add_argument("--fuse", action="store_true", help="allow contraction, as a control")
    args = parser.parse_args()
    driver.set_active(HopperDriver())
    arguments.reason_unavailable = lambda device: None
    reduction._max_programs = lambda device: 132
    compile_for_hardware()
    compiler = Compiler(args.fuse)
    found: dict[str, dict[str, int]] = {}
    for name, launch in launches(args.full).items():
        launch()
        ptx = compiler.last.asm["ptx"]
        counts = {word: len(re.findall(pattern, ptx)) for word, pattern in FORBIDDEN.items()}
        found[name] = {word: count for word, count in counts.items() if count}
        print(f"{name}: {len(ptx.splitlines())} lines of PTX, {found[name] or 'nothing forbidden'}")
    before = len(compiler.compiled)
    x, amax = torch.zeros(ROWS, COLS), torch.tensor(1.0)
    words = torch.zeros(9, dtype=torch.int32)
    for place, step in enumerate(STEPS):
        # Without words, and with words at every alignment.
        for own in (None, words[place : place + 2]):
            kernels.quantize_nvfp4(
                x, amax, rounding="stochastic", noise=noise(step, words=own), want_packed=True
            )
    result = {
        "triton": triton.__version__, "found": found, "compiled_for_steps": len(compiler.compiled) - before,
    }  # fmt: skip
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

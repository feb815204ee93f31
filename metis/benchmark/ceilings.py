"""What this device can do: a copy in bytes per second, a product in FLOPs per second.

Run as a program (`python -m metis.benchmark.ceilings --device cuda`) it prints one line of JSON with the
heading of the run, so that a benchmark that starts processes never holds a GPU itself.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from metis.benchmark.report import heading
from metis.benchmark.timing import Stopwatch, num_inputs_for, require_device, time_calls

GEMM_SIZE = {"cuda": 8192, "cpu": 256}
_COPIED = {"cuda": (8192, 4096), "cpu": (64, 64)}
_NUM_CALLS = {"cuda": 50, "cpu": 5}


def gemm_flops_per_second(stopwatch: Stopwatch) -> float:
    """Return FLOP/s of a square product: bf16 of size 8192 on a GPU, fp32 of size 256 on a CPU."""
    kind = stopwatch.device.type
    size = GEMM_SIZE[kind]
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=stopwatch.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = time_calls(
        [lambda _: torch.mm(a, b, out=out)], stopwatch=stopwatch, num_calls=_NUM_CALLS[kind], num_inputs=3
    )[0]
    return 2.0 * size**3 / timing.samples.median


def copy_bytes_per_second(stopwatch: Stopwatch) -> float:
    """Return bytes read plus written per second by a clone of a bf16 matrix, 8192x4096 on a GPU."""
    kind = stopwatch.device.type
    rows, cols = _COPIED[kind]
    num_bytes = 2 * rows * cols
    count = num_inputs_for(num_bytes, stopwatch.device)
    xs = [torch.randn(rows, cols, device=stopwatch.device).bfloat16() for _ in range(count)]
    timing = time_calls(
        [lambda i: xs[i].clone()], stopwatch=stopwatch, num_calls=_NUM_CALLS[kind], num_inputs=count
    )[0]
    return 2.0 * num_bytes / timing.samples.median


def main() -> int:
    """Print heading and ceilings as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    stopwatch = Stopwatch(require_device(parser.parse_args().device))
    result = {
        "heading": heading(stopwatch.device),
        "gemm_flops_per_second": gemm_flops_per_second(stopwatch),
        "copy_bytes_per_second": copy_bytes_per_second(stopwatch),
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

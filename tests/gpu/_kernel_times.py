"""Times of the Triton kernels on bf16 matrices of a training step; used by kernel_bits.py.

Medians of single calls between CUDA events, the launch hidden behind work already queued. Inputs rotate among
enough tensors to leave the L2 cache; the copy that everything is compared with is measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from metis import kernels
from metis.formats import RHT_SIGN_VECTOR
from metis.rng import NoisePosition, stream_key


def _noise(tokens: int, features: int, tokens_are_cols: bool = False) -> kernels.KernelNoise:
    return kernels.KernelNoise(
        key=stream_key(7, "layer"), position=NoisePosition(5, 3), tokens=((0, tokens),),
        features=((0, features),), tokens_are_cols=tokens_are_cols,
    )  # fmt: skip


def timings(rows: int, cols: int) -> dict[str, dict[str, float]]:
    """Median microseconds of every kernel on bf16 [rows, cols], its GB/s and its ratio to a copy.

    GB/s counts bytes read plus written once. Inputs rotate among enough tensors to leave the L2 cache.
    """
    device = "cuda"
    generator = torch.Generator(device).manual_seed(3)
    xs = [torch.randn(rows, cols, dtype=torch.bfloat16, device=device, generator=generator) for _ in range(6)]
    amax = kernels.amax(xs[0])
    n = rows * cols
    row_noise = _noise(rows, cols)
    col_noise = _noise(rows, cols, tokens_are_cols=True)
    signs = RHT_SIGN_VECTOR
    sr, q = {"rounding": "stochastic"}, kernels.quantize_nvfp4
    packs = [q(x, amax, want_packed=True, want_operand=False) for x in xs]
    packed_only = {"want_packed": True, "want_operand": False}
    packed_bytes = n // 2 + n // 16
    cases: dict[str, tuple[Callable[[int], object], float]] = {
        "copy": (lambda i: xs[i].clone(), 4 * n),
        "amax": (lambda i: kernels.amax(xs[i]), 2 * n),
        "amax, rht, transposed": (lambda i: kernels.amax(xs[i].t(), signs), 2 * n),
        "1x16 rne": (lambda i: q(xs[i], amax), 4 * n),
        "1x16 rne, transposed": (lambda i: q(xs[i].t(), amax), 4 * n),
        "16x16 rne 4over6": (lambda i: q(xs[i], amax, block_shape=(16, 16), four_over_six="mae"), 4 * n),
        "16x16 rne": (lambda i: q(xs[i], amax, block_shape=(16, 16)), 4 * n),
        "1x16 sr": (lambda i: q(xs[i], amax, noise=row_noise, **sr), 4 * n),
        "1x16 sr, 8 bits": (lambda i: q(xs[i], amax, noise=row_noise, num_random_bits=8, **sr), 4 * n),
        "1x16 rne rht, transposed": (lambda i: q(xs[i].t(), amax, sign_vector=signs), 4 * n),
        "1x16 sr rht, transposed": (
            lambda i: q(xs[i].t(), amax, sign_vector=signs, noise=col_noise, **sr), 4 * n,
        ),
        "1x16 rne, packed": (lambda i: q(xs[i], amax, **packed_only), 2 * n + packed_bytes),
        "1x16 rne rht, transposed, packed": (
            lambda i: q(xs[i].t(), amax, sign_vector=signs, **packed_only), 2 * n + packed_bytes,
        ),
        "mxfp4 rne": (lambda i: kernels.quantize_mxfp4(xs[i]), 4 * n),
        "rotate, transposed": (lambda i: kernels.rotate(xs[i].t(), signs), 4 * n),
        "decode operand": (
            lambda i: kernels.decode_operand(packs[i].packed, packs[i].scale_bytes), 2 * n + packed_bytes,
        ),
    }  # fmt: skip
    results: dict[str, dict[str, float]] = {}
    for name, (call, num_bytes) in cases.items():
        microseconds, spread = median_microseconds(call, len(xs))
        host = host_microseconds(call, len(xs))
        whole_copy = results.get("copy", {"us": microseconds})["us"]
        results[name] = {
            "us": round(microseconds, 1),
            "spread_us": round(spread, 1),
            "host_us": round(host, 1),
            "GB/s": round(num_bytes / microseconds * 1e-3),
            "to_copy_of_its_bytes": round(microseconds / (whole_copy * num_bytes / (4 * n)), 2),
            "to_copy": round(microseconds / whole_copy, 2),
        }
    return results


def median_microseconds(call: Callable[[int], object], num_inputs: int) -> tuple[float, float]:
    """Return the median and the interquartile range of single calls between CUDA events."""
    for index in range(2 * num_inputs):
        call(index % num_inputs)
    times = []
    for index in range(60):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Work already queued hides the time that the host needs for a launch.
        torch.cuda._sleep(200_000)
        start.record()
        call(index % num_inputs)
        end.record()
        end.synchronize()
        times.append(1000.0 * start.elapsed_time(end))
    low, median, high = statistics.quantiles(times, n=4)
    return median, high - low


def host_microseconds(call: Callable[[int], object], num_inputs: int) -> float:
    """Return the time that the host needs to launch, the GPU being busy with something else."""
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    began = time.perf_counter()
    for index in range(50):
        call(index % num_inputs)
    elapsed = time.perf_counter() - began
    torch.cuda.synchronize()
    return 1e6 * elapsed / 50


SWEPT_TILES = {
    False: ((4, 1024, 4), (8, 512, 4), (16, 256, 2), (16, 256, 4), (16, 256, 8), (32, 128, 4), (8, 256, 2),
            (4, 512, 2), (8, 1024, 8)),
    True: ((64, 16, 1), (128, 16, 1), (256, 16, 1), (256, 16, 2), (128, 32, 2), (256, 32, 4), (64, 32, 1),
           (512, 16, 4), (64, 64, 2)),
}  # fmt: skip
"""(rows, cols, warps) for row-major and for transposed inputs."""


def sweep(rows: int, cols: int) -> dict[str, str]:
    """Return the median time of every tile shape for the kernels of a training step, fastest first."""
    # Loaded here: Triton must not be asked for on a machine without it.
    from metis.kernels.blockwise import Tile

    xs = [torch.randn(rows, cols, dtype=torch.bfloat16, device="cuda") for _ in range(6)]
    amax, q = kernels.amax(xs[0]), kernels.quantize_nvfp4
    row_noise, col_noise = _noise(rows, cols), _noise(rows, cols, tokens_are_cols=True)
    signs, sr = RHT_SIGN_VECTOR, {"rounding": "stochastic"}
    cases: dict[str, tuple[bool, Callable[[int, Tile], object]]] = {
        "1x16 rne": (False, lambda i, t: q(xs[i], amax, tile=t)),
        "1x16 sr": (False, lambda i, t: q(xs[i], amax, noise=row_noise, tile=t, **sr)),
        "16x16 rne": (False, lambda i, t: q(xs[i], amax, block_shape=(16, 16), tile=t)),
        "1x16 rne, transposed": (True, lambda i, t: q(xs[i].t(), amax, tile=t)),
        "1x16 rne rht, transposed": (True, lambda i, t: q(xs[i].t(), amax, sign_vector=signs, tile=t)),
        "1x16 sr rht, transposed": (
            True, lambda i, t: q(xs[i].t(), amax, sign_vector=signs, noise=col_noise, tile=t, **sr),
        ),
        "amax, rht, transposed": (True, lambda i, t: kernels.amax(xs[i].t(), signs, tile=t)),
    }  # fmt: skip
    best = {}
    for name, (transposed, call) in cases.items():
        measured = []
        for shape in SWEPT_TILES[transposed]:
            if name.startswith("16x16") and shape[0] < 16:
                continue
            tile = Tile(*shape)
            measured.append((median_microseconds(lambda i, t=tile, c=call: c(i, t), len(xs))[0], shape))
        best[name] = ", ".join(f"{shape} {us:.1f} us" for us, shape in sorted(measured))
    return best


def table(times: dict[str, dict[str, float]], title: str) -> str:
    """Return the times as text, one line per kernel."""
    columns = ("us", "spread_us", "host_us", "GB/s", "to_copy", "to_copy_of_its_bytes")
    lines = [f"{title:34}" + "".join(f"{column:>{len(column) + 3}}" for column in columns)]
    for name, row in times.items():
        lines.append(f"{name:34}" + "".join(f"{row[column]:{len(column) + 3}}" for column in columns))
    return "\n".join(lines)

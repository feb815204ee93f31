"""Triton kernels against their torch oracles, bit by bit; tools/benchmark/kernels.py says how fast they are.

The oracle is `metis.quantize` on the CPU for the same tensors. On a GPU: `python tests/gpu/kernel_bits.py`.
On a CPU the same comparisons run under Triton's interpreter at a size it can bear:
`TRITON_INTERPRET=1 python tests/gpu/kernel_bits.py --device cpu`; tests/numerics/test_kernels.py does that.

Prints one line per group and ends with a JSON object; the exit status is 1 when
anything differs. NaNs of floating-point outputs are compared as NaNs (their payloads differ between devices);
codes and scale bytes never are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from metis import kernels
from metis.decompose.sketch import in_chunks
from metis.formats import E2M1_MIDPOINTS, RHT_SIGN_VECTOR
from metis.kernels import blockwise
from metis.kernels.blockwise import Tile
from metis.kernels.sampling import row_amax, take_rows
from metis.operand import EncodedMatrix, merged
from metis.quantize import (
    QuantizedTensor,
    quantize,
    quantize_mxfp4,
    random_hadamard,
    seeded_sign_vector,
    tensor_amax,
)
from metis.rng import WORD_BITS_FOR, NoisePosition, random_words, stream_key, uniform_hash

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEY = stream_key(7, "decoder.layers.3.mlp.linear_fc1", "wgrad_grad_output")
POSITION = NoisePosition(step=2**32 - 5, microbatch=3_000_000_000)
"""Words with the top bit set: a launch passes signed numbers."""


class Ledger:
    """Collects what was compared and what differed, by group."""

    def __init__(self, device: str, rows: int, cols: int) -> None:
        self.device, self.rows, self.cols = device, rows, cols
        self.counts: dict[str, int] = {}
        self.different: dict[str, str] = {}
        self.group = ""

    def same(self, name: str, actual: Tensor, expected: Tensor) -> None:
        """Compare bitwise, NaN equal to NaN."""
        self.counts[self.group] = self.counts.get(self.group, 0) + 1
        actual, expected = actual.detach().cpu(), expected.detach()
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            self.different[f"{self.group}: {name}"] = (
                f"{actual.dtype} {tuple(actual.shape)} and {expected.dtype} {tuple(expected.shape)}"
            )
            return
        unequal = bits_of(actual) != bits_of(expected)
        if actual.is_floating_point():
            unequal &= ~(actual.isnan() & expected.isnan())
        if bool(unequal.any()):
            first = tuple(unequal.nonzero()[0].tolist()) if unequal.dim() else ()
            self.different[f"{self.group}: {name}"] = (
                f"{int(unequal.sum())} of {unequal.numel()} differ, first at {list(first)}: "
                f"{actual[first].item()!r} not {expected[first].item()!r}"
            )

    def output(self, name: str, actual: kernels.KernelOutput, expected: QuantizedTensor) -> None:
        """Compare everything that a quantising kernel wrote."""
        if actual.packed is not None:
            self.same(f"codes, {name}", actual.packed, expected.packed())
            self.same(f"scales, {name}", actual.scale_bytes, expected.block_scale_bytes())
        if actual.operand is not None:
            self.same(f"operand, {name}", actual.operand, expected.operand(torch.bfloat16))

    def put(self, x: Tensor) -> Tensor:
        """Copy to the device with the same strides."""
        return x.to(self.device)


def bits_of(x: Tensor) -> Tensor:
    """Return a floating-point tensor's bits as integers, others as they are."""
    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(widths[x.element_size()]) if x.is_floating_point() else x


def inputs(rows: int, cols: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, fp32 matrix): ordinary ones and every edge of the formats."""
    generator = torch.Generator().manual_seed(20261122)
    normal = torch.randn(rows, cols, generator=generator)
    tail = normal / torch.randn(rows, cols, generator=generator).abs().clamp_(min=1e-3) ** 1.5
    midpoints = torch.tensor((*E2M1_MIDPOINTS, 6.0)).repeat(math.ceil(rows * cols / 8))[: rows * cols]
    with_zero_blocks = normal.clone()
    with_zero_blocks[: rows // 2, : cols // 2] = 0.0
    bad = {}
    for name, value in (("nan", math.nan), ("-nan", -math.nan), ("inf", math.inf), ("-inf", -math.inf)):
        bad[name] = normal.clone()
        bad[name][rows // 2, cols // 3] = value
    yield from (
        ("gaussian", normal),
        ("heavy tails", tail),
        ("gradient scale", tail * 1e-7),
        ("subnormal scales", normal * torch.logspace(-8, 0, rows)[:, None]),
        ("denormal", normal * 1e-39),
        ("mixed denormal", torch.where(normal > 0.5, normal, normal * 1e-40)),
        ("huge", normal * 5e37),
        ("huge and denormal", torch.where(normal > 1.0, normal * 5e37, normal * 1e-44)),
        ("zero", torch.zeros(rows, cols)),
        ("zero blocks", with_zero_blocks),
        ("negative zero", torch.where(normal > 0, torch.tensor(-0.0), normal)),
        ("ties", midpoints.view(rows, cols) * torch.where(normal < 0, -1.0, 1.0)),
        ("powers of two", torch.exp2(torch.floor(normal * 3)) * torch.where(tail < 0, -1.0, 1.0)),
        *bad.items(),
    )


def views(x: Tensor, cols: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the same kind of matrix in every memory order that callers have."""
    yield "rows", x
    yield "transposed view", x.t().contiguous().t()
    wide = torch.full((x.shape[0], 2 * cols), 7.0, dtype=x.dtype)
    wide[:, cols:] = x
    yield "columns of a wider matrix", wide[:, cols:]


def check_amax(ledger: Ledger) -> None:
    """The largest magnitude, in every memory order."""
    for name, x32 in inputs(ledger.rows, ledger.cols):
        for dtype in DTYPES:
            x = x32.to(dtype)
            ledger.same(f"{name} {dtype}", kernels.amax(ledger.put(x)), tensor_amax(x))
        for order, view in views(x32, ledger.cols):
            ledger.same(f"{name} {order}", kernels.amax(ledger.put(view)), tensor_amax(view))
    for shape in ((1, 1), (3, 5), (7, 4099)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        ledger.same(f"shape {shape}", kernels.amax(ledger.put(x)), tensor_amax(x))


def check_nvfp4(ledger: Ledger) -> None:
    """Round to nearest: every input, dtype and block shape."""
    for name, x32 in inputs(ledger.rows, ledger.cols):
        for dtype in DTYPES if name in ("gaussian", "mixed denormal") else DTYPES[:2]:
            x = x32.to(dtype)
            amax = tensor_amax(x)
            for block_shape in ((1, 16), (16, 16)):
                for scale_rounding in ("standard", "up"):
                    ledger.output(
                        f"{name} {dtype} {block_shape} {scale_rounding}",
                        kernels.quantize_nvfp4(
                            ledger.put(x), ledger.put(amax), block_shape=block_shape,
                            scale_rounding=scale_rounding, want_packed=True,
                        ),
                        quantize(x, block_shape=block_shape, scale_rounding=scale_rounding),
                    )  # fmt: skip


def check_reduced_amax(ledger: Ledger) -> None:
    """An amax that is not the matrix's own: larger, smaller, zero, infinite, NaN, denormal."""
    x = next(inputs(ledger.rows, ledger.cols))[1]
    for value in (40.0, 0.1, 0.0, math.inf, math.nan, 1e-41, 3e38):
        amax = torch.tensor(value)
        for block_shape in ((1, 16), (16, 16)):
            ledger.output(
                f"{value} {block_shape}",
                kernels.quantize_nvfp4(
                    ledger.put(x), ledger.put(amax), block_shape=block_shape, want_packed=True
                ),
                quantize(x, block_shape=block_shape, amax=amax),
            )


def check_four_over_six(ledger: Ledger) -> None:
    """Block maxima at 4 or 6, both errors, on every input."""
    for name, x32 in inputs(ledger.rows, ledger.cols):
        for dtype, error in zip(DTYPES[:2], ("mae", "mse"), strict=True):
            x = x32.to(dtype)
            for block_shape in ((1, 16), (16, 16)):
                options = {"block_shape": block_shape, "four_over_six": error}
                ledger.output(
                    f"{name} {dtype} {block_shape} {error}",
                    kernels.quantize_nvfp4(
                        ledger.put(x), ledger.put(tensor_amax(x)), want_packed=True, **options
                    ),
                    quantize(x, **options),
                )


def check_mxfp4(ledger: Ledger) -> None:
    """Every scale rule on every input, and stochastic rounding."""
    cols = ledger.cols // 32 * 32
    words = random_words(KEY, POSITION, torch.arange(ledger.rows), torch.arange(cols), 16)
    for name, x32 in inputs(ledger.rows, cols):
        for dtype in DTYPES[:2]:
            x = x32.to(dtype)
            for rule in ("standard", "even", "up"):
                ledger.output(
                    f"{name} {dtype} {rule}",
                    kernels.quantize_mxfp4(ledger.put(x), scale_rounding=rule, want_packed=True),
                    quantize_mxfp4(x, scale_rounding=rule),
                )
        ledger.output(
            f"{name} stochastic",
            kernels.quantize_mxfp4(
                ledger.put(x), rounding="stochastic", noise=whole_noise(ledger.rows, cols), want_packed=True
            ),
            quantize_mxfp4(x, rounding="stochastic", noise_words=words),
        )


def whole_noise(tokens: int, features: int, tokens_are_cols: bool = False) -> kernels.KernelNoise:
    """Return the noise of an unsharded matrix."""
    return kernels.KernelNoise(
        key=KEY, position=POSITION, tokens=((0, tokens),), features=((0, features),),
        tokens_are_cols=tokens_are_cols,
    )  # fmt: skip


def check_stochastic(ledger: Ledger) -> None:
    """Stochastic rounding with 24, 16 and 8 bits on every input, in both block shapes."""
    indices = torch.arange(ledger.rows), torch.arange(ledger.cols)
    words = {bits: random_words(KEY, POSITION, *indices, width) for bits, width in WORD_BITS_FOR.items()}
    noise = whole_noise(ledger.rows, ledger.cols)
    for name, x32 in inputs(ledger.rows, ledger.cols):
        for dtype in DTYPES[:2]:
            x = x32.to(dtype)
            amax = ledger.put(tensor_amax(x))
            for bits, block_shape in ((24, (1, 16)), (8, (1, 16)), (16, (1, 16)), (16, (16, 16))):
                options = {"block_shape": block_shape, "rounding": "stochastic", "num_random_bits": bits}
                ledger.output(
                    f"{name} {dtype} {block_shape} {bits} bits",
                    kernels.quantize_nvfp4(ledger.put(x), amax, noise=noise, want_packed=True, **options),
                    quantize(x, noise_words=words[bits], **options),
                )


def check_memory_orders(ledger: Ledger) -> None:
    """Views, single outputs and ragged sizes give the bits of a dense copy; operands keep the order."""
    for rows, cols in ((ledger.rows, ledger.cols), (16, 16), (48, 272), (208, 32)):
        for name, x32 in list(inputs(rows, cols))[1:2]:
            for dtype in DTYPES if cols == ledger.cols else DTYPES[1:2]:
                for order, x in views(x32.to(dtype), cols):
                    for block_shape in ((1, 16), (16, 16)):
                        expected = quantize(x, block_shape=block_shape)
                        on_device, amax = ledger.put(x), ledger.put(expected.amax)
                        label = f"{name} {dtype} {order} {block_shape} {(rows, cols)}"
                        options = {"block_shape": block_shape}
                        packed = kernels.quantize_nvfp4(
                            on_device, amax, want_packed=True, want_operand=False, **options
                        )
                        decoded = kernels.quantize_nvfp4(on_device, amax, **options)
                        ledger.output(label, packed, expected)
                        ledger.output(label, decoded, expected)
                        strides = (1, rows) if order == "transposed view" else (cols, 1)
                        ledger.same(
                            f"order, {label}", torch.tensor(decoded.operand.stride()), torch.tensor(strides)
                        )


def check_tall_grid(ledger: Ledger) -> None:
    """More rows of tiles than a grid is high, which takes another numbering of the programs."""
    x, height = next(inputs(80, 48))[1], blockwise.MAX_GRID_HEIGHT
    blockwise.MAX_GRID_HEIGHT = 1
    try:
        for order, view in (("rows", x), ("columns", x.t().contiguous().t())):
            ledger.output(
                order,
                kernels.quantize_nvfp4(
                    ledger.put(view), ledger.put(tensor_amax(x)), want_packed=True, tile=Tile(16, 16, 1)
                ),
                quantize(x, block_shape=(1, 16)),
            )
    finally:
        blockwise.MAX_GRID_HEIGHT = height


def check_shards(ledger: Ledger) -> None:
    """A piece of a matrix gives the bits that the whole gives there, from its logical indices alone."""
    rows, cols = 64, 96
    whole = list(inputs(rows, cols))[1][1]
    words = random_words(KEY, POSITION, torch.arange(rows), torch.arange(cols), 16)
    expected = quantize(whole, block_shape=(1, 16), rounding="stochastic", noise_words=words)
    amax = ledger.put(expected.amax)
    pieces = {
        "context-parallel rows": (((0, 8), (40, 24)), ((0, 96),)),
        "gate and up columns": (((0, 64),), ((16, 16), (64, 32))),
        "both": (((3, 5), (60, 4)), ((80, 16), (32, 16))),
    }
    for name, (tokens, features) in pieces.items():
        row, col = (torch.cat([torch.arange(f, f + n) for f, n in runs]) for runs in (tokens, features))
        noise = kernels.KernelNoise(key=KEY, position=POSITION, tokens=tokens, features=features)
        output = kernels.quantize_nvfp4(
            ledger.put(whole[row][:, col]), amax, rounding="stochastic", noise=noise
        )
        ledger.same(name, output.operand, expected.operand(torch.bfloat16)[row][:, col])
    tall = whole.t().contiguous()[:, :64]
    for name, features in (("aligned", ((12, 8), (40, 44))), ("unaligned", ((3, 6), (41, 31)))):
        feature = torch.cat([torch.arange(f, f + n) for f, n in features])
        for tokens in (((0, 64),), ((32, 32), (0, 32))):
            token = torch.cat([torch.arange(f, f + n) for f, n in tokens])
            noise = kernels.KernelNoise(
                key=KEY, position=POSITION, tokens=tokens, features=features, tokens_are_cols=True
            )
            x = tall[feature]
            ledger.output(
                f"transposed, {name} {tokens}",
                kernels.quantize_nvfp4(
                    ledger.put(x.t().contiguous()).t(), amax, rounding="stochastic", noise=noise,
                    want_packed=True,
                ),
                quantize(
                    x, block_shape=(1, 16), rounding="stochastic", amax=expected.amax,
                    noise_words=random_words(KEY, POSITION, token, feature, 16).t(),
                ),
            )  # fmt: skip
    ledger.same(
        "unaligned columns",
        kernels.quantize_nvfp4(
            ledger.put(whole[:, :32]), amax, rounding="stochastic",
            noise=kernels.KernelNoise(
                key=KEY, position=POSITION, tokens=((5, 64),), features=((7, 20), (50, 12))
            ),
        ).operand,
        quantize(
            whole[:, :32], block_shape=(1, 16), rounding="stochastic", amax=expected.amax,
            noise_words=random_words(
                KEY, POSITION, torch.arange(5, 69), torch.cat([torch.arange(7, 27), torch.arange(50, 62)]), 16
            ),
        ).operand(torch.bfloat16),
    )  # fmt: skip


def check_positions(ledger: Ledger) -> None:
    """Step and microbatch come from memory: a launch reads what is there, whatever the ints say."""
    x = next(inputs(32, 64))[1]
    token, feature = torch.arange(32), torch.arange(64)
    amax = tensor_amax(x)
    words = ledger.put(torch.zeros(3, dtype=torch.int32))[1:]
    held = NoisePosition(step=9, microbatch=9, words=words)
    noise = kernels.KernelNoise(key=KEY, position=held, tokens=((0, 32),), features=((0, 64),))
    index = token.to(torch.int32)
    for position in (POSITION, NoisePosition(step=3, microbatch=2**31), NoisePosition(step=0, microbatch=0)):
        words.copy_(torch.tensor([position.microbatch, position.step]).to(torch.uint32).view(torch.int32))
        expected = random_words(KEY, position, token, feature, 16)
        ledger.output(
            f"quantised at {position}",
            kernels.quantize_nvfp4(
                ledger.put(x), ledger.put(amax), rounding="stochastic", noise=noise, want_packed=True
            ),
            quantize(x, block_shape=(1, 16), rounding="stochastic", noise_words=expected),
        )
        rows = ledger.put(x)
        taken = take_rows(
            rows, row_amax(rows), ledger.put(index), key=KEY, position=held, threshold=2**31,
            num_pinned_rows=0, num_places=32, num_mark_columns=16,
        )  # fmt: skip
        chosen = x[uniform_hash(KEY, position, token) < 2**31]
        ledger.same(f"rows at {position}", taken[: len(chosen), :64], chosen)
        ledger.same(f"number of rows at {position}", taken[:, 64].sum(), torch.tensor(float(len(chosen))))


def check_rotation(ledger: Ledger) -> None:
    """Rotation alone, its amax, and fused with quantising (nearest and stochastic), all sizes."""
    for size in (16, 32, 64, 128):
        signs = RHT_SIGN_VECTOR if size == 16 else seeded_sign_vector(11, size)
        cols = 2 * max(size, 48) if size != 16 else ledger.cols
        for name, x32 in list(inputs(ledger.rows, cols))[:: 1 if size == 16 else 3]:
            for dtype in DTYPES[:2] if size == 16 else DTYPES[:1]:
                x = x32.to(dtype)
                x = x.t().contiguous().t() if name in ("gaussian", "heavy tails") else x
                cols_of_blocks = x.shape[1] // size * size
                x = x[:, :cols_of_blocks]
                rotated = random_hadamard(x, size, signs)
                label = f"{size} points, {name} {dtype}"
                on_device = ledger.put(x)
                amax = kernels.amax(on_device, signs)
                ledger.same(f"rotation, {label}", kernels.rotate(on_device, signs), rotated)
                ledger.same(f"amax, {label}", amax, tensor_amax(rotated))
                ledger.output(
                    label,
                    kernels.quantize_nvfp4(on_device, amax, sign_vector=signs, want_packed=True),
                    quantize(rotated, block_shape=(1, 16)),
                )
        words = random_words(KEY, POSITION, torch.arange(x.shape[1]), torch.arange(x.shape[0]), 16).t()
        ledger.output(
            f"{label} stochastic",
            kernels.quantize_nvfp4(
                on_device, amax, sign_vector=signs, rounding="stochastic", want_packed=True,
                noise=whole_noise(x.shape[1], x.shape[0], tokens_are_cols=True),
            ),
            quantize(rotated, block_shape=(1, 16), rounding="stochastic", noise_words=words),
        )  # fmt: skip
    x = x32[:, :64].contiguous()
    ledger.output(
        "mxfp4 of the rotated matrix",
        kernels.quantize_mxfp4(ledger.put(x), sign_vector=RHT_SIGN_VECTOR, want_packed=True),
        quantize_mxfp4(random_hadamard(x)),
    )


def check_amax_both(ledger: Ledger) -> None:
    """Two amaxes from one read are the two made apart."""
    rows, cols = ledger.rows // 128 * 128 or 128, ledger.cols // 32 * 32
    for name, x32 in inputs(rows, cols):
        for dtype in DTYPES[:2]:
            x = x32.to(dtype)
            for size in (16, 128) if name == "heavy tails" else (16,):
                signs = RHT_SIGN_VECTOR if size == 16 else seeded_sign_vector(11, size)
                plain, turned = kernels.amax_both(ledger.put(x), signs)
                ledger.same(f"plain {name} {dtype} {size}", plain, tensor_amax(x))
                rotated = random_hadamard(x.t(), size, signs)
                ledger.same(f"turned {name} {dtype} {size}", turned, tensor_amax(rotated))


def check_decoding(ledger: Ledger) -> None:
    """Bytes to operands and numbers; every code under every scale byte."""
    every = torch.arange(256, dtype=torch.uint8)
    code = torch.arange(16, dtype=torch.uint8)
    packed = (code | (code.flip(0) << 4)).repeat(256, 1)
    for format, block_shape, scale_cols in (("nvfp4", (1, 16), 2), ("mxfp4", (1, 32), 1)):
        scale_bytes = every[:, None].repeat(1, scale_cols)
        if format == "nvfp4":
            scale_bytes = scale_bytes % 128  # scales are not negative
        decode_all(
            ledger, f"every byte {format}", packed, scale_bytes, torch.tensor(3.7), block_shape, format
        )
    for name, x in inputs(ledger.rows, ledger.cols):
        for block_shape in ((1, 16), (16, 16)) if name in ("heavy tails", "huge", "-nan") else ():
            q = quantize(x, block_shape=block_shape)
            decode_all(ledger, name, q.packed(), q.block_scale_bytes(), q.amax, block_shape, "nvfp4")


def decode_all(
    ledger: Ledger,
    name: str,
    packed: Tensor,
    scale_bytes: Tensor,
    amax: Tensor,
    block_shape: tuple[int, int],
    format: str,
) -> None:
    """Compare operand and decoded numbers of given bytes."""
    expected = QuantizedTensor.from_bytes(packed, scale_bytes, amax, block_shape, format=format)
    p, s = ledger.put(packed), ledger.put(scale_bytes)
    options = {"block_shape": block_shape, "format": format}
    ledger.same(
        f"operand, {name} {block_shape}", kernels.decode_operand(p, s, **options),
        expected.operand(torch.bfloat16),
    )  # fmt: skip
    for dtype in DTYPES:
        on_device = ledger.put(amax) if format == "nvfp4" else None
        ledger.same(
            f"{dtype}, {name} {block_shape}",
            kernels.dequantize(p, s, on_device, dtype=dtype, **options),
            expected.dequantize(dtype),
        )


def check_large(ledger: Ledger) -> None:
    """More than 2^31 elements, in both memory orders: the last rows and the maximum are right."""
    rows, cols = (66_000, 32_784) if ledger.device.startswith("cuda") else (64, 48)
    x = torch.zeros(rows, cols, dtype=torch.bfloat16, device=ledger.device)
    tail = list(inputs(16, cols))[1][1].to(torch.bfloat16)
    x[-16:] = ledger.put(tail)
    amax = kernels.amax(x)
    ledger.same("amax", amax, tensor_amax(tail))
    for block_shape in ((1, 16), (16, 16)):
        output = kernels.quantize_nvfp4(x, amax, block_shape=block_shape, want_packed=True)
        expected = quantize(tail, block_shape=block_shape)
        ledger.same(f"codes {block_shape}", output.packed[-16:], expected.packed())
        ledger.same(f"operand {block_shape}", output.operand[-16:], expected.operand(torch.bfloat16))
        decoded = kernels.decode_operand(output.packed, output.scale_bytes, block_shape=block_shape)
        ledger.same(f"decoded {block_shape}", decoded[-16:], expected.operand(torch.bfloat16))
        del output, decoded
    output = kernels.quantize_nvfp4(x.t(), amax, want_packed=True)
    expected = quantize(tail.t(), block_shape=(1, 16))
    ledger.same("transposed operand", output.operand[:, -16:], expected.operand(torch.bfloat16))
    ledger.same("transposed codes", output.packed[:, -8:], expected.packed())


def check_added_heads(ledger: Ledger) -> None:
    """Operands with a head added back, in every memory order, rounding and format, on every input."""
    rows, cols = ledger.rows, ledger.cols // 32 * 32
    generator = torch.Generator().manual_seed(5)
    noise, turned = whole_noise(rows, cols), whole_noise(cols, rows, tokens_are_cols=True)
    indices = torch.arange(rows), torch.arange(cols)
    words = random_words(KEY, POSITION, *indices, WORD_BITS_FOR[16])
    words_turned = random_words(KEY, POSITION, indices[1], indices[0], WORD_BITS_FOR[16]).t()
    stochastic = {"rounding": "stochastic"}
    for name, x32 in inputs(rows, cols):
        head = 20 * torch.randn(rows, 1, generator=generator) * torch.randn(1, cols, generator=generator)
        for dtype in DTYPES[:2]:
            residual = x32.to(dtype)
            whole = (x32 + head).to(dtype)
            sides = {
                "rows": (residual, whole, noise, words),
                "columns": (*(m.t().contiguous().t() for m in (residual, whole)), turned, words_turned),
            }
            for order, (r, x, stream, its_words) in sides.items():
                amax = tensor_amax(r)
                on_device, beside = ledger.put(r), ledger.put(x)
                for block_shape in ((1, 16), (16, 16)):
                    encoded = quantize(r, block_shape=block_shape)
                    ledger.same(
                        f"{name} {dtype} {order} {block_shape}",
                        kernels.quantize_nvfp4(
                            on_device, ledger.put(amax), block_shape=block_shape, whole=beside
                        ).operand,
                        merged(x, r, EncodedMatrix(terms=(encoded,)), None),
                    )
                encoded = quantize(r, block_shape=(1, 16), noise_words=its_words, **stochastic)
                ledger.same(
                    f"{name} {dtype} {order} stochastic",
                    kernels.quantize_nvfp4(
                        on_device, ledger.put(amax), noise=stream, whole=beside, **stochastic
                    ).operand,
                    merged(x, r, EncodedMatrix(terms=(encoded,)), None),
                )
                ledger.same(
                    f"{name} {dtype} {order} mxfp4",
                    kernels.quantize_mxfp4(on_device, whole=beside).operand,
                    merged(x, r, EncodedMatrix(terms=(quantize_mxfp4(r),)), None),
                )


def check_split(ledger: Ledger) -> None:
    """P, R and its amax of one launch are those of three; the sums of R F are as close as sums are."""
    on_gpu = ledger.device.startswith("cuda")
    shapes = [(128, 256, 16, 16, 8, 1), (96, 208, 48, 0, 8, 1), (64, 128, 48, 0, 4, 2),
              (72, 96, 16, 32, 2, 1), (136, 80, 48, 16, 1, 1), (128, 512, 32, 32, 8, 2)]  # fmt: skip
    if on_gpu:
        shapes += [(16384, k, r, q, 8, parts) for k, parts in ((768, 1), (2048, 1), (4096, 2), (14336, 1))
                   for r, q in ((16, 16), (32, 16), (64, 64), (48, 0))]  # fmt: skip
    for rows, cols, rank, width, num_chunks, parts in shapes:
        generator = torch.Generator().manual_seed(rows + cols)
        x32 = torch.randn(rows, cols, generator=generator) * torch.linspace(3, 0.1, cols)
        v = torch.linalg.qr(torch.randn(cols, rank, generator=generator))[0].bfloat16().contiguous()
        f = torch.randn(cols, width, generator=generator).bfloat16() if width else None
        for special in (None, math.nan, math.inf):
            if special is not None:
                if rows > 1000:
                    continue
                x32[rows // 2, cols // 3] = special
            x, v_there = ledger.put(x32.bfloat16()), ledger.put(v)
            f_there = None if f is None else ledger.put(f)
            p, amax = torch.empty_like(x[:, :rank]).contiguous(), x.new_empty((), dtype=torch.float32)
            wide, other_wide = (p.new_zeros(rows, rank + 8) for _ in range(2))
            partials = kernels.project(x, v_there, num_chunks, parts)
            kernels.fold(partials, out=p, other_out=wide[:, :rank], zeroed=amax)
            residual, sums = kernels.residual(x, p, v_there, amax, f_there)
            at_once = kernels.split(x, v_there, num_chunks, parts, other_wide[:, :rank], f_there)
            label = f"{(rows, cols)} rank {rank} F {width} {num_chunks} chunks {special}"
            for name, actual, expected in (
                ("P", at_once[0], p), ("amax", at_once[1], amax), ("R", at_once[2], residual),
                ("P beside", other_wide, wide),
            ):  # fmt: skip
                ledger.same(f"{name}, {label}", actual, expected.cpu())
            if sums is not None and special is None:
                total = sums.sum(dim=0)
                error = (at_once[3].sum(dim=0) - total).abs().amax() / total.abs().amax()
                # fp32 sums, of a row at once there and of pieces of it here
                ledger.same(f"R F, {label}", (error < 1e-8 * cols + 1e-5).cpu(), torch.tensor(True))


def check_widening(ledger: Ledger) -> None:
    """Rows of several matrices in chunks are what copies make of them, whole and in blocks of rows."""
    cases = [(1, (40,), 64, 1, 8), (3, (16, 5), 96, 1, 4), (2, (7, 0, 20), 120, 2, 4), (2, (33,), 48, 3, 1)]
    if ledger.device.startswith("cuda"):
        cases += [(1, (6144,), 4096, 1, 8), (4, (400, 368), 2048, 2, 8), (2, (1000,), 14336, 1, 8)]
    for name, matrix in (("turned", torch.zeros(16, 8).t()), ("float64", torch.zeros(8, 16).double())):
        taken = kernels.can_widen(ledger.put(matrix))
        ledger.same(f"{name} matrices", torch.tensor(taken), torch.tensor(False))
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for bases, heights, num_features, parts, chunks in cases:
            generator = torch.Generator().manual_seed(num_features)
            num_rows = sum(heights)
            x = torch.randn(bases, num_rows, num_features + 16, generator=generator).to(dtype)
            x[-1, num_rows // 2, 3] = math.nan
            x[0, 0, 0] = -math.inf
            pieces = [[ledger.put(rows) for rows in its.split(heights)] for its in x]
            for start, stop in ((0, num_rows), (num_rows // 3, num_rows - 2)):
                actual = kernels.widen(pieces, start, stop, num_features, parts, chunks)
                expected = in_chunks(x[:, start:stop, :num_features], chunks, parts)
                ledger.same(f"{dtype} {bases} x {heights} x {num_features}, {parts} parts", actual, expected)


def check_controls(ledger: Ledger) -> None:
    """The comparison sees one flipped bit of each kind; counted as a difference when it does not."""
    trial = Ledger(ledger.device, ledger.rows, ledger.cols)
    x = next(inputs(32, 32))[1]
    output = kernels.quantize_nvfp4(ledger.put(x), ledger.put(tensor_amax(x)), want_packed=True)
    output.packed[3, 3] ^= 8
    output.scale_bytes[1, 1] ^= 1
    output.operand.view(torch.int16)[2, 2] ^= -(2**15)
    trial.output("flipped", output, quantize(x, block_shape=(1, 16)))
    seen = sorted(name.split(",")[0].removeprefix(": ") for name in trial.different)
    ledger.same("seen", torch.tensor(seen == ["codes", "operand", "scales"]), torch.tensor(True))


GROUPS: dict[str, Callable[[Ledger], None]] = {
    "controls": check_controls,
    "amax": check_amax,
    "nvfp4": check_nvfp4,
    "reduced amax": check_reduced_amax,
    "four over six": check_four_over_six,
    "mxfp4": check_mxfp4,
    "stochastic": check_stochastic,
    "memory orders": check_memory_orders,
    "tall grid": check_tall_grid,
    "shards": check_shards,
    "positions": check_positions,
    "rotation": check_rotation,
    "amax both": check_amax_both,
    "decoding": check_decoding,
    "added heads": check_added_heads,
    "split": check_split,
    "widening": check_widening,
    "large": check_large,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=None, help="of the compared matrices")
    parser.add_argument("--cols", type=int, default=None)
    parser.add_argument("--groups", nargs="*", default=list(GROUPS), choices=list(GROUPS))
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, in the interpreter
    ledger = Ledger(args.device, args.rows or (512 if on_gpu else 32), args.cols or (1040 if on_gpu else 80))
    for name in args.groups:
        ledger.group, began = name, time.time()
        ledger.counts[name] = 0
        try:
            GROUPS[name](ledger)
        except Exception as error:  # one broken group must not hide the others
            ledger.different[f"{name}: raised"] = f"{type(error).__name__}: {str(error)[-300:]}"
        wrong = sum(key.startswith(f"{name}:") for key in ledger.different)
        print(f"{name}: {ledger.counts[name]} checks, {wrong} different, {time.time() - began:.1f} s")
    for name, what in list(ledger.different.items())[:40]:
        print(f"DIFFERENT {name}: {what}")
    result = {"counts": ledger.counts, "different": ledger.different}
    print(json.dumps(result))
    return 1 if ledger.different else 0


if __name__ == "__main__":
    sys.exit(main())

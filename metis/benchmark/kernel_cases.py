"""The kernels as data: what is called, what it must move, and what it is compared with.

One idea: a case is a name, a call on input number i, and the bytes that any implementation has to read and
write once. Ratios follow: to a bf16 clone of the same matrix (the floor of everything that reads and writes
it), to the copy's bandwidth, and of a variant to its plain form.

Trap: "columns" cases read a transposed view, so blocks run against the grain of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from metis import kernels
from metis.benchmark.timing import Stopwatch, num_inputs_for, time_calls
from metis.config import QuantizerConfig
from metis.decompose.projector import num_chunks_for
from metis.errors import ConfigError, MetisError
from metis.formats import RHT_SIGN_VECTOR
from metis.kernels.availability import reason_unavailable
from metis.recipes import METIS
from metis.rng import NoisePosition, stream_key

COPY = "bf16 clone"
ROWS_RNE, COLUMNS_RNE = "1x16 rne, rows", "1x16 rne, columns"
_SEED = 3
_SPLIT_SHAPES = (
    (64, 64, 4, 4, None), (64, 64, 4, 3, None), (64, 64, 4, 2, None), (64, 64, 4, 3, 128),
    (64, 64, 4, 3, 96), (64, 64, 4, 2, 128), (128, 64, 8, 3, 128), (128, 64, 8, 2, 96),
    (32, 64, 4, 3, None), (32, 128, 4, 3, None), (64, 32, 4, 3, None), (128, 32, 4, 3, 128),
)  # fmt: skip
_TILES = {
    False: (
        (16, 256, 1),
        (16, 256, 2),
        (16, 256, 4),
        (32, 256, 4),
        (16, 512, 4),
        (16, 1024, 8),
        (64, 128, 4),
    ),
    True: ((256, 16, 1), (512, 16, 2), (1024, 16, 4), (128, 16, 1), (256, 32, 2)),
}
"""(rows, columns, warps) to try for row-major and for transposed inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCase:
    """One row: `call(i)` runs the kernel on input i; None with the reason why nothing can be measured.

    num_bytes: read and written once. reference: the plain form that a variant is compared with.
    """

    name: str
    num_bytes: float
    call: Callable[[int], object] | None = None
    reference: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The matrices of one shape and what kernels take beside them."""

    xs: list[Tensor]
    amax: Tensor
    signs: tuple[int, ...]

    @property
    def n(self) -> int:
        return self.xs[0].numel()

    def noise(self, *, tokens_are_cols: bool = False) -> kernels.KernelNoise:
        tokens, features = self.xs[0].shape
        return kernels.KernelNoise(
            key=stream_key(7, "layer"), position=NoisePosition(5, 3), tokens=((0, tokens),),
            features=((0, features),), tokens_are_cols=tokens_are_cols,
        )  # fmt: skip


def recipe_quantizer() -> QuantizerConfig:
    """Return how recipe metis quantises output gradients: the stochastic rounding that is in use."""
    quantizer = METIS.dgrad_grad_output.quantizer
    assert quantizer is not None and quantizer.rounding == "stochastic"
    return quantizer


def recipe_rank(features: int) -> int:
    """Return the columns that recipe metis splits off a matrix of so many features."""
    split = METIS.fprop_input.split
    assert split is not None and split.rank is not None
    return split.rank.columns(features)


def kernel_cases(rows: int, cols: int, device: torch.device, *, tiles: bool = False) -> list[KernelCase]:
    """Return all cases for bf16 [rows, cols]; inputs are made here.

    tiles: every tile shape of the main kernels as well.
    """
    num_inputs = num_inputs_for(2 * rows * cols, device)
    generator = torch.Generator(device).manual_seed(_SEED)
    xs = [
        torch.randn(rows, cols, dtype=torch.bfloat16, device=device, generator=generator)
        for _ in range(num_inputs)
    ]
    copy = KernelCase(name=COPY, num_bytes=4 * rows * cols, call=lambda i: xs[i].clone())
    inputs = _Inputs(xs, xs[0].abs().amax().float(), RHT_SIGN_VECTOR)
    reason = reason_unavailable(device)
    if reason is not None:
        return [copy, KernelCase(name="Triton kernels", num_bytes=4 * rows * cols, reason=reason)]
    cases = [copy, *_quantizing(inputs), *_pairs(inputs), *_packing(inputs), *_splitting(inputs),
             *_splitting_at_once(inputs)]  # fmt: skip
    return [*cases, *_tiles(inputs), *_split_shapes(inputs)] if tiles else cases


def _quantizing(inputs: _Inputs) -> Iterator[KernelCase]:
    """Yield amax and the kernels that write decoded operands."""
    xs, amax, signs, n = inputs.xs, inputs.amax, inputs.signs, inputs.n
    q, bits = kernels.quantize_nvfp4, recipe_quantizer().num_random_bits
    sr: dict[str, Any] = {"rounding": "stochastic", "num_random_bits": bits}
    by_rows, by_cols = inputs.noise(), inputs.noise(tokens_are_cols=True)
    tiles = {"block_shape": (16, 16)}

    def case(
        name: str, call: Callable[[int], object], num_bytes: int = 4 * n, to: str | None = None
    ) -> KernelCase:
        return KernelCase(name=name, call=call, num_bytes=num_bytes, reference=to)

    yield case("amax", lambda i: kernels.amax(xs[i]), 2 * n)
    yield case("amax, rht, columns", lambda i: kernels.amax(xs[i].t(), signs), 2 * n, "amax")
    yield case(ROWS_RNE, lambda i: q(xs[i], amax))
    yield case(COLUMNS_RNE, lambda i: q(xs[i].t(), amax), to=ROWS_RNE)
    yield case("16x16 rne", lambda i: q(xs[i], amax, **tiles), to=ROWS_RNE)
    yield case("16x16 rne, 4-over-6", lambda i: q(xs[i], amax, four_over_six="mae", **tiles), to="16x16 rne")
    yield case(f"1x16 sr {bits} bits, rows", lambda i: q(xs[i], amax, noise=by_rows, **sr), to=ROWS_RNE)
    yield case(
        f"1x16 sr {bits} bits, columns",
        lambda i: q(xs[i].t(), amax, noise=by_cols, **sr),
        to=COLUMNS_RNE,
    )
    yield case("1x16 rne rht, columns", lambda i: q(xs[i].t(), amax, sign_vector=signs), to=COLUMNS_RNE)
    yield case(
        f"1x16 sr {bits} bits rht, columns",
        lambda i: q(xs[i].t(), amax, sign_vector=signs, noise=by_cols, **sr),
        to=COLUMNS_RNE,
    )
    # Another input stands for the matrix that this one is the residual of: as many bytes, from other places.
    others = [*xs[1:], xs[0]]
    with_head = "head added back"
    yield case(f"1x16 rne, rows, {with_head}", lambda i: q(xs[i], amax, whole=others[i]), 6 * n, ROWS_RNE)
    yield case(
        f"1x16 sr {bits} bits, columns, {with_head}",
        lambda i: q(xs[i].t(), amax, noise=by_cols, whole=others[i].t(), **sr),
        6 * n,
        COLUMNS_RNE,
    )
    yield case("mxfp4 rne, rows", lambda i: kernels.quantize_mxfp4(xs[i]), to=ROWS_RNE)
    yield case("rotation alone, columns", lambda i: kernels.rotate(xs[i].t(), signs))


def _pairs(inputs: _Inputs) -> Iterator[KernelCase]:
    """Yield both copies of a matrix, rows and columns, as backward makes them: two launches, two reads."""
    xs, n, signs, q = inputs.xs, inputs.n, inputs.signs, kernels.quantize_nvfp4
    bits = recipe_quantizer().num_random_bits
    amax, sr = inputs.amax, {"rounding": "stochastic", "num_random_bits": bits}
    rows, cols = inputs.noise(), inputs.noise(tokens_are_cols=True)
    both = "1x16 rne, rows and columns"
    yield KernelCase(
        name="amax, rows and rht columns", num_bytes=2 * n, reference="amax",
        call=lambda i: kernels.amax_both(xs[i], signs),
    )  # fmt: skip
    yield KernelCase(
        name=both, num_bytes=6 * n, reference=ROWS_RNE,
        call=lambda i: (q(xs[i], amax), q(xs[i].t(), amax)),
    )  # fmt: skip
    yield KernelCase(
        name=f"1x16 sr {bits} bits, rows and columns", num_bytes=6 * n, reference=both,
        call=lambda i: (q(xs[i], amax, noise=rows, **sr), q(xs[i].t(), amax, noise=cols, **sr)),
    )  # fmt: skip
    yield KernelCase(
        name=f"1x16 sr {bits} bits, rows and rht columns", num_bytes=6 * n, reference=both,
        call=lambda i: (
            q(xs[i], amax, noise=rows, **sr), q(xs[i].t(), amax, noise=cols, sign_vector=signs, **sr),
        ),
    )  # fmt: skip


def _packing(inputs: _Inputs) -> Iterator[KernelCase]:
    """Yield the kernels that write or read codes and scales."""
    xs, amax, n, q = inputs.xs, inputs.amax, inputs.n, kernels.quantize_nvfp4
    packed_bytes = n / 2 + n / 16
    only = {"want_packed": True, "want_operand": False}
    packs: list[kernels.KernelOutput] = []

    def decode(i: int) -> Tensor:
        # Made on first use: a machine without kernels lists the case too.
        if not packs:
            packs.extend(q(x, amax, **only) for x in xs)
        pack = packs[i]
        return kernels.decode_operand(pack.packed, pack.scale_bytes)

    yield KernelCase(
        name="1x16 rne, rows, packed", call=lambda i: q(xs[i], amax, **only),
        num_bytes=2 * n + packed_bytes, reference=ROWS_RNE,
    )  # fmt: skip
    yield KernelCase(
        name="1x16 rne rht, columns, packed",
        call=lambda i: q(xs[i].t(), amax, sign_vector=inputs.signs, **only),
        num_bytes=2 * n + packed_bytes, reference=COLUMNS_RNE,
    )  # fmt: skip
    yield KernelCase(name="decode packed", call=decode, num_bytes=2 * n + packed_bytes, reference=ROWS_RNE)


def _splitting(inputs: _Inputs) -> Iterator[KernelCase]:
    """Yield projection and residual of the spectral split, at the recipe's rank."""
    xs, n = inputs.xs, inputs.n
    rows, cols = xs[0].shape
    rank = min(recipe_rank(cols), cols)
    v = torch.linalg.qr(torch.randn(cols, rank)).Q.contiguous().to(xs[0])
    p = (xs[0].float() @ v.float()).bfloat16()
    largest = torch.zeros((), device=v.device)
    chunks = num_chunks_for(cols)
    thin_bytes = 2 * rank * (rows + cols)
    yield KernelCase(
        name=f"projection, rank {rank}", num_bytes=2 * n + thin_bytes, reference="amax",
        call=lambda i: kernels.fold(kernels.project(xs[i], v, chunks)),
    )  # fmt: skip
    yield KernelCase(
        name=f"residual and its amax, rank {rank}", num_bytes=4 * n + thin_bytes, reference=ROWS_RNE,
        call=lambda i: kernels.residual(xs[i], p, v, largest),
    )  # fmt: skip
    yield KernelCase(
        name=f"residual, amax and R V, rank {rank}", num_bytes=4 * n + 2 * thin_bytes, reference=ROWS_RNE,
        call=lambda i: kernels.fold(kernels.residual(xs[i], p, v, largest, v)[1]),
    )  # fmt: skip


def _splitting_at_once(inputs: _Inputs) -> Iterator[KernelCase]:
    """Yield the split in one launch, which the linear takes where there are enough rows."""
    xs, n = inputs.xs, inputs.n
    rows, cols = xs[0].shape
    rank = min(recipe_rank(cols), cols)
    v = torch.linalg.qr(torch.randn(cols, rank)).Q.contiguous().to(xs[0])
    chunks = num_chunks_for(cols)
    thin_bytes = 2 * rank * (rows + cols)
    yield KernelCase(
        name=f"split in one launch, rank {rank}", num_bytes=4 * n + thin_bytes, reference=ROWS_RNE,
        call=lambda i: kernels.split(xs[i], v, chunks),
    )  # fmt: skip
    yield KernelCase(
        name=f"split in one launch with R V, rank {rank}", num_bytes=4 * n + 2 * thin_bytes,
        reference=ROWS_RNE, call=lambda i: kernels.split(xs[i], v, chunks, factor=v),
    )  # fmt: skip


def _split_shapes(inputs: _Inputs) -> Iterator[KernelCase]:
    """Yield projection and residual with other tiles."""
    xs, n = inputs.xs, inputs.n
    cols = xs[0].shape[1]
    rank = min(recipe_rank(cols), cols)
    v = torch.linalg.qr(torch.randn(cols, rank)).Q.contiguous().to(xs[0])
    p = (xs[0].float() @ v.float()).bfloat16()
    largest = torch.zeros((), device=v.device)
    for shape in _SPLIT_SHAPES:
        label = f"tile {shape[0]}x{shape[1]}, {shape[2]} warps, {shape[3]} stages, {shape[4]} registers"
        yield KernelCase(
            name=f"projection alone, {label}", num_bytes=2 * n, reference="amax",
            call=lambda i, s=shape: kernels.project(xs[i], v, num_chunks_for(cols), shape=s),
        )  # fmt: skip
        yield KernelCase(
            name=f"residual alone, {label}", num_bytes=4 * n, reference=ROWS_RNE,
            call=lambda i, s=shape: kernels.residual(xs[i], p, v, largest, shape=s),
        )  # fmt: skip
        yield KernelCase(
            name=f"residual and R V alone, {label}", num_bytes=4 * n, reference=ROWS_RNE,
            call=lambda i, s=shape: kernels.residual(xs[i], p, v, largest, v, shape=s),
        )  # fmt: skip


def _tiles(inputs: _Inputs) -> Iterator[KernelCase]:
    """Yield the main kernels with every tile shape, to see whether the chosen one is the best."""
    xs, amax, q = inputs.xs, inputs.amax, kernels.quantize_nvfp4
    # Loaded here: Triton must not be asked for on a machine without it.
    from metis.kernels.blockwise import Tile

    sr = {"rounding": "stochastic", "num_random_bits": recipe_quantizer().num_random_bits}
    by_rows, by_cols = inputs.noise(), inputs.noise(tokens_are_cols=True)
    signs = {"sign_vector": inputs.signs}
    variants: dict[str, tuple[bool, dict[str, Any]]] = {
        ROWS_RNE: (False, {}),
        f"1x16 sr {sr['num_random_bits']} bits, rows": (False, {"noise": by_rows, **sr}),
        COLUMNS_RNE: (True, {}),
        "1x16 rne rht, columns": (True, signs),
        f"1x16 sr {sr['num_random_bits']} bits rht, columns": (True, {"noise": by_cols, **sr, **signs}),
    }
    for name, (transposed, options) in variants.items():
        for shape in _TILES[transposed]:

            def call(
                i: int, options: Any = options, shape: Any = shape, transposed: bool = transposed
            ) -> object:
                return q(xs[i].t() if transposed else xs[i], amax, tile=Tile(*shape), **options)

            label = f"{name}, tile {shape[0]}x{shape[1]}, {shape[2]} warps"
            yield KernelCase(name=label, call=call, num_bytes=4 * inputs.n, reference=name)


def select(cases: list[KernelCase], pattern: str | None) -> list[KernelCase]:
    """Return the copy, what matches a glob, and what that is compared with.

    Raises ConfigError when nothing matches.
    """
    if pattern is None:
        return cases
    matching = [case for case in cases if fnmatchcase(case.name, pattern)]
    if not matching:
        names = ", ".join(repr(case.name) for case in cases)
        raise ConfigError("--only", f"must match a row, received {pattern!r}; there are {names}")
    wanted = {COPY} | {case.name for case in matching} | {case.reference for case in matching}
    return [case for case in cases if case.name in wanted]


def measure(
    cases: list[KernelCase], shape: tuple[int, int], stopwatch: Stopwatch, num_calls: int
) -> list[dict[str, Any]]:
    """Return one row per case: microseconds, bandwidth, and ratios to the copy and to the plain form.

    A case that raises gets a row with the reason and `failed`; the others go on.
    """
    num_inputs = num_inputs_for(2 * shape[0] * shape[1], stopwatch.device)
    rows = []
    for case in cases:
        row: dict[str, Any] = {
            "shape": f"{shape[0]}x{shape[1]}", "name": case.name, "megabytes": case.num_bytes / 1e6,
            "reason": case.reason, "failed": False,
        }  # fmt: skip
        rows.append(row)
        if case.call is None:
            continue
        try:
            timing = time_calls([case.call], stopwatch=stopwatch, num_calls=num_calls, num_inputs=num_inputs)[
                0
            ]
        except MetisError as error:  # a shape that this kernel does not take
            row["reason"] = str(error)
            continue
        except Exception as error:  # one broken kernel must not hide the others
            row |= {"reason": f"{type(error).__name__}: {str(error)[-200:]}", "failed": True}
            continue
        row |= {
            "us": 1e6 * timing.samples.median,
            "spread_us": 1e6 * timing.samples.spread,
            "host_us": None if timing.host_seconds is None else 1e6 * timing.host_seconds,
            "gigabytes_per_second": 1e-9 * case.num_bytes / timing.samples.median,
            "reference": case.reference,
            "samples_us": [1e6 * seconds for seconds in timing.samples.seconds],
        }
    _add_ratios(rows)
    return rows


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    measured = {row["name"]: row for row in rows if "us" in row}
    for row in measured.values():
        copy, plain = measured[COPY], measured.get(row["reference"] or "")
        row["of_copy_bandwidth"] = row["gigabytes_per_second"] / copy["gigabytes_per_second"]
        row["to_copy"] = row["us"] / copy["us"]
        row["to_reference"] = None if plain is None else row["us"] / plain["us"]

"""What kernels take and give, and the checks in front of every launch.

One idea: a launch receives tensors and plain 32-bit numbers only. Anything that changes from step to step
(keys, step, microbatch, row indices) is excluded from specialisation or sits in memory, so that no training
step compiles anything. Step and microbatch sit in memory, so that a captured launch can be replayed at
others.

Shape letters: R rows, C columns of the piece held here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from metis.errors import ConfigError, ShapeError
from metis.formats import RHT_SCALES_F32
from metis.kernels.availability import reason_unavailable
from metis.rng import WORD_BITS_FOR, NoisePosition

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANDOM_BIT_WIDTHS = (8, 16, 24)

Runs = tuple[tuple[int, int], ...]

_BITS_PER_CALL = 128
_MAX_INDEX = 2**31
_HOPPER = (9, 0)


@lru_cache(maxsize=512)
def _are_aligned(runs: Runs, length: int) -> bool:
    """Whether runs are made of whole groups nj, nj + 1, ..., nj + n - 1 of `length` n."""
    return all(first % length == 0 and size % length == 0 for first, size in runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelNoise:
    """Which random words stochastic rounding uses: those of `metis.rng.random_words`, bit for bit.

    key: two ints in [0, 2^32), `metis.rng.stream_key`. position: step and microbatch.
    tokens, features: (first logical index, length) of each contiguous piece that the matrix holds of either
    axis, in local order, as `Axis.runs`.
    tokens_are_cols: the matrix is [features, tokens] instead of [tokens, features].
    """

    key: tuple[int, int]
    position: NoisePosition
    tokens: Runs
    features: Runs
    tokens_are_cols: bool = False

    def __post_init__(self) -> None:
        for axis, runs in (("tokens", self.tokens), ("features", self.features)):
            if any(first < 0 or length < 1 or first + length > _MAX_INDEX for first, length in runs):
                raise ShapeError(
                    f"noise {axis}",
                    f"runs need a first index of at least 0, a length of at least 1 and indices below "
                    f"2^31, received {runs}",
                )

    def features_are_aligned(self, num_random_bits: int) -> bool:
        """Whether the features that share a Philox call always lie side by side, which is much cheaper."""
        return _are_aligned(self.features, _BITS_PER_CALL // WORD_BITS_FOR[num_random_bits])

    def counter_words(self, device: torch.device) -> tuple[tuple[int, int], Tensor]:
        """Return the key words as the signed 32-bit ints that a launch passes, and the position's tensor."""
        key_0, key_1 = self.key
        return (as_signed(key_0), as_signed(key_1)), position_words(self.position, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOutput:
    """What a quantising kernel wrote; None for what was not asked for.

    packed: uint8 [R, C / 2], the even column in the low nibble.
    scale_bytes: uint8 [R / block_rows, C / block_cols], E4M3 or E8M0.
    operand: bf16 [R, C], `e2m1 * block_scale` without tensor scale, exact; in the memory order of the input,
    so that a transposed view is neither read nor written against the grain.
    """

    packed: Tensor | None = None
    scale_bytes: Tensor | None = None
    operand: Tensor | None = None

    def pointers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three tensors as kernels write them: bf16 as its 16-bit integers."""
        operand = None if self.operand is None else self.operand.view(torch.int16)
        return self.packed, self.scale_bytes, operand

    def operand_strides(self) -> tuple[int, int]:
        """Return the operand's strides, (0, 0) without one."""
        return (0, 0) if self.operand is None else self.operand.stride()


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmScales:
    """What a quantising kernel writes beside its operand: `metis.kernels.gemm_scales` with `other_amax`.

    out: fp32 [2].
    """

    other_amax: Tensor
    out: Tensor
    reciprocal_target: float
    invertible: bool


@dataclass(frozen=True, slots=True)
class Thin:
    """One factor and its place.

    source: [C, rows, cols] or [rows, cols], fp32 or bf16, any strides; C partial sums, a power of two up to
    32. out: bf16 [rows, cols], any strides. is_scaled: times the factor of `place`.
    """

    source: Tensor
    out: Tensor
    is_scaled: bool


@lru_cache(maxsize=512)
def indices_of(runs: Runs, device: torch.device) -> Tensor:
    """Return the logical index of every local position: int32 [sum of lengths]."""
    pieces = [torch.arange(first, first + length, dtype=torch.int32, device=device) for first, length in runs]
    return torch.cat(pieces)


def as_signed(word: int) -> int:
    """Return a number in [0, 2^32) as the signed int of the same 32 bits."""
    return word - 2**32 if word >= 2**31 else word


def position_words(position: NoisePosition, device: torch.device) -> Tensor:
    """Return the words of a position where kernels on `device` read them: int32 [2] = (microbatch, step).

    A position without words of its own gets a copy that stays what it is. Raises ConfigError when it has
    words on another device.
    """
    words = position.words
    if words is None:
        # Of each stream by itself: launches of another one need not have written them yet.
        stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
        return _fixed_position_words(position.microbatch, position.step, device, stream)
    if words.device != device:
        raise ConfigError(
            "NoisePosition words", f"must lie where the kernel runs, on {device}, received {words.device}"
        )
    return words


@lru_cache(maxsize=256)
def _fixed_position_words(microbatch: int, step: int, device: torch.device, stream: int) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "NoisePosition words", "must be given inside a CUDA graph: every replay would draw the same bits"
        )
    # Written by launches: a copy from the host would wait for everything launched before it.
    words = torch.empty(2, dtype=torch.int32, device=device)
    words[0].fill_(as_signed(microbatch))
    words[1].fill_(as_signed(step))
    return words


@lru_cache(maxsize=64)
def signs_of(sign_vector: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a rotation's signs as fp32 on a device."""
    return torch.tensor(sign_vector, dtype=torch.float32, device=device)


def rotation_of(sign_vector: Sequence[int] | None, device: torch.device) -> tuple[Tensor | None, int, float]:
    """Return (signs, size, `fp32(1 / sqrt(size))`) of a rotation; (None, 0, 1.0) for none.

    Raises ConfigError when the size is no `metis.formats.RHT_SIZES` or an entry is not +-1.
    """
    if sign_vector is None:
        return None, 0, 1.0
    signs = tuple(sign_vector)
    if len(signs) not in RHT_SCALES_F32 or any(sign not in (-1, 1) for sign in signs):
        raise ConfigError(
            "sign_vector",
            f"needs +1 or -1 in each of {tuple(RHT_SCALES_F32)} places, received {len(signs)} places",
        )
    return signs_of(signs, device), len(signs), RHT_SCALES_F32[len(signs)]


def require_matrix(
    where: str, x: Tensor, block_shape: tuple[int, int], sign_vector: Sequence[int] | None
) -> None:
    """Refuse what is not a non-empty fp32, bf16 or fp16 matrix of whole blocks and rotations, or has no
    device.

    A device has none where kernels cannot run.
    """
    if x.dtype not in INPUT_DTYPES:
        raise ShapeError(where, f"the input must be float32, bfloat16 or float16, received {x.dtype}")
    if x.dim() != 2 or x.numel() == 0:
        raise ShapeError(where, f"the input must be a non-empty matrix [R, C], received {tuple(x.shape)}")
    block = (block_shape[0], max(block_shape[1], len(sign_vector or ())))
    for axis, multiple in enumerate(block):
        if x.shape[axis] % multiple:
            raise ShapeError(
                where,
                f"axis {axis} must be a multiple of {multiple} (blocks {block_shape}"
                f"{f', rotation of {len(sign_vector)}' if sign_vector else ''}), received shape "
                f"{tuple(x.shape)}; pad it or keep this layer in BF16",
            )
    require_device(where, x.device)


def require_outputs(where: str, want_packed: bool, want_operand: bool) -> None:
    """Refuse a launch that would write nothing."""
    if not (want_packed or want_operand):
        raise ConfigError(where, "must write something: want_packed, want_operand or both, received neither")


def require_whole(where: str, x: Tensor, whole: Tensor | None, want_operand: bool) -> None:
    """Refuse what cannot be the matrix that x is the residual of, or would have no effect."""
    if whole is None:
        return
    if whole.shape != x.shape or whole.dtype != x.dtype or whole.device != x.device:
        raise ShapeError(
            f"{where} whole",
            f"must be {tuple(x.shape)} {x.dtype} on {x.device} as its residual, received "
            f"{tuple(whole.shape)} {whole.dtype} on {whole.device}",
        )
    if not want_operand:
        raise ConfigError(f"{where} whole", "has no effect on codes; set want_operand or remove it")


def require_device(where: str, device: torch.device) -> None:
    """Refuse a device without kernels, saying why."""
    reason = reason_unavailable(device)
    if reason is not None:
        raise ConfigError(where, f"Triton kernels cannot run on {device}: {reason}; use metis.quantize")
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ConfigError(
            where,
            f"the tensors must be on the current device cuda:{torch.cuda.current_device()}, received "
            f"{device}; "
            "call torch.cuda.set_device first",
        )


def require_amax(where: str, amax: Tensor, device: torch.device) -> None:
    """Refuse an amax that is not an fp32 scalar beside the input (a host number would stall the GPU)."""
    if amax.dim() != 0 or amax.dtype != torch.float32 or amax.device != device:
        raise ShapeError(
            where,
            f"amax must be a 0-dim float32 tensor on {device}, received shape {tuple(amax.shape)}, "
            f"{amax.dtype} on {amax.device}",
        )


def require_rounding(
    where: str, x: Tensor, rounding: str, noise: KernelNoise | None, num_random_bits: int
) -> None:
    """Refuse a rounding, a noise and a number of bits that do not go together or do not fit the matrix."""
    if rounding not in ("rne", "stochastic"):
        raise ConfigError(f"{where} rounding", f"must be 'rne' or 'stochastic', received {rounding!r}")
    if (rounding == "stochastic") != (noise is not None):
        raise ConfigError(
            f"{where} noise",
            f"must be given with rounding 'stochastic' and with no other, received {rounding!r} and "
            f"{'no noise' if noise is None else 'noise'}",
        )
    if noise is None:
        return
    if num_random_bits not in RANDOM_BIT_WIDTHS:
        raise ConfigError(
            f"{where} num_random_bits", f"must be one of {RANDOM_BIT_WIDTHS}, received {num_random_bits}"
        )
    tokens, features = (sum(length for _, length in runs) for runs in (noise.tokens, noise.features))
    expected = (features, tokens) if noise.tokens_are_cols else (tokens, features)
    if expected != tuple(x.shape):
        raise ShapeError(
            f"{where} noise",
            f"its runs describe a matrix of shape {expected}, received the matrix {tuple(x.shape)}",
        )


def ceil_div(a: int, b: int) -> int:
    """Return ceil(a / b); Triton's own takes ten times as long on the host."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def is_native(x: Tensor) -> bool:
    """Whether kernels on x run on hardware, with its own conversions and roundings (of the same bits)."""
    return x.is_cuda


def is_hopper(x: Tensor) -> bool:
    """Whether kernels on x run on hardware that has what compute capability 9.0 added: bf16 pairs multiplied,
    minima that keep a sign (8.6).
    """
    return x.is_cuda and _capability(x.device) >= _HOPPER


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def as_loadable(x: Tensor) -> Tensor:
    """Return bf16 as its 16-bit integers, which kernels widen themselves; other dtypes as they are."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def empty_operand(x: Tensor) -> Tensor:
    """Return an uninitialised bf16 [R, C] in the memory order of `x`."""
    num_rows, num_cols = x.shape
    if is_column_major(x):
        return torch.empty(num_cols, num_rows, dtype=torch.bfloat16, device=x.device).t()
    return torch.empty(num_rows, num_cols, dtype=torch.bfloat16, device=x.device)


def empty_output(
    x: Tensor,
    block_shape: tuple[int, int],
    want_packed: bool,
    want_operand: bool,
    operand_out: Tensor | None = None,
) -> KernelOutput:
    """Return uninitialised outputs for a matrix; the operand goes to `operand_out` where that is given."""
    if operand_out is not None and (operand_out.shape != x.shape or operand_out.dtype != torch.bfloat16):
        raise ShapeError(
            "operand_out",
            f"must be bf16 {tuple(x.shape)}, received {operand_out.dtype} {tuple(operand_out.shape)}",
        )
    num_rows, num_cols = x.shape
    packed = scale_bytes = None
    if want_packed:
        blocks = (num_rows // block_shape[0], num_cols // block_shape[1])
        packed = torch.empty(num_rows, num_cols // 2, dtype=torch.uint8, device=x.device)
        scale_bytes = torch.empty(blocks, dtype=torch.uint8, device=x.device)
    operand = operand_out
    if want_operand and operand is None:
        operand = empty_operand(x)
    return KernelOutput(packed=packed, scale_bytes=scale_bytes, operand=operand)


def is_column_major(x: Tensor) -> bool:
    """Whether neighbouring rows of the matrix lie closer in memory than neighbouring columns."""
    return x.stride(0) < x.stride(1)

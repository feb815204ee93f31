"""Random numbers addressed by logical coordinates, so that a parallel layout cannot change them.

Every random decision in the numerics (stochastic rounding, token sampling, random directions) is a pure
function of a key and of coordinates that mean the same on every layout: step, microbatch, row and column of
the *unsharded* matrix. A rank that holds a slice asks for the words of its slice and receives exactly those
that a single rank would have used. Nothing here has state, so recompute and resume need no bookkeeping.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
computed in int64 because torch has no full set of unsigned operations.

Traps:
* One stream (`stream_key`) per purpose. Two purposes that share a key and coordinates share their bits.
* An int64 product of two 32-bit numbers wraps, which is harmless: its bits are those of the unsigned
  product. Its upper half must be masked after the arithmetic shift.
* Coordinates must lie in [0, 2^32). Tensors are not checked (that would stall a GPU); positions are.

Shape letters: R rows, C columns of the piece that is asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from metis.errors import ConfigError, ShapeError

_MASK_32 = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_KEY_INCREMENT_0 = 0x9E3779B9
_KEY_INCREMENT_1 = 0xBB67AE85

_WORDS_PER_CALL = 4
_WORD_BITS = 32
_BITS_PER_CALL = _WORDS_PER_CALL * _WORD_BITS
_WORD_WIDTHS = (8, 16, 32)
WORD_BITS_FOR = {8: 8, 16: 16, 24: 32}
"""Width of the word that stochastic rounding with so many random bits takes; 24 are the top of 32."""

_ROW_HASH_COLUMN_BLOCK = _MASK_32
"""First counter word of `uniform_hash`: no column block reaches it, since a column is below 2^32."""

_CHUNK_COUNTERS_CPU = 1 << 15
_CHUNK_COUNTERS_GPU = 1 << 22
"""Counters advanced together: on a CPU what stays in cache (70 against 40 million words a second on one
core), on a GPU what bounds the temporaries."""

_GAUSSIAN_GRID = 2.0**20


@dataclass(frozen=True, slots=True)
class NoisePosition:
    """Where in training a random number is drawn.

    step: optimizer step, from 0.
    microbatch: first consumed sample // micro_batch_size, the same on every data-parallel layout.
    words: the same two for kernels, which read them from memory, so that a captured CUDA graph can be
    replayed at another position: int32 [2] = (microbatch, step) as 32-bit patterns, on the device where they
    run. Who gives them keeps them current. None: kernels are given numbers of their own, made from the ints.

    Positions are equal when step and microbatch are. A pickled or copied one has no words: they belong to one
    process and to whoever writes them.
    """

    step: int
    microbatch: int
    words: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("step", self.step), ("microbatch", self.microbatch)):
            if not 0 <= value <= _MASK_32:
                raise ConfigError("NoisePosition", f"{name} must lie in [0, 2^32), received {value}")
        words = self.words
        if words is not None and (
            words.dtype != torch.int32 or words.shape != (2,) or words.stride() != (1,)
        ):
            raise ShapeError(
                "NoisePosition words",
                f"must be int32 [2], contiguous, received {words.dtype} {tuple(words.shape)}",
            )

    def at_first_microbatch(self) -> NoisePosition:
        """Return the position of microbatch 0 of this step; its words follow this one's at every replay."""
        words = self.words
        if words is not None:
            words = words.clone()
            words[:1].zero_()
        return NoisePosition(step=self.step, microbatch=0, words=words)

    def __reduce__(self) -> tuple[type[NoisePosition], tuple[int, int]]:
        return type(self), (self.step, self.microbatch)


@lru_cache(maxsize=65536)
def stream_key(seed: int, *names: str) -> tuple[int, int]:
    """Return the Philox key of a named stream: two 32-bit words of blake2b(seed, names).

    Stable across processes, machines and versions of Python; `("ab", "c")` and `("a", "bc")` differ.
    """
    text = json.dumps([int(seed), *names])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox4x32(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int],
    key: tuple[int, int],
    rounds: int = 10,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit output words of Philox4x32 for every counter.

    counter: four int64 tensors or ints with values in [0, 2^32), broadcast against each other.
    key: two ints in [0, 2^32).
    Returns four int64 tensors of the broadcast shape, values in [0, 2^32).

    Per round, with hi and lo the halves of a 64-bit product: `c0, c1, c2, c3 = hi(M1 c2) ^ c1 ^ k0, lo(M1
    c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)`; then the key advances by the Weyl constants. Source: Random123
    `philox.h`; checked against its known answers.
    """
    device = next((c.device for c in counter if isinstance(c, Tensor)), None)
    c0, c1, c2, c3 = (
        c if isinstance(c, Tensor) else torch.full((), c, dtype=torch.int64, device=device) for c in counter
    )
    shape = torch.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    k0, k1 = key
    for _ in range(rounds):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        # While the counters still broadcast, a round costs a row or a column only; no need to expand earlier.
        c0 = ((product_1 >> 32) ^ (c1 ^ k0)).bitwise_and_(_MASK_32)
        c2 = ((product_0 >> 32) ^ (c3 ^ k1)).bitwise_and_(_MASK_32)
        c1 = product_1.bitwise_and_(_MASK_32)
        c3 = product_0.bitwise_and_(_MASK_32)
        k0 = (k0 + _KEY_INCREMENT_0) & _MASK_32
        k1 = (k1 + _KEY_INCREMENT_1) & _MASK_32
    return c0.expand(shape), c1.expand(shape), c2.expand(shape), c3.expand(shape)


def random_words(
    key: tuple[int, int], position: NoisePosition, rows: Tensor, cols: Tensor, num_bits: int = 32
) -> Tensor:
    """Return one random word per (row, col) of a piece of a matrix.

    rows: [R] int64 global row indices; cols: [C] int64 global column indices; any order, repeats allowed.
    num_bits: 32, 16 or 8. Returns [R, C] int64, values in [0, 2^num_bits), on the device of `rows`.

    One Philox call serves n = 128 / num_bits neighbouring columns: the word of (row, col) is piece `col % n`,
    lowest bits first, of the output with counter `(col // n, row, microbatch, step)`. Columns that come as
    aligned runs of n use every piece; others are gathered from the calls they need.
    """
    _require_index_vector("rows", rows)
    _require_index_vector("cols", cols)
    if num_bits not in _WORD_WIDTHS:
        raise ConfigError("num_bits", f"must be one of {_WORD_WIDTHS}, received {num_bits}")
    per_call = _BITS_PER_CALL // num_bits
    if _is_aligned_runs(cols, per_call):
        return _pieces(_words_of_blocks(key, position, rows, cols[::per_call] // per_call), num_bits)
    blocks, block_of_col = torch.unique(cols // per_call, return_inverse=True)
    words = _pieces(_words_of_blocks(key, position, rows, blocks), num_bits)
    return words.index_select(1, block_of_col * per_call + cols % per_call)


def _pieces(words: Tensor, num_bits: int) -> Tensor:
    """Cut 32-bit words [R, n] into words of num_bits, lowest bits first: [R, n * 32 / num_bits]."""
    if num_bits == _WORD_BITS:
        return words
    shifts = torch.arange(0, _WORD_BITS, num_bits, device=words.device)
    return ((words[:, :, None] >> shifts) & (2**num_bits - 1)).flatten(1)


def uniform_hash(key: tuple[int, int], position: NoisePosition, rows: Tensor) -> Tensor:
    """Return one 32-bit word per row: a layout-free hash for choosing rows (token sampling).

    rows: [R] int64 global row indices. Returns [R] int64, values in [0, 2^32).
    Counter `(2^32 - 1, row, microbatch, step)`, which no element of `random_words` uses.
    """
    _require_index_vector("rows", rows)
    return philox4x32((_ROW_HASH_COLUMN_BLOCK, rows, position.microbatch, position.step), key)[0].contiguous()


def gaussian(
    key: tuple[int, int], rows: Tensor, cols: Tensor, position: NoisePosition | None = None
) -> Tensor:
    """Return a standard normal number per (row, col): layout-free random directions.

    rows: [R] int64, cols: [C] int64, global indices. `position` defaults to step 0, microbatch 0.
    Returns [R, C] float64, rounded to multiples of 2^-20 (so exact in fp32 too), |z| < 6.8.

    Box-Muller on the words of `random_words`: columns 2j and 2j + 1 share the words u of column 2j and v of
    2j + 1, `z = sqrt(-2 ln((u + 1/2) / 2^32)) * (cos | sin)(2 pi (v + 1/2) / 2^32)`. The rounding hides
    last-bit differences between the logarithms and cosines of different devices or vector widths.
    """
    _require_index_vector("cols", cols)
    position = position or NoisePosition(0, 0)
    even_cols = cols - cols % 2
    pair_cols = torch.stack((even_cols, even_cols + 1), dim=1).flatten()
    words = random_words(key, position, rows, pair_cols).unflatten(1, (-1, 2)).to(torch.float64)
    unit = (words + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(unit[:, :, 0]))
    angle = (2.0 * math.pi) * unit[:, :, 1]
    z = radius * torch.where(cols % 2 == 0, torch.cos(angle), torch.sin(angle))
    return torch.round(z * _GAUSSIAN_GRID) / _GAUSSIAN_GRID


def _words_of_blocks(key: tuple[int, int], position: NoisePosition, rows: Tensor, blocks: Tensor) -> Tensor:
    """Return the words of whole column blocks (four columns each): [R, 4 * len(blocks)] int64."""
    num_rows, num_blocks = rows.numel(), blocks.numel()
    words = torch.empty(num_rows, num_blocks, _WORDS_PER_CALL, dtype=torch.int64, device=rows.device)
    limit = _CHUNK_COUNTERS_CPU if rows.device.type == "cpu" else _CHUNK_COUNTERS_GPU
    rows_per_chunk = max(1, limit // max(1, num_blocks))
    for start in range(0, num_rows, rows_per_chunk):
        chunk = slice(start, start + rows_per_chunk)
        counter = (blocks[None, :], rows[chunk, None], position.microbatch, position.step)
        for index, output in enumerate(philox4x32(counter, key)):
            words[chunk, :, index] = output
    return words.flatten(1)


def _is_aligned_runs(cols: Tensor, length: int) -> bool:
    """Tell whether `cols` is a sequence of runs nj, nj + 1, ..., nj + n - 1 of `length` n."""
    if cols.numel() % length:
        return False
    runs = cols.view(-1, length)
    first = runs[:, :1]
    expected = first + torch.arange(length, device=cols.device)
    return bool(((runs == expected) & (first % length == 0)).all())


def _require_index_vector(name: str, index: Tensor) -> None:
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ShapeError(
            "metis.rng",
            f"{name} must be a 1-D int64 tensor of global indices, "
            f"received shape {tuple(index.shape)}, {index.dtype}",
        )

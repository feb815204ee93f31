"""Device functions that every kernel is made of: loading, rounding, scales, random words, rotation.

One idea: nearest rounding onto a grid with spacing d is `(m + M) - M` with `M = 1.5 * 2^23 * d`: the sum's
last place is d, and fp32 addition rounds to nearest even. d is half (E2M1) or an eighth (E4M3) of the power
of two below m, held at the smallest normal number. The low bits of the sum count multiples of d, which is the
code.

Traps:
* Launch with `enable_fp_fusion=False`: an FMA would skip the rounding between product and sum.
* `/` is approximate on a GPU, `div_rn` is not. Plain minimum and maximum drop NaN; where it must survive,
  `propagate_nan` says so. Magnitudes are compared as integers, where NaN is the largest.
* Bf16 is loaded, rounded and stored as integers: the interpreter truncates when casting (and rounds to E4M3
  wrongly where a carry reaches the exponent), and a GPU does the same work either way.
* Signs are set as bits: some versions of Triton compute `-x` as `0 - x`, which is +0 for +0.
* Integers that may wrap are added with `sanitize_overflow=False`, or the interpreter stops.

Shape letters: R rows, C columns of a tile; B block size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metis import formats

E2M1_MAX = tl.constexpr(formats.E2M1_MAX)
E2M1_SIGN_BIT = tl.constexpr(formats.E2M1_SIGN_BIT)
E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
E4M3_MIN_NORMAL = tl.constexpr(formats.E4M3_MIN_NORMAL)
E4M3_MIN_SUBNORMAL = tl.constexpr(formats.E4M3_MIN_SUBNORMAL)
E4M3_NAN_BYTE = tl.constexpr(formats.E4M3_NAN_BYTE)
E8M0_NAN_BYTE = tl.constexpr(formats.E8M0_NAN_BYTE)
FLOAT32_MAX = tl.constexpr(formats.FLOAT32_MAX)
RECIPROCAL_6 = tl.constexpr(formats.RECIPROCAL_6_F32)

MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
SIGN_BITS = tl.constexpr(-0x80000000)
EXPONENT_BITS = tl.constexpr(0x7F800000)
QUIET_NAN_BITS = tl.constexpr(0x7FC00000)
E2M1_MAGIC = tl.constexpr(1.5 * 2.0**22)
"""Times the power of two below m: 1.5 * 2^23 steps of half of it."""
E4M3_MAGIC = tl.constexpr(1.5 * 2.0**20)
"""Times the power of two below m: 1.5 * 2^23 steps of an eighth of it."""


@triton.jit
def load_float32(pointer, offsets, mask, IS_BF16: tl.constexpr):
    """Load fp32, fp16 or (as int16) bf16 numbers as fp32; zero outside the mask."""
    raw = tl.load(pointer + offsets, mask=mask, other=0)
    if IS_BF16:
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return raw.to(tl.float32)


@triton.jit
def as_int_pointer(pointer):
    """Return a pointer to fp32 as one to int32: magnitudes are compared as integers."""
    return pointer.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def magnitude_bits(x):
    """Return the fp32 bits of |x| as int32: ordered as the magnitudes are, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & MAGNITUDE_BITS


@triton.jit
def round_to_bf16(x, NATIVE: tl.constexpr):
    """Round fp32 to bf16, nearest even; returns the bf16 number as fp32. NATIVE: on a GPU."""
    if NATIVE:
        # Two at a time: converting one takes a slow instruction.
        halves = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.int16,
                                           is_pure=True, pack=2)  # fmt: skip
        number = (halves.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        odd = (bits >> 16) & 1
        rounded = tl.add(bits, odd + 0x7FFF, sanitize_overflow=False)
        number = (tl.where(x == x, rounded, QUIET_NAN_BITS) & -65536).to(tl.float32, bitcast=True)
    return number


@triton.jit
def exact_bf16_bits(x):
    """Return the bits, int16, of fp32 numbers that bf16 holds exactly."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def power_of_two_bits(x):
    """Return the fp32 bits, int32, of the power of two at or below a positive normal x."""
    return x.to(tl.int32, bitcast=True) & EXPONENT_BITS


@triton.jit
def add_toward_zero(a, b, NATIVE: tl.constexpr):
    """Return fp32 a + b >= 0 cut off instead of rounded; b is 0 or above a. NATIVE: on a GPU."""
    if NATIVE:
        total = tl.inline_asm_elementwise("add.rz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32,
                                          is_pure=True, pack=1)  # fmt: skip
    else:
        total = a + b
        too_far = (total - b > a).to(tl.int32)  # exact: b is the larger one, or nothing was rounded
        total = (total.to(tl.int32, bitcast=True) - too_far).to(tl.float32, bitcast=True)
    return total


@triton.jit
def round_to_e2m1(y, random_integer, NUM_RANDOM_BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Round fp32 onto E2M1: nearest even for NUM_RANDOM_BITS = 0, else stochastically.

    Returns (magnitude fp32, its code 0..7 int32). Twin of `metis.rounding.round_to_e2m1_rne` and
    `_stochastic` but for NaN, which gives 6: what comes of it is decided per block.

    Stochastic: the random integer is added below the last bit that the grid keeps and carries into it with
    probability `floor(2^b f) / 2^b`. With up to 16 bits that is done on the bits of an fp32 number in [1, 8):
    the magnitude itself, or 1 more than it where it is below 1, cut off at 2^-23 (the grid step is 2^-1, so
    no bit of `floor(2^16 f)` is lost). With 24 bits it takes fixed point.
    """
    magnitude = tl.minimum(tl.abs(y), E2M1_MAX)
    if NUM_RANDOM_BITS == 0:
        power = power_of_two_bits(tl.maximum(magnitude, 1.0))
        magic = power.to(tl.float32, bitcast=True) * E2M1_MAGIC
        shifted = magnitude + magic
        value = shifted - magic
        # Two codes further for each doubling of the step.
        code = (shifted.to(tl.int32, bitcast=True) & 0xF) + ((power >> 22) - 254)
    elif NUM_RANDOM_BITS <= 16:
        offset = tl.where(magnitude < 1.0, 1.0, 0.0)
        bits = add_toward_zero(magnitude, offset, NATIVE).to(tl.int32, bitcast=True)
        bits = (bits + (random_integer << (22 - NUM_RANDOM_BITS))) & -0x400000
        value = bits.to(tl.float32, bitcast=True) - offset
        code = (bits >> 22) - tl.where(magnitude < 1.0, 254, 252)
    else:
        power = power_of_two_bits(tl.maximum(magnitude, 1.0))
        # The exponent field 255 - e of 2 / power: exponents of power and of its inverse add up to 254.
        inverse_step = (power ^ EXPONENT_BITS).to(tl.float32, bitcast=True)
        fixed = (magnitude * inverse_step * (2.0**NUM_RANDOM_BITS)).to(tl.int32)
        multiple = (fixed + random_integer) >> NUM_RANDOM_BITS
        value = multiple.to(tl.float32) * (power.to(tl.float32, bitcast=True) * 0.5)
        code = multiple + ((power >> 22) - 254)
    return value, code


@triton.jit
def sign_bits(y):
    """Return the sign bit of a strictly negative fp32 number, int32; 0 for -0.0."""
    return (y + 0.0).to(tl.int32, bitcast=True) & SIGN_BITS


@triton.jit
def e2m1_value(code):
    """Return the fp32 value of a code 0..15 (int32)."""
    low = code & 7
    value = tl.where(low < 2, low.to(tl.float32) * 0.5, ((low + 252) << 22).to(tl.float32, bitcast=True))
    return (value.to(tl.int32, bitcast=True) | ((code & E2M1_SIGN_BIT) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def round_to_e4m3(raw):
    """Round fp32 in [0, 448] to the nearest E4M3 value, ties to even, subnormals kept; NaN stays."""
    power = power_of_two_bits(tl.maximum(raw, E4M3_MIN_NORMAL))
    magic = power.to(tl.float32, bitcast=True) * E4M3_MAGIC
    return (raw + magic) - magic


@triton.jit
def e4m3_byte(scale):
    """Return the byte (int32) of a non-negative E4M3 value; NaN gives 0x7F."""
    normal = (scale.to(tl.int32, bitcast=True) >> 20) - 960  # bias 7 instead of 127, three mantissa bits
    is_number = scale == scale
    subnormal = (tl.where(is_number, scale, 0.0) * (1.0 / E4M3_MIN_SUBNORMAL)).to(tl.int32)
    byte = tl.where(scale < E4M3_MIN_NORMAL, subnormal, normal)
    return tl.where(is_number, byte, E4M3_NAN_BYTE)


@triton.jit
def e8m0_value(byte):
    """Return the fp32 value 2^(byte - 127) of an E8M0 byte (int32); 0xFF gives NaN."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)  # 2^-127 is subnormal in fp32
    return tl.where(byte == E8M0_NAN_BYTE, QUIET_NAN_BITS, bits).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_value(byte):
    """Return the fp32 value of a non-negative E4M3 byte (int32)."""
    normal = ((byte + 960) << 20).to(tl.float32, bitcast=True)
    value = tl.where(byte < 8, byte.to(tl.float32) * E4M3_MIN_SUBNORMAL, normal)
    return tl.where(byte == E4M3_NAN_BYTE, float("nan"), value)


@triton.jit
def tensor_scales(amax, TARGET: tl.constexpr):
    """Return (S_enc, S_dec) of an fp32 scalar: `min(TARGET / amax, FLT_MAX)`, 1 for zero; its reciprocal."""
    encode = tl.div_rn(TARGET, amax)
    encode = tl.minimum(encode, FLOAT32_MAX, propagate_nan=tl.PropagateNan.ALL)
    encode = tl.where(encode == 0.0, 1.0, encode)
    return encode, tl.div_rn(1.0, encode)


@triton.jit
def block_encode_scale(scale, tensor_decode):
    """Return what a block's elements are multiplied by: `min(1 / (scale * S_dec), FLT_MAX)`."""
    encode = tl.div_rn(1.0, scale * tensor_decode)
    return tl.minimum(encode, FLOAT32_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Return the four uint32 words of Philox4x32-10; counters and key uint32, shapes broadcast.

    Counters that vary along one axis only stay rows and columns for the first rounds.
    """
    for _ in tl.static_range(10):
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product_1.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def load_position(position):
    """Return the words (microbatch, step) of a position, uint32."""
    microbatch, step = tl.load(position), tl.load(position + 1)
    return microbatch.to(tl.uint32, bitcast=True), step.to(tl.uint32, bitcast=True)


@triton.jit
def random_integers(
    tokens,
    features,
    row_start,
    col_start,
    num_rows,
    num_cols,
    key_0,
    key_1,
    position,
    NUM_RANDOM_BITS: tl.constexpr,
    TOKENS_ARE_COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Return random integers of a tile, int32 [TILE_R, TILE_C] in [0, 2^b), of `metis.rng.random_words`.

    tokens, features: int32 logical index of every local row and column (columns and rows when
    TOKENS_ARE_COLS). position: int32 [2], see `load_position`. ALIGNED: features that share a call lie side
    by side, and it gives all of them. b = 24: the top bits of a 32-bit word, four to a call; b = 16: eight to
    a call, b = 8: sixteen.
    """
    k0 = key_0.to(tl.uint32, bitcast=True)
    k1 = key_1.to(tl.uint32, bitcast=True)
    c2, c3 = load_position(position)
    WIDTH: tl.constexpr = 32 if NUM_RANDOM_BITS == 24 else NUM_RANDOM_BITS
    PER_CALL: tl.constexpr = 128 // WIDTH
    # Tokens run down the tile whatever its orientation, so that a thread draws the words of its own elements.
    if TOKENS_ARE_COLS:
        TOKENS: tl.constexpr = TILE_C
        FEATURES: tl.constexpr = TILE_R
        token_start, feature_start, num_tokens, num_features = col_start, row_start, num_cols, num_rows
    else:
        TOKENS: tl.constexpr = TILE_R
        FEATURES: tl.constexpr = TILE_C
        token_start, feature_start, num_tokens, num_features = row_start, col_start, num_rows, num_cols
    token_at = token_start + tl.arange(0, TOKENS)
    token = tl.load(tokens + token_at, mask=token_at < num_tokens, other=0).to(tl.uint32)[:, None]
    if ALIGNED:
        feature_at = feature_start + tl.arange(0, FEATURES // PER_CALL) * PER_CALL
        feature = tl.load(features + feature_at, mask=feature_at < num_features, other=0)
        w0, w1, w2, w3 = philox4x32((feature.to(tl.uint32) // PER_CALL)[None, :], token, c2, c3, k0, k1)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        if WIDTH == 16:
            words = tl.join(words & 0xFFFF, words >> 16)
        if WIDTH == 8:
            words = tl.join(tl.join(words & 0xFF, (words >> 16) & 0xFF),
                            tl.join((words >> 8) & 0xFF, words >> 24))  # fmt: skip
        word = tl.reshape(words, [TOKENS, FEATURES])
    else:
        feature_at = feature_start + tl.arange(0, FEATURES)
        feature = tl.load(features + feature_at, mask=feature_at < num_features, other=0).to(tl.uint32)
        feature = feature[None, :]
        w0, w1, w2, w3 = philox4x32(feature // PER_CALL, token, c2, c3, k0, k1)
        piece = feature % PER_CALL
        PER_WORD: tl.constexpr = 32 // WIDTH
        place = piece // PER_WORD
        word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
        if WIDTH < 32:
            word = (word >> ((piece % PER_WORD) * WIDTH)) & ((1 << WIDTH) - 1)
    if NUM_RANDOM_BITS == 24:
        word = word >> 8
    if TOKENS_ARE_COLS:
        word = tl.trans(word)
    return word.to(tl.int32)


@triton.jit
def rotate_tile(
    x, signs, scale, SIZE: tl.constexpr, NATIVE: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr
):
    """Rotate every SIZE columns of an fp32 tile: signs, butterflies of stride 1, 2, 4 ..., scale, to bf16.

    Returns the bf16 numbers as fp32 [TILE_R, TILE_C]. Twin of `metis.quantize.random_hadamard`.
    """
    x = x * tl.load(signs + tl.arange(0, TILE_C) % SIZE)[None, :]
    for stage in tl.static_range(7):
        if (1 << stage) < SIZE:
            pairs = tl.reshape(x, [TILE_R, TILE_C // (2 << stage), 2, 1 << stage])
            first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            pairs = tl.join(first + second, first - second)
            x = tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), [TILE_R, TILE_C])
    return round_to_bf16(x * scale, NATIVE)

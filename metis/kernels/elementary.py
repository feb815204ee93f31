"""Device functions that every kernel is made of: loading, rounding, scales, random words, rotation.

One idea: nearest rounding onto a grid with spacing d is `(m + M) - M`, where the last place of M and of the
sum is d and M is an even multiple of it: fp32 addition rounds to nearest even. d is half (E2M1) or an eighth
(E4M3) of the power of two below m, held at the smallest normal number. E2M1 is fp32 with fewer bits: an
E2M1 number times 2^-126 has its code in the upper bits, subnormal where E2M1 is.

Traps:
* Launch with `enable_fp_fusion=False`: an FMA would skip the rounding between product and sum. Those written
  here are exact in the product, so that they give the bits of the two operations apart.
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
E2M1_MAGIC = tl.constexpr(2.0**22)
"""Times m: what has half of the power of two below m in its last place."""
E2M1_TO_CODE = tl.constexpr(2.0**-126)
"""Takes E2M1's smallest normal number, 1, to that of fp32."""
CODE_TO_E2M1 = tl.constexpr(2.0**126)
CODE_SHIFT = tl.constexpr(22)
CODE_BITS = tl.constexpr(-1 << 22)
"""Sign and code in the bits of 2^-126 v."""
E4M3_MAGIC = tl.constexpr(1.5 * 2.0**20)
"""Times the power of two below m: 1.5 * 2^23 steps of an eighth of it."""


@triton.jit
def load_float32(pointer, offsets, mask, IS_BF16: tl.constexpr, NATIVE: tl.constexpr = False):
    """Load fp32, fp16 or (as int16) bf16 numbers as fp32; zero outside the mask. NATIVE: on a GPU."""
    raw = tl.load(pointer + offsets, mask=mask, other=0)
    if IS_BF16 and NATIVE:
        # Two at a time: the upper one is there already.
        return tl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=&r,=r,r", [raw],
                                         dtype=tl.float32, is_pure=True, pack=2)  # fmt: skip
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
def larger_magnitude(a, b):
    """Return `max(|a|, |b|)`, fp32; NaN when either is."""
    return tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)


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
def round_to_e2m1(y):
    """Round fp32 to the nearest E2M1 number, ties to even; returns the magnitude, fp32.

    Twin of `metis.rounding.round_to_e2m1_rne` but for the sign, and for NaN, which gives 6: what comes of it
    is decided per block.

    Of m in [1.5, 6], the product `M = 2^22 m` has the grid's step in its last place, as has `M - m` (where
    that falls below a power of two, it is finer, and the grid's number is the power of two itself). M is an
    even multiple where m lies between two numbers of the grid. Below 1.5 the step is that at 1.5.
    """
    magnitude = tl.minimum(tl.abs(y), E2M1_MAX)
    wide = tl.maximum(magnitude, 1.5)
    return tl.fma(wide, E2M1_MAGIC, tl.fma(wide, -E2M1_MAGIC, magnitude))


@triton.jit
def code_bits(value):
    """Return the bits of 2^-126 v, int32, of an E2M1 number v (fp32): `code << 22`, and v's sign."""
    return (value * E2M1_TO_CODE).to(tl.int32, bitcast=True)


@triton.jit
def code_of(bits):
    """Return the code 0..15, int32, of `code_bits`."""
    return ((bits >> CODE_SHIFT) & 7) | ((bits >> 28) & E2M1_SIGN_BIT)


@triton.jit
def round_to_e2m1_stochastic(y, random_integer, NUM_RANDOM_BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Round fp32 to one of the E2M1 numbers beside it; returns `code_bits`, int32, bits below it undefined.

    Twin of `metis.rounding.round_to_e2m1_stochastic` but for NaN, which gives 6 of either sign. The sign is
    that of y: give it a zero that is positive. NATIVE: on a GPU.

    The random integer is added below the last bit that the grid keeps and carries into it with probability
    `floor(2^b f) / 2^b`. With up to 16 bits that is done on the bits of `2^-126 m`, cut off: by 2^-22 grid
    steps or less, so no bit of `floor(2^16 f)` is lost. With 24 bits it takes fixed point.
    """
    if NUM_RANDOM_BITS <= 16 and NATIVE:
        bits = tl.inline_asm_elementwise(
            "{.reg .f32 m; min.xorsign.abs.f32 m, $1, 0f40C00000; mul.rz.f32 $0, m, 0f00800000;}", "=r,f",
            [y], dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip
        bits = bits + (random_integer << (CODE_SHIFT - NUM_RANDOM_BITS))
    else:
        magnitude = tl.minimum(tl.abs(y), E2M1_MAX)
        if NUM_RANDOM_BITS <= 16:
            scaled = magnitude * E2M1_TO_CODE
            too_far = (scaled * CODE_TO_E2M1 > magnitude).to(tl.int32)
            bits = scaled.to(tl.int32, bitcast=True) - too_far
            bits = bits + (random_integer << (CODE_SHIFT - NUM_RANDOM_BITS))
        else:
            power = power_of_two_bits(tl.maximum(magnitude, 1.0))
            # The exponent field 255 - e of 2 / power: exponents of power and of its inverse add up to 254.
            inverse_step = (power ^ EXPONENT_BITS).to(tl.float32, bitcast=True)
            fixed = (magnitude * inverse_step * (2.0**NUM_RANDOM_BITS)).to(tl.int32)
            multiple = (fixed + random_integer) >> NUM_RANDOM_BITS
            bits = (multiple + ((power >> CODE_SHIFT) - 254)) << CODE_SHIFT
        bits = bits | (y.to(tl.int32, bitcast=True) & SIGN_BITS)
    return bits


@triton.jit
def operand_of_codes(bits, scale, NATIVE: tl.constexpr):
    """Return the bf16 bits, int16, of v times an E4M3 scale, for what `round_to_e2m1_stochastic` gives.

    scale: fp32, one for each number. NATIVE: on a GPU, two at a time; the upper half of `code_bits` is the
    bf16 number 2^-126 v, and the scale is multiplied to it in two steps because 2^126 scale is too large.
    """
    if NATIVE:
        stretched = exact_bf16_bits(scale * (2.0**117))
        return tl.inline_asm_elementwise(
            "{.reg .b32 both, rest; mov.b32 rest, 0x44004400; prmt.b32 both, $1, $2, 0x7632;"
            " and.b32 both, both, 0xFFC0FFC0; mul.rn.bf16x2 both, both, $3; mul.rn.bf16x2 $0, both, rest;}",
            "=r,r,r,r", [bits, stretched], dtype=tl.int16, is_pure=True, pack=2)  # fmt: skip
    return exact_bf16_bits(value_of_codes(bits) * scale)


@triton.jit
def value_of_codes(bits):
    """Return v, fp32, for what `round_to_e2m1_stochastic` gives."""
    return (bits & CODE_BITS).to(tl.float32, bitcast=True) * CODE_TO_E2M1


@triton.jit
def with_sign(magnitude, y):
    """Return fp32 numbers that are not negative with the signs of y."""
    sign = y.to(tl.int32, bitcast=True) & SIGN_BITS
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


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
def reciprocal(x, NATIVE: tl.constexpr):
    """Return fp32 1 / x, rounded to nearest even. NATIVE: on a GPU."""
    if NATIVE:
        return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True,
                                         pack=1)  # fmt: skip
    return tl.div_rn(1.0, x)


@triton.jit
def tensor_scales(amax, TARGET: tl.constexpr, NATIVE: tl.constexpr = False):
    """Return (S_enc, S_dec) of an fp32 scalar: `min(TARGET / amax, FLT_MAX)`, 1 for zero; its reciprocal."""
    encode = tl.div_rn(TARGET, amax)
    encode = tl.minimum(encode, FLOAT32_MAX, propagate_nan=tl.PropagateNan.ALL)
    encode = tl.where(encode == 0.0, 1.0, encode)
    return encode, reciprocal(encode, NATIVE)


@triton.jit
def block_encode_scale(scale, tensor_decode, NATIVE: tl.constexpr = False):
    """Return what a block's elements are multiplied by: `min(1 / (scale * S_dec), FLT_MAX)`."""
    encode = reciprocal(scale * tensor_decode, NATIVE)
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
    NATIVE: tl.constexpr,
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
            if NATIVE:
                # What a compiler sees through it would shift and mask: one instruction more for each.
                low, high = tl.inline_asm_elementwise(
                    "prmt.b32 $0, $2, 0, 0x4410; prmt.b32 $1, $2, 0, 0x4432;", "=&r,=r,r", [words],
                    dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1)  # fmt: skip
            else:
                low, high = words & 0xFFFF, words >> 16
            words = tl.join(low, high)
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
    x = x * scale
    if NATIVE:
        # As `round_to_bf16`, for who computes with the number: both are taken apart where they lie.
        return tl.inline_asm_elementwise(
            "{.reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16;"
            " and.b32 $1, both, 0xFFFF0000;}", "=r,=r,f,f", [x], dtype=tl.float32, is_pure=True,
            pack=2)  # fmt: skip
    return round_to_bf16(x, NATIVE)

"""Stochastic rounding to E2M1: probabilities, neighbours, saturation, independence of layout."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import pytest
import torch
from _assertions import assert_bitwise_equal, assert_sqnr_near, assert_within_sigma

from metis.errors import ConfigError, ShapeError
from metis.formats import E2M1_MAGNITUDES
from metis.quantize import quantize, tensor_amax
from metis.quantize.reference import reference_e2m1_stochastic, reference_quantize
from metis.rng import NoisePosition, random_words, stream_key
from metis.rounding import codes_to_values, round_to_e2m1_rne, round_to_e2m1_stochastic, values_to_codes

KEY = stream_key(5, "layer", "dgrad_grad_output")
POSITION = NoisePosition(0, 0)
MAX_SIGMA = 5.0
# Relative rms of 1x16 stochastic rounding on Gaussian data is 0.1373; measured here 17.23 dB.
STOCHASTIC_SQNR_DB = 17.24
SQNR_TOLERANCE_DB = 0.2

GRID = torch.tensor(E2M1_MAGNITUDES)
SIGNED_GRID = torch.cat((-GRID.flip(0)[:-1], GRID))
OFF_GRID = [
    1e-9,
    0.01,
    0.124,
    0.25,
    0.4999,
    0.6,
    0.75,
    1.1,
    1.3333333,
    1.7,
    2.2,
    2.5,
    2.999,
    3.3,
    4.1,
    5.0,
    5.9,
]


def words_for(num_rows: int, num_cols: int, key: tuple[int, int] = KEY) -> torch.Tensor:
    return random_words(key, POSITION, torch.arange(num_rows), torch.arange(num_cols))


def check_frequencies(num_random_bits: int, num_draws: int) -> None:
    """Frequency of rounding up equals floor(2^b f) / 2^b, for both signs, within five sigma."""
    magnitudes = torch.tensor(OFF_GRID)
    y = torch.cat((magnitudes, -magnitudes))
    lower_code = (torch.searchsorted(GRID, magnitudes, right=True) - 1).repeat(2)
    lower, upper = GRID[lower_code], GRID[lower_code + 1]
    probability = torch.tensor(
        [
            float((Fraction(m) - Fraction(lo)) / (Fraction(up) - Fraction(lo)) * 2**num_random_bits // 1)
            / 2**num_random_bits
            for m, lo, up in zip(y.abs().tolist(), lower.tolist(), upper.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    rounded = round_to_e2m1_stochastic(
        y.expand(num_draws, -1).contiguous(), words_for(num_draws, y.numel()), num_random_bits
    )
    assert bool(((rounded.abs() == lower) | (rounded.abs() == upper)).all())
    assert bool((rounded.signbit() == y.signbit()).all())
    frequency = (rounded.abs() == upper).double().mean(0)
    sigma = (probability * (1 - probability) / num_draws).sqrt()
    assert_within_sigma(frequency, probability, sigma, MAX_SIGMA, f"P(up) with {num_random_bits} bits")


@pytest.mark.parametrize("num_random_bits", [8, 16, 24])
def test_frequency_of_rounding_up_is_the_rest_of_the_value(num_random_bits):
    check_frequencies(num_random_bits, num_draws=20_000)


@pytest.mark.long
@pytest.mark.parametrize("num_random_bits", [8, 16, 24])
def test_frequency_of_rounding_up_is_the_rest_of_the_value_long(num_random_bits):
    check_frequencies(num_random_bits, num_draws=400_000)


def test_eight_bits_enumerated_give_exactly_floor_256_f_over_256():
    words = torch.arange(256) | (0xABCDEF << 8)
    for magnitude in OFF_GRID:
        y = torch.full((256,), magnitude)
        up = int((round_to_e2m1_stochastic(y, words, 8) > y).sum())
        lower = max(grid for grid in E2M1_MAGNITUDES if grid <= float(y[0]))
        upper = min(grid for grid in E2M1_MAGNITUDES if grid > float(y[0]))
        rest = (Fraction(float(y[0])) - Fraction(lower)) / (Fraction(upper) - Fraction(lower))
        assert up == rest * 256 // 1, magnitude


@pytest.mark.parametrize("num_random_bits", [8, 16, 24])
def test_rounding_equals_exact_fractions_bitwise(num_random_bits):
    generator = torch.Generator().manual_seed(6)
    y = torch.cat(
        (torch.randn(1500, generator=generator) * 3, torch.tensor([0.0, -0.0, 7.0, -1e9, 1e-42, -1e-42]))
    )
    # Words beside the decision: k = 2^b - floor(2^b f) goes up, one less stays.
    y = torch.cat((y, torch.full((2,), 0.1), torch.full((2,), -5.3)))
    words = words_for(1, y.numel() - 4)[0]
    edges = []
    for magnitude, lower, step in ((float(y[-4]), 0.0, 0.5), (-float(y[-1]), 4.0, 2.0)):
        rest = (Fraction(magnitude) - Fraction(lower)) / Fraction(step)
        edge = 2**num_random_bits - int(rest * 2**num_random_bits // 1)
        edges += [edge, edge - 1]
    words = torch.cat((words, torch.tensor(edges) << (32 - num_random_bits if num_random_bits == 24 else 0)))
    expected = [
        reference_e2m1_stochastic(value, word, num_random_bits)
        for value, word in zip(y.tolist(), words.tolist(), strict=True)
    ]
    codes = values_to_codes(round_to_e2m1_stochastic(y, words, num_random_bits))
    assert_bitwise_equal(codes, torch.tensor(expected, dtype=torch.uint8), "stochastic codes")
    assert codes[-4:].tolist() == [1, 0, 15, 14]


@pytest.mark.parametrize("num_random_bits", [8, 16, 24])
def test_values_on_the_grid_never_move(num_random_bits):
    worst_words = torch.tensor([0, 0xFFFFFFFF, 0xFF, 0xFFFFFF00])
    for word in worst_words:
        words = word.expand(SIGNED_GRID.shape).contiguous()
        rounded = round_to_e2m1_stochastic(SIGNED_GRID, words, num_random_bits)
        assert_bitwise_equal(rounded, SIGNED_GRID, f"grid values with word {int(word):#x}")


def test_smallest_and_largest_words_bracket_the_value():
    y = torch.tensor(OFF_GRID)
    lowest = round_to_e2m1_stochastic(y, torch.zeros(y.shape, dtype=torch.int64))
    highest = round_to_e2m1_stochastic(y, torch.full(y.shape, 0xFFFFFFFF))
    code = torch.searchsorted(GRID, y, right=True) - 1
    assert_bitwise_equal(lowest, GRID[code], "lower neighbours")
    # 1e-9 is below 2^-24 of its step: P(up) = 0 and the largest word leaves it.
    assert float(highest[0]) == 0.0
    assert_bitwise_equal(highest[1:], GRID[code + 1][1:], "upper neighbours")


def test_above_six_is_six_and_nan_is_plus_six():
    y = torch.tensor([6.0001, 7.0, 1e30, float("inf"), -6.2, float("-inf"), float("nan"), -float("nan")])
    for words in (torch.zeros(8, dtype=torch.int64), torch.full((8,), 0xFFFFFFFF)):
        rounded = round_to_e2m1_stochastic(y, words)
        assert rounded.tolist() == [6, 6, 6, 6, -6, -6, 6, 6]


def test_mean_over_draws_is_unbiased_where_nearest_rounding_is_not():
    x = torch.full((4096, 16), 0.3)
    x[:, 0] = 6.0  # the block maximum fixes the scale: 0.3 is itself on the E2M1 scale
    words = words_for(4096, 16)
    stochastic = quantize(x, block_shape=(1, 16), rounding="stochastic", noise_words=words).dequantize()[
        :, 1:
    ]
    nearest = quantize(x, block_shape=(1, 16)).dequantize()[:, 1:]
    probability = torch.tensor(0.6, dtype=torch.float64)
    sigma = 0.5 * (probability * (1 - probability) / stochastic.numel()).sqrt()
    assert_within_sigma(stochastic.double().mean(), torch.tensor(0.3).double(), sigma, MAX_SIGMA, "mean")
    assert float(nearest.mean()) == 0.5


@pytest.mark.parametrize("block_shape", [(1, 16), (16, 16)])
@pytest.mark.parametrize("num_random_bits", [8, 16, 24])
def test_stochastic_quantisation_equals_the_slow_reference(block_shape, num_random_bits):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(32, 64, generator=generator) * torch.exp(2 * torch.randn(32, 64, generator=generator))
    words = words_for(32, 64)
    fast = quantize(
        x, block_shape=block_shape, rounding="stochastic", noise_words=words, num_random_bits=num_random_bits
    )
    slow = reference_quantize(x.numpy(), block_shape, None, words.numpy(), num_random_bits)
    assert_bitwise_equal(fast.codes(), torch.from_numpy(slow.codes), "codes")
    assert_bitwise_equal(fast.block_scale_bytes(), torch.from_numpy(slow.block_scale_bytes), "block scales")


def test_scales_and_neighbourhood_are_those_of_nearest_rounding():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(8))
    nearest = quantize(x, block_shape=(1, 16))
    stochastic = quantize(x, block_shape=(1, 16), rounding="stochastic", noise_words=words_for(64, 128))
    assert_bitwise_equal(stochastic.block_scale, nearest.block_scale, "scales stay nearest")
    ordinal = torch.searchsorted(SIGNED_GRID, stochastic.values) - torch.searchsorted(
        SIGNED_GRID, nearest.values
    )
    assert int(ordinal.abs().max()) == 1


def test_same_coordinates_give_the_same_bits_and_another_step_does_not():
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(9))
    rows, cols = torch.arange(32), torch.arange(64)

    def codes(position: NoisePosition) -> torch.Tensor:
        words = random_words(KEY, position, rows, cols)
        return quantize(x, block_shape=(1, 16), rounding="stochastic", noise_words=words).codes()

    assert_bitwise_equal(codes(NoisePosition(3, 1)), codes(NoisePosition(3, 1)), "repeated draw")
    assert not torch.equal(codes(NoisePosition(3, 1)), codes(NoisePosition(4, 1)))
    assert not torch.equal(codes(NoisePosition(3, 1)), codes(NoisePosition(3, 2)))


@pytest.mark.parametrize(("block_shape", "axis"), [((1, 16), 0), ((1, 16), 1), ((16, 16), 0), ((16, 16), 1)])
def test_shards_with_their_own_coordinates_equal_slices_of_the_whole(block_shape, axis):
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(10))
    index = [torch.arange(64), torch.arange(96)]

    def quantized(shard: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor):
        return quantize(
            shard,
            block_shape=block_shape,
            rounding="stochastic",
            amax=tensor_amax(x),
            noise_words=random_words(KEY, POSITION, rows, cols),
        )

    whole = quantized(x, *index)
    for part in index[axis].split(16 if axis == 0 else 48):
        rows, cols = (part, index[1]) if axis == 0 else (index[0], part)
        shard = quantized(x[rows][:, cols], rows, cols)
        assert_bitwise_equal(shard.codes(), whole.codes()[rows][:, cols], "codes of a shard")
        blocks = whole.block_scale[rows[:: block_shape[0]] // block_shape[0]][:, cols[::16] // 16]
        assert_bitwise_equal(shard.block_scale, blocks, "scales of a shard")


def test_noise_level_on_gaussian_data_is_the_known_one():
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(11))
    decoded = quantize(
        x, block_shape=(1, 16), rounding="stochastic", noise_words=words_for(512, 512)
    ).dequantize()
    assert_sqnr_near(decoded, x, STOCHASTIC_SQNR_DB, SQNR_TOLERANCE_DB, "1x16 stochastic")


def test_codes_and_values_are_inverse_and_the_sign_is_strictly_negative():
    codes = torch.arange(16, dtype=torch.uint8)
    assert_bitwise_equal(values_to_codes(codes_to_values(codes)), codes, "codes")
    for rounded in (
        round_to_e2m1_rne(torch.tensor([-0.0, -1e-45, -0.2, 0.2])),
        round_to_e2m1_stochastic(torch.tensor([-0.0, -1e-45, -0.2, 0.2]), torch.zeros(4, dtype=torch.int64)),
    ):
        assert values_to_codes(rounded).tolist() == [0, 8, 8, 0]


def test_words_of_a_position_are_no_part_of_what_it_is():
    plain = NoisePosition(step=3, microbatch=2**32 - 1)
    held = NoisePosition(step=3, microbatch=2**32 - 1, words=torch.tensor([-1, 3], dtype=torch.int32))
    assert held == plain and hash(held) == hash(plain) and repr(held) == repr(plain)
    for copied in (pickle.loads(pickle.dumps(held)), copy.deepcopy(held), copy.copy(held)):
        assert copied == held and copied.words is None
    for wrong in (torch.zeros(2), torch.zeros(3, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)[::2]):
        with pytest.raises(ShapeError, match=r"must be int32 \[2\]"):
            NoisePosition(0, 0, wrong)


def test_words_of_a_wrong_kind_are_refused():
    y = torch.zeros(4)
    with pytest.raises(ShapeError, match="words must be int64 of shape"):
        round_to_e2m1_stochastic(y, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"one of \(8, 16, 24\), received 12"):
        round_to_e2m1_stochastic(y, torch.zeros(4, dtype=torch.int64), 12)
    x = torch.zeros(1, 16)
    with pytest.raises(ShapeError, match="noise_words"):
        quantize(x, block_shape=(1, 16), rounding="stochastic")
    with pytest.raises(ConfigError, match="noise_words"):
        quantize(x, block_shape=(1, 16), noise_words=torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(ConfigError, match="rounding"):
        quantize(x, block_shape=(1, 16), rounding="nearest")

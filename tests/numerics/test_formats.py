"""MXFP4, FP8 and the formats together: bitwise against the slow twins; bytes; products of any two formats."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from _adversarial import adversarial_rows
from _assertions import assert_bitwise_equal, assert_sqnr_near, sqnr_db
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from metis.errors import ConfigError, ShapeError
from metis.formats import E2M1_MAX, FLOAT32_MAX, FORMAT_BLOCK_SHAPES, NVFP4_BITS_PER_ELEMENT
from metis.gemm import EmulatedGemm
from metis.quantize import QuantizedTensor, gemm_alpha, quantize, quantize_fp8, quantize_mxfp4, tensor_amax
from metis.quantize.reference import reference_quantize
from metis.quantize.reference_formats import (
    ReferenceBlocks,
    reference_decode,
    reference_e8m0_byte,
    reference_element_values,
    reference_nearest_code,
    reference_quantize_fp8,
    reference_quantize_mxfp4,
)
from metis.quantize.scales import e8m0_bytes_from_amax, e8m0_bytes_of_values, e8m0_values
from metis.rounding import fp8_bytes_to_values, round_to_fp8, values_to_fp8_bytes

SCALE_ROUNDINGS = ["standard", "even", "up"]
ELEMENTS = ["e4m3", "e5m2"]
FP8_BLOCKS = [None, (1, 128), (128, 128)]
DTYPES = [torch.float32, torch.bfloat16]

# Rows compared with the slow twins by the property tests: at least 192 * 25 + 200 * 25 + 128 * 40 = 14,920
# by default and 1,040,000 in the long run.
ROWS_PER_CASE = 200
NVFP4_CASES, MXFP4_CASES, FP8_CASES = 25, 25, 40
LONG_CASES = 2000  # of each of the three

# Noise on Gaussian data, measured on 512 x 512: MXFP4 18.80, 19.03, 18.75 dB by scale rule; FP8 per tensor,
# 1x128 and 128x128: E4M3 31.56, 31.83, 31.53 dB, E5M2 25.59, 25.78, 25.58 dB.
MXFP4_SQNR_DB = {"standard": 18.8, "even": 19.0, "up": 18.75}
FP8_SQNR_DB = {"e4m3": 31.7, "e5m2": 25.7}
SQNR_TOLERANCE_DB = 0.2

FP32_SUM = 1e-6  # relative to the largest entry, K = 256 terms in fp32; measured 1.3e-7
FP64_SUM = 1e-14  # the same in float64; measured 1.3e-15


def random_noise(x: Tensor, seed: int) -> Tensor:
    return torch.randint(2**32, x.shape, generator=torch.Generator().manual_seed(seed))


def assert_equals_twin(fast: QuantizedTensor, slow: ReferenceBlocks, element: str) -> None:
    """Codes, scale bytes and decoded numbers are those of the twin, to the bit; NaN where it has NaN."""
    assert_bitwise_equal(fast.codes(), torch.from_numpy(slow.codes), "codes")
    if slow.scale_bytes is not None:
        assert_bitwise_equal(fast.block_scale_bytes(), torch.from_numpy(slow.scale_bytes), "scale bytes")
    scale = fast.tensor_scale() if fast.block_scale is None else fast.block_scale
    same_numbers(scale, torch.from_numpy(np.asarray(slow.scale)), "scales")
    decoded = torch.from_numpy(reference_decode(slow, element, fast.block_shape))
    same_numbers(fast.dequantize(), decoded, "decoded numbers")


def same_numbers(actual: Tensor, expected: Tensor, what: str) -> None:
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN elsewhere"
    assert_bitwise_equal(actual.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0), what)


def check_mxfp4(x: Tensor, scale_rounding: str, words: Tensor | None, num_random_bits: int) -> None:
    fast = quantize_mxfp4(
        x,
        rounding="rne" if words is None else "stochastic",
        noise_words=words,
        num_random_bits=num_random_bits,
        scale_rounding=scale_rounding,
    )
    noise = None if words is None else words.numpy()
    slow = reference_quantize_mxfp4(x.float().numpy(), scale_rounding, noise, num_random_bits)
    assert_equals_twin(fast, slow, "e2m1")


def check_fp8(x: Tensor, element: str, block_shape: tuple[int, int] | None, power_of_two: bool) -> None:
    fast = quantize_fp8(x, element=element, block_shape=block_shape, power_of_two_scales=power_of_two)
    slow = reference_quantize_fp8(x.float().numpy(), element, block_shape, power_of_two)
    assert_equals_twin(fast, slow, element)


def check_nvfp4(
    x: Tensor,
    block_shape: tuple[int, int],
    amax: Tensor | None,
    words: Tensor | None,
    num_random_bits: int,
    options: dict[str, str],
) -> None:
    fast = quantize(
        x,
        block_shape=block_shape,
        rounding="rne" if words is None else "stochastic",
        noise_words=words,
        num_random_bits=num_random_bits,
        amax=amax,
        **options,
    )
    slow = reference_quantize(
        x.float().numpy(),
        block_shape,
        None if amax is None else amax.numpy(),
        None if words is None else words.numpy(),
        num_random_bits,
        **options,
    )
    assert_bitwise_equal(fast.codes(), torch.from_numpy(slow.codes), "codes")
    assert_bitwise_equal(fast.block_scale_bytes(), torch.from_numpy(slow.block_scale_bytes), "scale bytes")


def draw_rows(data: st.DataObject, width: int, *, finite: bool = False) -> tuple[Tensor, int]:
    seed = data.draw(st.integers(0, 2**31), label="seed")
    x = adversarial_rows(
        ROWS_PER_CASE,
        width,
        seed,
        base_exponent=data.draw(st.integers(-150, 128), label="exponent"),
        exponent_spread=data.draw(st.sampled_from([0, 8, 24, 160]), label="spread"),
        finite=finite,
    )
    return x.to(data.draw(st.sampled_from(DTYPES), label="dtype")), seed


def mxfp4_case(data: st.DataObject) -> None:
    x, seed = draw_rows(data, 32)
    bits = data.draw(st.sampled_from([0, 8, 16, 24]), label="random bits, 0: nearest")
    words = random_noise(x, seed) if bits else None
    check_mxfp4(x, data.draw(st.sampled_from(SCALE_ROUNDINGS), label="scale rounding"), words, bits or 16)


def fp8_case(data: st.DataObject) -> None:
    block_shape = data.draw(st.sampled_from([(1, 128), (1, 128), None, (128, 128)]), label="blocks")
    # One NaN turns off the scaling of everything that shares its scale.
    x, _ = draw_rows(data, 128, finite=block_shape != (1, 128))
    rows = ROWS_PER_CASE if block_shape != (128, 128) else 128
    check_fp8(x[:rows], data.draw(st.sampled_from(ELEMENTS)), block_shape, data.draw(st.booleans()))


def nvfp4_case(data: st.DataObject) -> None:
    options = data.draw(
        st.sampled_from([{}, {"scale_rounding": "up"}, {"four_over_six": "mae"}, {"four_over_six": "mse"}]),
        label="options",
    )
    # One NaN takes the whole tensor with it unless the amax comes from elsewhere.
    amax_exponent = data.draw(st.none() | st.integers(-149, 127), label="amax")
    amax = None if amax_exponent is None else torch.tensor(2.0**amax_exponent)
    x, seed = draw_rows(data, 16, finite=amax is None)
    widths = [0] if "four_over_six" in options else [0, 8, 16, 24]
    bits = data.draw(st.sampled_from(widths), label="random bits")
    block_shape = data.draw(st.sampled_from([(1, 16), (1, 16), (16, 16)]), label="blocks")
    x = x[: ROWS_PER_CASE // block_shape[0] * block_shape[0]]
    check_nvfp4(x, block_shape, amax, random_noise(x, seed) if bits else None, bits or 16, options)


CASES = {"nvfp4": (nvfp4_case, NVFP4_CASES), "mxfp4": (mxfp4_case, MXFP4_CASES), "fp8": (fp8_case, FP8_CASES)}


def run_cases(case: Callable[[st.DataObject], None], count: int) -> None:
    # A failure names its draws at once; shrinking a seed for a minute would say no more.
    options = settings(max_examples=count, deadline=None, derandomize=True, phases=[Phase.generate])
    options(given(st.data())(case))()


@pytest.mark.parametrize("name", CASES)
def test_adversarial_rows_equal_the_slow_twin(name):
    case, count = CASES[name]
    run_cases(case, count)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_a_million_adversarial_rows_equal_the_slow_twin(name):
    run_cases(CASES[name][0], LONG_CASES)


class TestE8m0:
    @pytest.mark.parametrize("scale_rounding", SCALE_ROUNDINGS)
    def test_bytes_equal_exact_comparisons_at_every_exponent_and_boundary(self, scale_rounding):
        mantissas = torch.tensor([0, 1, 0x3FFFFF, 0x400000, 0x400001, 0x5FFFFF, 0x600000, 0x600001, 0x7FFFFF])
        bits = (torch.arange(256)[:, None] << 23) + mantissas
        amax = bits.to(torch.int32).view(torch.float32).flatten()
        expected = [reference_e8m0_byte(value, scale_rounding) for value in amax.numpy()]
        actual = e8m0_bytes_from_amax(amax, scale_rounding)
        assert_bitwise_equal(actual, torch.tensor(expected, dtype=torch.uint8), "scale bytes")

    def test_bytes_and_values_are_torchs_and_come_back(self):
        every = torch.arange(256, dtype=torch.uint8)
        same_numbers(e8m0_values(every), every.view(torch.float8_e8m0fnu).to(torch.float32), "values")
        assert torch.equal(e8m0_bytes_of_values(e8m0_values(every)), every)

    @pytest.mark.parametrize(
        ("amax", "standard", "even", "up"),
        # exponents by hand: log2 6 lies between 2 and 3
        [(1.0, -2, -2, -2), (1.5, -2, -2, -2), (1.6, -2, -2, -1), (1.75, -2, -1, -1), (6.0, 0, 0, 0),
         (6.5, 0, 0, 1), (7.0, 0, 1, 1), (4.0, 0, 0, 0)],
    )  # fmt: skip
    def test_the_three_rules_on_numbers_done_by_hand(self, amax, standard, even, up):
        for rule, exponent in (("standard", standard), ("even", even), ("up", up)):
            assert int(e8m0_bytes_from_amax(torch.tensor([amax]), rule)) == exponent + 127, rule

    def test_up_saturates_nothing_and_a_smaller_scale_would(self):
        x = adversarial_rows(2000, 32, seed=1, base_exponent=20, exponent_spread=100)
        x = x[x.abs().amax(1) > 2.0**-120]
        largest = x.double().abs().amax(1, keepdim=True)
        limit = 6 * quantize_mxfp4(x, scale_rounding="up").block_scale.double()
        assert bool((largest <= limit).all()) and bool((largest > limit / 2).all())
        clipped = 6 * quantize_mxfp4(x).block_scale.double() < largest
        assert bool(clipped.any())


class TestMxfp4:
    def test_a_row_by_hand(self):
        x = torch.zeros(1, 32)
        x[0, :10] = torch.tensor([7.0, -7.0, 6.0, 5.0, 3.5, 0.25, 0.75, -0.1, -0.0, 1.25])
        standard, even = quantize_mxfp4(x), quantize_mxfp4(x, scale_rounding="even")
        assert standard.codes()[0, :10].tolist() == [7, 15, 7, 6, 6, 0, 2, 8, 0, 2]
        assert standard.block_scale_bytes().tolist() == [[127]]
        assert even.codes()[0, :10].tolist() == [6, 14, 5, 4, 4, 0, 1, 8, 0, 1]
        assert even.block_scale_bytes().tolist() == [[128]]
        assert even.dequantize()[0, :3].tolist() == [8.0, -8.0, 6.0]
        assert standard.packed()[0, :5].tolist() == [0xF7, 0x67, 0x06, 0x82, 0x20]

    @pytest.mark.parametrize("scale_rounding", SCALE_ROUNDINGS)
    def test_zero_and_subnormal_blocks_have_the_smallest_scale(self, scale_rounding):
        x = torch.zeros(3, 32)
        x[1], x[2] = 2.0**-149, -(2.0**-128)
        quantized = quantize_mxfp4(x, scale_rounding=scale_rounding)
        assert not quantized.block_scale_bytes().any()
        assert quantized.codes()[:, 0].tolist() == [0, 0, 9]  # 2^-128 / 2^-127 is 0.5
        assert quantized.dequantize()[2, 0] == -(2.0**-128)

    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("scale_rounding", SCALE_ROUNDINGS)
    def test_a_bad_element_takes_its_block_and_no_other(self, bad, scale_rounding):
        x = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
        clean = quantize_mxfp4(x, scale_rounding=scale_rounding)
        x[1, 40] = bad
        quantized = quantize_mxfp4(x, scale_rounding=scale_rounding)
        assert quantized.block_scale_bytes()[1, 1] == 0xFF
        lost = quantized.dequantize().isnan()
        assert bool(lost[1, 32:].all()) and int(lost.sum()) == 32
        assert_bitwise_equal(quantized.dequantize()[~lost], clean.dequantize()[~lost], "other blocks")
        assert not math.isfinite(float(quantized.amax))

    @pytest.mark.parametrize("scale_rounding", SCALE_ROUNDINGS)
    def test_noise_level_on_gaussian_data_is_the_known_one(self, scale_rounding):
        x = torch.randn(512, 512, generator=torch.Generator().manual_seed(3))
        decoded = quantize_mxfp4(x, scale_rounding=scale_rounding).dequantize()
        assert_sqnr_near(decoded, x, MXFP4_SQNR_DB[scale_rounding], SQNR_TOLERANCE_DB, scale_rounding)

    def test_stochastic_rounding_is_unbiased_with_the_scale_rounded_up(self):
        x = torch.tensor([6.5, 0.1, -3.3, 2.75]).repeat(8)[None, :].expand(4096, 32)
        words = random_noise(x, seed=4)
        mean = {
            rule: quantize_mxfp4(x, rounding="stochastic", noise_words=words, scale_rounding=rule)
            .dequantize()
            .double()
            .mean(0)
            for rule in ("standard", "up")
        }
        # Steps under a scale of 2 are at most 4, so one element's sigma is at most 2 and the mean's 2 / 64.
        assert float((mean["up"] - x[0].double()).abs().max()) < 5 * 2 / 64
        assert abs(float(mean["standard"][0]) - 6.0) < 1e-12  # 6.5 is always clipped to 6

    def test_transposed_view_shard_and_input(self):
        x = adversarial_rows(64, 96, seed=5)
        before = x.clone()
        whole = quantize_mxfp4(x)
        assert_bitwise_equal(x, before, "input")
        assert_bitwise_equal(quantize_mxfp4(x[8:, 32:]).codes(), whole.codes()[8:, 32:], "shard")
        view, copy = quantize_mxfp4(x.t()), quantize_mxfp4(x.t().contiguous())
        assert_bitwise_equal(view.packed(), copy.packed(), "transposed view")
        assert_bitwise_equal(view.block_scale, copy.block_scale, "scales of a transposed view")

    def test_wrong_use_is_refused(self):
        x = torch.zeros(2, 64)
        with pytest.raises(ShapeError, match="axis 1 must be a multiple of 32"):
            quantize_mxfp4(x[:, :48])
        with pytest.raises(ShapeError, match="round it to float32 first"):
            quantize_mxfp4(x.double())
        with pytest.raises(ConfigError, match="did you mean 'even'"):
            quantize_mxfp4(x, scale_rounding="evn")
        with pytest.raises(ShapeError, match="noise_words"):
            quantize_mxfp4(x, rounding="stochastic")
        with pytest.raises(ConfigError, match="no random bits"):
            quantize_mxfp4(x, noise_words=random_noise(x, 0))


class TestFp8:
    @pytest.mark.parametrize("element", ELEMENTS)
    def test_rounding_equals_a_search_over_all_values(self, element):
        values = torch.tensor(reference_element_values(element))
        midpoints = (values[1:] + values[:-1]) / 2
        beside = [torch.nextafter(midpoints, torch.tensor(limit)) for limit in (math.inf, 0.0)]
        top = torch.tensor([values[-1] * 1.03, values[-1] * 1.5, FLOAT32_MAX, math.inf, 1e-45, 2.0**-130])
        y = torch.cat((values, midpoints, *beside, top))
        y = torch.cat((y, -y))
        code = reference_nearest_code(y.numpy(), element) + 128 * np.signbit(y.numpy())
        rounded = round_to_fp8(y, element)
        codes = values_to_fp8_bytes(rounded, element)
        assert_bitwise_equal(codes, torch.from_numpy(code.astype(np.uint8)), "codes")
        assert_bitwise_equal(fp8_bytes_to_values(codes, element), rounded, "values of codes")
        lost = round_to_fp8(torch.tensor([math.nan, -math.nan]), element)
        assert bool(lost.isnan().all()) and values_to_fp8_bytes(lost, element).tolist() == [0x7F, 0x7F]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("block_shape", FP8_BLOCKS)
    @pytest.mark.parametrize("power_of_two", [False, True])
    def test_several_blocks_each_way_equal_the_slow_twin(self, block_shape, power_of_two, dtype):
        x = adversarial_rows(256, 256, seed=6, base_exponent=3, exponent_spread=6).to(dtype)
        for element in ELEMENTS:
            check_fp8(x, element, block_shape, power_of_two)

    def test_scale_rule_on_numbers_done_by_hand(self):
        def scale(amax: float, element: str = "e4m3", **options: bool) -> float:
            x = torch.full((1, 128), amax)
            return 1 / float(quantize_fp8(x, element=element, block_shape=(1, 128), **options).block_scale)

        assert scale(448.0) == 1.0 and scale(57344.0, "e5m2") == 1.0 and scale(7.0) == 64.0
        assert scale(5.0, power_of_two_scales=True) == 64.0  # 448 / 5 = 89.6
        assert scale(0.0) == scale(math.inf) == scale(math.nan) == 1.0
        assert scale(2.0**-140, power_of_two_scales=True) == 2.0**127
        tiny = quantize_fp8(torch.full((1, 128), 2.0**-149), element="e4m3", block_shape=None)
        assert float(tiny.tensor_scale()) == float(np.float32(1) / np.float32(FLOAT32_MAX))

    def test_a_nan_stays_and_an_infinity_saturates_unscaled(self):
        x = torch.full((1, 256), 3.0)
        x[0, 5], x[0, 130] = math.nan, -math.inf
        for element, largest in (("e4m3", 448.0), ("e5m2", 57344.0)):
            quantized = quantize_fp8(x, element=element, block_shape=(1, 128))
            decoded = quantized.dequantize()
            assert bool(decoded[0, 5].isnan()) and int(decoded.isnan().sum()) == 1
            assert float(decoded[0, 130]) == -largest and quantized.block_scale.tolist() == [[1.0, 1.0]]
            assert bool(quantized.amax.isnan())

    @pytest.mark.parametrize("element", ELEMENTS)
    @pytest.mark.parametrize("block_shape", FP8_BLOCKS)
    def test_noise_level_on_gaussian_data_is_the_known_one(self, element, block_shape):
        x = torch.randn(512, 512, generator=torch.Generator().manual_seed(7))
        decoded = quantize_fp8(x, element=element, block_shape=block_shape).dequantize()
        assert_sqnr_near(decoded, x, FP8_SQNR_DB[element], SQNR_TOLERANCE_DB, f"{element} {block_shape}")

    def test_a_shard_with_the_global_amax_equals_the_slice_of_the_whole(self):
        x = torch.randn(32, 48, generator=torch.Generator().manual_seed(8))
        x[0, 0] = 9.0
        whole = quantize_fp8(x, element="e4m3", block_shape=None)
        shard = quantize_fp8(x[16:], element="e4m3", block_shape=None, amax=tensor_amax(x))
        assert_bitwise_equal(shard.codes(), whole.codes()[16:], "codes of a shard")
        assert_bitwise_equal(shard.tensor_scale(), whole.tensor_scale(), "scale of a shard")
        assert float(quantize_fp8(x[16:], element="e4m3", block_shape=None).amax) < 9.0

    def test_a_transposed_tile_matrix_decodes_alike_both_ways(self):
        x = torch.randn(128, 256, generator=torch.Generator().manual_seed(9))
        one_way = quantize_fp8(x, element="e4m3", block_shape=(128, 128)).dequantize()
        other_way = quantize_fp8(x.t(), element="e4m3", block_shape=(128, 128)).dequantize()
        assert_bitwise_equal(one_way.t().contiguous(), other_way, "transposed")

    def test_wrong_use_is_refused(self):
        x = torch.zeros(64, 256)
        with pytest.raises(ShapeError, match="axis 0 must be a multiple of 128"):
            quantize_fp8(x, element="e4m3", block_shape=(128, 128))
        with pytest.raises(ShapeError, match="must be one of"):
            quantize_fp8(x, element="e4m3", block_shape=(1, 64))
        with pytest.raises(ConfigError, match="'e4m3' or 'e5m2'"):
            quantize_fp8(x, element="e3m4", block_shape=None)
        with pytest.raises(ConfigError, match="must be None with blocks"):
            quantize_fp8(x, element="e4m3", block_shape=(1, 128), amax=torch.tensor(1.0))


def encoded(name: str, x: Tensor) -> QuantizedTensor:
    """One of every kind of encoding; names are listed in `KINDS`."""
    if name.startswith("nvfp4"):
        return quantize(
            x,
            block_shape=(16, 16) if "tiles" in name else (1, 16),
            four_over_six="mae" if "four" in name else None,
        )
    if name == "mxfp4":
        return quantize_mxfp4(x)
    blocks = {"tensor": None, "rows": (1, 128), "tiles": (128, 128)}[name.split()[1]]
    return quantize_fp8(x, element=name.split()[0], block_shape=blocks, power_of_two_scales="power" in name)


KINDS = [
    "nvfp4", "nvfp4 tiles", "nvfp4 four over six", "mxfp4", "e4m3 tensor", "e5m2 tensor power", "e4m3 rows",
    "e5m2 tiles", "e4m3 rows power", "e4m3 tiles power",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_bytes_rebuild_the_tensor_and_are_counted(name):
    x = adversarial_rows(256, 256, seed=10, base_exponent=4, exponent_spread=8)
    q = encoded(name, x)
    scale_bytes = q.block_scale_bytes()
    rebuilt = QuantizedTensor.from_bytes(
        q.packed(),
        scale_bytes,
        q.amax,
        q.block_shape,
        scale_target=q.scale_target,
        format=q.format,
        power_of_two_scales=q.power_of_two_scales,
    )
    assert_bitwise_equal(rebuilt.values, q.values, "values")
    assert_bitwise_equal(rebuilt.dequantize(), q.dequantize(), "decoded")
    assert_bitwise_equal(rebuilt.tensor_scale(), q.tensor_scale(), "tensor scale")
    assert rebuilt.is_exact_in_bf16 == q.is_exact_in_bf16
    scale_count = 0 if scale_bytes is None else scale_bytes.numel()
    assert q.num_bytes == q.packed().numel() + scale_count + 4
    if name == "nvfp4":
        assert (q.num_bytes - 4) * 8 == NVFP4_BITS_PER_ELEMENT * x.numel() == 4.5 * x.numel()
    if name == "mxfp4":
        assert (q.num_bytes - 4) * 8 == 4.25 * x.numel()


def test_bytes_of_another_shape_or_format_are_refused():
    q = encoded("mxfp4", torch.zeros(4, 64))
    with pytest.raises(ShapeError, match="must have shape"):
        QuantizedTensor.from_bytes(q.packed()[:2], q.block_scale_bytes(), q.amax, (1, 32), format="mxfp4")
    with pytest.raises(ShapeError, match=r"received None"):
        QuantizedTensor.from_bytes(q.packed(), None, q.amax, (1, 32), format="mxfp4")
    with pytest.raises(ShapeError, match=r"for format 'mxfp4', received \(1, 16\)"):
        QuantizedTensor.from_bytes(q.packed(), q.block_scale_bytes(), q.amax, (1, 16), format="mxfp4")
    with pytest.raises(ConfigError, match="did you mean 'mxfp4'"):
        QuantizedTensor.from_bytes(q.packed(), q.block_scale_bytes(), q.amax, (1, 32), format="mxpf4")


@pytest.mark.parametrize("name", KINDS)
def test_operands_say_truly_whether_they_are_exact_in_bf16(name):
    q = encoded(name, torch.randn(256, 256, generator=torch.Generator().manual_seed(11)))
    exact = q.operand(torch.float64)
    in_bf16 = q.operand(torch.bfloat16)
    assert in_bf16.dtype == torch.bfloat16
    assert torch.equal(in_bf16.double(), exact) == q.is_exact_in_bf16
    scaled = exact * q.tensor_scale().double()
    error = (scaled - q.dequantize(torch.float64)).abs() / scaled.abs().clamp(min=1e-30)
    assert float(error.max()) <= 3 * 2.0**-24  # up to three fp32 roundings


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", KINDS)
def test_gpu_gives_the_bits_of_the_cpu(name):
    for seed, spread in ((15, 8), (16, 160)):
        x = adversarial_rows(256, 256, seed, base_exponent=8, exponent_spread=spread)
        on_cpu, on_gpu = encoded(name, x), encoded(name, x.cuda())
        for part in ("codes", "block_scale_bytes", "tensor_scale", "dequantize"):
            expected, actual = getattr(on_cpu, part)(), getattr(on_gpu, part)()
            if expected is not None:
                assert_bitwise_equal(actual.cpu(), expected, f"{name} {part}")
    a = encoded(name, torch.randn(256, 256, generator=torch.Generator().manual_seed(17)))
    gpu_a = QuantizedTensor(
        *(t.cuda() if isinstance(t, Tensor) else t for t in (getattr(a, slot) for slot in a.__slots__))
    )
    exact = EmulatedGemm().multiply(a, a, torch.float64)
    actual = EmulatedGemm().multiply(gpu_a, gpu_a, torch.float32).cpu().double()
    assert float((actual - exact).abs().max() / exact.abs().max()) <= FP32_SUM


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize(
    "right", ["nvfp4 tiles", "nvfp4 four over six", "mxfp4", "e4m3 tensor", "e5m2 tiles"]
)
def test_product_of_any_two_formats_is_that_of_the_decoded_matrices(left, right):
    generator = torch.Generator().manual_seed(12)
    a = encoded(left, 1e-3 * torch.randn(128, 256, generator=generator))
    b = encoded(right, 50 * torch.randn(256, 256, generator=generator))
    exact = (a.operand(torch.float64) @ b.operand(torch.float64).T) * gemm_alpha(a, b).double()
    for accumulate, tolerance in ((torch.float32, FP32_SUM), (torch.float64, FP64_SUM)):
        actual = EmulatedGemm().multiply(a, b, accumulate)
        assert actual.dtype == accumulate
        assert float((actual.double() - exact).abs().max() / exact.abs().max()) <= tolerance
    decoded = a.dequantize(torch.float64) @ b.dequantize(torch.float64).T
    assert float((exact - decoded).abs().max() / decoded.abs().max()) <= FP32_SUM


def test_alpha_of_every_pair_of_formats():
    a, b = torch.tensor(4.7), torch.tensor(0.0123)

    def of(name: str, amax: Tensor) -> QuantizedTensor:
        x = torch.zeros(128, 128)
        x[0, 0] = amax
        return encoded(name, x)

    nvfp4 = (np.float32(4.7) * np.float32(0.0123)) * np.float32(1 / (2688 * 1536))
    assert_bitwise_equal(gemm_alpha(of("nvfp4", a), of("nvfp4 four over six", b)), torch.tensor(nvfp4), "4/6")
    one = torch.tensor(1.0)
    assert_bitwise_equal(gemm_alpha(of("mxfp4", a), of("mxfp4", b)), one, "mxfp4")
    assert_bitwise_equal(gemm_alpha(of("e4m3 rows", a), of("e5m2 tiles", b)), one, "fp8 blocks")

    def scale(amax: float, largest: float) -> np.float32:
        return np.float32(1) / (np.float32(largest) / np.float32(amax))

    expected = scale(4.7, 448) * scale(0.0123, 448)
    assert_bitwise_equal(
        gemm_alpha(of("e4m3 tensor", a), of("e4m3 tensor", b)), torch.tensor(expected), "fp8 per tensor"
    )


def test_four_over_six_scale_reaches_the_product():
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(13))
    a = quantize(x, block_shape=(1, 16), four_over_six="mse")
    product = EmulatedGemm().multiply(a, a, torch.float64)
    # With the default target the product would be three times too small (3.5 dB); measured 24.0 dB.
    assert sqnr_db(product, x.double() @ x.double().T) > 20.0


def test_every_format_names_its_largest_element_and_its_blocks():
    largest = {"nvfp4": E2M1_MAX, "mxfp4": E2M1_MAX, "e4m3 tensor": 448.0, "e5m2 tensor power": 57344.0}
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(14))
    for name, value in largest.items():
        q = encoded(name, x)
        assert q.element_max == value and q.block_shape in FORMAT_BLOCK_SHAPES[q.format]
        assert float(q.values.abs().max()) <= value

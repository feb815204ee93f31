"""Philox and its streams: known answers, addressing by coordinates, independence of layout."""

from __future__ import annotations

import math

import pytest
import torch

from metis.errors import ConfigError, ShapeError
from metis.rng import NoisePosition, gaussian, philox4x32, random_words, stream_key, uniform_hash

# Random123 1.14, kat_vectors, philox4x32 10: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

KEY = stream_key(1234, "decoder.layers.0.mlp.linear_fc1", "dgrad_grad_output")
POSITION = NoisePosition(step=7, microbatch=3)
SIGMAS = 5.0
GAUSSIAN_BOUND = math.sqrt(2 * 33 * math.log(2))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def test_philox_of_tensors_equals_philox_of_each_counter():
    columns = torch.tensor([0, 1, 0xFFFFFFFF])
    rows = torch.tensor([[5], [0x80000000]])
    words = philox4x32((columns, rows, 9, 2), KEY)
    for i in range(2):
        for j in range(3):
            single = philox4x32((int(columns[j]), int(rows[i, 0]), 9, 2), KEY)
            assert [int(word[i, j]) for word in words] == [int(word) for word in single]


def test_word_is_output_col_mod_4_of_counter_col_row_microbatch_step():
    rows, cols = torch.tensor([0, 70000, 0xFFFFFFFF]), torch.arange(8, 24)
    words = random_words(KEY, POSITION, rows, cols)
    assert words.dtype == torch.int64
    for i, row in enumerate(rows.tolist()):
        for j, col in enumerate(cols.tolist()):
            expected = philox4x32((col // 4, row, POSITION.microbatch, POSITION.step), KEY)[col % 4]
            assert int(words[i, j]) == int(expected)


@pytest.mark.parametrize(
    "cols",
    [
        torch.arange(3, 61),
        torch.tensor([5]),
        torch.arange(64).flip(0),
        torch.tensor([9, 9, 2, 40, 41, 42, 43, 8]),
        torch.cat((torch.arange(48, 64), torch.arange(0, 16))),
        torch.arange(1, 33),
    ],
    ids=["unaligned", "one", "reversed", "scattered", "aligned-out-of-order", "shifted-runs"],
)
def test_any_selection_of_columns_equals_the_slice_of_the_whole(cols):
    rows = torch.tensor([11, 2, 3, 3])
    whole = random_words(KEY, POSITION, torch.arange(12), torch.arange(64))
    assert torch.equal(random_words(KEY, POSITION, rows, cols), whole[rows][:, cols])


def test_a_matrix_larger_than_one_chunk_equals_its_parts():
    rows, cols = torch.arange(700), torch.arange(512)  # 89,600 counters: three chunks of 32,768
    whole = random_words(KEY, POSITION, rows, cols)
    for part in rows.split(233):
        assert torch.equal(random_words(KEY, POSITION, part, cols), whole[part])


def test_key_step_microbatch_each_change_the_words():
    rows, cols = torch.arange(16), torch.arange(64)
    words = [
        random_words(key, position, rows, cols)
        for key, position in (
            (KEY, POSITION),
            (stream_key(1235, "decoder.layers.0.mlp.linear_fc1", "dgrad_grad_output"), POSITION),
            (stream_key(1234, "decoder.layers.1.mlp.linear_fc1", "dgrad_grad_output"), POSITION),
            (stream_key(1234, "decoder.layers.0.mlp.linear_fc1", "wgrad_grad_output"), POSITION),
            (KEY, NoisePosition(8, 3)),
            (KEY, NoisePosition(7, 4)),
        )
    ]
    for i, first in enumerate(words):
        for second in words[:i]:
            assert int((first == second).sum()) == 0  # 1024 words: a chance match has probability 2e-7


def test_every_bit_of_the_words_is_fair():
    words = random_words(KEY, POSITION, torch.arange(256), torch.arange(256)).flatten()
    count = words.numel()
    for bit in range(32):
        ones = int(((words >> bit) & 1).sum())
        assert abs(ones - count / 2) <= SIGMAS * math.sqrt(count) / 2, f"bit {bit}"


def test_stream_key_separates_names_and_is_frozen():
    assert stream_key(1, "ab", "c") != stream_key(1, "a", "bc")
    assert stream_key(1, "a") != stream_key(1, "a", "")
    assert stream_key(11) != stream_key(1, "1")
    # The digest as first recorded: another value here would change the noise of every run and resume.
    assert stream_key(0) == (0x306200AC, 0x9C09BF85)


def test_uniform_hash_depends_on_the_row_alone_and_differs_from_words():
    rows = torch.arange(4096)
    hashes = uniform_hash(KEY, POSITION, rows)
    assert torch.equal(uniform_hash(KEY, POSITION, rows[1000:1010]), hashes[1000:1010])
    assert hashes.unique().numel() == 4096
    mean = hashes.to(torch.float64).mean() / 2**32
    assert abs(float(mean) - 0.5) <= SIGMAS / math.sqrt(12 * 4096)
    assert not torch.equal(hashes, random_words(KEY, POSITION, rows, torch.arange(4))[:, 0])


def test_gaussian_has_the_moments_of_a_standard_normal():
    z = gaussian(KEY, torch.arange(500), torch.arange(401)).flatten()
    count = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        measured = float((z**power).mean())
        assert abs(measured - moment) <= SIGMAS * math.sqrt(variance / count), f"moment {power}"
    assert float(z.abs().max()) < GAUSSIAN_BOUND
    pairs = gaussian(KEY, torch.arange(500), torch.arange(400)).view(-1, 2)
    assert abs(float((pairs[:, 0] * pairs[:, 1]).mean())) <= SIGMAS / math.sqrt(pairs.shape[0])


def test_gaussian_of_a_piece_equals_the_piece_of_the_whole():
    whole = gaussian(KEY, torch.arange(64), torch.arange(101), POSITION)
    rows, cols = torch.tensor([63, 5, 17]), torch.tensor([100, 33, 1, 0, 64])
    assert torch.equal(gaussian(KEY, rows, cols, POSITION), whole[rows][:, cols])
    assert torch.equal(whole.to(torch.float32).to(torch.float64), whole)
    assert not torch.equal(gaussian(KEY, torch.arange(64), torch.arange(101)), whole)


def test_gaussian_is_box_muller_of_the_words():
    words = random_words(KEY, NoisePosition(0, 0), torch.arange(3), torch.arange(6))
    z = gaussian(KEY, torch.arange(3), torch.arange(6))
    for row in range(3):
        for pair in range(3):
            u, v = ((int(words[row, 2 * pair + i]) + 0.5) / 2**32 for i in range(2))
            radius = math.sqrt(-2 * math.log(u))
            assert abs(float(z[row, 2 * pair]) - radius * math.cos(2 * math.pi * v)) <= 2**-20
            assert abs(float(z[row, 2 * pair + 1]) - radius * math.sin(2 * math.pi * v)) <= 2**-20


@pytest.mark.parametrize(("step", "microbatch"), [(-1, 0), (0, -1), (1 << 32, 0), (0, 1 << 32)])
def test_positions_outside_32_bits_are_refused(step, microbatch):
    with pytest.raises(ConfigError, match=r"must lie in \[0, 2\^32\)"):
        NoisePosition(step, microbatch)


def test_indices_of_another_dtype_or_rank_are_refused():
    with pytest.raises(ShapeError, match="rows must be a 1-D int64"):
        random_words(KEY, POSITION, torch.arange(4, dtype=torch.int32), torch.arange(4))
    with pytest.raises(ShapeError, match="cols must be a 1-D int64"):
        random_words(KEY, POSITION, torch.arange(4), torch.arange(4)[None])


def test_the_first_microbatch_of_a_position_follows_its_words():
    words = torch.tensor([5, 9], dtype=torch.int32)
    first = NoisePosition(step=9, microbatch=5, words=words).at_first_microbatch()
    assert first == NoisePosition(step=9, microbatch=0) and first.words.tolist() == [0, 9]
    assert words.tolist() == [5, 9]
    assert NoisePosition(step=9, microbatch=5).at_first_microbatch().words is None

"""Tiles: how one is chosen, that the choice survives on disk, and that no tile changes a bit.

Choosing is tested with a clock that is given, no GPU and no Triton. What kernels write with every candidate
is compared under Triton's interpreter, in a process of its own (this file as a script), because the
interpreter must be chosen before Triton is first imported.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metis import kernels
from metis.benchmark.shapes import matrices_of
from metis.errors import ConfigError
from metis.formats import RHT_SIGN_VECTOR
from metis.kernels import tuning
from metis.kernels.tuning import Choice, Device, Tuner

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
H200 = Device("NVIDIA H200", (9, 0), "3.6.0", "0123456789ab")
A, B, C = (16, 256, 4), (16, 256, 2), (32, 256, 8)

MAX_CLASSES = 12
"""[11] classes of the matrices of a LLaMA-3-8B block at 2048 to 32768 tokens, in both orientations."""
MIN_COMPARISONS = 70
"""Launches with another tile than the constant; fewer means that candidates or cases were lost."""


class Clock:
    """A launch takes as long as this says for its tile; None: it fails."""

    def __init__(self, seconds: dict[Choice, float | None]) -> None:
        self.seconds, self.launched, self.last = seconds, 0, ()

    def launch(self, tile: Choice) -> None:
        self.launched, self.last = self.launched + 1, tile
        if self.seconds[tile] is None:
            raise RuntimeError(f"out of registers: {tile}")

    def time(self, launch: Callable[[], object]) -> float:
        launch()
        return self.seconds[self.last]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tuning.DIRECTORY, str(tmp_path / "cache"))
    monkeypatch.delenv(tuning.SWITCH, raising=False)
    return tmp_path / "cache"


def tuner(device: Device = H200, is_capturing: Callable[[], bool] = lambda: False) -> Tuner:
    """A tuner as a new process has it."""
    return Tuner(lambda _: device, is_capturing)


def measured(own: Tuner, clock: Clock, key: str = "k") -> Choice:
    with own.measuring(clock.time):
        return own.choose(key, tuple(clock.seconds), GPU, clock.launch)


def tiles_of(path: Path) -> dict[str, list[int]]:
    return {key: entry["tile"] for key, entry in json.loads(path.read_text())["tiles"].items()}


def test_the_fastest_candidate_is_chosen_and_its_times_are_kept():
    own = tuner()
    assert measured(own, Clock({A: 3e-6, B: 2e-6, C: 2.5e-6})) == B
    assert own.file(GPU).decisions["k"].microseconds == pytest.approx(
        {"16x256x4": 3.0, "16x256x2": 2.0, "32x256x8": 2.5}
    )


@pytest.mark.parametrize(("other", "expected"), [(0.985, A), (0.975, B)])
def test_the_constant_wins_ties_within_two_percent(other: float, expected: Choice):
    assert measured(tuner(), Clock({A: 1.0, B: other, C: 1.0})) == expected


def test_one_slow_round_decides_nothing():
    clock, calls = Clock({A: 1.0, B: 0.9}), itertools.count()

    def time(launch: Callable[[], object]) -> float:
        seconds = clock.time(launch)
        return 10.0 if clock.last == B and next(calls) == 0 else seconds

    own = tuner()
    with own.measuring(time):
        assert own.choose("k", (A, B), GPU, clock.launch) == B


def test_nothing_is_launched_or_written_unless_asked_for(directory: Path):
    clock = Clock({A: 2.0, B: 1.0})
    assert tuner().choose("k", (A, B), GPU, clock.launch) == A
    assert clock.launched == 0 and not directory.exists()


def test_a_choice_is_remembered_in_memory_and_on_disk(directory: Path):
    clock = Clock({A: 2.0, B: 1.0})
    first, launched = tuner(), []
    for _ in range(2):
        assert measured(first, clock) == B
        launched.append(clock.launched)
    assert launched[0] == launched[1] > 0
    later = tuner()  # measures nothing, and reads the file
    assert later.known("k", (A, B), GPU) == B
    assert later.choose("k", (A, B), GPU) == B
    assert measured(later, Clock({A: 1.0, B: 2.0})) == B
    assert [path.name for path in directory.iterdir()] == [H200.file_name()]


def test_measuring_ends_with_its_context_also_after_an_error():
    own = tuner()
    with pytest.raises(KeyError), own.measuring(Clock({}).time):
        assert own.timer(GPU) is not None
        raise KeyError
    assert own.timer(GPU) is None


def test_candidates_that_fail_are_left_out():
    own = tuner()
    assert measured(own, Clock({A: 2.0, B: None, C: 1.0})) == C
    assert set(own.file(GPU).decisions["k"].microseconds) == {"16x256x4", "32x256x8"}
    assert measured(own, Clock({A: 2.0, B: None}), "only the constant runs") == A


def test_what_the_constant_raises_is_raised():
    with pytest.raises(RuntimeError, match="out of registers"):
        measured(tuner(), Clock({A: None, B: 1.0}))


def test_nothing_is_timed_while_a_graph_is_captured():
    capturing = True
    own, clock = tuner(is_capturing=lambda: capturing), Clock({A: 2.0, B: 1.0})
    assert measured(own, clock) == A
    assert clock.launched == 0
    capturing = False
    assert measured(own, clock) == B
    capturing, clock.launched = True, 0
    assert measured(own, clock) == B  # what is known is used in a graph too
    assert clock.launched == 0


def test_a_captured_stream_is_noticed(monkeypatch: pytest.MonkeyPatch):
    assert not tuning.is_capturing()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.is_capturing()
    own = Tuner(lambda _: H200)
    with own.measuring():
        assert own.timer(GPU) is None


def test_ranks_merge_what_they_measure(directory: Path):
    one, two = tuner(), tuner()
    for own in (one, two):
        own.file(GPU)  # both have read the file before either writes
    clock = Clock({A: 2.0, B: 1.0})
    measured(one, clock, "first")
    measured(two, clock, "second")
    measured(one, clock, "third")
    assert tiles_of(directory / H200.file_name()) == {key: list(B) for key in ("first", "second", "third")}
    launched = clock.launched
    assert measured(two, clock, "third") == B
    assert clock.launched == launched  # read again before measuring


DAMAGED = {
    "no JSON": "{",
    "no text": b"\xff\xfe\x00",
    "another shape": "[1, 2]",
    "no tiles": json.dumps(H200.heading()),
    "another GPU": json.dumps({**H200.heading(), "name": "NVIDIA H100", "tiles": {}}),
    "another format": json.dumps({**H200.heading(), "format": 0, "tiles": {}}),
    "a tile of text": json.dumps(
        {**H200.heading(), "tiles": {"k": {"tile": ["16", 256, 4], "microseconds": {}}}}
    ),
    "an empty tile": json.dumps({**H200.heading(), "tiles": {"k": {"tile": [], "microseconds": {}}}}),
    "no times": json.dumps({**H200.heading(), "tiles": {"k": {"tile": list(B)}}}),
    "tiles in a list": json.dumps({**H200.heading(), "tiles": [list(B)]}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning_and_replaced(name: str, directory: Path):
    path, content = directory / H200.file_name(), DAMAGED[name]
    directory.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    own = tuner()
    with pytest.warns(UserWarning, match="ignored") as caught:
        assert own.choose("k", (A, B), GPU) == A
        assert own.choose("other", (A, B), GPU) == A
        assert measured(own, Clock({A: 2.0, B: 1.0})) == B
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuner().choose("k", (A, B), GPU) == B


def test_a_home_that_cannot_be_written_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(tuning.DIRECTORY, str(tmp_path / "file" / "below"))
    own, clock = tuner(), Clock({A: 2.0, B: 1.0})
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        assert [measured(own, clock, key) for key in ("k", "l")] == [B, B]
    assert len(caught) == 1 and H200.file_name() in str(caught[0].message)
    launched = clock.launched
    assert measured(own, clock) == B
    assert clock.launched == launched  # memory holds it


def test_without_a_home_memory_holds_the_choice(monkeypatch: pytest.MonkeyPatch):
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv(tuning.DIRECTORY)
    monkeypatch.setattr(Path, "home", no_home)
    own, clock = tuner(), Clock({A: 2.0, B: 1.0})
    assert measured(own, clock) == B
    assert own.file(GPU).path is None and own.known("k", (A, B), GPU) == B


def test_files_lie_in_the_home_unless_a_directory_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(tuning.DIRECTORY)
    assert tuning.cache_directory() == Path.home() / ".cache" / "metis"


def test_an_interrupted_write_leaves_the_old_file(directory: Path, monkeypatch: pytest.MonkeyPatch):
    own, clock = tuner(), Clock({A: 2.0, B: 1.0})
    measured(own, clock, "old")

    def interrupted(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.warns(UserWarning, match="disk full"):
        measured(own, clock, "new")
    assert [path.name for path in directory.iterdir()] == [H200.file_name()]
    assert list(tiles_of(directory / H200.file_name())) == ["old"]


def test_a_tile_that_is_no_candidate_any_more_is_measured_again():
    measured(tuner(), Clock({A: 2.0, B: 1.0}))
    later = tuner()
    assert later.choose("k", (A, C), GPU) == A
    assert measured(later, Clock({A: 2.0, C: 1.0})) == C


@pytest.mark.parametrize(
    "other",
    [
        Device("NVIDIA H100", (9, 0), "3.6.0", "0123456789ab"),
        Device("NVIDIA H200", (10, 0), "3.6.0", "0123456789ab"),
        Device("NVIDIA H200", (9, 0), "3.7.0", "0123456789ab"),
        Device("NVIDIA H200", (9, 0), "3.6.0", "ba9876543210"),
    ],
)
def test_timings_hold_for_one_device_compiler_and_source(other: Device):
    measured(tuner(), Clock({A: 2.0, B: 1.0}))
    assert tuner(other).choose("k", (A, B), GPU) == A


def test_the_environment_turns_measuring_on(monkeypatch: pytest.MonkeyPatch):
    clock, own = Clock({A: 2.0, B: 1.0}), tuner()
    monkeypatch.setattr(tuning, "time_on_gpu", clock.time)
    for value, expected in (("0", A), ("", A), ("1", B)):
        monkeypatch.setenv(tuning.SWITCH, value)
        assert own.choose("k", (A, B), GPU, clock.launch) == expected
    assert own.timer(CPU) is None  # the interpreter's times mean nothing
    monkeypatch.setenv(tuning.SWITCH, "yes")
    with pytest.raises(ConfigError, match="METIS_AUTOTUNE: must be 0 or 1, received 'yes'"):
        own.timer(GPU)


def test_a_model_has_few_classes_and_a_larger_microbatch_adds_none():
    def classes(tokens: int) -> set[str]:
        shapes = matrices_of("llama3-8b", tokens)
        return {tuning.key_of("k", (), shape) for r, c in shapes for shape in ((r, c), (c, r))}

    assert len(set().union(*(classes(2**power) for power in range(11, 16)))) <= MAX_CLASSES
    assert classes(16384) >= classes(32768)
    assert classes(8192) == classes(8192 - 16 * 7)


def test_small_matrices_of_different_size_are_different_classes():
    keys = {tuning.key_of("k", ("v", 1), shape) for shape in ((64, 64), (128, 64), (64, 128), (4096, 4096))}
    assert len(keys) == 4
    assert tuning.key_of("k", ("v", 1), (100, 60)) == "k/v/1/128x64"


@pytest.mark.parametrize("is_column_major", [False, True])
def test_candidates_vary_around_the_constant_within_limits(is_column_major: bool):
    constant, least, most = (
        ((128, 16, 1), (16, 16), (256, 32)) if is_column_major else (A, (16, 16), (32, 512))
    )
    found = tuning.around(constant, least, most, is_column_major=is_column_major)
    assert found[0] == constant
    assert 4 <= len(found) == len(set(found)) <= 6
    for rows, cols, warps in found:
        assert least[0] <= rows <= most[0] and least[1] <= cols <= most[1]
        assert 1 <= rows * cols // (32 * warps) <= 64
        assert all(size & (size - 1) == 0 for size in (rows, cols, warps))


def test_a_matrix_smaller_than_the_constant_keeps_it():
    assert tuning.around(A, (1, 16), (8, 64), is_column_major=False)[0] == A


def test_the_tool_refuses_to_tune_without_a_gpu():
    command = [sys.executable, "tools/benchmark/kernels.py", "--device", "cpu", "--tune", "--shapes", "32x64"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --tune: times kernels on a GPU, received cpu")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What this file says as a script."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY),
        tuning.DIRECTORY: str(tmp_path_factory.mktemp("tiles")),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_no_candidate_changes_a_bit(interpreted: dict[str, Any]):
    assert not interpreted["different"]
    assert interpreted["num_comparisons"] >= MIN_COMPARISONS


def test_every_kernel_asks_and_has_four_to_six_candidates(interpreted: dict[str, Any]):
    kinds = {key.split("/")[0] for key in interpreted["num_candidates"]}
    assert kinds == {"quantize", "rotate", "decode", "place", "amax", "amax_both"}
    assert all(4 <= number <= 6 for number in interpreted["num_candidates"].values())


def test_a_first_launch_measures_on_its_own_tensors_and_later_ones_use_the_tile(interpreted: dict[str, Any]):
    found = interpreted["measured"]
    assert found["is_equal"]
    assert found["tile"] == found["used"] == found["favourite"]
    assert found["launches_of_the_second_call"] == found["timed_by_the_second_call"] == 0
    assert found["file"] == {found["key"]: found["favourite"]}


# As a script, under Triton's interpreter.

ROWS, COLS = 48, 528
"""Ragged against every tile but those of one block."""


def cases() -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Launches of every kernel; each returns all that it writes."""
    x = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(5)).bfloat16()
    tall, square = x.t().contiguous().t(), torch.randn(128, 512).bfloat16()
    amax, signs, q = x.abs().max().float(), RHT_SIGN_VECTOR, kernels.quantize_nvfp4
    from metis.rng import NoisePosition

    def noise(rows: int, cols: int) -> kernels.KernelNoise:
        return kernels.KernelNoise(
            key=(1, 2), position=NoisePosition(3, 4), tokens=((0, rows),), features=((0, cols),)
        )

    def quantised(matrix: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        output = q(matrix, amax, want_packed=True, **options)
        return [output.operand, output.packed, output.scale_bytes]

    def decoded(block_shape: tuple[int, int], turned: bool) -> list[torch.Tensor]:
        packed = q(x, amax, want_packed=True, block_shape=block_shape)
        out = torch.empty(COLS, ROWS, dtype=torch.bfloat16).t() if turned else None
        return [
            kernels.decode_operand(
                packed.packed, packed.scale_bytes, block_shape=block_shape, operand_out=out
            )
        ]

    def placed(turned: bool) -> list[torch.Tensor]:
        partials = torch.randn(4, ROWS, 24, generator=torch.Generator().manual_seed(6))
        first = torch.zeros(24, ROWS).bfloat16().t() if turned else torch.zeros(ROWS, 24).bfloat16()
        second = torch.zeros(ROWS, COLS).bfloat16()
        kernels.place(kernels.Thin(partials, first, True), kernels.Thin(x, second, False), torch.tensor(0.3))
        return [first, second]

    sr = {"rounding": "stochastic"}
    return {
        "1x16": lambda: quantised(x),
        "1x16, columns": lambda: quantised(tall),
        "16x16": lambda: quantised(x, block_shape=(16, 16)),
        "16x16, columns": lambda: quantised(tall, block_shape=(16, 16)),
        "1x16, rotated by 64 and stochastic": lambda: quantised(
            square, sign_vector=(1, -1) * 32, noise=noise(128, 512), **sr
        ),
        "1x16, stochastic, columns, 24 bits": lambda: quantised(
            tall, noise=noise(ROWS, COLS), num_random_bits=24, **sr
        ),
        "mxfp4": lambda: [kernels.quantize_mxfp4(square).operand],
        "rotation": lambda: [kernels.rotate(x, signs)],
        "rotation, columns": lambda: [kernels.rotate(tall, signs)],
        "decode": lambda: decoded((1, 16), False),
        "decode, turned": lambda: decoded((1, 16), True),
        "decode, 16x16": lambda: decoded((16, 16), False),
        "place": lambda: placed(False),
        "place, turned": lambda: placed(True),
        "amax": lambda: [kernels.amax(x)],
        "amax, strided": lambda: [kernels.amax(x[:, :512])],
        "amax, rotated": lambda: [kernels.amax(x, signs)],
        "amax both": lambda: list(kernels.amax_both(x, signs)),
    }


def launchers() -> list[Any]:
    """Return what remembers prepared launches."""
    from metis.kernels import blockwise, decoding, placing, reduction, rotation

    return [
        blockwise._quantizers, decoding._decoders, placing._places, reduction._amaxes,
        reduction._amaxes_both, rotation._rotations,
    ]  # fmt: skip


def compare_candidates() -> dict[str, Any]:
    """Run every case with every candidate of its launches; says which outputs differ from the constant's."""
    original, different, num_comparisons = tuning.prepare, [], 0
    num_candidates: dict[str, int] = {}

    def bits(run: Callable[[], list[torch.Tensor]], number: int) -> tuple[list[torch.Tensor], int]:
        """Return what a case writes with candidate `number`, and how many there are."""
        asked: dict[str, int] = {}

        def prepare(key: str, candidates: Any, device: Any, build: Any) -> Any:
            asked[key] = len(candidates)
            return build(candidates[number % len(candidates)])

        for launcher in launchers():
            launcher._prepared.clear()
        tuning.prepare = prepare
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
        written = [tensor.clone().view(integers[tensor.element_size()]) for tensor in run()]
        num_candidates.update(asked)
        return written, max(asked.values())

    for name, run in cases().items():
        expected, count = bits(run, 0)
        for number in range(1, count):
            num_comparisons += 1
            if not all(map(torch.equal, bits(run, number)[0], expected)):
                different.append(f"{name}, candidate {number}")
    tuning.prepare = original
    return {"different": different, "num_comparisons": num_comparisons, "num_candidates": num_candidates}


def measure_one() -> dict[str, Any]:
    """Let a rotation choose its tile by a clock that favours one, launch it twice, and read the file."""
    from metis.kernels import blockwise, rotation
    from metis.quantize import random_hadamard

    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(7)).bfloat16()
    launched: list[Choice] = []
    prepare = rotation._rotations.prepare

    def recording(key: Any, grid: Any, numbers: Any, constants: Any, kept: Any = (), **options: Any) -> Any:
        launched.append((*constants[-2:], options["num_warps"]))
        return prepare(key, grid, numbers, constants, kept, **options)

    rotation._rotations.prepare = recording
    rotation._rotations._prepared.clear()
    candidates = blockwise.candidates(x, (1, 1), 16)
    favourite, timed = candidates[-1], []

    def clock(launch: Callable[[], object]) -> float:
        launch()
        timed.append(candidates[len(timed) % len(candidates)])
        return 1.0 if timed[-1] == favourite else 2.0

    with tuning.measuring(clock):
        result = kernels.rotate(x, RHT_SIGN_VECTOR)
        first, num_timed = len(launched), len(timed)
        kernels.rotate(x, RHT_SIGN_VECTOR)
    file = tuning.tile_file(CPU)
    (key,) = file.measured
    expected = random_hadamard(x)
    return {
        "key": key, "favourite": favourite, "tile": file.decisions[key].tile, "used": launched[-1],
        "launches_of_the_second_call": len(launched) - first,
        "timed_by_the_second_call": len(timed) - num_timed, "file": tiles_of(file.path),
        "is_equal": torch.equal(result, expected),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({**compare_candidates(), "measured": measure_one()}))

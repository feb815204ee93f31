"""Which tile a kernel works with: measured once per kind of launch, remembered on disk.

One idea: the bits of these kernels do not depend on the tile, so a launch can be repeated on its own tensors
with every candidate, and what it leaves behind is what it was asked for. A kind of launch is a kernel, its
variant and a class of shapes; `prepare` answers it from memory, then from a file, else with the constant that
stands first among the candidates. Measuring happens only when asked for: METIS_AUTOTUNE=1 in the environment,
or inside `measuring()`.

The file is `$METIS_CACHE_DIR/tiles_*.json`, or in ~/.cache/metis, one for each GPU model, version of Triton
and state of the kernels' sources; it is used by every later run, whether that measures or not. Deleting it is
safe.

Traps:
* A launch that was prepared before `measuring()` keeps its tile: begin before the first launch.
* Inside a CUDA graph's capture nothing can be timed; what is launched there for the first time keeps the
  constant.
* Several ranks measure for themselves and merge what they find. Two that write at the same moment may lose an
  entry from the file, and a later run measures it again.
* Kernels whose sums follow their tiles (projection.py) must not be tuned.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metis.errors import ConfigError
from metis.kernels.arguments import next_power_of_two
from metis.kernels.launching import Prepared

Choice = tuple[int, ...]
"""A tile as a file holds it: rows, columns, warps."""
Timer = Callable[[Callable[[], object]], float]
"""Returns the seconds of one launch."""

SWITCH, DIRECTORY = "METIS_AUTOTUNE", "METIS_CACHE_DIR"
TIE = 1.02
"""A candidate must be faster than the constant by more than this factor."""
MAX_CLASS_COLUMNS, MAX_CLASS_ELEMENTS = 8192, 2**25
"""Larger matrices are of one class: eight waves of programs on a Hopper GPU, and whole tiles in rows."""

_FORMAT = 1
_ROUNDS, _LAUNCHES, _WARM_UPS = 3, 12, 2
_L2_MULTIPLE, _HEAD_START_CYCLES = 2, 2_000_000
_MAX_CANDIDATES, _MAX_WARPS, _MAX_PER_THREAD = 6, 8, 64


@dataclass(frozen=True, slots=True)
class Device:
    """What timings hold for."""

    name: str
    capability: tuple[int, int]
    triton: str
    sources: str

    def file_name(self) -> str:
        """Return the name of its file."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        major, minor = self.capability
        return f"tiles_{name}_sm{major}{minor}_triton{self.triton}_{self.sources}.json"

    def heading(self) -> dict[str, Any]:
        """Return what its file says of itself."""
        return {"format": _FORMAT, **asdict(self), "capability": list(self.capability)}


@dataclass(frozen=True, slots=True)
class Decision:
    """The tile of one kind of launch, and the microseconds of every candidate that ran."""

    tile: Choice
    microseconds: Mapping[str, float]


@lru_cache(maxsize=1)
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


@lru_cache(maxsize=64)
def describe(device: torch.device) -> Device:
    """Return what timings on a device hold for."""
    import triton  # kernels have loaded it; whoever only asks about files has not

    if device.type != "cuda":
        return Device(device.type, (0, 0), triton.__version__, _sources())
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Device(name, capability, triton.__version__, _sources())


def time_on_gpu(launch: Callable[[], object]) -> float:
    """Return the median seconds of a launch between two events, its inputs not in the L2 cache."""
    for _ in range(_WARM_UPS):
        launch()
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    other = torch.empty(_L2_MULTIPLE * cache, dtype=torch.uint8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_LAUNCHES)]
    torch.cuda._sleep(_HEAD_START_CYCLES)  # so that the host is ahead
    for start, end in pairs:
        other.zero_()
        start.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(1e-3 * start.elapsed_time(end) for start, end in pairs)


def is_capturing() -> bool:
    """Return whether the current stream records a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def cache_directory() -> Path | None:
    """Return where files lie; None without a home."""
    given = os.environ.get(DIRECTORY)
    try:
        return Path(given) if given else Path.home() / ".cache" / "metis"
    except RuntimeError:
        return None


class TileFile:
    """Decisions for one device, in memory and on disk. path: None keeps them in memory."""

    def __init__(self, path: Path | None, device: Device) -> None:
        self.path, self._device = path, device
        self.decisions: dict[str, Decision] = {}
        self.measured: dict[str, Decision] = {}  # by this process: newer than what any file says
        self._warned: set[str] = set()
        self.read()

    def read(self) -> None:
        """Take over what the file holds; one that is damaged or describes something else is ignored."""
        try:
            found = {} if self.path is None else _parsed(self.path.read_text(encoding="utf-8"), self._device)
        except (FileNotFoundError, NotADirectoryError):
            return  # what cannot be written either says so then
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            self._warn("reading", f"ignored, {type(error).__name__}: {error}")
            return
        self.decisions |= found | self.measured

    def add(self, key: str, decision: Decision) -> None:
        """Remember a decision, and write it beside what other processes have written meanwhile."""
        self.measured[key] = decision
        self.read()
        self.decisions[key] = decision
        if self.path is None:
            return
        tiles = {name: asdict(self.decisions[name]) for name in sorted(self.decisions)}
        text = json.dumps({**self._device.heading(), "tiles": tiles}, indent=1)
        try:
            _replace(self.path, text)
        except OSError as error:
            self._warn("writing", f"cannot be written, tiles are measured in every run: {error}")

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"{self.path}: {message}", stacklevel=3)


def _parsed(text: str, device: Device) -> dict[str, Decision]:
    """Return the decisions of a file; some exception for what is not one for this device."""
    content = json.loads(text)
    tiles = content.pop("tiles")
    if content != device.heading():
        raise ValueError(f"it is for {content}")
    found = {}
    for key, entry in tiles.items():
        tile = tuple(entry["tile"])
        if not tile or not all(type(size) is int for size in tile):
            raise ValueError(f"no tile: {entry}")
        found[key] = Decision(tile, {name: float(time) for name, time in entry["microseconds"].items()})
    return found


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class Tuner:
    """Chooses tiles. The arguments are for tests.

    describe: what a device's timings hold for. is_capturing: whether nothing may be timed now.
    """

    def __init__(
        self,
        describe: Callable[[torch.device], Device] = describe,
        is_capturing: Callable[[], bool] = is_capturing,
    ) -> None:
        self._describe, self._is_capturing = describe, is_capturing
        self._timer: Timer | None = None
        self._files: dict[tuple[Path | None, Device], TileFile] = {}

    @contextmanager
    def measuring(self, timer: Timer | None = None) -> Iterator[None]:
        """Inside, every kind of launch that has no tile yet is measured; timer: None times GPUs only."""
        before, self._timer = self._timer, timer or time_on_gpu
        try:
            yield
        finally:
            self._timer = before

    def timer(self, device: torch.device) -> Timer | None:
        """Return what measures launches on a device now, None if nothing does.

        Raises ConfigError for METIS_AUTOTUNE other than 0 and 1.
        """
        switch = os.environ.get(SWITCH, "")
        if switch not in ("", "0", "1"):
            raise ConfigError(SWITCH, f"must be 0 or 1, received {switch!r}")
        timer = self._timer or (time_on_gpu if switch == "1" else None)
        if timer is None or (timer is time_on_gpu and device.type != "cuda") or self._is_capturing():
            return None
        return timer

    def file(self, device: torch.device) -> TileFile:
        """Return the decisions for a device."""
        directory, described = cache_directory(), self._describe(device)
        path = None if directory is None else directory / described.file_name()
        if (path, described) not in self._files:
            self._files[path, described] = TileFile(path, described)
        return self._files[path, described]

    def known(self, key: str, candidates: Sequence[Choice], device: torch.device) -> Choice | None:
        """Return the tile that was chosen for a key; None without one, or if it is no candidate any more."""
        decision = self.file(device).decisions.get(key)
        return decision.tile if decision is not None and decision.tile in candidates else None

    def choose(
        self,
        key: str,
        candidates: Sequence[Choice],
        device: torch.device,
        launch: Callable[[Choice], object] | None = None,
    ) -> Choice:
        """Return the tile for a kind of launch: known, else measured, else the first candidate.

        key: of `key_of`. launch: launches once with a tile; None: not now. What the first candidate raises
        is raised; others that fail are left out.
        """
        timer = None if launch is None or len(candidates) < 2 else self.timer(device)
        if timer is not None and self.known(key, candidates, device) is None:
            self.file(device).read()  # another rank may have been faster
        known = self.known(key, candidates, device)
        if known is not None or timer is None:
            return known or candidates[0]
        seconds = _measure(candidates, launch, timer)
        best = min(seconds, key=seconds.__getitem__)
        if seconds[candidates[0]] <= TIE * seconds[best]:
            best = candidates[0]
        times = {"x".join(map(str, tile)): 1e6 * time for tile, time in seconds.items()}
        self.file(device).add(key, Decision(best, times))
        return best

    def prepare(
        self,
        key: str,
        candidates: Sequence[Choice],
        device: torch.device,
        build: Callable[[Choice], Prepared],
    ) -> Prepared:
        """Return a launch with the tile that `choose` says, if need be measured when it is first called.

        build: prepares the launch with a tile, and leaves it with its launcher.
        """
        known = self.known(key, candidates, device)
        if known is None and len(candidates) > 1 and self.timer(device) is not None:
            return _Undecided(self, key, candidates, device, build)
        return build(known or candidates[0])


class _Undecided(Prepared):
    """A launch that measures its tiles on the tensors of its first call."""

    __slots__ = ("_build", "_candidates", "_device", "_key", "_tuner")

    def __init__(
        self,
        tuner: Tuner,
        key: str,
        candidates: Sequence[Choice],
        device: torch.device,
        build: Callable[[Choice], Prepared],
    ) -> None:
        self._tuner, self._key, self._candidates = tuner, key, candidates
        self._device, self._build = device, build
        self.kept = build(candidates[0]).kept

    def __call__(self, tensors: Sequence[Tensor | None], volatile: tuple[int, ...] = ()) -> None:
        """Measure, launch, and leave the chosen launch with the launcher."""
        built: dict[Choice, Prepared] = {}

        def launch(tile: Choice) -> None:
            if tile not in built:
                built[tile] = self._build(tile)
            built[tile](tensors, volatile)

        tile = self._tuner.choose(self._key, self._candidates, self._device, launch)
        self._build(tile)(tensors, volatile)


def _measure(
    candidates: Sequence[Choice], launch: Callable[[Choice], object], timer: Timer
) -> dict[Choice, float]:
    """Return the seconds of every candidate that runs: the median of rounds, in which all take turns."""
    launch(candidates[0])
    running = [candidates[0]]
    for tile in candidates[1:]:
        try:
            launch(tile)
        except Exception:  # no code for it, or too many registers; a broken GPU breaks the constant too
            continue
        running.append(tile)
    rounds = [{tile: timer(lambda tile=tile: launch(tile)) for tile in running} for _ in range(_ROUNDS)]
    return {tile: statistics.median(times[tile] for times in rounds) for tile in running}


def key_of(kernel: str, variant: Sequence[object], shape: Sequence[int]) -> str:
    """Return the name of a kind of launch: kernel, variant, and the class of a matrix [R, C].

    A class is the next powers of two, columns up to `MAX_CLASS_COLUMNS` and then rows up to
    `MAX_CLASS_ELEMENTS` in all: larger ones fill the GPU in the same way.
    """
    rows, cols = map(next_power_of_two, shape)
    cols = min(cols, MAX_CLASS_COLUMNS)
    rows = min(rows, MAX_CLASS_ELEMENTS // cols)
    return "/".join((kernel, *map(str, variant), f"{rows}x{cols}"))


def dtype_name(dtype: torch.dtype) -> str:
    """Return fp32, bf16 and the like, for a key."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def around(
    constant: Choice, least: tuple[int, int], most: tuple[int, int], *, is_column_major: bool
) -> tuple[Choice, ...]:
    """Return up to six candidates, the constant first: (rows, columns, warps), powers of two.

    least, most: rows and columns that a tile may have. is_column_major: the matrix lies along its rows.
    """
    rows, cols, warps = constant
    along, across = (rows, cols) if is_column_major else (cols, rows)
    found = [constant]
    for length, width, count in (
        (along, across, warps // 2),
        (along, across, 2 * warps),
        (along, 2 * across, 2 * warps),
        (2 * along, across, 2 * warps),
        (2 * along, across // 2, warps),
        (along // 2, across, max(1, warps // 2)),
    ):
        shape = (length, width) if is_column_major else (width, length)
        fits = all(low <= size <= max(low, high) for size, low, high in zip(shape, least, most, strict=True))
        per_thread = length * width // (32 * max(1, count))
        if fits and 1 <= count <= _MAX_WARPS and 1 <= per_thread <= _MAX_PER_THREAD:
            found.append((*shape, count))
    return tuple(dict.fromkeys(found))[:_MAX_CANDIDATES]


_tuner = Tuner()
choose, known, measuring, prepare, tile_file = (
    _tuner.choose, _tuner.known, _tuner.measuring, _tuner.prepare, _tuner.file,
)  # fmt: skip
"""Of the process."""

"""Checkpoint directories on disk: names, the tracker file, the commit of a finished save, and what is
deleted when.

One idea: a directory called `iter_0000010` is always complete. A save is written to
`.iter_0000010.incomplete` and renamed when every rank is done; only then the tracker
`latest_checkpointed_iteration.txt` is replaced. So a crash, a full disk or a SIGKILL at any moment leaves
the previous checkpoint and the tracker that names it.

Traps: saving the same iteration again swaps two directories in two renames. A crash between them leaves the
old one under `.iter_0000010.replaced`; `recover_interrupted_swap` brings it back before the next load or
save. All functions here run on one rank only (rank 0) and touch no tensors.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from metis.errors import CheckpointError

TRACKER_NAME = "latest_checkpointed_iteration.txt"
RELEASE = "release"
METADATA_NAME = "metadata.json"  # megatron-core writes it last, and only when every shard is on disk
_ITERATION_DIRECTORY = re.compile(r"^iter_(\d{7,})$")
_LEFTOVER_DIRECTORY = re.compile(r"^\.iter_\d{7,}\.(incomplete|deleting|replaced)$")
_REPLACED_DIRECTORY = re.compile(r"^\.iter_(\d{7,})\.replaced$")


def checkpoint_directory(root: str | Path, iteration: int, *, release: bool = False) -> Path:
    """Return `ROOT/iter_0000010` (seven digits), or `ROOT/release` for converted weights."""
    return Path(root) / (RELEASE if release else f"iter_{iteration:07d}")


def staging_directory(root: str | Path, iteration: int) -> Path:
    """Return the directory that a save is written to before it is complete."""
    return Path(root) / f".iter_{iteration:07d}.incomplete"


def is_complete(directory: Path) -> bool:
    """Tell whether `directory` holds a finished torch_dist checkpoint."""
    return (directory / METADATA_NAME).is_file() and (directory / ".metadata").is_file()


def list_iterations(root: str | Path) -> list[int]:
    """Return the iterations of all complete checkpoints below `root`, ascending."""
    root = Path(root)
    if not root.is_dir():
        return []
    matches = ((entry, _ITERATION_DIRECTORY.match(entry.name)) for entry in root.iterdir())
    return sorted(int(match.group(1)) for entry, match in matches if match and is_complete(entry))


def read_tracker(root: str | Path) -> tuple[int, bool] | None:
    """Return `(iteration, is_release)` from the tracker file, or None when there is none.

    Raises CheckpointError when the file holds neither a decimal iteration nor the word `release`.
    """
    path = Path(root) / TRACKER_NAME
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(str(path), f"must be readable, received: {error}") from error
    if text == RELEASE:
        return 0, True
    if not text.isdecimal():
        raise CheckpointError(
            str(path),
            f"must hold a decimal iteration or the word {RELEASE!r}, received {text[:40]!r}; "
            f"{_available(root)}write one of them into the file or pass --ckpt-step",
        )
    return int(text), False


def find_checkpoint(root: str | Path, ckpt_step: int | None) -> tuple[Path, int, bool] | None:
    """Return `(directory, iteration, is_release)` that a run loads from `root`, or None when `root` has no
    tracker.

    `ckpt_step` (`--ckpt-step`) overrides the tracker. Raises CheckpointError when the named directory is
    missing or was never completed; the message lists the iterations that are there.
    """
    if ckpt_step is None:
        found = read_tracker(root)
        if found is None:
            return None
        (iteration, release), source = found, f"{TRACKER_NAME} names"
    else:
        (iteration, release), source = (ckpt_step, False), "--ckpt-step names"
    directory = checkpoint_directory(root, iteration, release=release)
    if not is_complete(directory):
        state = "incomplete" if directory.exists() else "missing"
        raise CheckpointError(
            str(directory), f"{source} this checkpoint, but it is {state}; {_available(root)}pass --ckpt-step"
        )
    return directory, iteration, release


def _available(root: str | Path) -> str:
    iterations = list_iterations(root)
    return f"complete checkpoints are {', '.join(map(str, iterations))}; " if iterations else ""


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that readers see the old or the new content, never a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk; file systems that cannot do that are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def prepare_staging(root: str | Path, iteration: int) -> Path:
    """Create an empty staging directory for `iteration` after removing what interrupted saves have left
    behind.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    recover_interrupted_swap(root)
    for leftover in _leftovers(root):
        shutil.rmtree(leftover)
    staging = staging_directory(root, iteration)
    staging.mkdir()
    return staging


def _leftovers(root: Path) -> Iterator[Path]:
    return (entry for entry in list(root.iterdir()) if _LEFTOVER_DIRECTORY.match(entry.name))


def recover_interrupted_swap(root: str | Path) -> None:
    """Put back a checkpoint that a crash caught in the middle of being replaced by a newer save of its
    iteration.
    """
    root = Path(root)
    if not root.is_dir():
        return
    for entry in list(root.iterdir()):
        match = _REPLACED_DIRECTORY.match(entry.name)
        if match and not (directory := checkpoint_directory(root, int(match.group(1)))).exists():
            os.rename(entry, directory)


def commit(root: str | Path, iteration: int) -> Path:
    """Turn the complete staging directory into `iter_XXXXXXX` and point the tracker at it; return the
    directory.
    """
    root = Path(root)
    staging, directory = staging_directory(root, iteration), checkpoint_directory(root, iteration)
    assert is_complete(staging), staging
    for name in ("common.pt", ".metadata", METADATA_NAME):
        with open(staging / name, "rb") as stream:
            os.fsync(stream.fileno())
    sync_directory(staging)
    replaced = root / f".{directory.name}.replaced"
    if directory.exists():
        os.rename(directory, replaced)
    os.rename(staging, directory)
    sync_directory(root)
    write_atomically(root / TRACKER_NAME, str(iteration))
    if replaced.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    return directory


def iterations_to_delete(
    iterations: list[int], saved: int, *, retain_interval: int | None, keep_last: int | None
) -> list[int]:
    """Return which of `iterations` go away after iteration `saved` is complete, ascending.

    Without either option nothing does. `retain_interval` (`--save-retain-interval`) keeps the multiples of
    itself for good, `keep_last` (`--keep-last-checkpoints`) the newest so many; `retain_interval` alone
    keeps the newest one. Later iterations than `saved` belong to another branch of the run and are never
    touched.
    """
    if retain_interval is None and keep_last is None:
        return []
    past = sorted(iteration for iteration in iterations if iteration <= saved)
    newest = set(past[-max(keep_last or 1, 1) :]) | {saved}
    kept = {iteration for iteration in past if retain_interval and iteration % retain_interval == 0}
    return [iteration for iteration in past if iteration not in newest | kept]


def delete_checkpoint(root: str | Path, iteration: int) -> None:
    """Delete one checkpoint; it stops being a checkpoint (by rename) before the first of its files goes."""
    directory = checkpoint_directory(root, iteration)
    doomed = Path(root) / f".{directory.name}.deleting"
    os.rename(directory, doomed)
    shutil.rmtree(doomed)

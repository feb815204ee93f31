"""What every benchmark prints: where and on what it ran, and one table; the same as JSON.

The table is Markdown, so that it goes into docs/performance.md as it is. A commit is read from git; in a copy
without a repository METIS_COMMIT in the environment says it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from metis.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
_PACKAGES = ("triton", "megatron-core", "transformer-engine")
_VARIABLES = ("NCCL_NVLS_ENABLE", "CUDA_DEVICE_MAX_CONNECTIONS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table: key of a row, heading, and how many digits follow the point."""

    key: str
    title: str
    digits: int | None = None

    def text(self, row: Mapping[str, Any]) -> str:
        """Return a row's cell; `-` for what it does not have."""
        value = row.get(self.key)
        if value is None:
            return "-"
        return f"{value:.{self.digits}f}" if self.digits is not None else str(value)


def heading(device: torch.device) -> dict[str, str]:
    """Return device, versions, commit and command line of this run."""
    versions = {name: _version(name) for name in _PACKAGES}
    if device.type == "cuda":
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    else:
        hardware = f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": hardware,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        **{name: version or "none" for name, version in versions.items()},
        "environment": " ".join(f"{name}={value}" for name, value in variables.items()) or "-",
        "commit": commit(),
        "command": command_line(),
    }


def command_line() -> str:
    """Return what was typed to start this process."""
    return shlex.join(sys.orig_argv)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Return the checkout's commit and whether files differ from it; METIS_COMMIT where this is no checkout,
    as in a copy that lies in some other one.
    """
    stated = os.environ.get("METIS_COMMIT")
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != REPOSITORY.resolve():
            return stated or "unknown"
        name = _git("rev-parse", "--short", "HEAD")
        edits = _git("status", "--porcelain", "--untracked-files=normal")
    except (OSError, subprocess.CalledProcessError):
        return stated or "unknown"
    return f"{name} with uncommitted edits" if edits else name


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table; a row with a `reason` shows that in place of its numbers."""
    cells = [[column.title for column in columns]]
    for row in rows:
        texts = [column.text(row) for column in columns]
        if row.get("reason"):
            texts[-1] = f"not measured: {row['reason']}"
        cells.append(texts)
    # The last column may hold a reason; it is not padded to the longest of them.
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns) - 1)]
    widths.append(len(columns[-1].title))
    lines = [
        "| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    ruler = "| " + " | ".join("-" * max(3, width) for width in widths) + " |"
    return "\n".join([lines[0], ruler, *lines[1:]])


def show(
    head: Mapping[str, str],
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> None:
    """Print heading, notes and the table, which comes last."""
    width = max(map(len, head))
    text = [f"{name:{width}}  {value}" for name, value in head.items()]
    text += ["", *notes, *([""] if notes else []), table(columns, rows), ""]
    sys.stdout.write("\n".join(text))
    sys.stdout.flush()


def require_writable(path: str | None) -> None:
    """Refuse a `--json` file that cannot be written, before anything is measured."""
    if path is None:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).open("a", encoding="utf-8").close()
    except OSError as error:
        raise ConfigError("--json", f"must be writable, received {path} ({error})") from None


def write_json(path: str | None, **content: Any) -> None:
    """Write everything that was measured, if a file was asked for."""
    if path is not None:
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

"""What a patch of megatron-core is, and how patches are verified, installed and documented.

One idea: a patch is an apology with an expiry date. It names one upstream symptom, the symbols it replaces
with the hash of the source it was written against, the call paths it reaches and the day it can be deleted.
If upstream differs from that source, `PatchMismatch` stops the run before anything was changed: a patch
applied to code that nobody has read is worse than none.

Traps: a symbol that other modules imported by name (`from x import f`) lives in several places, all of which
must be listed as targets; hashes are of `inspect.getsource`, so they see comments and decorators too.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

MEGATRON_CORE_VERSION = "0.16.1"
DEVICES = ("cpu", "cuda")
_MARK = "__megatron_patch__"


class PatchMismatch(RuntimeError):  # noqa: N818 - it says what happened
    """The installed megatron-core is not the one that a patch was written for.

    Attributes: `path` (dotted path of the symbol), `expected` and `received` (source hashes, or versions),
    `version` (of megatron-core as found).
    """

    def __init__(self, path: str, expected: str, received: str, version: str) -> None:
        super().__init__(
            f"{path}: expected {expected}, found {received} in megatron-core {version}; install "
            f"megatron-core {MEGATRON_CORE_VERSION}, or read the new source and update or delete the patch"
        )
        self.path = path
        self.expected = expected
        self.received = received
        self.version = version


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One upstream symbol.

    `path` is its dotted path. `source_hash` is the sha256 of its source; None for symbols of torch, which is
    not pinned to one version: those are only required to exist. `optional` targets may be absent (a name that
    exists only with Transformer Engine).
    """

    path: str
    source_hash: str | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One upstream symptom and its cure.

    `replace(original, path)` returns what takes the place of each target; it is called once per target. A
    patch that changes state rather than symbols (a function mode, a flag) has `activate`, which returns
    whether it changed something. `relies_on`: symbols that stay in place but must be those the patch was
    written for. `devices`: where it applies; `only_exact`: only in the exact mode; `on_request`: only through
    a function of its own, because it needs something that its caller has. `upstream`: file and lines at
    megatron-core 0.16.1.
    """

    name: str
    why: str
    reaches: str
    upstream: str
    delete_when: str
    devices: tuple[str, ...] = DEVICES
    only_exact: bool = False
    on_request: bool = False
    targets: tuple[Target, ...] = ()
    relies_on: tuple[Target, ...] = ()
    replace: Callable[[Any, str], Any] | None = None
    activate: Callable[[], bool] | None = None


def megatron_core_version() -> str:
    """Return the version of the megatron-core that is importable."""
    return importlib.import_module("megatron.core.package_info").__version__


def source_hash(symbol: Any) -> str:
    """Return the sha256 (hex) of the source text of a Python function, method or class."""
    return hashlib.sha256(inspect.getsource(symbol).encode()).hexdigest()


def resolve(path: str) -> tuple[Any, str, Any]:
    """Return (owner, attribute name, value) for a dotted path, importing the longest prefix that is a module.

    The value is read without binding, so that a staticmethod stays one. Raises `PatchMismatch` if nothing is
    there.
    """
    parts = path.split(".")
    owner: Any = None
    for length in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:length])
        try:
            owner = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            continue
        break
    else:
        raise PatchMismatch(path, "a module", "none of that name", megatron_core_version())
    try:
        for name in parts[length:-1]:
            owner = getattr(owner, name)
        return owner, parts[-1], inspect.getattr_static(owner, parts[-1])
    except AttributeError as error:
        raise PatchMismatch(path, "a symbol", f"none ({error})", megatron_core_version()) from None


def original_of(path: str) -> Any:
    """Return the upstream symbol behind a dotted path, patched or not."""
    _, _, value = resolve(path)
    while is_patched(value):
        value = _unwrap_static(value).__wrapped__
    return value


def is_patched(value: Any) -> bool:
    """Return whether a symbol was put in place by this package."""
    return hasattr(_unwrap_static(value), _MARK)


def _unwrap_static(value: Any) -> Any:
    return value.__func__ if isinstance(value, staticmethod) else value


def _present(target: Target) -> bool:
    if not target.optional:
        return True
    try:
        return resolve(target.path)[2] is not None
    except (PatchMismatch, ImportError):
        return False


def verify(patches: Sequence[Patch]) -> None:
    """Check version, existence and source hash of every target; raise `PatchMismatch` on the first
    difference.

    Symbols that are patched already are checked by the original behind them.
    """
    version = megatron_core_version()
    if version != MEGATRON_CORE_VERSION:
        raise PatchMismatch(
            "megatron.core", f"version {MEGATRON_CORE_VERSION}", f"version {version}", version
        )
    for patch in patches:
        for target in (*patch.targets, *patch.relies_on):
            if not _present(target):
                continue
            original = original_of(target.path)
            if target.source_hash is None:
                continue
            received = source_hash(_unwrap_static(original))
            if received != target.source_hash:
                raise PatchMismatch(
                    target.path, f"source {target.source_hash[:16]}", f"source {received[:16]}", version
                )


def install(patches: Sequence[Patch]) -> list[str]:
    """Verify all patches, then install those that are not in place; return the names of the newly installed
    ones.

    Nothing is changed if any of them does not match. Each installed patch logs one line.
    """
    verify(patches)
    installed = []
    for patch in patches:
        changed = patch.activate() if patch.activate is not None else False
        for target in patch.targets:
            if _present(target):
                changed |= _replace(patch, target)
        if changed:
            installed.append(patch.name)
            logger.info("megatron_patches: %s (%s)", patch.name, patch.why)
    return installed


def _replace(patch: Patch, target: Target) -> bool:
    owner, name, value = resolve(target.path)
    if is_patched(value):
        return False
    assert patch.replace is not None, patch.name
    replacement = patch.replace(_unwrap_static(value), target.path)
    setattr(replacement, _MARK, patch.name)
    replacement.__wrapped__ = _unwrap_static(value)
    setattr(owner, name, staticmethod(replacement) if isinstance(value, staticmethod) else replacement)
    return True


def table(patches: Sequence[Patch]) -> str:
    """Return the patches as text: one paragraph each, in the order in which they are applied."""
    blocks = []
    for patch in patches:
        lines = [f"{patch.name}  [{', '.join(patch.devices)}]"]
        lines += [f"  target       {_describe(target)}" for target in patch.targets]
        lines += [f"  relies on    {_describe(target)}" for target in patch.relies_on]
        lines += [
            f"  why          {patch.why}",
            f"  reaches      {patch.reaches}",
            f"  upstream     {patch.upstream}",
            f"  delete when  {patch.delete_when}",
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _describe(target: Target) -> str:
    suffix = f"  sha256 {target.source_hash[:16]}" if target.source_hash else ""
    return f"{target.path}{suffix}{'  (if present)' if target.optional else ''}"

"""Exceptions for users. Each message is one sentence: where, what must hold, what was received, what to do.

Internal invariants use `assert`; these classes are for mistakes that a user can make and mend. Entry scripts
turn them into the single line `error: <where>: <message>` and exit status 2, without a traceback
(`report_and_exit`).
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

USER_ERROR_EXIT_STATUS = 2
_SECONDS_TO_PRINT = 2.0


class MetisError(Exception):
    """Base of all errors that are meant for users.

    `where` names the place (an option, a file, a module path), `message` says what must hold, what was
    received and what to do about it.
    """

    found_by_one_rank = False  # True: other ranks do not raise it, so whichever rank does has to print it

    def __init__(self, where: str, message: str = "") -> None:
        # One argument: somebody re-raised `type(error)(text)`, as megatron-core does when a module is built.
        super().__init__(f"{where}: {message}" if message else where)
        self.where = where
        self.message = message


class ConfigError(MetisError, ValueError):
    """A setting, file or combination of settings that cannot work."""


class ShapeError(MetisError, ValueError):
    """A tensor whose shape or dtype the operation cannot take."""


class CheckpointError(MetisError, RuntimeError):
    """A checkpoint that is missing, damaged, or belongs to another run."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are `ConfigError`s, so that they end in one line like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError at the option that argparse names."""
        match = re.match(r"argument ([^\s:]+): (.*)", message, re.DOTALL)
        where, what = match.groups() if match else ("command line", message)
        raise ConfigError(where.split("/")[0], f"{what}; see --help")


def report_and_exit(error: MetisError) -> NoReturn:
    """Print `error: <where>: <message>` once per node and leave with status 2 on every rank.

    Most checks run identically on every rank, so only local rank 0 prints and the others leave silently with
    the same status; what a single rank has found (`found_by_one_rank`) that rank prints.
    """
    if error.found_by_one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)  # noqa: T201
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun kills all ranks as soon as one has left; rank 0 must have printed by then.
        time.sleep(_SECONDS_TO_PRINT)
    sys.exit(USER_ERROR_EXIT_STATUS)

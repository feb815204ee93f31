"""The two words that argument checks are written in: `require` and `warn`."""

from __future__ import annotations

import sys
from argparse import Namespace

from metis.errors import ConfigError


def require(condition: bool, where: str, message: str) -> None:
    """Raise `ConfigError(where, message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(where, message)


def warn(args: Namespace, text: str) -> None:
    """Print a warning on standard error, on rank 0 only."""
    if args.rank == 0:
        print(f"WARNING: {text}", file=sys.stderr, flush=True)

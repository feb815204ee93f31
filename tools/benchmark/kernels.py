"""Time every kernel against a bf16 clone of the same matrix, the floor of whatever reads and writes it.

    python tools/benchmark/kernels.py                                        # 8192x4096
    python tools/benchmark/kernels.py --model llama3-8b --tokens 8192        # the matrices of a block
    python tools/benchmark/kernels.py --model llama3-8b --tune               # choose tiles for later
    python tools/benchmark/kernels.py --shapes 8192x4096 8192x14336 --only '1x16 sr*' --json runs/kernels.json
    TRITON_INTERPRET=1 python tools/benchmark/kernels.py --device cpu --shapes 32x64 --calls 2   # every path

Prints one table: median and interquartile range in microseconds, the time the host needs to launch, the bytes
that must move, their share of the copy's bandwidth, the ratio to the copy (of BF16 in the same run), and of a
variant to its plain form. With --tune a second table says which tiles were chosen before that. The measuring
is in `metis/benchmark/kernel_cases.py`, the choosing in `metis/kernels/tuning.py`.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In place of this folder, whose file names are those of packages.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from metis.benchmark.shapes import matrices_of, parse_shape, require_tokens
from metis.errors import ArgumentParser, ConfigError, MetisError, report_and_exit

if TYPE_CHECKING:
    import torch


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's values, shapes as pairs of numbers."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shapes", nargs="+", metavar="RxC", help="[default: 8192x4096]")
    which.add_argument("--model", help="preset: inputs, output gradients and weights of its block")
    parser.add_argument("--tokens", type=int, default=8192, help="rows, with --model [default: 8192]")
    parser.add_argument("--only", metavar="GLOB", help="rows by name; what they are compared with stays")
    parser.add_argument("--tiles", action="store_true", help="every tile shape of the main kernels too")
    parser.add_argument(
        "--tune", action="store_true",
        help="choose a tile for every kind of launch that has none yet (METIS_CACHE_DIR or ~/.cache/metis)",
    )  # fmt: skip
    parser.add_argument("--calls", type=int, default=60, help="timed calls per row [default: 60]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[default: auto]")
    parser.add_argument("--json", metavar="FILE", help="write everything there too")
    args = parser.parse_args(argv)
    if args.calls < 1:
        raise ConfigError("--calls", f"must be at least 1, received {args.calls}")
    if args.model is not None:
        args.matrices = matrices_of(args.model, require_tokens(args.tokens))
    else:
        args.matrices = [parse_shape("--shapes", text) for text in args.shapes or ["8192x4096"]]
    return args


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; 1 when a kernel that should run did not."""
    # Loaded here: a mistyped option is answered without torch.
    from metis.benchmark import kernel_cases, report
    from metis.benchmark.timing import Stopwatch, require_device
    from metis.kernels import is_available, tuning

    report.require_writable(args.json)
    device = require_device(args.device)
    if args.tune and (device.type != "cuda" or not is_available(device)):
        raise ConfigError("--tune", f"times kernels on a GPU, received {device}; leave it out")
    stopwatch = Stopwatch(device)
    rows = []
    with tuning.measuring() if args.tune else nullcontext():
        for shape in args.matrices:
            cases = kernel_cases.kernel_cases(*shape, device, tiles=args.tiles)
            rows += kernel_cases.measure(kernel_cases.select(cases, args.only), shape, stopwatch, args.calls)
    columns = (
        report.Column("shape", "bf16 matrix"),
        report.Column("name", "kernel"),
        report.Column("us", "us, median", 1),
        report.Column("spread_us", "IQR", 1),
        report.Column("host_us", "host us", 1),
        report.Column("megabytes", "MB", 1),
        report.Column("gigabytes_per_second", "GB/s", 0),
        report.Column("of_copy_bandwidth", "of copy's GB/s", 2),
        report.Column("to_reference", "x plain form", 2),
        report.Column("to_copy", "x bf16 clone", 2),
    )
    head = report.heading(device)
    report.show(head, columns, rows, [f"median of {args.calls} calls; MB: read and written once"])
    tiles = _show_tiles(device) if args.tune else []
    report.write_json(args.json, heading=head, rows=rows, tiles=tiles)
    return 1 if any(row["failed"] for row in rows) else 0


def _show_tiles(device: torch.device) -> list[dict[str, Any]]:
    """Print and return what was tuned: one row per kind of launch."""
    from metis.benchmark import report
    from metis.kernels import tuning

    file = tuning.tile_file(device)
    rows = []
    for key, decision in file.measured.items():
        constant = next(iter(decision.microseconds.values()))
        tile = "x".join(map(str, decision.tile))
        chosen = decision.microseconds[tile]
        rows.append(
            {"key": key, "tile": tile, "us": chosen, "constant_us": constant, "gain": constant / chosen}
        )
    columns = (
        report.Column("key", "kind of launch"),
        report.Column("tile", "rows x columns x warps"),
        report.Column("us", "us", 1),
        report.Column("constant_us", "us, constant tile", 1),
        report.Column("gain", "gain", 2),
    )
    known = len(file.decisions) - len(rows)
    print(f"\n{len(rows)} kinds of launches measured, {known} known before; {file.path}\n")
    print(report.table(columns, rows))
    return rows


def main() -> int:
    """Parse and run; exit status 2 and one `error:` line on bad input."""
    try:
        return run(parse_arguments())
    except MetisError as error:
        report_and_exit(error)


if __name__ == "__main__":
    sys.exit(main())

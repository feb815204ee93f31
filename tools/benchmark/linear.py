"""Time forward and backward of one linear under every recipe against torch.nn.Linear in bf16.

    python tools/benchmark/linear.py                                         # 4096x4096 and 4096x14336
    python tools/benchmark/linear.py --model llama3-8b --tokens 8192 --microbatches-per-step 4
    python tools/benchmark/linear.py --shape 4096x14336 --recipes nvfp4,metis,my_recipe.yaml --gradient grad
    python tools/benchmark/linear.py --device cpu --shape 64x96 --tokens 64 --rounds 10     # every path

Prints one table: milliseconds per step (median and interquartile range of the steps that renew no basis),
what a refresh costs and its share when spread over its interval, the host's time, TFLOP/s, the share of three
bare products of the same shape, memory, and the ratio to torch.nn.Linear with the same kind of gradient.
Where every timed step renews bases, the numbers are those of such steps, and a note says so. A step is N
microbatches (`--microbatches-per-step`), whose weights are the same. Contenders take turns. Transformer
Engine's linear takes part where it is installed. The measuring is in `metis/benchmark/linear_cases.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# In place of this folder, whose file names are those of packages.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from metis.benchmark.shapes import LinearShape, linears_of, parse_shape, require_distinct, require_tokens
from metis.errors import ArgumentParser, ConfigError, MetisError, report_and_exit
from metis.recipes import resolve_recipe


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's values, shapes and recipes resolved."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shape", nargs="+", metavar="KxN", help="in x out features [default: 4096x4096 4096x14336]"
    )
    which.add_argument("--model", help="preset: the four linears of its block")
    parser.add_argument("--tokens", type=int, default=8192, help="of a microbatch [default: 8192]")
    parser.add_argument("--recipes", default="bf16,nvfp4,metis", help="names or files [default: %(default)s]")
    parser.add_argument("--gradient", choices=("grad", "main_grad", "both"), default="both")
    parser.add_argument("--microbatches-per-step", type=int, default=1, metavar="N", help="[default: 1]")
    parser.add_argument("--rounds", type=int, default=64, help="timed steps of each [default: 64]")
    parser.add_argument("--quantize-kernels", choices=("auto", "triton", "torch"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[default: auto]")
    parser.add_argument("--json", metavar="FILE", help="write everything there too")
    args = parser.parse_args(argv)
    for option in ("microbatches_per_step", "rounds"):
        if getattr(args, option) < 1:
            name = f"--{option.replace('_', '-')}"
            raise ConfigError(name, f"must be at least 1, received {getattr(args, option)}")
    require_tokens(args.tokens)
    if args.model is not None:
        args.linears = linears_of(args.model)
    else:
        sizes = [parse_shape("--shape", text) for text in args.shape or ["4096x4096", "4096x14336"]]
        args.linears = [LinearShape(f"{k}x{n}", k, n) for k, n in sizes]
    recipes = args.recipes.split(",")
    args.resolved_recipes = [resolve_recipe(name) for name in recipes]
    require_distinct("--recipes", recipes, [recipe.name for recipe in args.resolved_recipes])
    return args


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; 1 when a contender that should run did not."""
    # Loaded here: a mistyped option is answered without torch.
    from metis.benchmark import linear_cases, report
    from metis.benchmark.timing import Stopwatch, require_device

    report.require_writable(args.json)
    device = require_device(args.device)
    stopwatch = Stopwatch(device)
    gradients = linear_cases.GRADIENTS if args.gradient == "both" else (args.gradient,)
    rows = []
    for shape in args.linears:
        job = linear_cases.LinearJob(
            shape=shape,
            tokens=args.tokens,
            num_microbatches=args.microbatches_per_step,
            num_rounds=args.rounds,
        )
        rows += linear_cases.measure(job, args.resolved_recipes, gradients, stopwatch, args.quantize_kernels)
    columns = (
        report.Column("shape", "in x out"),
        report.Column("name", "linear"),
        report.Column("gradient", "dw"),
        report.Column("ms", "ms, median", 3),
        report.Column("spread_ms", "IQR", 3),
        report.Column("host_ms", "host ms", 2),
        report.Column("refresh_ms", "ms per refresh", 2),
        report.Column("refresh_percent", "refresh %", 2),
        report.Column("tflops", "TFLOP/s", 1),
        report.Column("of_ceiling", "of three products", 2),
        report.Column("memory_mb", "MB", 0),
        report.Column("to_bf16", "x nn.Linear", 3),
    )
    head = report.heading(device)
    notes = [
        f"forward + backward of {args.microbatches_per_step} microbatch(es) of {args.tokens} tokens per "
        "step; "
        f"median of {args.rounds} rounds in turn"
    ]
    notes += [
        f"every timed step of {name} renews bases: its numbers are those of such steps"
        for name in dict.fromkeys(row["name"] for row in rows if row.get("refreshes_always"))
    ]
    report.show(head, columns, rows, notes)
    report.write_json(args.json, heading=head, rows=rows)
    return 1 if any(row["failed"] for row in rows) else 0


def main() -> int:
    """Parse and run; exit status 2 and one `error:` line on bad input."""
    try:
        return run(parse_arguments())
    except MetisError as error:
        report_and_exit(error)


if __name__ == "__main__":
    sys.exit(main())

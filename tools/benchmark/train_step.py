"""Time optimizer steps of the trainer under each recipe, on one GPU or several.

    python tools/benchmark/train_step.py --preset llama3-8b-4layers --transformer-engine --profile
    python tools/benchmark/train_step.py --preset llama-125m -- --micro-batch-size 16 --global-batch-size 32
    python tools/benchmark/train_step.py --preset llama3-8b-4layers --gpus 2 -- \
        --tensor-model-parallel-size 2 --sequence-parallel
    python tools/benchmark/train_step.py --device cpu --preset tiny --steps 4 --warmup 1 -- --vocab-size 255

Options after `--` go to the trainer (`pretrain_llama.py --help`) and win over the preset's. `--preset` takes
the trainer's presets and three models for measuring: llama3-8b-4layers (four 8B-shaped layers, sequences of
4096, four microbatches, a vocabulary of 32,000 so that logits do not dominate); llama-125m and llama-30m,
whose steps are captured in CUDA graphs on a GPU (`-- --cuda-graph-impl none` launches them kernel by kernel).
Each recipe runs in a process of its own on mock data; for several ranks this program starts torchrun itself.

Prints one table: milliseconds per step (median and interquartile range of the steps that renew no basis;
median of those that do; the mean over a refresh interval), tokens and model FLOPs per second by that mean,
the share of a large product's FLOP/s measured in the same run, peak memory of the fullest GPU, and the ratio
to our own bf16; `-` for what the timed steps do not say. `--profile` prints GPU time by category before it.
The measuring is in `metis/benchmark/step_runs.py`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

# In place of this folder, whose file names are those of packages.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from metis.benchmark.shapes import step_model
from metis.errors import ArgumentParser, ConfigError, MetisError, report_and_exit

NUM_PROFILED = 3


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the command line's values; `more` holds what follows `--`."""
    own, more = argv, []
    if "--" in argv:
        own, more = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", default="llama3-8b-4layers", help="[default: %(default)s]")
    parser.add_argument("--recipes", default="bf16,nvfp4,metis", help="names or files [default: %(default)s]")
    parser.add_argument("--transformer-engine", action="store_true", help="bf16 by its modules too")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks, on one node [default: 1]")
    parser.add_argument("--warmup", type=int, default=8, help="steps to drop [default: 8]")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each [default: 40]")
    parser.add_argument("--repeat", type=int, default=1, help="rounds over all recipes [default: 1]")
    parser.add_argument("--profile", action="store_true", help=f"trace {NUM_PROFILED} more steps")
    parser.add_argument("--timeout-seconds", type=float, default=600.0, help="of one run [default: 600]")
    parser.add_argument("--keep", metavar="DIR", help="keep logs, metrics files and traces there")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[default: auto]")
    parser.add_argument("--json", metavar="FILE", help="write everything there too")
    args = parser.parse_args(own)
    args.more, args.model = more, step_model(args.preset)
    for option, least in (("gpus", 1), ("warmup", 0), ("steps", 1), ("repeat", 1)):
        if getattr(args, option) < least:
            raise ConfigError(f"--{option}", f"must be at least {least}, received {getattr(args, option)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "torchrun",
            f"must not start this program, which starts it itself for each recipe; use --gpus "
            f"{os.environ['WORLD_SIZE']}",
        )
    return args


def run(args: argparse.Namespace, scratch: Path) -> int:
    """Check all command lines, train, print and write; 1 when a run failed."""
    from metis.benchmark import report, step_runs
    from metis.benchmark.timing import require_kind

    report.require_writable(args.json)
    settings = step_runs.StepSettings(
        model=args.model,
        device=require_kind(args.device),
        num_gpus=args.gpus,
        warmup=args.warmup,
        num_steps=args.steps,
        num_profiled=NUM_PROFILED if args.profile else 0,
        more=args.more,
        timeout_seconds=args.timeout_seconds,
    )
    contenders = step_runs.contenders(args.recipes.split(","), args.transformer_engine)
    for contender in contenders:
        step_runs.resolve(settings, contender)
    measured = step_runs.ceilings(settings.device)
    for number in range(args.repeat):
        for contender in contenders:
            folder = scratch / f"{contender.name.replace(', ', '-').replace(' ', '-')}-{number}"
            step_runs.run_contender(settings, contender, folder, step_runs.launch_process)
    rows = step_runs.rows_of(settings, contenders, measured["gemm_flops_per_second"])
    head = measured["heading"] | {"command": report.command_line()}
    notes = [model_line(args, contenders[0].config), ceiling_line(measured)]
    if args.profile:
        notes += ["", profile_table(rows)]
    report.show(head, columns(), rows, notes)
    configs = {contender.name: contender.config for contender in contenders}
    report.write_json(args.json, heading=head, ceilings=measured, configs=configs, rows=rows)
    return 1 if any(row["failed"] for row in rows) else 0


def model_line(args: argparse.Namespace, config: dict[str, Any]) -> str:
    """Return one line about what was trained."""
    model, training = config["model"], config["training"]
    parameters = config["parameters"]
    return (
        f"{args.preset}: {model['num_layers']} layers of hidden {model['hidden_size']}, ffn "
        f"{model['ffn_hidden_size']}, vocabulary {model['padded_vocab_size']}, "
        f"{'?' if parameters is None else f'{parameters / 1e6:.1f}'} M parameters; "
        f"{config['tokens_per_iteration']} tokens per step as {training['global_batch_size']} sequences of "
        f"{model['seq_length']}, micro batch {training['micro_batch_size']}; {args.gpus} rank(s); "
        f"{args.warmup} + "
        f"{args.steps} steps, {args.repeat} round(s)"
    )


def ceiling_line(measured: dict[str, Any]) -> str:
    """Return one line about the ceilings."""
    return (
        f"product {1e-12 * measured['gemm_flops_per_second']:.1f} TFLOP/s, copy "
        f"{1e-9 * measured['copy_bytes_per_second']:.0f} GB/s (read + written)"
    )


def profile_table(rows: list[dict[str, Any]]) -> str:
    """Return GPU milliseconds of a plain step by category, or of any where all renew bases; one column per
    contender.
    """
    from metis.benchmark.report import Column, table
    from metis.benchmark.step_profile import CATEGORIES

    profiled = [row for row in rows if row.get("profile")]
    lines = [{"category": name} for name in (*CATEGORIES, "any of them", "idle", "step", "launches")]
    for row in profiled:
        profile, step = row["profile"], row["amortised_ms"] if row["ms"] is None else row["ms"]
        idle = None if step is None else step - profile["busy_ms"]
        values = [profile["milliseconds"][name] for name in CATEGORIES]
        values += [profile["busy_ms"], idle, step, profile["num_kernels"]]
        for line, value in zip(lines, values, strict=True):
            line[row["name"]] = value
    columns = [Column("category", "ms per step"), *(Column(row["name"], row["name"], 2) for row in profiled)]
    return table(columns, lines)


def columns() -> tuple[Any, ...]:
    """Return the columns of the table of steps."""
    from metis.benchmark.report import Column

    return (
        Column("name", "recipe"),
        Column("quantized", "FP4 linears"),
        Column("ms", "ms, median", 1),
        Column("spread_ms", "IQR", 1),
        Column("refresh_ms", "ms, refresh", 1),
        Column("amortised_ms", "ms, mean", 1),
        Column("refresh_percent", "refresh %", 2),
        Column("tokens_per_second", "tokens/s", 0),
        Column("tflops", "TFLOP/s/GPU", 1),
        Column("of_ceiling", "of product", 2),
        Column("peak_gib", "peak GiB", 2),
        Column("to_bf16", "x bf16", 3),
    )


def main() -> int:
    """Parse and run; exit status 2 and one `error:` line on bad input."""
    # Whoever ends this process ends its runs too: they are in process groups of their own.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        args = parse_arguments(sys.argv[1:])
        if args.keep is not None:
            return run(args, Path(args.keep))
        with tempfile.TemporaryDirectory(prefix="train_step_") as scratch:
            return run(args, Path(scratch))
    except MetisError as error:
        report_and_exit(error)


if __name__ == "__main__":
    sys.exit(main())

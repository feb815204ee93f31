"""Training steps of several recipes: one process each, then their metrics side by side.

One idea: a contender is the trainer's command line; what it did is read from its metrics file. Steps that are
slow by design are told apart by the recipe: the warm-up is dropped, steps that renew bases are a group of
their own, and the mean over a refresh interval says what training costs.

Traps: contenders run one after another, so a drift of the clocks shows as a difference; `--repeat` goes round
again. FLOPs are the model's (`metis.training.accounting`), whatever the recipe multiplies.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from metis.benchmark.shapes import StepModel, require_distinct
from metis.benchmark.step_worker import WorkerJob
from metis.benchmark.timing import Samples
from metis.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
_LOG_END = 3000
_OURS = (
    "--preset", "--device", "--recipe", "--fp4-format", "--train-iters", "--train-samples", "--metrics-file",
    "--save", "--load", "--print-config",
)  # fmt: skip
"""Options of the trainer that the user must leave to the benchmark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What all contenders share.

    model: preset and its options. device: auto, cpu or cuda. num_gpus: ranks. warmup: dropped steps.
    num_steps: timed ones. num_profiled: traced afterwards, 0 for none. more: trainer options of the user,
    which come last and so win. timeout_seconds: of one process.
    """

    model: StepModel
    device: str
    num_gpus: int = 1
    warmup: int = 8
    num_steps: int = 40
    num_profiled: int = 0
    more: Sequence[str] = ()
    timeout_seconds: float = 600.0


@dataclass(slots=True)
class Contender:
    """One recipe (and implementation), its resolved configuration, and the steps that were timed."""

    name: str
    recipe: str
    implementation: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    plain: list[float] = field(default_factory=list)
    refresh: list[float] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    peak_bytes: int | None = None
    profile: dict[str, Any] | None = None
    reason: str | None = None

    @property
    def refresh_interval(self) -> int | None:
        """Steps from one renewal of the bases to the next, None where nothing is kept."""
        basis = self.config["recipe"].get("basis")
        return basis["refresh_interval_steps"] if basis and self.config["num_quantized_linears"] else None

    def take(self, rows: Sequence[dict[str, Any]], warmup: int) -> None:
        """Sort the lines of a metrics file into warm-up, plain and refreshing steps."""
        interval = self.refresh_interval
        self.losses = [row["lm_loss"] for row in rows]
        for row in rows:
            if row["iteration"] <= warmup:
                continue
            refreshing = interval is not None and row["iteration"] % interval == 0
            (self.refresh if refreshing else self.plain).append(row["step_seconds"])

    @property
    def amortised_seconds(self) -> float | None:
        """Mean step over a refresh interval, from the medians of its two kinds of steps.

        None where plain steps are part of it and none was timed.
        """
        plain, refresh, interval = _median(self.plain), _median(self.refresh), self.refresh_interval
        if interval == 1:
            return refresh
        if plain is None or refresh is None or interval is None:
            return plain
        return plain + (refresh - plain) / interval


def _median(seconds: Sequence[float]) -> float | None:
    return Samples(tuple(seconds)).median if seconds else None


Launch = Callable[[StepSettings, WorkerJob, Path], str | None]
"""Runs a worker; returns None, or why it failed. The path is a folder for its files."""


def contenders(recipes: Sequence[str], transformer_engine: bool) -> list[Contender]:
    """Return the runs to make: bf16 by Transformer Engine beside our own if asked for, then each recipe.

    Raises ConfigError for recipes that would have the same name.
    """
    names = [Path(recipe).name for recipe in recipes]
    require_distinct("--recipes", recipes, names)
    found = []
    for name, recipe in zip(names, recipes, strict=True):
        found.append(Contender(name, recipe, ("--transformer-impl", "local")))
        if transformer_engine and recipe == "bf16":
            implementation = ("--transformer-impl", "transformer_engine")
            found.append(Contender("bf16, Transformer Engine", recipe, implementation))
    return found


def trainer_options(settings: StepSettings, contender: Contender, num_iterations: int) -> list[str]:
    """Return the trainer's command line; later options win, the user's last."""
    options = [
        "--preset", settings.model.preset, "--mock-data",
        "--micro-batch-size", "1", "--global-batch-size", "4",
        "--lr", "1e-5", "--lr-decay-style", "constant", "--eval-iters", "0",
        "--log-interval", str(num_iterations), "--train-iters", str(num_iterations),
        "--device", settings.device, "--recipe", contender.recipe, *contender.implementation,
    ]  # fmt: skip
    options += ["--num-workers", "0"] if settings.device == "cpu" else ["--bf16"]
    if settings.model.is_small and settings.device == "cuda":
        options += ["--cuda-graph-impl", "local"]
    for option, value in settings.model.options.items():
        options += [option, str(value)]
    return options + list(settings.more)


def resolve(settings: StepSettings, contender: Contender) -> None:
    """Check a contender's command line without torch, and keep its resolved configuration.

    Raises ConfigError as the trainer would.
    """
    from metis.training.accounting import resolved_config
    from metis.training.arguments import parse_args, validate_args
    from metis.training.preflight import preflight

    _refuse_ours(settings.more)
    args = parse_args(
        [*trainer_options(settings, contender, num_iterations(settings, None)), "--print-config"]
    )
    args.world_size = settings.num_gpus
    validate_args(args, args.world_size)
    preflight(args)
    contender.config = resolved_config(args)


def _refuse_ours(more: Sequence[str]) -> None:
    """Refuse what is ours among the user's options, however the trainer lets it be spelled."""
    from metis.training.arguments import build_parser
    from metis.training.options import OPTIONS

    given, _ = build_parser().parse_known_args(list(more))
    for option in OPTIONS:
        if option.dest in given and option.flags[0] in _OURS:
            raise ConfigError(
                option.flags[0], "must not be among the trainer's options: the benchmark sets it; see --help"
            )


def profile_after(num_steps: int, num_profiled: int, interval: int | None) -> int:
    """Return the step after which to profile, so that after one more no profiled step renews bases."""
    after = num_steps
    while interval is not None and num_profiled < interval and any(
        (after + 1 + number) % interval == 0 for number in range(1, num_profiled + 1)
    ):  # fmt: skip
        after += 1
    return after


def num_iterations(settings: StepSettings, interval: int | None) -> int:
    """Return how many iterations a run makes in all."""
    timed = settings.warmup + settings.num_steps
    if not settings.num_profiled:
        return timed
    return profile_after(timed, settings.num_profiled, interval) + 1 + settings.num_profiled


def run_contender(settings: StepSettings, contender: Contender, scratch: Path, launch: Launch) -> None:
    """Train once and take in what the metrics file says; a failure becomes the contender's reason."""
    interval = contender.refresh_interval
    timed = settings.warmup + settings.num_steps
    scratch.mkdir(parents=True, exist_ok=True)
    metrics, result = scratch / "metrics.jsonl", scratch / "result.json"
    options = trainer_options(settings, contender, num_iterations(settings, interval))
    job = WorkerJob(
        options=[*options, "--metrics-file", str(metrics)],
        num_steps=timed,
        result=str(result),
        trace=str(scratch / "trace.json"),
        num_profiled=settings.num_profiled,
        profile_after=profile_after(timed, settings.num_profiled, interval),
    )
    contender.reason = launch(settings, job, scratch)
    if contender.reason is not None:
        return
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    contender.take(
        [row for row in rows if row["kind"] == "train" and row["iteration"] <= timed], settings.warmup
    )
    found = json.loads(result.read_text(encoding="utf-8"))
    contender.peak_bytes, contender.profile = found["peak_bytes"], found.get("profile")


def environment(options: Sequence[str] = ()) -> dict[str, str]:
    """Return this process's environment with our sources first and what the trainer's layouts want."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    connections = "8" if "--tp-comm-overlap" in options else "1"  # copies beside products need queues
    return {"CUDA_DEVICE_MAX_CONNECTIONS": connections, "OMP_NUM_THREADS": "4"} | given


def launch_process(settings: StepSettings, job: WorkerJob, scratch: Path) -> str | None:
    """Run the worker in a process group of its own, under torchrun for more than one rank."""
    path, log = scratch / "job.json", scratch / "log.txt"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [sys.executable, "-m"]
    if settings.num_gpus > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(settings.num_gpus), "--master-port",
                    str(_free_port()), "-m"]  # fmt: skip
    command += ["metis.benchmark.step_worker", str(path)]
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(job.options),
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(settings.timeout_seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:  # also when the user interrupts
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status == 0:
        return None
    text = log.read_text(encoding="utf-8", errors="replace")
    sys.stderr.write(f"---- end of {log}\n{text[-_LOG_END:]}\n----\n")
    error = re.findall(r"^error: (.*)", text, re.MULTILINE)
    if error:
        return error[-1]
    return f"exit status {status}" if status is not None else f"longer than {settings.timeout_seconds:.0f} s"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ceilings(device: str) -> dict[str, Any]:
    """Return the heading and the ceilings of the device, measured in a process of its own.

    Raises ConfigError when that fails.
    """
    command = [sys.executable, "-m", "metis.benchmark.ceilings", "--device", device]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError("--device", f"{device} must be able to multiply two matrices, received: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows_of(
    settings: StepSettings, measured: Sequence[Contender], gemm_flops_per_second: float
) -> list[dict[str, Any]]:
    """Return one row per contender, with the ratio to our own bf16; None for what was not timed."""
    rows: list[dict[str, Any]] = []
    reference = next((c for c in measured if c.recipe == "bf16" and c.reason is None), None)
    bf16 = None if reference is None else reference.amortised_seconds
    for contender in measured:
        config = contender.config
        row: dict[str, Any] = {
            "name": contender.name,
            "quantized": f"{config['num_quantized_linears']} of {config['num_linears']}",
            "reason": contender.reason,
            "failed": contender.reason is not None,
        }
        rows.append(row)
        if contender.reason is not None:
            continue
        plain, refresh = _median(contender.plain), _median(contender.refresh)
        mean = contender.amortised_seconds
        flops = None if mean is None else config["flops_per_iteration"] / settings.num_gpus / mean
        row |= {
            "ms": None if plain is None else 1e3 * plain,
            "spread_ms": None if plain is None else 1e3 * Samples(tuple(contender.plain)).spread,
            "refresh_ms": None if refresh is None else 1e3 * refresh,
            "amortised_ms": None if mean is None else 1e3 * mean,
            "refresh_percent": 100.0 * (mean / plain - 1.0) if plain and mean and refresh else None,
            "tokens_per_second": None if mean is None else config["tokens_per_iteration"] / mean,
            "tflops": None if flops is None else 1e-12 * flops,
            "of_ceiling": None if flops is None else flops / gemm_flops_per_second,
            "peak_gib": None if contender.peak_bytes is None else contender.peak_bytes / 2**30,
            "to_bf16": None if mean is None or bf16 is None else mean / bf16,
            "samples_ms": [1e3 * seconds for seconds in contender.plain],
            "refresh_samples_ms": [1e3 * seconds for seconds in contender.refresh],
            "losses": contender.losses,
            "profile": contender.profile,
        }
    return rows

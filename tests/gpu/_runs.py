"""Runs of the entry script, what is kept of them, and how they are judged.

One idea: a run is its options and what its metrics file says afterwards; a session knows where things are,
how much time is left, and the table that grows. `check_gpu.py` says which runs make which part.

Traps: runs whose speed is reported are alone on the machine; runs that are only compared share it. NCCL runs
never share a GPU with another NCCL run: both would spin.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = ("bf16", "nvfp4", "metis")
STEPS_TINY, STEPS_COMPARED, SAVED_AT, STEPS_1B = 50, 12, 6, 12
STEPS_OPTIONS = 20
STEPS_GRAPHED = 28  # three renewals of the bases; every kind of step is captured by the sixteenth
SAME_LOSS = {"bf16": 1e-3, "nvfp4": 1e-2, "metis": 1e-2}
"""Largest relative loss difference of two layouts under --bf16 over the compared steps."""
FIRST_LOSS = {"bf16": 1e-4, "nvfp4": 1e-3, "metis": 1e-3}
"""Largest relative difference of the first loss between two layouts under --bf16, same weights and data.

Another rounding of one bf16 activation flips FP4 codes: measured 2.2e-4 on two GPUs, and 4e-4 over attention
kernels and tensor-parallel sizes on the CPU. A tensor amax that is not reduced over the ranks gives 2.5e-3.
"""
FIRST_STEP_FP32 = {"bf16": (1e-5, 1e-5), "nvfp4": (1e-4, 1e-2), "metis": (1e-4, 1e-2)}
"""The same without --bf16: loss and gradient norm. Measured on the CPU for nvfp4: 7e-10 and 4e-5."""

TINY = {
    "--preset": "tiny", "--micro-batch-size": 4, "--global-batch-size": 8, "--lr": 2e-3, "--min-lr": 2e-4,
    "--lr-warmup-fraction": 0.5, "--lr-decay-style": "cosine", "--split": "95,5,0",
    "--tokenizer-type": "GPTSentencePieceTokenizer",
}  # fmt: skip
"""Warmed up, because at this rate from the first step on bf16 has a gradient norm of 2 to 14 in the fifth
step, by how it is rounded (2.3 in fp32): no two layouts agree there.
"""
BILLION = {
    "--preset": "llama3.2-1b", "--seq-length": 4096, "--micro-batch-size": 1, "--global-batch-size": 2,
    "--lr": 5e-5, "--min-lr": 5e-6, "--lr-decay-style": "cosine", "--mock-data": None,
    "--tokenizer-type": "NullTokenizer", "--vocab-size": 128255, "--use-distributed-optimizer": None,
}  # fmt: skip
COMMON = {
    "--bf16": None, "--seed": 1234, "--log-interval": 1, "--eval-iters": 0, "--num-workers": 0,
    "--distributed-timeout-minutes": 2, "--transformer-impl": "auto",
}  # fmt: skip
REHEARSAL = {
    "--num-layers": 2, "--hidden-size": 64, "--ffn-hidden-size": 64, "--kv-channels": 16, "--seq-length": 64,
    "--num-attention-heads": 4, "--num-query-groups": 4, "--max-position-embeddings": 64, "--device": "cpu",
}  # fmt: skip


@dataclass
class Run:
    """One training run: options, number of ranks, and what came of it."""

    name: str
    options: dict[str, Any]
    ranks: int = 1
    gpu: int = 0
    seconds: float = 0.0
    status: str = "not run"
    rows: list[dict[str, Any]] = field(default_factory=list)
    validations: list[float] = field(default_factory=list)
    log: str = ""

    @property
    def ok(self) -> bool:
        """Whether the process ended well and left metrics."""
        return self.status == "ok" and bool(self.rows)

    def values(self, name: str) -> list[float]:
        """Return one number per step; NaN where the file has null."""
        return [math.nan if row[name] is None else row[name] for row in self.rows]


@dataclass
class Session:
    """Where things are, what time is left, and the table that is being made."""

    device: str
    data: Path
    out: Path
    scratch: Path
    deadline: float
    gpu: int = 0
    table: list[tuple[str, str, str, str]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Run] = field(default_factory=dict)

    def add(self, part: str, name: str, verdict: str, detail: str) -> None:
        """Add a line to the table and print it at once."""
        self.table.append((part, name, verdict, detail))
        print(f"== {part} | {name} | {verdict} | {detail}")

    @property
    def seconds_left(self) -> float:
        """Seconds before the time limit."""
        return self.deadline - time.time()

    def tiny(self, name: str, recipe: str, steps: int, ranks: int = 1, gpu: int = 0, **more: Any) -> Run:
        """Return a run of the quickstart-size model."""
        data = {
            "--data-path": self.data / "t", "--tokenizer-model": self.data / "sp.model",
            "--data-cache-path": self.scratch / "cache",
        }  # fmt: skip
        return Run(name, self._options(TINY | data, recipe, steps, more), ranks, gpu)

    def billion(self, name: str, recipe: str, steps: int, ranks: int = 1, **more: Any) -> Run:
        """Return a run of the 1B preset on mock data."""
        return Run(name, self._options(BILLION, recipe, steps, more), ranks)

    def _options(self, base: dict[str, Any], recipe: str, steps: int, more: dict[str, Any]) -> dict[str, Any]:
        options = COMMON | base | (REHEARSAL if self.device == "cpu" else {"--device": "cuda"})
        options |= {"--recipe": recipe, "--train-iters": steps}
        return options | {f"--{key.replace('_', '-')}": value for key, value in more.items()}

    def start(self, run: Run) -> subprocess.Popen:
        """Start a run in a process group of its own."""
        run.options["--metrics-file"] = self.scratch / f"{run.name}.jsonl"
        arguments = [str(REPOSITORY / "pretrain_llama.py")]
        for option, value in run.options.items():
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            arguments += [option, *map(str, values)]
        command = [sys.executable, *arguments]
        if run.ranks > 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(run.ranks),
                       "--master-port", str(20000 + os.getpid() % 10000), *arguments]  # fmt: skip
        environment = os.environ | {
            "OMP_NUM_THREADS": "1" if self.device == "cpu" else "4",
            "CUDA_DEVICE_MAX_CONNECTIONS": "8" if "--tp-comm-overlap" in run.options else "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
            "TRITON_CACHE_DIR": str(self.scratch / "triton"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        if run.ranks == 1 and self.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = str(self.gpu + run.gpu)
        with open(self.scratch / f"{run.name}.log", "w") as log:
            log.write(" ".join(command) + "\n")
            log.flush()
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def together(self, runs: Sequence[Run], timeout_seconds: float = 120.0) -> None:
        """Run all of `runs` at the same time and wait for them."""
        limit = min(timeout_seconds, self.seconds_left)
        if limit < 20.0:
            return
        began = time.time()
        processes = [(run, self.start(run)) for run in runs]
        for run, process in processes:
            try:
                process.wait(max(0.1, began + limit - time.time()))
                run.status = "ok" if process.returncode == 0 else f"exit {process.returncode}"
            except subprocess.TimeoutExpired:
                run.status = f"timeout {limit:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            run.seconds = time.time() - began
            self.done[run.name] = run
            run.log = (self.scratch / f"{run.name}.log").read_text(errors="replace")
            path = self.scratch / f"{run.name}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            rows = [json.loads(line) for line in lines]
            run.rows = [row for row in rows if row["kind"] == "train"]
            run.validations = [row["validation_loss"] for row in rows if row["kind"] == "validation"]
            self.results[run.name] = {
                "status": run.status, "seconds": run.seconds, "rows": run.rows, "memory_mb": memory_mb(run),
            }  # fmt: skip
            if not run.ok:
                print(f"---- {run.name}: {run.status}; end of its log\n{run.log[-2500:]}\n----")


def memory_mb(run: Run) -> float | None:
    """Return the peak of allocated GPU memory that a run's log reports, in MB."""
    found = re.findall(r"\| max allocated: ([0-9.]+)", run.log)
    return max(map(float, found)) if found else None


def finite(run: Run) -> bool:
    """Whether every loss and gradient norm is a finite number."""
    return all(math.isfinite(v) for name in ("lm_loss", "grad_norm") for v in run.values(name))


def same_bits(a: Run, b: Run, after: int = 0, until: int | None = None) -> str:
    """Say from which step on two runs differ in loss or gradient norm, or that they are equal."""
    left, right = (
        {row["iteration"]: row for row in run.rows if after < row["iteration"] <= (until or 10**9)}
        for run in (a, b)
    )
    steps = sorted(left)
    if not steps or steps != sorted(right):
        return f"steps missing: {steps} and {sorted(right)}"
    for step in steps:
        for name in ("lm_loss", "grad_norm"):
            if left[step][name] != right[step][name]:
                return f"differ from step {step}: {name} {left[step][name]!r} and {right[step][name]!r}"
    return f"bitwise equal over {len(steps)} steps"


def relative(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Return |a - b| / |a| per step."""
    return [abs(x - y) / abs(x) for x, y in zip(a, b, strict=True)]


def speed(run: Run, skip: int = 3) -> dict[str, float]:
    """Return the median step time and the tokens per second that it means."""
    rows = run.rows[skip:] or run.rows
    seconds = statistics.median(row["step_seconds"] for row in rows)
    return {
        "step_seconds": seconds,
        "largest_step_seconds": max(row["step_seconds"] for row in rows),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows),
    }


def report_training(session: Session, part: str, runs: Sequence[Run], must_learn: bool) -> None:
    """Add losses, speed and memory of runs that were alone on the machine."""
    is_reference = runs[0].ok and runs[0].options["--recipe"] == "bf16" and len(runs) > 1
    reference = speed(runs[0])["step_seconds"] if is_reference else None
    for run in runs:
        if not run.ok:
            session.add(part, run.name, "FAILED", run.status)
            continue
        losses, fast = run.values("lm_loss"), speed(run)
        session.results[run.name] |= fast
        ratio = "" if reference is None else f", {fast['step_seconds'] / reference:.2f} x bf16"
        memory = memory_mb(run)
        detail = (
            f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {1000 * fast['step_seconds']:.1f} ms/step "
            f"(slowest {1000 * fast['largest_step_seconds']:.0f}{ratio}), "
            f"{fast['tokens_per_second']:.0f} tokens/s, "
            f"peak {'?' if memory is None else f'{memory / 1024:.2f}'} GiB, {run.seconds:.0f} s in all"
        )
        good = finite(run) and (losses[-1] < losses[0] or not must_learn)
        session.add(part, run.name, "ok" if good else "FAILED", detail)


def report_resume(
    session: Session, part: str, name: str, whole: Run, resumed: Run, saved_at: int, more: str = ""
) -> None:
    """Compare the steps of a resumed run with those of the run that was not interrupted."""
    if not whole.ok or not resumed.ok:
        session.add(part, name, "FAILED", f"whole: {whole.status}, resumed: {resumed.status}")
        return
    verdict = same_bits(whole, resumed, after=saved_at)
    good = verdict.startswith("bitwise")
    session.add(part, name, "ok" if good else "DIFFERS", f"resumed: {verdict}{more}")

"""Runs the real entry script as a user does, on data that take no tokenizer, no torch and no time to make.

`write_data` makes an indexed dataset from the format's description alone, so that tests of the error path
need neither torch nor megatron-core; `SHAPE` is a model of three quantised blocks and one in bf16.
`run_by_hand` starts the ranks the way `srun` does, without torchrun's own messages in between.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from metis.errors import MetisError
from tests._distributed import run_ranks, use_fast_checkpoint_queue

REPOSITORY = Path(__file__).resolve().parents[2]
ENTRY_SCRIPT = REPOSITORY / "pretrain_llama.py"
VOCAB_SIZE = 255  # of the NullTokenizer, whose end of document is one more id
SHAPE = (
    "--preset tiny --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--num-query-groups 2 --kv-channels 16 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine "
    "--num-workers 0 --device cpu --log-interval 1 --seed 7"
)
TOKENIZER = f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE}"


def write_data(prefix: Path, num_documents: int = 40, seed: int = 0) -> str:
    """Write `prefix.bin` and `prefix.idx` (uint16 tokens below VOCAB_SIZE, documents ended by VOCAB_SIZE).

    Successive tokens differ by 1, 2 or 3, so that there is something to learn. Returns the prefix as text.
    """
    draw = random.Random(seed)
    lengths, tokens = [], array("H")
    for _ in range(num_documents):
        length = draw.randrange(100, 300)
        token = draw.randrange(VOCAB_SIZE)
        for _ in range(length - 1):
            token = (token + draw.randrange(1, 4)) % VOCAB_SIZE
            tokens.append(token)
        tokens.append(VOCAB_SIZE)
        lengths.append(length)
    offsets = [2 * sum(lengths[:i]) for i in range(num_documents)]
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, num_documents, num_documents + 1)
    body = struct.pack(f"<{num_documents}i{num_documents}q", *lengths, *offsets)
    boundaries = struct.pack(f"<{num_documents + 1}q", *range(num_documents + 1))
    Path(f"{prefix}.idx").write_bytes(header + body + boundaries)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    return str(prefix)


def data_options(prefix: str) -> str:
    """Return the options that train on `prefix`, with a part for validation."""
    return f"--data-path {prefix} --split 80,20,0 {TOKENIZER}"


def environment(**extra: str) -> dict[str, str]:
    """Return an environment without a launcher's variables, one thread per process."""
    launcher = ("SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    return clean | {"OMP_NUM_THREADS": "1"} | extra


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def trainer_command(line: str, num_ranks: int = 1) -> list[str]:
    """Return the command: plain python for one rank, torchrun for more."""
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
        launcher += ["--master-port", str(free_port())]
    return [*launcher, str(ENTRY_SCRIPT), *line.split()]


def start_trainer(line: str, log: Path, num_ranks: int = 1) -> subprocess.Popen:
    """Start the trainer in a session of its own; both its outputs go to `log`."""
    with open(log, "w") as stream:
        return subprocess.Popen(
            trainer_command(line, num_ranks),
            cwd=REPOSITORY,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill_tree(process: subprocess.Popen) -> None:
    """Kill the process and all its descendants with SIGKILL, as a node that loses power would.

    torchrun's workers are sessions of their own, so killing its process group would leave them running.
    """
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for member in [*family, process]:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


@dataclass(frozen=True)
class RankOutcome:
    """What one rank printed and returned."""

    status: int
    stdout: str
    stderr: str


def run_by_hand(
    options: Sequence[str], num_ranks: int, timeout: float = 120.0, **extra: str
) -> list[RankOutcome]:
    """Run `num_ranks` ranks with the variables that a launcher sets; return their outcomes in rank order."""
    processes = []
    for rank in range(num_ranks):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)} | extra
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ENTRY_SCRIPT), *options],
                cwd=REPOSITORY,
                env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", **variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outcomes = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=timeout)
        outcomes.append(RankOutcome(process.returncode, stdout, stderr))
    return outcomes


def read_metrics(path: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the lines of one kind in a metrics file, a torn last line left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    values = [json.loads(line) for line in lines if line.endswith("\n")]
    return [value for value in values if value["kind"] == kind]


def run_in_process(
    cases: Mapping[str, str], world_size: int = 1, timeout: float = 600.0
) -> dict[str, Outcome]:
    """Run the trainer once per case (name -> options after SHAPE) in one process group.

    For what does not depend on how a process starts and ends. Returns name -> outcome: standard output of the
    last rank, standard error of all ranks.
    """
    by_rank = run_ranks(_run_cases, world_size, dict(cases), timeout=timeout)
    return {
        name: replace(by_rank[-1][name], stderr="".join(rank[name].stderr for rank in by_rank))
        for name in cases
    }


@dataclass(frozen=True)
class Outcome:
    """What one run in a process group printed, and the error that ended it, if any."""

    stdout: str
    stderr: str
    error: str


def _run_cases(rank: int, world_size: int, cases: dict[str, str]) -> dict[str, Outcome]:
    use_fast_checkpoint_queue()
    return {name: run_case(world_size, line) for name, line in cases.items()}


def run_case(world_size: int, line: str) -> Outcome:
    """Run the trainer once on this rank, inside the process group that exists."""
    from metis.training.arguments import parse_args, validate_args
    from metis.training.initialize import initialize, shut_down
    from metis.training.preflight import preflight

    error, stdout, stderr = "", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            args = parse_args([*SHAPE.split(), *line.split()])
            validate_args(args, world_size)
            preflight(args)
            initialize(args)
            from metis.training.loop import pretrain

            pretrain(args)
        except MetisError as failure:
            error = str(failure)
        finally:
            shut_down(keep_process_group=True)
    return Outcome(stdout.getvalue(), stderr.getvalue(), error)

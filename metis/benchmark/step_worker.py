"""One training run of a benchmark, as a process of its own: train, then profile a few steps more.

One idea: this is `pretrain_llama.py` with its loop unrolled: the trainer's own set-up and its own iteration,
so that what is timed is what trains. Step times come from the trainer's `--metrics-file`; memory and the
profile are read here, after the timed steps.

    python -m metis.benchmark.step_worker JOB.json          (or under torchrun, once per rank)

The job file holds a `WorkerJob`; the result goes to its `result` path, from rank 0.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metis.errors import MetisError, report_and_exit


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJob:
    """options: the trainer's command line. num_steps: trained and timed. num_profiled: traced steps, 0 for
    none; the first of them follows step `profile_after`, with a step for the profiler to settle in between.
    result: where rank 0 writes its JSON. trace: where the profiler's trace goes.
    """

    options: list[str]
    num_steps: int
    result: str
    trace: str
    num_profiled: int = 0
    profile_after: int = 0


def run_job(job: WorkerJob) -> dict[str, Any]:
    """Train as the job says and return what was found, the same on every rank; collective.

    Leaves the process group to the caller (`metis.training.initialize.shut_down`).
    """
    from metis.training.arguments import parse_args, validate_args
    from metis.training.initialize import initialize
    from metis.training.preflight import preflight

    args = parse_args(job.options)
    validate_args(args, args.world_size)
    preflight(args)
    initialize(args)
    from metis.training import loop

    run = loop.Run(args)
    run.set_up()
    for chunk in run.model:
        chunk.train()
    run.log.start()
    for _ in range(job.num_steps):
        loop._one_iteration(run)
    found: dict[str, Any] = {"peak_bytes": _peak_bytes(args.device)}
    if job.num_profiled:
        while run.state.iteration < job.profile_after:
            loop._one_iteration(run)
        found["profile"] = _profile(run, job)
    run.log.close()
    return found


def _peak_bytes(device: str) -> int | None:
    """Return the largest peak of allocated GPU memory over all ranks; None on a CPU."""
    if device != "cuda":
        return None
    import torch
    import torch.distributed as dist

    peak = torch.tensor([torch.cuda.max_memory_allocated()], device="cuda")
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak.item())


def _profile(run: Any, job: WorkerJob) -> dict[str, Any] | None:
    """Trace the next steps on rank 0 while all ranks train; return the profile there."""
    import torch
    import torch.distributed as dist

    from metis.benchmark.step_profile import read_profile
    from metis.training import loop

    if dist.get_rank() != 0:
        for _ in range(1 + job.num_profiled):
            loop._one_iteration(run)
        return None
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=job.num_profiled, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(job.trace),
    ) as profiler:
        for _ in range(1 + job.num_profiled):
            loop._one_iteration(run)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a step's kernels belong to that step
            profiler.step()
    return asdict(read_profile(Path(job.trace), job.num_profiled))


def main() -> int:
    """Run the job file that is named on the command line."""
    job = WorkerJob(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    from metis.training.initialize import shut_down

    try:
        found = run_job(job)
        import torch.distributed as dist

        if dist.get_rank() == 0:
            Path(job.result).write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
    except MetisError as error:
        report_and_exit(error)
    finally:
        shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())

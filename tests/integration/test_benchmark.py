"""The three benchmarks on a CPU with tiny shapes: every path runs, and the rows say what was measured.

Their numbers mean nothing here. What is timed is right, though: a contender's gradients are compared with
plain sums.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from metis.benchmark import kernel_cases, linear_cases, step_runs
from metis.benchmark.shapes import LinearShape, step_model
from metis.benchmark.step_worker import WorkerJob, run_job
from metis.benchmark.timing import Stopwatch
from metis.recipes import resolve_recipe, with_changes
from tests._distributed import run_ranks, use_fast_checkpoint_queue

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / "tools" / "benchmark"
TINY = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --num-query-groups 2 "
    "--kv-channels 16 --seq-length 32 --max-position-embeddings 32 --vocab-size 255"
).split()
EVERY_STEP = "base: metis\nbasis: {refresh_interval_steps: 1}\n"
BF16_SQNR_DB = 45.0  # of a bf16 gradient accumulator against float64; measured 50
FP4_SQNR_DB = 12.0  # of a gradient by nvfp4 against float64; measured 16


def run_tool(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a benchmark as a user does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, str(TOOLS / name), *arguments],
        capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=300,
    )  # fmt: skip


def measured(name: str, path: Path, *arguments: str, **variables: str) -> tuple[str, dict[str, Any]]:
    """Run a benchmark; return what it printed and its JSON."""
    done = run_tool(name, *arguments, "--device", "cpu", "--json", str(path), **variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout, json.loads(path.read_text())


def table_of(text: str) -> list[list[str]]:
    """Return the cells of the table that a benchmark prints last."""
    lines = text.rstrip().splitlines()
    first = max(index for index, line in enumerate(lines) if not line.startswith("|")) + 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:]]


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("kernels.py", ["--shapes", "33x64"], "error: --shapes: must be two multiples of 16"),
        ("kernels.py", ["--model", "llama3-8"], "did you mean 'llama3-8b'"),
        ("kernels.py", ["--calls", "0"], "error: --calls: must be at least 1"),
        ("linear.py", ["--recipes", "bf16,metas"], "did you mean 'metis'"),
        ("linear.py", ["--tokens", "100"], "error: --tokens: must be a positive multiple of 16"),
        ("linear.py", ["--recipes", "metis,metis"], "received 'metis' 2 times (metis, metis); rename"),
        ("linear.py", ["--round", "3"], "unrecognized arguments: --round"),
        ("train_step.py", ["--preset", "tinny"], "did you mean 'tiny'"),
        ("train_step.py", ["--steps", "0"], "error: --steps: must be at least 1"),
        ("train_step.py", ["--recipes", "a/x.yaml,b/x.yaml"], "'x.yaml' 2 times (a/x.yaml, b/x.yaml)"),
        ("train_step.py", ["--device", "cpu", "--", "--num-layer", "2"], "did you mean '--num-layers'"),
        ("train_step.py", ["--device", "cpu", "--", "--save", "x"], "error: --save: must not be among"),
        ("train_step.py", ["--device", "cpu", "--", "--recipe=nvfp4"], "error: --recipe: must not be among"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tool: str, arguments: list[str], message: str):
    done = run_tool(tool, *arguments)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout


def test_torchrun_must_not_start_the_step_benchmark():
    done = run_tool("train_step.py", "--device", "cpu", WORLD_SIZE="2")
    assert done.returncode == 2 and "use --gpus 2" in done.stderr


# --- kernels -----------------------------------------------------------------------------------------------


def test_kernels_under_the_interpreter(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    text, found = measured(
        "kernels.py", tmp_path / "k.json", "--shapes", "32x64", "--calls", "2", TRITON_INTERPRET="1"
    )
    rows = {row["name"]: row for row in found["rows"]}
    copy = rows[kernel_cases.COPY]
    for row in rows.values():
        assert row["reason"] is None and len(row["samples_us"]) == 2 and row["us"] > 0.0
        assert row["to_copy"] == pytest.approx(row["us"] / copy["us"])
        if row["reference"]:
            assert row["to_reference"] == pytest.approx(row["us"] / rows[row["reference"]]["us"])
    cells = table_of(text)
    assert len(cells) == 2 + len(rows) and cells[0][:3] == ["bf16 matrix", "kernel", "us, median"]
    assert {"device", "torch", "triton", "commit", "command"} <= set(found["heading"])
    assert found["heading"]["command"] in text and "kernels.py" in found["heading"]["command"]


def test_without_kernels_a_row_says_why(tmp_path):
    text, found = measured("kernels.py", tmp_path / "k.json", "--shapes", "32x64", TRITON_INTERPRET="0")
    copy, kernels = found["rows"]
    assert copy["us"] > 0.0 and "us" not in kernels and kernels["reason"] in text


def test_a_kernel_that_raises_is_a_failed_row_and_the_next_goes_on():
    def broken(index: int) -> None:
        raise RuntimeError("launch failed")

    cases = [
        kernel_cases.KernelCase(name=kernel_cases.COPY, num_bytes=4, call=lambda i: None),
        kernel_cases.KernelCase(name="broken", num_bytes=4, call=broken),
        kernel_cases.KernelCase(name="good", num_bytes=4, call=lambda i: None, reference="broken"),
    ]
    rows = kernel_cases.measure(cases, (16, 16), Stopwatch(torch.device("cpu")), num_calls=3)
    assert [row["failed"] for row in rows] == [False, True, False]
    assert "launch failed" in rows[1]["reason"] and rows[2]["to_reference"] is None and rows[2]["us"] >= 0.0


# --- linear ------------------------------------------------------------------------------------------------


def test_linear_compares_recipes_with_torch(tmp_path):
    text, found = measured(
        "linear.py", tmp_path / "l.json", "--shape", "64x96", "--tokens", "128", "--rounds", "16",
        "--microbatches-per-step", "2",
    )  # fmt: skip
    rows = {(row["name"], row["gradient"]): row for row in found["rows"]}
    for gradient in linear_cases.GRADIENTS:
        torch_row = rows[linear_cases.TORCH, gradient]
        assert torch_row["to_bf16"] == 1.0 and len(torch_row["samples_ms"]) == 16
        plain, metis = (rows[f"metis.nn.MetisLinear, {name}", gradient] for name in ("nvfp4", "metis"))
        assert plain["to_bf16"] == pytest.approx(plain["ms"] / torch_row["ms"]) and "refresh_ms" not in plain
        # One step in eight renews bases, whatever step the warm-up ends at.
        assert len(metis["refresh_samples_ms"]) == 2 and len(metis["samples_ms"]) == 14
        assert metis["refresh_interval_steps"] == 8
    ceiling = rows[linear_cases.CEILING, "-"]
    assert ceiling["tflops"] == pytest.approx(6e-9 * 2 * 128 * 64 * 96 / ceiling["ms"])
    skipped = {key for key, row in rows.items() if row.get("reason")}
    assert skipped == {
        (linear_cases.TE, "grad"), (linear_cases.TE, "main_grad"), (linear_cases.TORCH_FUSED, "main_grad"),
    }  # fmt: skip
    assert len(table_of(text)) == 2 + len(rows)


def test_a_linear_whose_every_step_renews_bases_is_timed_with_that(tmp_path):
    (tmp_path / "every.yaml").write_text(EVERY_STEP)
    text, found = measured(
        "linear.py", tmp_path / "l.json", "--shape", "64x96", "--tokens", "64", "--rounds", "3",
        "--gradient", "grad", "--recipes", f"{tmp_path / 'every.yaml'},metis",
    )  # fmt: skip
    rows = {row["name"]: row for row in found["rows"]}
    every = rows["metis.nn.MetisLinear, every"]
    assert every["refreshes_always"] and every["refresh_interval_steps"] == 1 and not every["samples_ms"]
    assert every["ms"] == pytest.approx(sorted(every["refresh_samples_ms"])[1])
    assert every["to_bf16"] == pytest.approx(every["ms"] / rows[linear_cases.TORCH]["ms"])
    assert "refresh_ms" not in every and "refresh_percent" not in every
    assert text.count("every timed step of ") == 1 and f"step of {every['name']} renews bases" in text


def test_the_first_timed_step_is_a_plain_one():
    class Launching(Stopwatch):
        def host_seconds(self, call: Callable[[int], object], num_calls: int = 5) -> float:
            """As on a GPU, where three steps are launched and the fourth may be one that renews."""
            call(0)
            return 1.0

    job = linear_cases.LinearJob(shape=LinearShape("l", 64, 96), tokens=256, num_microbatches=1, num_rounds=1)
    recipe = with_changes(resolve_recipe("metis"), {"basis": {"refresh_interval_steps": 4}}, "recipe")
    row = linear_cases.measure(job, [recipe], ["grad"], Launching(torch.device("cpu")))[-1]
    assert row["recipe"] == "metis" and len(row["samples_ms"]) == 1 and row["ms"] == row["samples_ms"][0]


def _sqnr_db(actual: torch.Tensor, expected: torch.Tensor) -> float:
    noise = (actual.double() - expected).square().sum()
    return float(10 * torch.log10(expected.square().sum() / noise))


@pytest.mark.parametrize(("recipe", "floor"), [("bf16", BF16_SQNR_DB), ("nvfp4", FP4_SQNR_DB)])
def test_contenders_deliver_the_sum_of_their_microbatches(recipe: str, floor: float):
    device = torch.device("cpu")
    job = linear_cases.LinearJob(shape=LinearShape("l", 64, 96), tokens=128, num_microbatches=3, num_rounds=1)
    found = linear_cases.entrants(job, [resolve_recipe(recipe)], linear_cases.GRADIENTS, device, "auto")
    name = linear_cases.TORCH if recipe == "bf16" else f"metis.nn.MetisLinear, {recipe}"
    built = [entrant.build() for entrant in found if entrant.name == name]
    assert [contender.gradient for contender in built] == ["grad", "main_grad"]
    generator = torch.Generator().manual_seed(1)
    xs, gs = ([torch.randn(128, size, generator=generator).bfloat16() for _ in range(3)] for size in (64, 96))
    expected = sum(g.double().t() @ x.double() for x, g in zip(xs, gs, strict=True))
    for contender in built:
        for number, (x, g) in enumerate(zip(xs, gs, strict=True)):
            contender.microbatch(number, x.clone().requires_grad_(), g)
        is_main = contender.gradient == "main_grad"
        gradient: Any = contender.weight.main_grad if is_main else contender.weight.grad
        assert gradient.dtype == (torch.float32 if is_main else torch.bfloat16)
        assert _sqnr_db(gradient, expected) > floor
        assert not is_main or contender.weight.grad is None


# --- training steps ----------------------------------------------------------------------------------------


def _work(rank: int, world_size: int, job: dict[str, Any]) -> None:
    from metis.training.initialize import shut_down

    use_fast_checkpoint_queue()
    try:
        found = run_job(WorkerJob(**job))
    finally:
        shut_down(keep_process_group=True)
    if rank == 0:
        Path(job["result"]).write_text(json.dumps(found))


def _launch_here(settings: step_runs.StepSettings, job: WorkerJob, scratch: Path) -> None:
    """Run the worker in ranks that have imported everything already."""
    run_ranks(_work, settings.num_gpus, asdict(job))


@pytest.mark.parametrize(
    ("num_ranks", "more"),
    [(1, ()), pytest.param(2, ("--tensor-model-parallel-size", "2"), marks=pytest.mark.long)],
)
def test_steps_of_every_recipe_with_profile(tmp_path, monkeypatch, num_ranks: int, more: tuple[str, ...]):
    settings = step_runs.StepSettings(
        model=step_model("tiny"), device="cpu", num_gpus=num_ranks, warmup=2, num_steps=7, num_profiled=2,
        more=[*TINY, *more, *(("--sequence-parallel",) if more else ())],
    )  # fmt: skip
    found = step_runs.contenders(["bf16", "metis"] if num_ranks == 1 else ["metis"], False)
    for contender in found:
        step_runs.resolve(settings, contender)
        step_runs.run_contender(settings, contender, tmp_path / contender.name, _launch_here)
    rows = {row["name"]: row for row in step_runs.rows_of(settings, found, 1e9)}
    assert all(row["reason"] is None and len(row["losses"]) == 9 for row in rows.values())
    metis = rows["metis"]
    assert (len(metis["samples_ms"]), len(metis["refresh_samples_ms"])) == (6, 1)  # of steps 3 to 9, step 8
    assert metis["quantized"] == "4 of 8"
    profile = metis["profile"]
    assert profile["milliseconds"]["quantise and split"] > 0.0 and profile["milliseconds"]["GEMM"] > 0.0
    assert profile["busy_ms"] <= 1.01 * sum(profile["milliseconds"].values()) + 1e-6 * profile["num_kernels"]
    if num_ranks == 1:
        assert rows["bf16"]["to_bf16"] == 1.0 and rows["bf16"]["quantized"] == "0 of 8"
        assert rows["bf16"]["profile"]["milliseconds"]["quantise and split"] == 0.0
        assert metis["to_bf16"] > 0.0


def test_step_script_runs_the_trainer_in_a_process_of_its_own(tmp_path):
    kept, path = tmp_path / "kept", tmp_path / "s.json"
    options = ["--device", "cpu", "--preset", "tiny", "--recipes", "nvfp4", "--steps", "2", "--warmup", "1"]
    done = run_tool("train_step.py", *options, "--keep", str(kept), "--json", str(path), "--", *TINY)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(path.read_text())
    row = found["rows"][0]
    assert row["name"] == "nvfp4" and len(row["samples_ms"]) == 2 and row["to_bf16"] is None
    assert "2 layers of hidden 64" in done.stdout and len(table_of(done.stdout)) == 3
    assert found["ceilings"]["gemm_flops_per_second"] > 0.0
    assert (kept / "nvfp4-0" / "log.txt").exists()


def test_a_step_script_that_is_ended_leaves_no_run_behind(tmp_path):
    tool = [
        sys.executable,
        str(REPOSITORY / "tools/benchmark/train_step.py"),
        "--device",
        "cpu",
        "--preset",
        "tiny",
    ]
    options = ["--recipes", "nvfp4", "--steps", "5000", "--keep", str(tmp_path), "--", *TINY]
    process = subprocess.Popen([*tool, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def runs() -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # gone meanwhile
                words = path.read_bytes().decode(errors="replace").split("\0")
                if "metis.benchmark.step_worker" in words and any(str(tmp_path) in word for word in words):
                    found.append(int(path.parent.name))
        return found

    try:
        for _ in range(600):
            if runs():
                break
            time.sleep(0.1)
        assert runs(), "no run was started"
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM and not runs()
    finally:
        process.kill()
        for pid in runs():
            os.kill(pid, signal.SIGKILL)


def test_steps_that_all_renew_bases_are_reported_as_such(tmp_path):
    recipe, path = tmp_path / "every.yaml", tmp_path / "s.json"
    recipe.write_text(EVERY_STEP)
    options = ["--device", "cpu", "--preset", "tiny", "--steps", "2", "--warmup", "1", "--profile"]
    done = run_tool("train_step.py", *options, "--recipes", str(recipe), "--json", str(path), "--", *TINY)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    row = json.loads(path.read_text())["rows"][0]
    assert row["ms"] is None and row["refresh_percent"] is None and not row["samples_ms"]
    assert len(row["refresh_samples_ms"]) == 2 and row["amortised_ms"] == row["refresh_ms"] > 0.0
    assert row["tokens_per_second"] > 0.0 and table_of(done.stdout)[2][2] == "-"
    step = next(line for line in done.stdout.splitlines() if line.startswith("| step "))
    assert float(step.split("|")[2]) == pytest.approx(row["refresh_ms"], abs=0.01)


def test_a_run_that_fails_is_a_row_with_the_trainers_own_error(tmp_path):
    settings = step_runs.StepSettings(
        model=step_model("tiny"), device="cpu", warmup=0, num_steps=1, more=TINY
    )
    contender = step_runs.contenders(["bf16"], False)[0]
    step_runs.resolve(settings, contender)
    contender.recipe = "metas"
    step_runs.run_contender(settings, contender, tmp_path / "run", step_runs.launch_process)
    assert contender.reason is not None and "did you mean 'metis'" in contender.reason
    assert step_runs.rows_of(settings, [contender], 1.0)[0]["failed"]

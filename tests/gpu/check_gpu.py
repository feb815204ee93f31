"""Train on GPUs and judge the runs: bits, losses, resume, layouts, step times and memory.

    python tests/gpu/check_gpu.py one|two [--parts a,b] [--device cpu] [--minutes 8]

One idea: a part is a list of runs of the real entry script plus a judgement of their metrics files. Parts are
isolated: a failing or hanging run is reported with the end of its log and the next part goes on. A part that
would start after the time limit is reported as not run. The table comes last.

Trap: `--device cpu` is a rehearsal with tiny shapes: it tries every command line; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _runs import (
    FIRST_LOSS,
    FIRST_STEP_FP32,
    RECIPES,
    REPOSITORY,
    SAME_LOSS,
    SAVED_AT,
    STEPS_1B,
    STEPS_COMPARED,
    STEPS_GRAPHED,
    STEPS_OPTIONS,
    STEPS_TINY,
    Run,
    Session,
    finite,
    relative,
    report_resume,
    report_training,
    same_bits,
    speed,
)


def part_smoke(session: Session) -> None:
    """Two steps, alone: fills caches and shows what breaks everywhere."""
    run = session.tiny("smoke", "bf16", 2)
    session.together([run], 180)
    session.add("smoke", run.name, "ok" if run.ok else "FAILED", f"{run.status}, {run.seconds:.0f} s in all")


def part_bits(session: Session) -> None:
    """CPU and GPU bits of the same tensors."""
    command = [sys.executable, str(REPOSITORY / "tests/gpu/bits.py"), "--device", session.device]
    with open(session.scratch / "bits.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = str(process.wait(min(150.0, session.seconds_left)))
        except subprocess.TimeoutExpired:
            process.kill()
            status = "timeout"
    text = (session.scratch / "bits.log").read_text(errors="replace")
    print(text[:6000].rpartition("\n{")[0] or text[-2500:])
    last = text.strip().splitlines()[-1] if text.strip() else ""
    result = json.loads(last) if last.startswith("{") else {"checks": 0, "different": {}, "measured": {}}
    session.results["bits"] = result
    verdict = "ok" if status == "0" and result["checks"] else "FAILED"
    session.add(
        "bits", "cpu = gpu", verdict, f"{result['checks']} checks, {len(result['different'])} different"
    )
    for name, value in result["measured"].items():
        session.add("bits", name, "measured", str(value))


def part_tiny(session: Session) -> None:
    """The quickstart-size model with every recipe, one after another."""
    runs = [session.tiny(f"tiny-{recipe}", recipe, STEPS_TINY) for recipe in RECIPES]
    for run in runs:
        session.together([run], 90)
    report_training(session, "tiny", runs, must_learn=True)


def part_billion(session: Session) -> None:
    """The 1B preset with every recipe, one after another."""
    runs = [session.billion(f"1b-{recipe}", recipe, STEPS_1B) for recipe in RECIPES]
    for run in runs:
        session.together([run], 110)
    report_training(session, "1b", runs, must_learn=False)


def part_billion_packed(session: Session) -> None:
    """What keeping the input packed for backward saves at 1B, and what plain PyTorch quantisers cost."""
    file = session.scratch / "metis_packed.yaml"
    file.write_text("base: metis\nsave_packed: true\n")
    plain = session.billion("1b-nvfp4-torch", "nvfp4", 5, quantize_kernels="torch")
    packed = session.billion("1b-metis-packed", str(file), 10)
    for run in (packed, plain):
        session.together([run], 100)
    report_training(session, "1b", [packed, plain], must_learn=False)


def part_resume(session: Session) -> None:
    """Twice the same run, and one that is resumed from the middle, plain and in deterministic mode."""
    modes: dict[str, dict[str, Any]] = {"plain": {}, "deterministic": {"deterministic_mode": None}}
    runs: dict[str, list[Run]] = {}
    for mode, more in modes.items():
        for recipe in RECIPES:
            name = f"resume-{recipe}-{mode}"
            save = {"save": session.scratch / name, "save_interval": SAVED_AT}
            load = {"load": session.scratch / name, "ckpt_step": SAVED_AT}
            runs[f"{recipe} {mode}"] = [
                session.tiny(f"{name}-{suffix}", recipe, STEPS_COMPARED, **more, **extra)
                for suffix, extra in (("whole", save), ("again", {}), ("resumed", load))
            ]
    for index in range(3):
        session.together([case[index] for case in runs.values()], 150)
    for name, (whole, again, resumed) in runs.items():
        repeat = same_bits(whole, again) if again.ok else again.status
        report_resume(session, "resume", name, whole, resumed, SAVED_AT, f"; again: {repeat}")


GRAPHS = {"cuda_graph_impl": "local", "deterministic_mode": None}


def part_graphs(session: Session) -> None:
    """A step captured in CUDA graphs against the same step launched kernel by kernel; and its resume."""
    if session.device == "cpu":
        session.add("graphs", "CUDA graphs", "not run", "they need a GPU")
        return
    waves: list[list[Run]] = [[], [], []]
    for recipe in RECIPES:
        folder = session.scratch / f"graphs-{recipe}"
        save = {"save": folder, "save_interval": STEPS_GRAPHED // 2}
        load = {"load": folder, "ckpt_step": STEPS_GRAPHED // 2}
        for wave, name, more in (
            (waves[0], "graphs", GRAPHS | save),
            (waves[1], "launched", {"deterministic_mode": None}),
            (waves[2], "graphs-resumed", GRAPHS | load),
        ):
            wave.append(session.tiny(f"{name}-{recipe}", recipe, STEPS_GRAPHED, **more))
    for wave in waves:
        session.together(wave, 120)
    for recipe, graphed, launched, resumed in zip(RECIPES, *waves, strict=True):
        if not graphed.ok or not launched.ok:
            detail = f"graphs: {graphed.status}, launched: {launched.status}"
            session.add("graphs", recipe, "FAILED", detail)
            continue
        verdict = same_bits(launched, graphed)
        good = verdict.startswith("bitwise")
        session.add("graphs", recipe, "ok" if good else "DIFFERS", f"against launches: {verdict}")
        report_resume(session, "graphs", f"{recipe} resume", graphed, resumed, STEPS_GRAPHED // 2)


PACKED = "base: metis\nsave_packed: true\n"
ALL_ROWS = "base: metis\nbasis: {row_sample_fraction: 1.0, max_rows_per_column: null}\n"
"""With large microbatches too much to keep, so that a captured step sketches rows itself."""
HEALED = """phases:
  - at_step: 9
    change: {fprop_input: {split: {rank: {fixed: 32}}}, wgrad_input: {split: {rank: {fixed: 32}}}}
  - {at_step: 15, recipe: bf16}
"""
"""A basis that gets wider, and the end of FP4, both after graphs have been captured."""

GRAPHED_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "evaluated": ("metis", {"eval_interval": 7, "eval_iters": 2}),
    "packed": ("packed.yaml", {}),
    "merged": ("metis_merged", {}),
    "all rows": ("all_rows.yaml", {"micro_batch_size": 64, "global_batch_size": 128}),
    "healed": ("metis", {"recipe_schedule": "healed.yaml"}),
    "ramp": ("metis", {"rampup_batch_size": (4, 4, 48), "global_batch_size": 16, "train_samples": 220}),
    "documents": ("metis", {"reset_attention_mask": None, "reset_position_ids": None, "eod_mask_loss": None}),
    "measured": ("metis", {"log_quantization_interval": 7}),
    "skip": ("nvfp4", {"nonfinite_operands": "skip"}),
    "codes": ("metis", {"weight_cache": "codes"}),
    "everywhere": ("metis", {"policy": "all"}),
    "mxfp4": ("mxfp4", {}),
    "fp8": ("fp8", {}),
    "4over6": ("nvfp4_4over6", {}),
    "mean": ("mean_split", {}),
    "paper": ("metis_paper", {}),
    "v1": ("metis_v1", {}),
}
"""Recipe, or a file of this part, and options of steps that are captured and launched."""


def part_graph_options(session: Session) -> None:
    """Captured steps against launched ones, bit by bit, under options that change what a step is."""
    files = {"packed.yaml": PACKED, "all_rows.yaml": ALL_ROWS, "healed.yaml": HEALED}
    for name, text in files.items():
        (session.scratch / name).write_text(text)

    def located(value: Any) -> Any:
        return session.scratch / value if value in files else value

    on_gpu = session.device == "cuda"
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) if on_gpu else 1
    runs: dict[str, dict[str, Run]] = {case: {} for case in GRAPHED_CASES}
    for index, (case, (recipe, options)) in enumerate(GRAPHED_CASES.items()):
        options = {name: located(value) for name, value in options.items()}
        for mode, more in (("launched", {"deterministic_mode": None}), ("graphs", GRAPHS))[: 1 + on_gpu]:
            run = session.tiny(
                f"{mode}-{case.replace(' ', '-')}", str(located(recipe)), STEPS_OPTIONS, **options | more
            )
            run.gpu = index % num_gpus
            if "train_samples" in options:
                del run.options["--train-iters"]
            runs[case][mode] = run
    waiting = [run for case in runs.values() for run in case.values()]
    while waiting:
        session.together(waiting[: 6 * num_gpus], 150)
        del waiting[: 6 * num_gpus]
    for case, pair in runs.items():
        launched, graphed = pair["launched"], pair.get("graphs", pair["launched"])
        if not launched.ok or not graphed.ok:
            detail = f"graphs: {graphed.status}, launched: {launched.status}"
            session.add("graph options", case, "FAILED", detail)
            continue
        verdict = same_bits(launched, graphed) if "graphs" in pair else "not compared, no GPU"
        if launched.validations != graphed.validations:
            verdict = f"validation losses {launched.validations} and {graphed.validations}"
        good = verdict.startswith(("bitwise", "not compared")) and finite(graphed)
        losses = graphed.values("lm_loss")
        detail = f"against launches: {verdict}; loss {losses[0]:.3f} -> {losses[-1]:.3f}"
        session.add("graph options", case, "ok" if good else "DIFFERS", detail)


def part_resume_billion(session: Session) -> None:
    """Resume the 1B preset with Metis's bases in use, plain and in deterministic mode, side by side.

    Two checkpoints of 17 GB lie on the disk meanwhile. The plain run is a measurement: attention backward
    adds in any order at this sequence length.
    """
    modes: dict[str, dict[str, Any]] = {"plain": {}, "deterministic": {"deterministic_mode": None}}
    waves: list[list[Run]] = [[], [], []]
    for mode, more in modes.items():
        directory = session.scratch / f"1b-{mode}"
        save = {"save": directory, "save_interval": 2, "exit_interval": 2}
        load = {"load": directory}
        for wave, suffix, extra in zip(waves, ("whole", "saved", "resumed"), ({}, save, load), strict=True):
            wave.append(session.billion(f"1b-{suffix}-{mode}", "metis", 4, **more, **extra))
    for wave in waves:
        session.together(wave, 120)
    for mode, whole, saved, resumed in zip(modes, *waves, strict=True):
        if not saved.ok:
            session.add("resume", f"1b metis {mode}", "FAILED", f"saving run: {saved.status}")
            continue
        first = f"; first half again: {same_bits(whole, saved, until=2)}"
        report_resume(session, "resume", f"1b metis {mode}", whole, resumed, 2, first)
        shutil.rmtree(session.scratch / f"1b-{mode}", ignore_errors=True)


def part_deterministic_speed(session: Session) -> None:
    """What deterministic mode costs at 1B, alone on the machine."""
    runs = [
        session.billion(f"1b-{recipe}-deterministic", recipe, 8, deterministic_mode=None)
        for recipe in ("bf16",)
    ]
    for run in runs:
        session.together([run], 60)
    report_training(session, "1b", runs, must_learn=False)


TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": None}
DP2 = {"use_distributed_optimizer": None, "overlap_grad_reduce": None, "overlap_param_gather": None}
PP2 = {"pipeline_model_parallel_size": 2}


def part_single(session: Session) -> None:
    """What two ranks are compared with: each recipe on one GPU; the other GPU has a 1B run meanwhile."""
    runs = [session.tiny(f"single-{recipe}", recipe, STEPS_COMPARED) for recipe in RECIPES]
    large = session.billion("1b-metis", "metis", STEPS_1B)
    large.gpu = 1
    session.together([*runs, large], 110)
    for run in runs:
        session.add("one rank", run.name, "ok" if run.ok else "FAILED", run.status)
    report_training(session, "1b", [large], must_learn=False)


def compare_layout(session: Session, layout: str, options: dict[str, Any]) -> None:
    """Run every recipe on two ranks and compare with one rank from the same seed and data."""
    if "cuda_graph_impl" in options and session.device == "cpu":
        session.add(layout, "CUDA graphs", "not run", "they need a GPU")
        return
    missing = [recipe for recipe in RECIPES if f"single-{recipe}" not in session.done]
    session.together([session.tiny(f"single-{recipe}", recipe, STEPS_COMPARED) for recipe in missing], 110)
    for recipe in RECIPES:
        run = session.tiny(f"{layout}-{recipe}", recipe, STEPS_COMPARED, 2, **options)
        if layout == "tp2":
            run.options |= {"--save": session.scratch / run.name, "--save-interval": SAVED_AT}
        session.together([run], 70)
        single = session.done.get(f"single-{recipe}")
        if not run.ok or single is None or not single.ok:
            one = "not run" if single is None else single.status
            session.add(layout, recipe, "FAILED", f"{run.status}; one rank: {one}")
            continue
        losses = relative(single.values("lm_loss"), run.values("lm_loss"))
        norms = relative(single.values("grad_norm"), run.values("grad_norm"))
        good = finite(run) and losses[0] < FIRST_LOSS[recipe] and max(losses) < SAME_LOSS[recipe]
        detail = (
            f"loss: first step {losses[0]:.1e}, worst of {len(losses)} {max(losses):.1e}; "
            f"grad norm: first {norms[0]:.1e}, worst {max(norms):.1e}; "
            f"{1000 * speed(run)['step_seconds']:.0f} ms/step"
        )
        session.add(layout, recipe, "ok" if good else "DIFFERS", detail)


def part_tp2(session: Session) -> None:
    """Tensor and sequence parallelism over two GPUs."""
    compare_layout(session, "tp2", TP2)


def part_tp2_fp32(session: Session) -> None:
    """One step of each recipe without --bf16, on one rank and with tensor and sequence parallelism."""
    for recipe in RECIPES:
        single = session.tiny(f"fp32-single-{recipe}", recipe, 1)
        sharded = session.tiny(f"fp32-tp2-{recipe}", recipe, 1, 2, **TP2)
        for run in (single, sharded):
            del run.options["--bf16"]
            session.together([run], 70)
        if not single.ok or not sharded.ok:
            session.add("tp2 fp32", recipe, "FAILED", f"{single.status}, {sharded.status}")
            continue
        loss, norm = (
            relative(single.values(name), sharded.values(name))[0] for name in ("lm_loss", "grad_norm")
        )
        limits = FIRST_STEP_FP32[recipe]
        good = loss < limits[0] and norm < limits[1]
        detail = f"first step: loss {loss:.1e}, grad norm {norm:.1e}"
        session.add("tp2 fp32", recipe, "ok" if good else "DIFFERS", detail)


def part_dp2(session: Session) -> None:
    """Data parallelism with the distributed optimizer and overlapped communication."""
    compare_layout(session, "dp2", DP2)


def part_pp2(session: Session) -> None:
    """Two pipeline stages."""
    compare_layout(session, "pp2", PP2)


def part_resume_tp2(session: Session) -> None:
    """Resume at TP=2 from the middle of the runs of `tp2`."""
    for recipe in RECIPES:
        whole = session.done[f"tp2-{recipe}"]
        load = {"load": session.scratch / whole.name, "ckpt_step": SAVED_AT}
        resumed = session.tiny(f"tp2-{recipe}-resumed", recipe, STEPS_COMPARED, 2, **TP2, **load)
        session.together([resumed], 70)
        report_resume(session, "resume tp2", recipe, whole, resumed, SAVED_AT)


def part_tp2_graphs(session: Session) -> None:
    """Tensor and sequence parallelism with the step, its messages included, in CUDA graphs."""
    compare_layout(session, "tp2-graphs", TP2 | {"cuda_graph_impl": "local"})


def part_tp2_overlap(session: Session) -> None:
    """Messages beside products: as those between them, and captured as launched; in deterministic mode."""
    how = TP2 | {"deterministic_mode": None}
    beside = how | {"tp_comm_overlap": None}
    for recipe in RECIPES:
        between, launched, captured = (
            session.tiny(f"overlap-{name}-{recipe}", recipe, STEPS_COMPARED, 2, **options)
            for name, options in (
                ("without", how),
                ("launched", beside),
                ("captured", beside | {"cuda_graph_impl": "local"}),
            )
        )
        for run in (between, launched) if session.device == "cpu" else (between, launched, captured):
            session.together([run], 70)
        if not between.ok or not launched.ok:
            session.add("overlap", recipe, "FAILED", f"without: {between.status}; with: {launched.status}")
            continue
        losses = relative(between.values("lm_loss"), launched.values("lm_loss"))
        good = finite(launched) and losses[0] < FIRST_LOSS[recipe] and max(losses) < SAME_LOSS[recipe]
        detail = f"{same_bits(between, launched)}; loss: first {losses[0]:.1e}, worst {max(losses):.1e}"
        peers = "by copies into the other GPUs" in launched.log
        detail += "" if session.device == "cpu" else f"; peer memory: {'used' if peers else 'NOT used'}"
        session.add("overlap", recipe, "ok" if good else "DIFFERS", detail)
        if session.device == "cuda":
            verdict = same_bits(launched, captured) if captured.ok else captured.status
            good = verdict.startswith("bitwise")
            session.add("overlap", f"{recipe} in graphs", "ok" if good else "DIFFERS", verdict)


def part_dp2_graphs(session: Session) -> None:
    """Data parallelism with the distributed optimizer, the step in CUDA graphs."""
    compare_layout(session, "dp2-graphs", {"use_distributed_optimizer": None, "cuda_graph_impl": "local"})


def part_billion_tp2(session: Session) -> None:
    """The 1B preset at TP=2 with sequence parallelism."""
    runs = [session.billion(f"1b-tp2-{recipe}", recipe, 8, 2, **TP2) for recipe in RECIPES]
    for run in runs:
        session.together([run], 90)
    report_training(session, "1b tp2", runs, must_learn=False)


def part_cp2(session: Session) -> None:
    """Two context-parallel ranks: bf16 as one rank, the others finite and learning."""
    compare_layout(session, "cp2", {"context_parallel_size": 2})


def part_vpp2(session: Session) -> None:
    """Two pipeline stages of two virtual stages each."""
    compare_layout(session, "vpp2", PP2 | {"num_virtual_stages_per_pipeline_rank": 2})


TE = {"transformer_impl": "transformer_engine"}


def part_te(session: Session) -> None:
    """Transformer Engine's norm and attention around our linears: as the local layers, and bitwise resume."""
    local, whole, resumed = {}, {}, {}
    for recipe in RECIPES:
        name = f"te-{recipe}"
        save = {"save": session.scratch / name, "save_interval": SAVED_AT, "deterministic_mode": None}
        load = {"load": session.scratch / name, "ckpt_step": SAVED_AT, "deterministic_mode": None}
        local[recipe] = session.tiny(f"single-{recipe}", recipe, STEPS_COMPARED)
        whole[recipe] = session.tiny(name, recipe, STEPS_COMPARED, **TE, **save)
        resumed[recipe] = session.tiny(f"{name}-resumed", recipe, STEPS_COMPARED, **TE, **load)
    session.together([*local.values(), *whole.values()], 150)
    session.together(list(resumed.values()), 120)
    for recipe in RECIPES:
        if not local[recipe].ok or not whole[recipe].ok:
            detail = f"local: {local[recipe].status}, TE: {whole[recipe].status}"
            session.add("te", recipe, "FAILED", detail)
            continue
        losses = relative(local[recipe].values("lm_loss"), whole[recipe].values("lm_loss"))
        good = finite(whole[recipe]) and losses[0] < FIRST_LOSS[recipe] and max(losses) < SAME_LOSS[recipe]
        detail = f"against local: first loss {losses[0]:.1e}, worst of {len(losses)} {max(losses):.1e}"
        session.add("te", recipe, "ok" if good else "DIFFERS", detail)
        report_resume(session, "te", f"{recipe} resume", whole[recipe], resumed[recipe], SAVED_AT)


def part_te_tp2(session: Session) -> None:
    """The same at TP=2 with sequence parallelism."""
    compare_layout(session, "te-tp2", TP2 | TE)


def part_te_billion(session: Session) -> None:
    """Step times at 1B with Transformer Engine, and bf16 without it in the same call."""
    runs = [
        session.billion("1b-local-bf16", "bf16", 8),
        *(session.billion(f"1b-te-{recipe}", recipe, 8, **TE) for recipe in RECIPES),
    ]
    for run in runs:
        session.together([run], 80)
    report_training(session, "1b te", runs, must_learn=False)


PARTS: dict[str, dict[str, Callable[[Session], None]]] = {
    "one": {
        "smoke": part_smoke, "bits": part_bits, "resume": part_resume, "billion": part_billion,
        "billion-packed": part_billion_packed, "graphs": part_graphs, "graph-options": part_graph_options,
        "tiny": part_tiny, "resume-billion": part_resume_billion,
        "deterministic-speed": part_deterministic_speed, "te": part_te, "te-billion": part_te_billion,
    },
    "two": {
        "single": part_single, "tp2": part_tp2, "resume-tp2": part_resume_tp2, "dp2": part_dp2,
        "pp2": part_pp2, "cp2": part_cp2, "vpp2": part_vpp2, "tp2-fp32": part_tp2_fp32,
        "billion-tp2": part_billion_tp2, "te-tp2": part_te_tp2, "tp2-graphs": part_tp2_graphs,
        "tp2-overlap": part_tp2_overlap,
        "dp2-graphs": part_dp2_graphs,
    },
}  # fmt: skip


def describe_machine() -> str:
    """Return device and versions in one line."""
    code = (
        "import platform, torch; from megatron.core.package_info import __version__ as m; c = torch.cuda;"
        "print(f'{c.device_count()} x {c.get_device_name()}' if c.is_available() else 'CPU', 'torch',"
        "torch.__version__, 'CUDA', torch.version.cuda, 'megatron-core', m,"
        "'Python', platform.python_version())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]


def write_report(session: Session) -> None:
    """Write table, results and all logs in one file each."""
    lines = [f"{part:<12} {name:<34} {verdict:<9} {detail}" for part, name, verdict, detail in session.table]
    (session.out / "table.txt").write_text("\n".join(lines) + "\n")
    (session.out / "results.json").write_text(json.dumps(session.results, indent=1))
    with open(session.out / "logs.txt", "w") as stream:
        for log in sorted(session.scratch.glob("*.log"), key=lambda path: path.stat().st_mtime):
            stream.write(f"\n######## {log.name}\n{log.read_text(errors='replace')[-150_000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("machine", choices=PARTS)
    parser.add_argument("--parts", help="some of the machine's parts, separated by commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--data", type=Path, default=REPOSITORY / ".gpu_data", help="t.bin, t.idx, sp.model")
    parser.add_argument("--gpu", type=int, default=0, help="the GPU of runs on one rank")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part starts after this")
    args = parser.parse_args()
    out = Path(os.environ.get("OUT", REPOSITORY / "runs" / "gpu"))
    out.mkdir(parents=True, exist_ok=True)
    parts = PARTS[args.machine]
    chosen = list(parts) if args.parts is None else args.parts.split(",")
    if unknown := [name for name in chosen if name not in parts]:
        parser.error(f"--parts must be of {', '.join(parts)}, received {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="metis-gpu-") as scratch:
        deadline = time.time() + 60 * args.minutes
        session = Session(args.device, args.data.resolve(), out, Path(scratch), deadline, gpu=args.gpu)
        session.results["machine"] = describe_machine()
        print(session.results["machine"])
        for name in chosen:
            if session.seconds_left < 20.0:
                session.add(name, "", "NOT RUN", "time limit")
                continue
            began = time.time()
            try:
                parts[name](session)
            except Exception as error:  # the next part may still tell something
                session.add(name, "", "FAILED", f"{type(error).__name__}: {error}")
            print(f"== {name}: {time.time() - began:.0f} s")
            write_report(session)
    print(session.results["machine"])
    print((out / "table.txt").read_text())
    return 0 if all(verdict in ("ok", "measured") for _, _, verdict, _ in session.table) else 1


if __name__ == "__main__":
    sys.exit(main())

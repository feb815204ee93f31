"""What a user of the trainer sees: counters, files, schedules, and runs cut in two, through the whole loop.

Oracles: Megatron-LM's behaviour (which batch `--iterations-to-skip` leaves out, fp16 steps skipped on
overflow), an uninterrupted run for a resumed one, one rank for several, and the same run without overlapping
for one with it. All bitwise unless a tolerance says otherwise.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metis.training.retention import TRACKER_NAME
from metis.training.signals import EXITED_CLEANLY
from tests._distributed import run_ranks, use_fast_checkpoint_queue
from tests.integration._trainer import (
    REPOSITORY,
    TOKENIZER,
    Outcome,
    data_options,
    environment,
    read_metrics,
    run_case,
    run_in_process,
    write_data,
)

FP32_LOSS = 1e-5  # two stages against one rank over two steps; promised as much, measured 5e-7
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
DOCUMENTS = "--num-layers 4 --reset-attention-mask --reset-position-ids --eod-mask-loss"
STEADY = "--train-iters 4 --eval-iters 1 --eval-interval 2 --recipe metis --log-params-norm"


def column(path: Path, name: str = "lm_loss", kind: str = "train") -> dict[int, float]:
    """Return iteration -> value of a metrics file."""
    values = {line["iteration"]: line[name] for line in read_metrics(path, kind)}
    assert len(values) == len(read_metrics(path, kind)), f"an iteration appears twice in {path}"
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Outcome]:
    """All runs of one rank, in one process."""
    data = data_options(write_data(folder / "text"))
    save = f"--save {folder}/save --save-interval 2"
    samples = "--train-samples 24 --eval-iters 0 --lr-decay-style linear"
    ramp = "--train-samples 40 --eval-iters 0 --rampup-batch-size 4 4 16 --global-batch-size 8"
    cases = {
        "plain": "--train-iters 4 --eval-iters 0",
        "skip": "--train-iters 4 --eval-iters 0 --iterations-to-skip 1",
        "fp16": "--train-iters 4 --eval-iters 0 --fp16 --hysteresis 1 --initial-loss-scale 4294967296",
        "fp16_fixed": "--train-iters 2 --eval-iters 0 --fp16 --loss-scale 1e30",
        "steady": STEADY,
        "first_half": f"{STEADY} {save} --exit-interval 2 --log-progress",
        "second_half": f"{STEADY} {save} --load {folder}/save --async-save --log-progress",
        "again": f"{STEADY} --load {folder}/save --eval-interval 3",
        "evaluate": f"--skip-train --eval-iters 1 --recipe metis --load {folder}/save",
        "weights_only": f"{STEADY} --load {folder}/save --ckpt-step 2 --no-load-optim "
        "--lr-decay-style linear",
        "samples_half": f"{samples} --save {folder}/samples --save-interval 100 --exit-interval 2",
        "samples_smaller": f"{samples} --load {folder}/samples --global-batch-size 2",
        "samples_larger": f"{samples} --load {folder}/samples --global-batch-size 8",
        "documents": f"--train-iters 2 --eval-iters 0 {DOCUMENTS}",
        "ramp": ramp,
        "ramp_half": f"{ramp} --save {folder}/ramp --save-interval 100 --exit-interval 3",
        "ramp_rest": f"{ramp} --load {folder}/ramp",
        "tied": "--train-iters 2 --eval-iters 0 --preset llama3.2-1b --num-layers 4 --no-rope-fusion",
        "logged": f"--train-iters 2 --eval-iters 0 --logging-level 20 --timing-log-level 2 --log-interval 2 "
        f"--tensorboard-dir {folder}/events --tensorboard-log-interval 2 --log-timers-to-tensorboard",
        "nan": "--train-iters 4 --eval-iters 0 --lr 1e30 --min-lr 1e30 --clip-grad 0",
    }
    files = {"first_half": "halves", "second_half": "halves", "again": "halves", "ramp_half": "ramps",
             "ramp_rest": "ramps"}  # fmt: skip
    lines = {
        name: f"{data} {line} --metrics-file {folder}/{files.get(name, name)}.jsonl"
        for name, line in cases.items()
    }
    lines["mock"] = f"--mock-data {TOKENIZER} --train-iters 1 --eval-iters 0"
    outcomes = run_in_process(lines)
    unexpected = {name: outcome.error for name, outcome in outcomes.items() if outcome.error}
    assert set(unexpected) == {"nan", "fp16_fixed"}, unexpected
    return outcomes


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Outcome]) -> dict[str, Outcome]:
    """All runs of two ranks, in one process group."""
    del one
    data = data_options(str(folder / "text"))
    save = f"--save {folder}/save2 --save-interval 2"
    cases = {
        "dp2": f"{STEADY} --use-distributed-optimizer",
        "overlap": f"{STEADY} {OVERLAP}",
        "overlap_half": f"{STEADY} {OVERLAP} {save} --exit-interval 2",
        "overlap_rest": f"{STEADY} {OVERLAP} {save} --load {folder}/save2",
        "tied2": "--train-iters 2 --eval-iters 0 --preset llama3.2-1b --num-layers 4 --no-rope-fusion "
        "--pipeline-model-parallel-size 2",
        "documents_vpp2": f"--train-iters 2 --eval-iters 0 {DOCUMENTS} --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1",
        "recomputed": f"{STEADY} --use-distributed-optimizer --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
    }
    lines = {}
    for name, line in cases.items():
        file = name.replace("_half", "_parts").replace("_rest", "_parts")
        lines[name] = f"{data} {line} --metrics-file {folder}/{file}.jsonl"
    outcomes = run_in_process(lines, world_size=2)
    assert not any(outcome.error for outcome in outcomes.values()), outcomes
    return outcomes


def test_iterations_to_skip_counts_from_zero_and_reads_the_batch(
    folder: Path, one: dict[str, Outcome]
) -> None:
    plain, skip = column(folder / "plain.jsonl"), column(folder / "skip.jsonl")
    assert sorted(skip) == [1, 3, 4] and skip[1] == plain[1]
    tokens = column(folder / "skip.jsonl", "consumed_tokens")
    assert tokens[3] == column(folder / "plain.jsonl", "consumed_tokens")[3]
    # The learning rate moves with updates, so the third step has what the second would have had.
    assert (
        column(folder / "skip.jsonl", "learning_rate")[3]
        == column(folder / "plain.jsonl", "learning_rate")[2]
    )
    assert "skipped samples:            4 |" in one["skip"].stdout


def test_fp16_overflow_is_skipped_with_a_dynamic_loss_scale_only(
    folder: Path, one: dict[str, Outcome]
) -> None:
    losses = column(folder / "fp16.jsonl")
    assert sorted(losses) == [1, 2, 3, 4] and all(value is not None for value in losses.values())
    assert "number of skipped iterations:   1 |" in one["fp16"].stdout
    assert one["fp16_fixed"].error.startswith("iteration 1, rank 0: a gradient")


def test_non_finite_loss_names_iteration_rank_and_remedies(one: dict[str, Outcome]) -> None:
    error = one["nan"].error
    assert re.match(r"iteration 2, rank 0: a gradient \(found NaN in [^'=]*\) must be finite; ", error)
    assert "--iterations-to-skip 1," in error  # counts from zero, as the option does


def test_run_cut_in_two_equals_the_whole(folder: Path, one: dict[str, Outcome]) -> None:
    assert column(folder / "halves.jsonl") == column(folder / "steady.jsonl")
    assert column(folder / "halves.jsonl", "grad_norm") == column(folder / "steady.jsonl", "grad_norm")


def test_final_validation_is_replaced_when_the_job_is_run_again(
    folder: Path, one: dict[str, Outcome]
) -> None:
    """The second half ended with a validation at 4; a third job starts there and validates once more."""
    validations = column(folder / "halves.jsonl", "validation_loss", "validation")
    assert sorted(validations) == [2, 4]
    assert validations[2] == column(folder / "steady.jsonl", "validation_loss", "validation")[2]
    assert "validation loss at iteration 4 on validation set" in one["again"].stdout


def test_skip_train_evaluates_a_checkpoint_without_length_and_schedule(
    folder: Path, one: dict[str, Outcome]
) -> None:
    assert sorted(column(folder / "evaluate.jsonl", "validation_loss", "validation")) == [4]
    assert column(folder / "evaluate.jsonl") == {}


def test_weights_alone_go_on_at_their_place_in_the_schedule(folder: Path, one: dict[str, Outcome]) -> None:
    rates = column(folder / "weights_only.jsonl", "learning_rate")
    assert rates == pytest.approx({3: 1e-3 - 9e-4 * 2 / 4, 4: 1e-3 - 9e-4 * 3 / 4})  # to a tenth, linearly


def test_samples_that_are_left_are_trained_on_whatever_the_batch_size(
    folder: Path, one: dict[str, Outcome]
) -> None:
    for name, batch, last in (("samples_smaller", 2, 10), ("samples_larger", 8, 4)):
        tokens = column(folder / f"{name}.jsonl", "consumed_tokens")
        assert [count // 32 for count in tokens.values()] == list(range(8 + batch, 25, batch))
        assert max(tokens) == last and f"setting training iterations to {last}" in one[name].stdout


def test_documents_stay_apart_on_every_virtual_stage(folder: Path, two: dict[str, Outcome]) -> None:
    one_rank, stages = (column(folder / f"documents{suffix}.jsonl") for suffix in ("", "_vpp2"))
    assert stages == pytest.approx(one_rank, rel=FP32_LOSS)


def test_batch_size_ramp_resumes_in_the_middle(folder: Path, one: dict[str, Outcome]) -> None:
    whole = column(folder / "ramp.jsonl", "consumed_tokens")
    assert [tokens // 32 for tokens in whole.values()] == [4, 8, 12, 16, 24, 32, 40]
    for name in ("lm_loss", "consumed_tokens", "learning_rate"):
        assert column(folder / "ramps.jsonl", name) == column(folder / "ramp.jsonl", name)


def test_progress_file_tells_starts_and_saves(folder: Path, one: dict[str, Outcome]) -> None:
    lines = (folder / "save" / "progress.txt").read_text().splitlines()
    events = [line.split("\t")[3:5] for line in lines]
    assert events == [
        ["Starting job"],
        ["Saved checkpoint", "Iteration: 2"],
        ["Starting job"],
        ["Saving async checkpoint", "Iteration: 4"],
        ["Saved checkpoint", "Iteration: 4"],
    ]


def test_theoretical_memory_is_printed_with_the_bases(one: dict[str, Outcome]) -> None:
    pattern = r"weight and optimizer=([\d.]+) MB \(16.00 bytes per parameter\), buffers=([\d.]+) MB"
    parameters = int(re.search(r"model parallel rank \(0, 0\): (\d+)", one["steady"].stdout).group(1))
    size, bases = map(float, re.search(pattern, one["steady"].stdout).groups())
    assert size == round(16 * parameters / 2**20, 2)
    assert bases > 0.0 == float(re.search(pattern, one["plain"].stdout).group(2))


def test_timers_and_scalars_follow_their_intervals(folder: Path, one: dict[str, Outcome]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    assert {"optimizer-time", "batch-generator-time", "forward-backward-time"} <= set(
        events.Tags()["scalars"]
    )
    assert [point.step for point in events.Scalars("lm loss")] == [2]
    assert re.search(r"^    optimizer \.+: ", one["logged"].stdout, re.MULTILINE)


def test_logging_level_shows_messages_of_megatron_core(one: dict[str, Outcome]) -> None:
    assert "INFO:megatron.core" in one["logged"].stderr and "INFO:" not in one["plain"].stderr


def test_runs_print_no_warnings(one: dict[str, Outcome], two: dict[str, Outcome]) -> None:
    for name, outcome in {**one, **two}.items():
        if name != "logged":
            assert outcome.stderr == "", name


def test_tied_embeddings_on_two_stages_equal_one_rank(folder: Path, two: dict[str, Outcome]) -> None:
    a, b = column(folder / "tied.jsonl"), column(folder / "tied2.jsonl")
    assert max(abs(a[i] - b[i]) for i in a) <= FP32_LOSS


def test_overlapping_changes_nothing(folder: Path, two: dict[str, Outcome]) -> None:
    """Also what is read between steps: evaluation and parameter norm need complete parameters."""
    for kind, name in (("train", "lm_loss"), ("train", "grad_norm"), ("validation", "validation_loss")):
        assert column(folder / "overlap.jsonl", name, kind) == column(folder / "dp2.jsonl", name, kind)
    norms = [re.findall(r"params norm: ([\d.]+)", two[case].stdout) for case in ("overlap", "dp2")]
    assert len(norms[0]) == 4 and norms[0] == norms[1] and len(set(norms[0])) > 1


def test_overlapped_run_cut_in_two_equals_the_whole(folder: Path, two: dict[str, Outcome]) -> None:
    for kind, name in (("train", "lm_loss"), ("train", "grad_norm"), ("validation", "validation_loss")):
        assert column(folder / "overlap_parts.jsonl", name, kind) == column(
            folder / "overlap.jsonl", name, kind
        )


def test_full_recomputation_gives_the_same_curve(folder: Path, two: dict[str, Outcome]) -> None:
    assert column(folder / "recomputed.jsonl") == column(folder / "dp2.jsonl")


def _timeouts(rank: int, world_size: int) -> list[float]:
    from argparse import Namespace

    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from metis.training.initialize import lower_timeout

    parallel_state.initialize_model_parallel(2, create_gloo_process_groups=True)
    lower_timeout(Namespace(device="cpu", distributed_timeout_seconds_after_init=33))
    groups = (dist.group.WORLD, parallel_state.get_tensor_model_parallel_group())
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_timeout_is_lowered_for_every_group() -> None:
    assert run_ranks(_timeouts, 2) == [[33.0, 33.0]] * 2


def test_llama3_8b_scripts_differ_in_the_recipe_alone() -> None:
    configs, commands = {}, {}
    for recipe in ("bf16", "nvfp4", "metis"):
        script = REPOSITORY / "examples" / "llama3_8b" / f"{recipe}.sh"
        result = subprocess.run(
            ["bash", str(script), "--print-config"],
            env=environment(PYTHON=sys.executable, RUN_NAME="ignored", OUTPUT="/nowhere"),
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        configs[recipe] = json.loads(result.stdout)
        commands[recipe] = result.stderr.replace(f"--recipe {recipe} ", "--recipe RECIPE ")
    assert {name: config["recipe"]["name"] for name, config in configs.items()} == {n: n for n in configs}
    shared = ("model", "parallel", "training", "policy", "parameters", "tokens_total")
    for name in ("nvfp4", "metis"):
        assert commands[name] == commands["bf16"]
        assert [configs[name][key] for key in shared] == [configs["bf16"][key] for key in shared]
        assert configs[name]["num_quantized_linears"] == 112  # 28 of 32 blocks, 4 linears each
    assert configs["bf16"]["parallel"]["data_parallel_size"] == 2


def _run_started_61_seconds_ago(rank: int, world_size: int, line: str) -> Outcome:
    from types import SimpleNamespace

    from metis.training import loop

    use_fast_checkpoint_queue()
    loop.time = SimpleNamespace(time=lambda: time.time() - 61.0)
    return run_case(world_size, line)


def test_exit_duration_saves_and_leaves(folder: Path, one: dict[str, Outcome]) -> None:
    data, save = data_options(str(folder / "text")), folder / "duration"
    line = (
        f"{data} --train-iters 100 --eval-iters 0 --exit-duration-in-mins 1 --save {save} --save-interval 100"
    )
    (outcome,) = run_ranks(_run_started_61_seconds_ago, 1, line)
    assert outcome.error == "" and re.search(r"exiting program after 1\.\d minutes", outcome.stdout)
    assert (save / TRACKER_NAME).read_text() == "1"
    assert (save / EXITED_CLEANLY).read_text().startswith("1\texiting program after")

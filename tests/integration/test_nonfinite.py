"""A NaN or infinity in one operand of one step, through the whole trainer: found, named, and dealt with as
asked.

The poison is a hook on one linear, on one rank, in one step. Oracle of a skipped step: the same run told
beforehand to leave that batch out with `--iterations-to-skip`, bitwise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests._distributed import run_ranks, use_fast_checkpoint_queue
from tests.integration._trainer import Outcome, data_options, read_metrics, run_case, write_data

NUM_ITERATIONS = 4
BAD_STEP = 1  # from 0: iteration 2, in which bases are still sketched every step
LAYER, FIRST_STAGE = "decoder.layers.1.mlp.linear_fc2", "decoder.layers.0.self_attention.linear_qkv"
TRAIN = f"--train-iters {NUM_ITERATIONS} --eval-iters 0 --num-layers 2 --policy all --recipe metis"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
MARK = "NaN or infinity"


@dataclass(frozen=True)
class Poison:
    """One value put into one matrix. kind: input, grad_output, evaluation (an input then) or embedding."""

    kind: str
    value: float = float("nan")
    rank: int = 0
    layer: str = LAYER


@dataclass(frozen=True)
class Case:
    line: str
    poison: Poison | None = None


def _spoil(tensor: Tensor, value: float) -> Tensor:
    spoiled = tensor.clone()
    spoiled.view(-1)[5] = value
    return spoiled


def _attach(model: list[nn.Module], clock: Any, poison: Poison) -> None:
    from metis.mcore.state import recipe_linears

    def is_time() -> bool:
        return clock.step == BAD_STEP and dist.get_rank() == poison.rank

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if module.training == (poison.kind == "input") and (is_time() or not module.training):
            return (_spoil(inputs[0], poison.value), *inputs[1:])
        return None

    def after(module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
        if output[0].requires_grad and is_time():
            output[0].register_hook(lambda grad: _spoil(grad, poison.value))

    for linear in recipe_linears(model):
        if linear.layer_name == poison.layer:
            if poison.kind in ("input", "evaluation"):
                linear.register_forward_pre_hook(before)
            elif poison.kind == "grad_output":
                linear.register_forward_hook(after)
    for name, parameter in (pair for chunk in model for pair in chunk.named_parameters()):
        if poison.kind == "embedding" and name.endswith("word_embeddings.weight"):
            parameter.register_hook(lambda grad: _spoil(grad, poison.value) if is_time() else None)


def _run(rank: int, world_size: int, cases: dict[str, Case]) -> dict[str, Outcome]:
    from metis.training import loop

    use_fast_checkpoint_queue()
    build = loop.build_model

    def build_poisoned(poison: Poison | None, args: Any, clock: Any) -> list[nn.Module]:
        model = build(args, clock)
        if poison is not None:
            _attach(model, clock, poison)
        return model

    outcomes = {}
    for name, case in cases.items():
        loop.build_model = functools.partial(build_poisoned, case.poison)
        outcomes[name] = run_case(world_size, case.line)
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nonfinite")


def _lines(folder: Path, cases: dict[str, Case]) -> dict[str, Case]:
    data = data_options(write_data(folder / "text"))
    return {
        name: Case(f"{data} {case.line} --metrics-file {folder}/{name}.jsonl", case.poison)
        for name, case in cases.items()
    }


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Outcome]:
    """All runs of one rank."""
    nan, infinity = Poison("input"), Poison("input", float("inf"))
    evaluate = TRAIN.replace("--eval-iters 0", "--eval-iters 1 --eval-interval 2")
    cases = {
        "stop": Case(f"{TRAIN} --save {folder}/save --save-interval 1", nan),
        "infinity": Case(f"{TRAIN} --recipe mxfp4", infinity),
        "gradient": Case(f"{TRAIN} --recipe nvfp4", Poison("grad_output")),
        "skip": Case(f"{TRAIN} --nonfinite-operands skip --log-quantization-interval {BAD_STEP + 1}", nan),
        "told": Case(f"{TRAIN} --iterations-to-skip {BAD_STEP}"),
        "ignore": Case(f"{TRAIN} --nonfinite-operands ignore", nan),
        "evaluation_stop": Case(evaluate, Poison("evaluation")),
        "evaluation_skip": Case(f"{evaluate} --nonfinite-operands skip", Poison("evaluation")),
        "embedding": Case(TRAIN, Poison("embedding")),
        "bf16": Case(TRAIN.replace("metis", "bf16"), Poison("embedding")),
    }
    return run_ranks(_run, 1, _lines(folder, cases), timeout=300)[0]


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Outcome]) -> dict[str, list[Outcome]]:
    """All runs of two ranks; outcomes of both."""
    del one
    tp, pp = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
    shard = Poison("input", rank=1)
    cases = {
        "tp_stop": Case(f"{TRAIN} {tp}", shard),
        "tp_skip": Case(f"{TRAIN} {tp} --nonfinite-operands skip", shard),
        "tp_told": Case(f"{TRAIN} {tp} --iterations-to-skip {BAD_STEP}"),
        "dp_skip": Case(f"{TRAIN} {OVERLAP} --nonfinite-operands skip", Poison("grad_output", rank=1)),
        "dp_told": Case(f"{TRAIN} {OVERLAP} --iterations-to-skip {BAD_STEP}"),
        "pp_forward": Case(f"{TRAIN} {pp}", Poison("input", layer=FIRST_STAGE)),
        "pp_backward": Case(f"{TRAIN} {pp}", Poison("grad_output", rank=1)),
    }
    by_rank = run_ranks(_run, 2, _lines(folder, cases), timeout=300)
    return {name: [outcomes[name] for outcomes in by_rank] for name in cases}


def iterations(folder: Path, name: str) -> list[int]:
    return [line["iteration"] for line in read_metrics(folder / f"{name}.jsonl")]


def numbers(folder: Path, name: str, field: str) -> dict[int, float]:
    lines = read_metrics(folder / f"{name}.jsonl")
    return {line["iteration"]: line[field] for line in lines if line["iteration"] != BAD_STEP + 1}


@pytest.mark.parametrize(
    ("name", "cell"),
    [("stop", "fprop_input"), ("infinity", "fprop_input"), ("gradient", "dgrad_grad_output")],
)
def test_stop_names_iteration_layer_and_cell(one: dict[str, Outcome], name: str, cell: str, folder: Path):
    start = f"iteration {BAD_STEP + 1}, {LAYER}, {cell}: must be finite, received {MARK} (and in "
    assert one[name].error.startswith(start), one[name]
    assert f"--iterations-to-skip {BAD_STEP}, " in one[name].error
    assert iterations(folder, name) == list(range(1, BAD_STEP + 1))


def test_stop_leaves_the_last_good_checkpoint_alone(one: dict[str, Outcome], folder: Path):
    assert one["stop"].error
    assert (folder / "save" / "latest_checkpointed_iteration.txt").read_text().strip() == str(BAD_STEP)
    names = sorted(path.name for path in (folder / "save").glob("iter_*"))
    assert names == [f"iter_{number:07d}" for number in range(1, BAD_STEP + 1)]


@pytest.mark.parametrize(
    ("skipped", "told"), [("skip", "told"), ("tp_skip", "tp_told"), ("dp_skip", "dp_told")]
)
def test_skip_equals_a_run_that_left_the_batch_out(
    skipped: str, told: str, one: dict[str, Outcome], two: dict[str, list[Outcome]], folder: Path
):
    assert not any(outcome.error for outcome in (one["skip"], *two["tp_skip"], *two["dp_skip"]))
    assert iterations(folder, skipped) == list(range(1, NUM_ITERATIONS + 1))
    for field in ("lm_loss", "grad_norm", "learning_rate", "consumed_tokens"):
        assert numbers(folder, skipped, field) == numbers(folder, told, field), field
    assert len(numbers(folder, skipped, "lm_loss")) == NUM_ITERATIONS - 1


def test_skip_warns_once_and_counts(one: dict[str, Outcome], two: dict[str, list[Outcome]]):
    for outcomes, cell in (
        ([one["skip"]], "fprop_input"),
        (two["tp_skip"], "fprop_input"),
        (two["dp_skip"], "dgrad_grad_output"),
    ):
        text = "".join(outcome.stdout for outcome in outcomes)
        (warning,) = [line for line in text.splitlines() if MARK in line]
        assert warning.startswith(f"WARNING: iteration {BAD_STEP + 1}: {MARK} in {LAYER} {cell}, ")
        assert warning.endswith(" more); the step is skipped")
        assert text.count("skipped iterations:   1 | number of nan iterations:   1 |") == 1
        assert text.count("skipped iterations:   0 | number of nan iterations:   0 |") == NUM_ITERATIONS - 1


def test_a_measured_step_that_is_skipped_reports_finite_operands_only(one: dict[str, Outcome], folder: Path):
    lines = read_metrics(folder / "skip.jsonl", "quantization")
    measured = {(line["layer"], line["cell"]) for line in lines if line["iteration"] == BAD_STEP + 1}
    assert ("decoder.layers.0.mlp.linear_fc2", "fprop_input") in measured
    assert (LAYER, "fprop_weight") in measured and (LAYER, "fprop_input") not in measured
    assert f"quantization at iteration {BAD_STEP + 1}, " in one["skip"].stdout


def test_ignore_leaves_it_to_the_engine(one: dict[str, Outcome]):
    assert one["ignore"].error.startswith(f"iteration {BAD_STEP + 1}, rank 0: a gradient (found NaN in ")


def test_evaluation_is_looked_at_and_blames_no_training_step(one: dict[str, Outcome], folder: Path):
    start = f"evaluation after iteration 2, {LAYER}, fprop_input: must be finite"
    assert one["evaluation_stop"].error.startswith(start)
    assert "--iterations-to-skip" not in one["evaluation_stop"].error
    text = one["evaluation_skip"].stdout
    assert not one["evaluation_skip"].error
    assert f"WARNING: evaluation after iteration 2: {MARK} in {LAYER} fprop_input" in text
    assert iterations(folder, "evaluation_skip") == list(range(1, NUM_ITERATIONS + 1))
    assert text.count("skipped iterations:   0 |") == NUM_ITERATIONS


def test_a_bad_gradient_behind_finite_operands_is_named_by_its_parameter(one: dict[str, Outcome]):
    start = f"iteration {BAD_STEP + 1}: a gradient (embedding.word_embeddings.weight) must be finite"
    assert one["embedding"].error.startswith(start), one["embedding"]


def test_without_our_linears_the_engine_checks_as_ever(one: dict[str, Outcome]):
    assert one["bf16"].error.startswith(f"iteration {BAD_STEP + 1}, rank 0: a gradient (found NaN in ")


def test_all_ranks_raise_the_same_error(two: dict[str, list[Outcome]]):
    begin = f"iteration {BAD_STEP + 1}, "
    starts = {
        "tp_stop": f"{begin}{LAYER}, fprop_input: ",
        "pp_forward": f"{begin}{FIRST_STAGE}, fprop_input: ",
        "pp_backward": f"{begin}{LAYER}, dgrad_grad_output: ",
    }
    for name, start in starts.items():
        first, last = (outcome.error for outcome in two[name])
        assert first.startswith(start) and first == last, (name, first, last)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_watch_flags_one_bad_element_whatever_the_split(value: float):
    from metis.nn import MetisLinear

    linear = MetisLinear(32, 32, recipe="metis", name="here")
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(3):  # cold, cold, split
        linear(x).square().sum().backward()
        linear.after_step()
    assert linear.clock.watch.take_nonfinite() == []
    linear(_spoil(x, value))
    assert linear.clock.watch.take_nonfinite() == [("here", "fprop_input")]
    assert linear.clock.watch.take_nonfinite() == []

"""Resume changes nothing: stopping at k and going on equals not stopping, bitwise, in every recipe.

The uninterrupted run saves at k = 1, 6, 8 and 9 (inside, at and after a refresh window of 8 steps); each
checkpoint is then resumed to the end. Without the distributed optimizer on one rank, with it on two
data-parallel ranks. Another layout loads the same weights bitwise, and its first loss agrees to the promise
for one step.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path
from typing import Any

import pytest

from tests._distributed import run_ranks, use_fast_checkpoint_queue
from tests.multiproc._trainer_runs import (
    RECIPES,
    make_data,
    parse,
    read_metrics,
    run_cases,
    run_one,
    run_several,
)

LAST = 11
STOPS = (1, 6, 8, 9)
FIRST_LOSS_RESHARDED = 1e-4
ZERO = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
METIS_FIRST = [
    recipe if recipe == "metis" else pytest.param(recipe, marks=pytest.mark.long) for recipe in RECIPES
]
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data(tmp_path_factory.mktemp("data"))


def _resume(
    world_size: int, line: str, load: str, stops: tuple[int, ...], folder: Path, metrics: str
) -> list[dict[str, Any]]:
    """Resume from each stop; runs start from the whole metrics, so removing later lines is tested."""
    runs = []
    for k in stops:
        path = f"{folder}/from_{k}_{len(list(folder.iterdir()))}"
        Path(f"{path}.jsonl").write_text(Path(metrics).read_text())
        runs.append((f"{line} --load {load} --ckpt-step {k}", path))
    return run_several(world_size, runs)


def _run_saving_at_stops(rank: int, world_size: int, line: str, path: str) -> dict[str, Any] | None:
    """Run once, with checkpoints after the steps in STOPS only."""
    from metis.training import loop

    original = loop.Run.save

    def save(self: Any) -> None:
        if self.state.iteration in STOPS:
            original(self)

    loop.Run.save = save  # type: ignore[method-assign]
    return run_one(rank, world_size, line, path)


def _assert_resumes_bitwise(
    world_size: int, data: str, folder: Path, recipe: str, extra: str, stops: tuple[int, ...] = STOPS
) -> None:
    save = f"{folder}/{recipe}"
    line = f"{data} --recipe {recipe} --train-iters {LAST} {extra}"
    saving = f"{line} --save {save} --save-interval 1"
    whole = run_ranks(_run_saving_at_stops, world_size, saving, save, timeout=300)[world_size - 1]
    assert len(whole["loss"]) == LAST
    resumed = _resume(world_size, line, save, stops, folder, f"{save}.jsonl")
    for k, outcome in zip(stops, resumed, strict=True):
        assert outcome == whole, f"stopped at {k}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume_is_bitwise_on_one_rank(data: str, tmp_path: Path, recipe: str) -> None:
    _assert_resumes_bitwise(1, data, tmp_path, recipe, "")


@pytest.mark.parametrize(
    ("recipe", "stops"),
    [("metis", STOPS)]
    + [(recipe, (8,)) for recipe in RECIPES if recipe != "metis"]
    + [pytest.param(recipe, (1, 6, 9), marks=pytest.mark.long) for recipe in RECIPES if recipe != "metis"],
)
def test_resume_is_bitwise_with_the_distributed_optimizer(
    data: str, tmp_path: Path, recipe: str, stops: tuple[int, ...]
) -> None:
    _assert_resumes_bitwise(2, data, tmp_path, recipe, ZERO, stops)


@pytest.mark.parametrize("recipe", METIS_FIRST)
def test_resume_is_bitwise_in_bf16(data: str, tmp_path: Path, recipe: str) -> None:
    _assert_resumes_bitwise(1, data, tmp_path, recipe, "--bf16 --use-distributed-optimizer")


@pytest.mark.parametrize("recipe", RECIPES)
def test_full_recomputation_gives_the_curve_bitwise(data: str, tmp_path: Path, recipe: str) -> None:
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    line = f"--recipe {recipe} --train-iters 4"
    results = run_cases(1, data, {"none": line, "full": f"{line} {recompute}"}, tmp_path)
    assert results["full"] == results["none"]


def _load_and_save(rank: int, world_size: int, line: str) -> None:
    """Set a run up from a checkpoint and save what it has loaded."""
    from metis.training.initialize import initialize

    use_fast_checkpoint_queue()
    args = parse(world_size, line)
    with contextlib.redirect_stdout(io.StringIO()):
        initialize(args)
        from metis.training.loop import Run

        run = Run(args)
        run.set_up()
        run.save()


def _different_tensors(first: str, second: str, iteration: int) -> list[str]:
    """Return the names of tensors that two checkpoints do not hold bitwise alike."""
    import torch
    import torch.distributed.checkpoint as dcp

    contents = []
    for root in (first, second):
        reader = dcp.FileSystemReader(f"{root}/iter_{iteration:07d}")
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in reader.read_metadata().state_dict_metadata.items()
            if hasattr(entry, "size")
        }
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        contents.append(tensors)
    a, b = contents
    assert a.keys() == b.keys()
    assert len(a) > 10
    return [key for key in a if not torch.equal(a[key].view(torch.uint8), b[key].view(torch.uint8))]


@pytest.mark.parametrize("recipe", METIS_FIRST)
def test_another_layout_loads_the_same_weights(data: str, tmp_path: Path, recipe: str) -> None:
    """Save at TP=2, take one more step there and at PP=2, and compare what PP=2 has loaded, by tensor."""
    line = f"{data} --recipe {recipe} --train-iters 10 --use-distributed-optimizer"
    saved, loaded = f"{tmp_path}/tp2", f"{tmp_path}/pp2"
    first = f"{line} {TP2} --exit-interval 9 --save {saved} --save-interval 9"
    run_ranks(run_one, 2, first, f"{tmp_path}/first", timeout=300)
    losses = [
        _resume(2, f"{line} {layout}", saved, (9,), tmp_path, f"{tmp_path}/first.jsonl")
        for layout in (TP2, PP2)
    ]
    again = f"{line} {PP2} --load {saved} --save {loaded} --save-interval 1"
    run_ranks(_load_and_save, 2, again, timeout=300)
    assert _different_tensors(saved, loaded, 9) == []
    assert abs(losses[0][0]["loss"][-1] - losses[1][0]["loss"][-1]) <= FIRST_LOSS_RESHARDED


def _two_readers(rank: int, world_size: int, data: str) -> dict[str, Any]:
    """Train a few steps at DP=2 and return this rank's tokens and a digest of its weights and bases."""
    from metis.training.initialize import initialize

    args = parse(world_size, f"{data} --recipe metis --train-iters 3")
    tokens: list[Any] = []
    with contextlib.redirect_stdout(io.StringIO()):
        initialize(args)
        from metis.training import step
        from metis.training.loop import Run

        original = step.on_this_rank

        def remember(batch: Any) -> Any:
            tokens.append(batch["tokens"].clone())
            return original(batch)

        step.on_this_rank = remember
        run = Run(args)
        run.set_up()
        for iteration in range(3):
            run.steps.train_step(run.train_data, iteration)
    digest = hashlib.sha256()
    for chunk in run.model:
        for parameter in chunk.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        for module in chunk.modules():
            if hasattr(module, "take_pending"):
                digest.update(module.state.v.float().numpy().tobytes())
    return {"tokens": [batch.tolist() for batch in tokens], "weights": digest.hexdigest()}


def test_data_parallel_ranks_read_different_data_and_hold_equal_weights(data: str) -> None:
    first, second = run_ranks(_two_readers, 2, data, timeout=300)
    assert len(first["tokens"]) == len(second["tokens"]) == 3
    assert all(a != b for a in first["tokens"] for b in second["tokens"])
    assert first["weights"] == second["weights"]


def test_reading_metrics_refuses_gaps(tmp_path: Path) -> None:
    """The helper above would hide a lost or doubled line if it did not check the iterations."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "train", "iteration": 2, "lm_loss": 1.0, "grad_norm": 1.0}\n')
    with pytest.raises(AssertionError):
        read_metrics(str(path))

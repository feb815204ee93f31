"""Checkpoints on the real engine: exact resume, resharding, and what survives kills, full disks and wrong
use.

Oracles: an uninterrupted run (bitwise), the plain tensors of a checkpoint read without any layout
(bitwise), and the state of the directory after a failure. Every rank function may raise; `run_ranks` then
fails with its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from metis.errors import CheckpointError
from metis.training import retention
from metis.training.run_config import RUN_CONFIG_NAME, load_args_from_checkpoint
from metis.training.state import TrainState
from tests._distributed import RankError, run_ranks, use_fast_checkpoint_queue

CASES = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "zero1": {"distributed_optimizer": True},
    "bf16_zero1": {"dtype": torch.bfloat16, "distributed_optimizer": True},
}
GATED = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
RECIPE = {"name": "metis", "cells": {"fprop_input": {"rounding": "rne"}}}


class Session:
    """A tiny run with the pieces that a checkpoint joins: arguments, counters, model, optimizer, schedule."""

    def __init__(self, folder: str, world_size: int, case: dict[str, Any], **options: Any) -> None:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from tests._tiny_engine import HIDDEN_SIZE, NUM_HEADS, NUM_LAYERS, VOCAB_SIZE, Case, Run

        use_fast_checkpoint_queue()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        self.run = Run(Case(**case))
        self.state = TrainState()
        tp, pp = self.run.case.tp, self.run.case.pp
        self.args = Namespace(
            save=folder,
            load=folder,
            device="cpu",
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=self.run.case.vpp,
            data_parallel_size=world_size // (tp * pp),
            use_distributed_optimizer=self.run.case.distributed_optimizer,
            params_dtype_name="bf16" if self.run.case.dtype == torch.bfloat16 else "fp32",
            num_layers=NUM_LAYERS,
            hidden_size=HIDDEN_SIZE,
            num_attention_heads=NUM_HEADS,
            vocab_size=VOCAB_SIZE,
            rotary_base=10000,
            resolved_recipe=RECIPE,
            resolved_policy={"rules": [["*", "metis"]]},
            recipe="metis",
            seq_length=16,
            local_rank=0,
        )
        vars(self.args).update(options)
        self.scheduler = OptimizerParamScheduler(
            self.run.optimizer,
            0.0,
            1e-2,
            1e-3,
            4,
            100,
            "cosine",
            0.1,
            0.1,
            10,
            "constant",
            use_checkpoint_opt_param_scheduler=False,
        )

    def steps(self, count: int) -> list[tuple[float, float]]:
        curve = []
        for _ in range(count):
            curve.append(self.run.step())
            self.scheduler.step(increment=4)
            self.state.iteration += 1
            self.state.consumed_train_samples += 4
        return curve

    def save(self, **options: Any) -> None:
        from metis.training.checkpointing import save_checkpoint

        save_checkpoint(self.args, self.state, self.run.chunks, self.run.optimizer, self.scheduler, **options)

    def load(self) -> bool:
        from metis.training.checkpointing import load_checkpoint

        found = load_checkpoint(self.args, self.state, self.run.chunks, self.run.optimizer, self.scheduler)
        self.run.iteration = self.state.iteration
        return found

    def first_layer(self) -> torch.nn.Module:
        return self.run.chunks[0].module.decoder.layers[0]

    def register(self, name: str, value: torch.Tensor) -> None:
        """Give every layer a buffer, as layers with state of their own have."""
        for layer in self.run.chunks[0].module.decoder.layers:
            layer.register_buffer(name, value.clone())

    def parameters(self) -> dict[str, torch.Tensor]:
        return self.run.parameters()


@contextlib.contextmanager
def printed() -> Iterator[io.StringIO]:
    """Collect what is printed (rank 0 does the printing)."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        yield text


def failure_of(action: Callable[[], Any]) -> str:
    """Return the message of the CheckpointError that `action` must raise on this rank."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    raise AssertionError("no CheckpointError was raised")


def plain_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint as stored, whatever layout wrote it."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load_plain_tensors(str(directory))
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def draws() -> list[float]:
    """Return the next value of every generator that a checkpoint restores."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [random.random(), float(np.random.rand()), torch.rand(1).item(), tracked]


# ----------------------------------------------------------------------------------------------- exact resume


def _resume_bitwise(rank: int, world_size: int, folder: str) -> None:
    for name, case in CASES.items():
        path = f"{folder}/{name}"
        first = Session(path, world_size, case)
        first.steps(3)
        first.state.num_floating_point_operations = 1.5e18
        with printed() as text:
            first.save()
        after_save = draws()
        expected = first.steps(3)
        random.seed(5), np.random.seed(5), torch.manual_seed(5)

        second = Session(path, world_size, case)
        with printed() as loaded_text:
            assert second.load()
        assert second.state == TrainState(
            iteration=3, consumed_train_samples=12, num_floating_point_operations=1.5e18
        )
        assert second.scheduler.num_steps == 12, name
        assert draws() == after_save, name
        assert second.steps(3) == expected, name
        assert_same_tensors(first.parameters(), second.parameters())
        if rank == 0:
            assert f"saving checkpoint at iteration       3 to {path} in torch_dist format" in text.getvalue()
            done = f"successfully saved checkpoint from iteration       3 to {path} [ t 1/1, p 1/1 ]"
            assert done in text.getvalue()
            assert f" loading distributed checkpoint from {path} at iteration 3" in loaded_text.getvalue()
            assert f"successfully loaded checkpoint from {path} [ t 1/1, p 1/1 ] at iteration 3" in (
                loaded_text.getvalue()
            )
            stored = "optimizer state stored as fully_reshardable" in text.getvalue()
            assert stored == case.get("distributed_optimizer", False)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_is_bitwise_the_uninterrupted_run(tmp_path: Path, world_size: int) -> None:
    run_ranks(_resume_bitwise, world_size, str(tmp_path))
    directory = tmp_path / "zero1" / "iter_0000003"
    assert {entry.name for entry in directory.iterdir()} >= {
        ".metadata", "common.pt", "metadata.json", RUN_CONFIG_NAME
    }  # fmt: skip
    assert (tmp_path / "zero1" / retention.TRACKER_NAME).read_text() == "3"
    config = json.loads((directory / RUN_CONFIG_NAME).read_text())
    assert config == json.loads((tmp_path / "zero1" / RUN_CONFIG_NAME).read_text())
    assert config["format"] == 1 and config["recipe"] == RECIPE and config["model"]["num_layers"] == 4
    assert config["optimizer_sharding"] == "fully_reshardable"
    assert config["parallel"]["data_parallel_size"] == world_size
    common = torch.load(directory / "common.pt", weights_only=False)
    assert common["checkpoint_version"] == 3.0 and common["args"].consumed_train_samples == 12
    assert "dp_cp_group" not in common["content_metadata"]


# ------------------------------------------------------------------------------------------------- resharding


def _reshard_save(rank: int, world_size: int, folder: str) -> None:
    session = Session(folder + "/a", world_size, {"tp": 2, "distributed_optimizer": True, "model": GATED})
    session.steps(2)
    session.save()
    fixed = Session(
        folder + "/fixed",
        world_size,
        {"tp": 2, "distributed_optimizer": True},
        dist_ckpt_optim_fully_reshardable=False,
    )
    fixed.steps(1)
    fixed.save()


def _reshard_load(rank: int, world_size: int, folder: str, case: dict[str, Any], target: str) -> float:
    session = Session(folder + "/a", world_size, {**case, "distributed_optimizer": True, "model": GATED})
    with printed() as text:
        assert session.load()
    if rank == 0 and world_size == 2:
        assert "(TP, PP) mismatch after resume ((1, 2) vs (2, 1) from checkpoint): RNG" in text.getvalue()
    session.args.save = target
    session.save()
    loss, _ = session.run.step()

    if world_size == 2:
        fixed = Session(folder + "/fixed", world_size, {**case, "distributed_optimizer": True})
        message = failure_of(fixed.load)
        assert "dp_reshardable" in message and "tensor_model_parallel_size 2, received 1" in message, message
        fixed.args.no_load_optim = True
        assert fixed.load()
    return loss


# Worst case measured between TP=2, TP=1 and PP=2 in fp32: 0 to 2e-7 relative.
FIRST_LOSS_RELATIVE = 1e-5


def test_weights_and_optimizer_survive_a_change_of_layout_bitwise(tmp_path: Path) -> None:
    run_ranks(_reshard_save, 2, str(tmp_path))
    losses = []
    for world_size, case in ((1, {}), (2, {"pp": 2}), (2, {"pp": 2, "vpp": 2})):
        target = str(tmp_path / f"b{len(losses)}")
        losses.append(run_ranks(_reshard_load, world_size, str(tmp_path), case, target)[0])
        run_ranks(_compare_tensors, 1, str(tmp_path / "a" / "iter_0000002"), f"{target}/iter_0000002")
    assert max(losses) - min(losses) <= FIRST_LOSS_RELATIVE * losses[0], losses


def _compare_tensors(rank: int, world_size: int, left: str, right: str) -> None:
    tensors = plain_tensors(Path(left))
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in tensors)
    assert_same_tensors(tensors, plain_tensors(Path(right)))


# -------------------------------------------------------------------------------------------- crashes and
# disks


def _full(*unused: Any, **unused_options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


DISK_FULL_AT = {
    "shard": ("megatron.core.dist_checkpointing.strategies.filesystem_async._write_item", 1),
    "common": ("megatron.core.dist_checkpointing.strategies.common.TorchCommonSaveStrategy.save_common", 0),
    "metadata": ("torch.distributed.checkpoint.FileSystemWriter.finish", 0),
    "json": ("metis.training.checkpointing.save_config", 0),
    "commit": ("metis.training.retention.commit", 0),
    "staging": ("metis.training.retention.prepare_staging", 0),
}


def _disk_full(rank: int, world_size: int, folder: str) -> dict[str, str]:
    from metis.training.checkpointing import finalize_async_saves, make_async_queue

    session = Session(folder, world_size, {"distributed_optimizer": True}, async_save=True)
    session.steps(1)
    session.save()
    session.steps(1)
    messages = {}
    for point, (target, failing_rank) in DISK_FULL_AT.items():
        fault = mock.patch(target, _full) if rank == failing_rank else contextlib.nullcontext()
        with fault:
            messages[point] = failure_of(session.save)
        assert retention.read_tracker(folder) == (1, False)
        assert not list(Path(folder).glob(".iter*")), point
        dist.barrier()  # the next save makes such a directory again
    queue = make_async_queue(session.args)
    with mock.patch(DISK_FULL_AT["shard"][0], _full):
        session.save(async_queue=queue)
    messages["async"] = failure_of(lambda: finalize_async_saves(queue, blocking=True, save=folder))
    assert retention.list_iterations(folder) == [1]

    again = Session(folder, world_size, {"distributed_optimizer": True})
    assert again.load() and again.state.iteration == 1
    session.save()  # and with space again, it works
    assert retention.read_tracker(folder) == (2, False)
    return messages


def test_a_full_disk_ends_in_one_error_on_all_ranks_and_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(_disk_full, 2, str(tmp_path))
    assert first.keys() == {*DISK_FULL_AT, "async"}
    for point, message in first.items():
        assert message.startswith(f"{tmp_path}: ") and "No space left on device" in message, (point, message)
        assert second[point] == message
        assert "\n" not in message


def _kill_while_saving(rank: int, world_size: int, folder: str, target: str | None) -> None:
    session = Session(folder, world_size, {})
    session.load()
    session.steps(1)
    if target is None:
        session.save()
        return
    with mock.patch(target, lambda *_, **__: os.killpg(0, signal.SIGKILL)):
        session.save()


def test_sigkill_while_saving_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_ranks(_kill_while_saving, 1, folder, None)
    for target in (
        DISK_FULL_AT["shard"][0],
        "metis.training.checkpointing.save_config",
        "metis.training.retention.write_atomically",
    ):
        with pytest.raises(RankError, match="died"):
            run_ranks(_kill_while_saving, 1, folder, target)
        assert retention.read_tracker(folder) == (1, False)
        assert retention.list_iterations(folder) == [1]
    assert list(tmp_path.glob(".iter_0000002.incomplete"))
    run_ranks(_kill_while_saving, 1, folder, None)
    assert retention.read_tracker(folder) == (2, False)
    assert not list(tmp_path.glob(".iter*"))


def _overwrite(rank: int, world_size: int, folder: str) -> None:
    session = Session(folder, world_size, {})
    session.steps(1)
    session.save()
    session.run.step()
    session.save()  # the same iteration again, with other weights
    expected = session.parameters()
    again = Session(folder, world_size, {})
    assert again.load()
    assert_same_tensors(again.parameters(), expected)
    assert not list(Path(folder).glob(".iter*"))
    # A crash between the two renames of the swap leaves the old directory under its replaced name.
    os.rename(f"{folder}/iter_0000001", f"{folder}/.iter_0000001.replaced")
    final = Session(folder, world_size, {})
    assert final.load()
    assert_same_tensors(final.parameters(), expected)


def test_saving_the_same_iteration_again_is_safe(tmp_path: Path) -> None:
    run_ranks(_overwrite, 1, str(tmp_path))


def _extra_state_in_one_layer(rank: int, world_size: int, folder: str) -> None:
    def with_extra_state(session: Session) -> Session:
        norm = session.first_layer().input_layernorm
        methods = {"get_extra_state": lambda self: torch.ones(1), "set_extra_state": lambda self, state: None}
        norm.__class__ = type("NormWithExtraState", (norm.__class__,), methods)
        return session

    writer = with_extra_state(Session(folder, world_size, {}))
    assert any(name.endswith("_extra_state") for name in writer.first_layer().state_dict())
    writer.steps(1)
    writer.save()
    for reader in (Session(folder, world_size, {}), with_extra_state(Session(folder, world_size, {}))):
        assert reader.load()
        assert_same_tensors(reader.parameters(), writer.parameters())


def test_modules_with_extra_state_in_some_layers_do_not_tie_a_checkpoint_to_them(tmp_path: Path) -> None:
    """As where Transformer Engine's classes make some layers and ours the others."""
    run_ranks(_extra_state_in_one_layer, 1, str(tmp_path))


# ------------------------------------------------------------------------------------------ async and
# retention


def _async_and_retention(rank: int, world_size: int, folder: str) -> None:
    from metis.training.checkpointing import close_async_queue, finalize_async_saves, make_async_queue

    session = Session(
        folder, world_size, {}, async_save=True, save_retain_interval=4, keep_last_checkpoints=2
    )
    queue = make_async_queue(session.args)
    session.steps(1)
    completed = []
    with printed() as text:
        session.save(async_queue=queue, on_complete=lambda: completed.append(1))
        assert completed == [] and retention.read_tracker(folder) is None
        expected = session.parameters()
        session.steps(1)  # the forked writer must not see this
        assert finalize_async_saves(queue, blocking=True, save=folder, timeout_seconds=60) == 1
    assert completed == [1] and retention.read_tracker(folder) == (1, False)
    if rank == 0:
        assert f"scheduled an async checkpoint save at iteration       1 to {folder}" in text.getvalue()
    again = Session(folder, world_size, {})
    assert again.load()
    assert_same_tensors(again.parameters(), expected)
    for _ in range(5):
        session.save(async_queue=queue)
        session.steps(1)
    close_async_queue(queue, save=folder)
    assert retention.list_iterations(folder) == [4, 5, 6]


def test_async_save_and_retention(tmp_path: Path) -> None:
    run_ranks(_async_and_retention, 1, str(tmp_path))


def test_retention_rules() -> None:
    iterations = [10, 20, 30, 40, 50, 60]
    delete = retention.iterations_to_delete
    assert delete(iterations, 60, retain_interval=None, keep_last=None) == []
    assert delete(iterations, 60, retain_interval=30, keep_last=None) == [10, 20, 40, 50]
    assert delete(iterations, 60, retain_interval=None, keep_last=2) == [10, 20, 30, 40]
    assert delete(iterations, 60, retain_interval=20, keep_last=2) == [10, 30]
    assert delete(iterations, 40, retain_interval=None, keep_last=1) == [10, 20, 30]  # 50, 60: another branch


# --------------------------------------------------------------------------------------------------- bad
# input


def _refusals(rank: int, world_size: int, folder: str) -> dict[str, str]:
    session = Session(folder, world_size, {})
    basis = torch.full((3,), 1 / 3, dtype=torch.float64)
    session.register("basis", basis)
    session.steps(2)
    session.save()

    def attempt(case: dict[str, Any] | None = None, **options: Any) -> str:
        return failure_of(Session(folder, world_size, case or {}, **options).load)

    other_recipe = {"name": "metis", "cells": {"fprop_input": {"rounding": "stochastic"}}}
    messages = {
        "model": attempt(num_layers=6, rotary_base=500000),
        "recipe": attempt(resolved_recipe=other_recipe),
        "policy": attempt(resolved_policy={"rules": []}),
        "step": attempt(ckpt_step=7),
        "optimizer": attempt({"distributed_optimizer": True}),
        "dtype": attempt({"dtype": torch.bfloat16}),
        "missing": attempt(load=folder + "/nothing", exit_on_missing_checkpoint=True),
        "pretrained": attempt(load=None, pretrained_checkpoint=folder + "/nothing"),
    }
    schedule = Session(folder, world_size, {})
    schedule.scheduler.lr_decay_steps = 50
    messages["schedule"] = failure_of(schedule.load)

    absent = Session(folder + "/nothing", world_size, {})
    with printed() as text:
        assert not absent.load()
    tracker = f"{folder}/nothing/{retention.TRACKER_NAME}"
    warning = (
        f"WARNING: could not find the metadata file {tracker}\n"
        "    will not load any checkpoints and will start from random\n"
    )
    assert rank != 0 or text.getvalue() == warning

    tuned = Session(folder, world_size, {}, finetune=True, resolved_recipe=other_recipe)
    tuned.register("fresh", torch.ones(2))
    assert tuned.load()
    assert tuned.state == TrainState() and tuned.scheduler.num_steps == 0
    assert_same_tensors(tuned.parameters(), session.parameters())
    assert torch.equal(tuned.first_layer().fresh, torch.ones(2))

    resized = Session(folder, world_size, {}, finetune=True)
    resized.register("basis", torch.ones(5, dtype=torch.float64))
    assert resized.load()
    assert torch.equal(resized.first_layer().basis, torch.ones(5, dtype=torch.float64))
    assert_same_tensors(resized.parameters(), session.parameters())

    weights = Session(folder, world_size, {"distributed_optimizer": True}, no_load_optim=True)
    assert weights.load() and weights.state.iteration == 2
    assert_same_tensors(weights.parameters(), session.parameters())

    started = Session(folder, world_size, {}, load=folder + "/nothing", pretrained_checkpoint=folder)
    assert started.load() and started.state.iteration == 0

    precise = Session(folder, world_size, {})
    precise.register("basis", torch.zeros(3, dtype=torch.float64))
    assert precise.load()
    assert (
        torch.equal(precise.first_layer().basis, basis) and precise.first_layer().basis.dtype == torch.float64
    )

    lacking = Session(folder, world_size, {})
    lacking.register("unknown", torch.ones(2))
    messages["lacking"] = failure_of(lacking.load)

    directory = Path(folder) / "iter_0000002"
    for name in ("common.pt", ".metadata", "__0_0.distcp"):
        path = directory / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        messages[name] = attempt()
        path.write_bytes(whole)
    (directory / RUN_CONFIG_NAME).unlink()  # as another trainer's checkpoint: the stored arguments speak
    messages["foreign"] = attempt(num_layers=6, resolved_recipe=other_recipe)
    foreign = Session(folder, world_size, {}, resolved_recipe=other_recipe)
    assert foreign.load() and foreign.state.iteration == 2

    shutil.copytree(directory, Path(folder) / "release")
    (Path(folder) / retention.TRACKER_NAME).write_text("release\n")
    converted = Session(folder, world_size, {})
    assert converted.load() and converted.state == TrainState() and converted.scheduler.num_steps == 0
    assert_same_tensors(converted.parameters(), session.parameters())

    (Path(folder) / retention.TRACKER_NAME).write_text("2x")
    messages["tracker"] = attempt()
    return messages


EXPECTED_REFUSALS = {
    "model": (
        "another model",
        "num_layers stored 4, requested 6",
        "rotary_base stored 10000, requested 500000",
    ),
    "recipe": (
        "another recipe",
        "cells.fprop_input.rounding stored 'rne', requested 'stochastic'",
        "--finetune",
    ),
    "policy": ("another policy", "rules stored"),
    "step": ("iter_0000007", "missing", "complete checkpoints are 2"),
    "optimizer": ("without --use-distributed-optimizer", "--no-load-optim"),
    "dtype": ("fp32", "bf16", "--finetune"),
    "missing": (retention.TRACKER_NAME, "--exit-on-missing-checkpoint"),
    "pretrained": ("--pretrained-checkpoint", "nothing"),
    "schedule": ("total number of iterations", "--override-opt_param-scheduler"),
    "lacking": ("lacks what this run needs", "layers.0.unknown"),
    "common.pt": ("common.pt", "damaged"),
    ".metadata": (".metadata", "damaged"),
    "__0_0.distcp": ("__0_0.distcp", "damaged", "bytes"),
    "foreign": ("another model", "num_layers stored 4, requested 6"),
    "tracker": (retention.TRACKER_NAME, "'2x'", "complete checkpoints are 2"),
}


def test_wrong_or_damaged_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    (messages,) = run_ranks(_refusals, 1, str(tmp_path))
    assert messages.keys() == EXPECTED_REFUSALS.keys()
    for name, parts in EXPECTED_REFUSALS.items():
        assert all(part in messages[name] for part in parts), (name, messages[name])


# ------------------------------------------------------------------------------------- options from a
# checkpoint


def test_use_checkpoint_args_takes_the_model_without_torch(tmp_path: Path) -> None:
    directory = tmp_path / "iter_0000004"
    directory.mkdir()
    for name in (".metadata", retention.METADATA_NAME):
        (directory / name).touch()
    (tmp_path / retention.TRACKER_NAME).write_text("4\n")
    config = {
        "format": 1,
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "padded_vocab_size": 512,
            "tokenizer_type": "NullTokenizer",
        },
        "training": {"recipe": "metis", "policy": None, "tokenizer_model": "t.model"},
        "parallel": {"world_size": 8, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4},
    }
    (directory / RUN_CONFIG_NAME).write_text(json.dumps(config))
    args = Namespace(load=str(tmp_path), num_layers=None, hidden_size=64, recipe="bf16", world_size=1)
    args.tensor_model_parallel_size = 1
    load_args_from_checkpoint(args, {"hidden_size"})
    assert (args.num_layers, args.hidden_size, args.recipe) == (4, 64, "metis")
    assert (args.tokenizer_type, args.tokenizer_model) == ("NullTokenizer", "t.model")
    assert args.tensor_model_parallel_size == 1 and not hasattr(args, "padded_vocab_size")
    args.use_mp_args_from_checkpoint_args = True
    load_args_from_checkpoint(args, set())
    assert (args.tensor_model_parallel_size, args.hidden_size, args.world_size) == (2, 32, 1)

    code = (
        "import sys, metis.training.run_config; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode
        == 0
    )
    with pytest.raises(CheckpointError, match="no --load"):
        load_args_from_checkpoint(Namespace(load=None), set())
    (directory / RUN_CONFIG_NAME).write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="must have format 1, received 99"):
        load_args_from_checkpoint(args, set())

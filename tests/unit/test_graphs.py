"""Which steps a CUDA graph is captured for and when graphs go, with captures that only count."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from metis.bases import OperandBasis
from metis.clock import TrainingClock
from metis.config import BasisConfig
from metis.decompose import basis as algebra
from metis.errors import ConfigError
from metis.operand import Axis
from metis.training import graphs, initialize, quantization_log, renewal_graph
from metis.training import step as steps_module
from metis.training.arguments import parse_args
from metis.training.graphs import MAX_KINDS, StepGraphs
from metis.training.quantization_log import QuantizationLog
from metis.training.step import StepRunner
from metis.training.validation import validate_args

GRAPHED = (
    "--preset tiny --mock-data --vocab-size 1000 --micro-batch-size 2 --lr 1e-3 --train-iters 10 --bf16 "
    "--attention-dropout 0 --hidden-dropout 0 --cuda-graph-impl local"
)


class CountedGraph:
    """Stands for a CUDA graph: counts its replays and what it is told."""

    made: list[CountedGraph]

    def __init__(self) -> None:
        self.pool: Any = None
        self.num_replays, self.is_reset = 0, False
        self.made.append(self)

    def replay(self) -> None:
        """Count."""
        assert not self.is_reset
        self.num_replays += 1

    def reset(self) -> None:
        """Count."""
        self.is_reset = True


class Steps:
    """Steps of a model without linears; a kind is a number of tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_warmup_steps: int = 1) -> None:
        CountedGraph.made, self.num_launched, self.is_broken = [], 0, False

        @contextmanager
        def capture(graph: CountedGraph, pool: Any, **_options: Any) -> Iterator[None]:
            graph.pool = pool
            yield

        for name, value in (
            ("CUDAGraph", CountedGraph), ("graph", capture), ("graph_pool_handle", object),
            ("synchronize", lambda: None), ("current_stream", lambda: None),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(renewal_graph.dist, "barrier", lambda: None)
        monkeypatch.setattr(graphs, "_quiet_engine", nullcontext)
        monkeypatch.setattr(graphs, "on_this_rank", lambda batch: batch)
        monkeypatch.setattr(StepGraphs, "_stage", lambda self, batches: SimpleNamespace(batches=batches))
        monkeypatch.setattr(initialize, "_AT_SHUT_DOWN", [])
        args = Namespace(device="cuda", micro_batch_size=1, tensor_model_parallel_size=1)
        self.graphs = StepGraphs(args, [], TrainingClock(), self._launch, num_warmup_steps)

    def use(self, linears: list[Any]) -> None:
        """Have these for a model's linears."""
        self.graphs.cores = [linear.core for linear in linears]

    def _launch(self, batches: Iterator[Any], num_microbatches: int) -> list[Any]:
        self.num_launched += 1
        assert len(list(batches)) == num_microbatches
        if self.is_broken:
            raise RuntimeError("out of memory")
        return []

    def make(self, *kinds: int) -> None:
        """Make one step of each kind."""
        for num_tokens in kinds:
            self.graphs(iter([{"tokens": torch.zeros(1, num_tokens)}]), 1)

    def linear(self, active: Any) -> Any:
        """Return a linear with one basis in use."""
        basis = SimpleNamespace(active=active, wants_sketch=lambda step: False, take_pending=lambda: None)
        core = SimpleNamespace(
            recipe=None, weights=None, bases={"input": basis}, own_bases=lambda: [("input", basis)]
        )
        return SimpleNamespace(core=core)


@pytest.mark.parametrize(("num_warmup_steps", "launched", "replayed"), [(1, 1, 4), (3, 3, 2)])
def test_a_kind_is_launched_once_or_while_warming_up_then_captured_and_replayed(
    monkeypatch, num_warmup_steps: int, launched: int, replayed: int
):
    steps = Steps(monkeypatch, num_warmup_steps)
    steps.make(5, 5, 5, 5, 5)
    assert [graph.num_replays for graph in CountedGraph.made] == [replayed]
    assert steps.num_launched == launched + 1, "a capture goes through the passes once more"


def test_the_last_kind_of_a_long_ramp_up_is_captured_and_the_oldest_graphs_go(monkeypatch):
    steps = Steps(monkeypatch)
    for num_tokens in range(1, 3 * MAX_KINDS):
        steps.make(num_tokens, num_tokens, num_tokens)
    made = CountedGraph.made
    assert len(made) == 3 * MAX_KINDS - 1 and all(graph.num_replays == 2 for graph in made)
    assert [graph.is_reset for graph in made] == [True] * (len(made) - MAX_KINDS) + [False] * MAX_KINDS


def test_batches_that_no_kind_reads_any_more_leave_the_device(monkeypatch):
    stage = StepGraphs._stage
    steps = Steps(monkeypatch)
    monkeypatch.setattr(StepGraphs, "_stage", stage)
    for name in ("zeros", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(
            torch,
            name,
            lambda *size, original=original, **options: original(*size, **options | {"device": "cpu"}),
        )

    def make(num_tokens: int) -> None:
        batch = {"tokens": torch.ones(1, num_tokens), "first_sample": 0}
        steps.graphs(iter([batch]), 1)

    for num_tokens in range(1, 3 * MAX_KINDS):
        for _ in range(3):
            make(num_tokens)
    assert len(steps.graphs._staged) == MAX_KINDS
    make(3 * MAX_KINDS - 1)
    assert CountedGraph.made[-1].num_replays == 3
    steps.graphs.release()
    assert not steps.graphs._staged


def test_bases_that_ranks_renew_for_themselves_are_refused(tmp_path):
    """In any phase: ranks may want sketches in different steps; one would capture while another launches."""
    (tmp_path / "local.json").write_text('{"base": "metis", "basis": {"tp_mode": "local"}}')
    (tmp_path / "later.json").write_text(
        f'{{"phases": [{{"at_step": 4, "recipe": "{tmp_path}/local.json"}}]}}'
    )
    for option in (f"--recipe {tmp_path}/local.json", f"--recipe-schedule {tmp_path}/later.json"):
        validate_args(parse_args([*GRAPHED.split(), *option.split()]), 1)
        args = parse_args([*GRAPHED.split(), *option.split(), "--tensor-model-parallel-size", "2"])
        with pytest.raises(ConfigError, match=r"tp_mode: local\), received recipe local"):
            validate_args(args, 2)


def test_every_replay_leaves_behind_what_the_captured_step_did(monkeypatch):
    """Amaxes for the watch and rows for the next basis, as a launched step leaves them."""
    left, aside = SimpleNamespace(pending=None), []

    def take_pending() -> Any:
        taken, left.pending = left.pending, None
        return taken

    steps = Steps(monkeypatch)
    linear = steps.linear(torch.zeros(2))
    basis = linear.core.bases["input"]
    basis.take_pending, basis.put_aside = take_pending, aside.append
    steps.use([linear])
    watch, rows = steps.graphs.clock.watch, object()

    def launch(batches: Iterator[Any], num_microbatches: int) -> list[Any]:
        watch.note_amax("layer", "fprop_input", torch.tensor(float("nan")))
        left.pending = rows
        return []

    steps.graphs.run = launch
    for num_replays in (0, 1, 2, 3):
        steps.make(1)
        assert watch.take_nonfinite() == [("layer", "fprop_input")]
        assert aside == [rows] * num_replays


def test_a_kind_that_keeps_coming_outlives_others(monkeypatch):
    steps = Steps(monkeypatch)
    steps.make(1, 1)
    for num_tokens in range(2, 3 * MAX_KINDS):
        steps.make(num_tokens, 1)
    assert CountedGraph.made[0].num_replays == 3 * MAX_KINDS - 1
    assert not CountedGraph.made[0].is_reset


def test_a_pool_whose_graphs_have_gone_is_not_used_again(monkeypatch):
    """The allocator refuses it while a tensor of theirs is left, and somebody may hold one."""
    steps = Steps(monkeypatch)
    steps.use([steps.linear(torch.zeros(2))])
    steps.make(1, 1, 2, 2)
    first, second = CountedGraph.made
    assert first.pool is second.pool
    steps.use([steps.linear(torch.zeros(2))])
    steps.make(1, 1)
    assert first.is_reset and second.is_reset
    assert CountedGraph.made[2].pool is not first.pool
    steps.make(*range(10, 11 + MAX_KINDS), 30, 30)
    assert CountedGraph.made[2].is_reset and CountedGraph.made[3].pool is not CountedGraph.made[2].pool


def test_graphs_go_before_the_communicators_whose_messages_they_hold(monkeypatch):
    """NCCL does not return from destroying a communicator before."""
    steps = Steps(monkeypatch)
    steps.make(1, 1)
    is_held: list[bool] = []
    monkeypatch.setattr(
        initialize.dist, "is_initialized", lambda: is_held.append(not CountedGraph.made[0].is_reset)
    )
    initialize.shut_down()
    assert is_held == [False]


def test_a_capture_that_fails_is_told_by_the_rank_where_it_does(monkeypatch):
    steps = Steps(monkeypatch)
    steps.make(1)
    steps.is_broken = True
    with pytest.raises(ConfigError, match="out of memory") as caught:
        steps.make(1)
    assert caught.value.found_by_one_rank


@pytest.mark.parametrize("data_rank", [0, 1])
def test_all_ranks_know_which_steps_are_looked_at(monkeypatch, data_rank: int):
    """Only data-parallel rank 0 measures, but a message is captured on all ranks or on none."""
    monkeypatch.setattr(quantization_log.parallel_state, "get_data_parallel_rank", lambda: data_rank)
    monkeypatch.setattr(quantization_log, "_ranks_that_send", lambda measures: [])
    clock = TrainingClock()
    log = QuantizationLog(4, [], clock)
    assert [log.begin_step(step) for step in range(8)] == [False, False, False, True] * 2
    assert (clock.watch.observer is not None) == (data_rank == 0)


@pytest.mark.parametrize("options", ["--check-for-large-grads", "--timing-log-level 2"])
def test_what_asks_the_device_inside_a_step_is_refused(options: str):
    args = parse_args(GRAPHED.split())
    validate_args(args, 1)
    args = parse_args([*GRAPHED.split(), *options.split()])
    with pytest.raises(ConfigError, match="--cuda-graph-impl local") as caught:
        validate_args(args, 1)
    assert caught.value.where == options.split()[0]


def test_energies_in_use_are_one_tensor_that_is_overwritten():
    """The smooth spectral learning rate reads them in a step, where a captured launch looks for them."""
    common = {"layer": "l", "features": Axis.whole(32), "rank": 4, "config": BasisConfig(), "seed": 0}
    basis = OperandBasis(operand="grad_output", ordered=True, **common)
    assert basis.active is None and basis.active_energies is None
    in_use = None
    for step in range(2):
        v, energies = torch.randn(basis.state.v.shape).bfloat16(), torch.rand(basis.state.energies.shape)
        basis.state = algebra.renewed(basis.state, v, energies.double(), step)
        in_use = basis.active_energies if in_use is None else in_use
        assert basis.active_energies is in_use and torch.equal(in_use, energies[:4].double())
        assert torch.equal(basis.active, v[:, :4])
    unordered = OperandBasis(operand="input", **common)
    unordered.state = basis.state
    assert unordered.active is not None and unordered.active_energies is None


def test_a_step_renews_its_bases_by_the_graphs_of_its_passes(monkeypatch):
    """And by launches where no graphs are asked for; everything else of a step stands still."""
    made: list[Any] = []

    class Graphs:
        def __init__(self, *_arguments: Any) -> None:
            self.renewals = object()
            made.append(self)

        def __call__(self, *_arguments: Any) -> list[Any]:
            return []

    still, linears = MagicMock(), [SimpleNamespace(core=object())]
    still.OperandGuard.return_value.after_backward.return_value = SimpleNamespace(
        operands=None, gradients=None
    )
    for name in ("OperandGuard", "QuantizationLog", "get_forward_backward_func", "parallel_state"):
        monkeypatch.setattr(steps_module, name, getattr(still, name))
    for name, value in (
        ("StepGraphs", Graphs), ("recipes_by_phase", lambda args: {}), ("all_uses", lambda recipes: {}),
        ("recipe_linears", lambda model: linears), ("get_num_microbatches", lambda: 1),
        ("_all_ranks_agree", lambda applied: applied), ("_largest_of_ranks", lambda value: value),
    ):  # fmt: skip
        monkeypatch.setattr(steps_module, name, value)
    monkeypatch.setattr(StepRunner, "_mean_losses", lambda self, reports: {})
    monkeypatch.setattr(StepRunner, "_note_spike", lambda *_arguments: None)
    monkeypatch.setattr(StepRunner, "_run_schedule", lambda *_arguments, **_options: [])
    seen: list[Any] = []
    monkeypatch.setattr(steps_module, "advance_model_bases", lambda *arguments: seen.append(arguments))
    optimizer = MagicMock()
    optimizer.step.return_value = True, 1.0, 0
    for implementation in ("none", "local"):
        args = Namespace(
            cuda_graph_impl=implementation, cuda_graph_warmup_steps=3, check_for_nan_in_loss_and_grad=False,
            nonfinite_operands="stop", log_quantization_interval=0, micro_batch_size=1, data_parallel_size=1,
            seq_length=8, empty_unused_memory_level=0, device="cpu", overlap_param_gather=False,
        )  # fmt: skip
        runner = StepRunner(args, [], optimizer, MagicMock(), TrainingClock(), MagicMock())
        runner.quantization.begin_step.return_value = False
        runner.train_step(iter([]), 4)
    assert [arguments[0] for arguments in seen] == [linears, linears]
    assert [arguments[1] for arguments in seen] == [4, 4]
    assert seen[0][3] is None and seen[1][3] is made[0].renewals

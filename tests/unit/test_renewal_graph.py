"""When a renewal of bases becomes a graph, and that a replay makes what launches would, with a stand-in that
runs the captured computation again into the tensors it has made.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from metis.bases import OperandBasis, overwrite_active
from metis.clock import TrainingClock
from metis.config import BasisConfig
from metis.decompose.sampling import MARK_COLUMNS
from metis.errors import ConfigError
from metis.operand import Axis
from metis.renewal import Outcome, Pending, Sketch, Work, compute_outcome, renew_bases, sketch_pending
from metis.training import graphs as step_graphs
from metis.training import initialize, renewal_graph
from metis.training.graphs import StepGraphs
from metis.training.renewal_graph import MAX_GRAPHS, RenewalGraphs

CONFIG = BasisConfig(oversample=4)
SHAPES = {"input": (64, 96), "grad_output": (48, 96), "weight": (64, 32)}
"""Features and rows of each operand."""


def tensors_of(outcome: Outcome) -> list[Tensor]:
    """Return every tensor that an outcome holds, in order."""
    found = [value for s in outcome.found for value in (s.z, s.gram, s.count) if isinstance(value, Tensor)]
    values = [] if outcome.values is None else [outcome.values]
    return [*found, *(v for _, v in outcome.candidates), *values]


class RerunGraph:
    """Stands for a CUDA graph: a replay computes again from the tensors read then, into those made then."""

    made: list[RerunGraph]
    capturing: RerunGraph | None

    def __init__(self) -> None:
        self.num_replays, self.is_reset = 0, False
        self.work: list[Any] = []
        self.outcome: Outcome | None = None
        self.made.append(self)

    def replay(self) -> None:
        """Compute again."""
        self.compute_again()

    def compute_again(self) -> None:
        """Compute what was captured from what its inputs hold now."""
        assert not self.is_reset and self.outcome is not None
        self.num_replays += 1
        again = compute_outcome([(basis, p.copy()) for basis, p in self.work])
        for target, value in zip(tensors_of(self.outcome), tensors_of(again), strict=True):
            target.copy_(value)

    def replay_if_renewal(self) -> None:
        """Compute a renewal again; a step leaves its rows where they are anyway."""
        if self.outcome is not None:
            RerunGraph.compute_again(self)

    def reset(self) -> None:
        """Count."""
        self.is_reset = True


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[RerunGraph]:
    RerunGraph.made, RerunGraph.capturing = [], None

    @contextmanager
    def capture(graph: RerunGraph, **_options: Any) -> Iterator[None]:
        RerunGraph.capturing = graph
        yield
        RerunGraph.capturing = None

    def compute(work: Work, token_group: Any = None) -> Outcome:
        graph = RerunGraph.capturing
        if graph is None:
            return compute_outcome(work, token_group)
        graph.work = [(basis, p.copy()) for basis, p in work]
        graph.outcome = compute_outcome(work, token_group)
        inputs = {id(tensor) for _, p in graph.work for tensor in p.tensors()}
        for value in tensors_of(graph.outcome):  # a capture computes nothing
            if id(value) not in inputs:
                value.fill_(torch.nan)
        return graph.outcome

    for name, value in (
        ("CUDAGraph", RerunGraph), ("graph", capture), ("synchronize", lambda: None),
        ("current_stream", lambda: None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(renewal_graph.dist, "barrier", lambda: None)
    monkeypatch.setattr(renewal_graph, "compute_outcome", compute)
    return RerunGraph


class Model:
    """Bases of two layers, with rows that lie in the same places in every step."""

    def __init__(self) -> None:
        self.bases = [
            OperandBasis(layer=f"l{layer}", operand=operand, features=Axis.whole(features), rank=8,
                         config=CONFIG, seed=1)
            for layer in range(2) for operand, (features, _) in SHAPES.items()
        ]  # fmt: skip
        self.rows = [
            torch.zeros(num_rows, features + (0 if basis.operand == "weight" else MARK_COLUMNS))
            for basis, (features, num_rows) in zip(self.bases, 2 * list(SHAPES.values()), strict=True)
        ]

    def fill(self, step: int, spoiled: str | None = None) -> None:
        """Write this step's rows: half of the places used where there are marks."""
        for number, (basis, rows) in enumerate(zip(self.bases, self.rows, strict=True)):
            generator = torch.Generator().manual_seed(100 * step + number)
            features = basis.features.size
            rows.copy_(torch.randn(rows.shape, generator=generator))
            rows[:, :features] *= torch.linspace(3, 0.1, features)
            if basis.operand != "weight":
                used = 10 if spoiled == "few rows" and number == 0 else rows.shape[0] // 2
                rows[:, features:] = 0
                rows[:used, features] = 1
                rows[used:] = 0
            if spoiled == "deficient" and number in (1, 2):
                rows[:, :features] = rows[:, :1]
            if spoiled == "not finite" and number == 4:
                rows[0, 0] = torch.nan

    def put_aside(self, number: int, rows: Tensor) -> None:
        """Give a basis its rows of this step."""
        basis = self.bases[number]
        if basis.operand == "weight":
            basis.add_weight(rows, Axis.whole(rows.shape[0]))
        else:
            basis.add_rows(rows)

    def renew(self, step: int, compute: Any = None, *, moved: bool = False) -> None:
        """Put the rows aside, or copies of them, and renew."""
        for number, rows in enumerate(self.rows):
            self.put_aside(number, rows.clone() if moved else rows)
        renew_bases(self.bases, step, None, compute)
        overwrite_active(self.bases)

    def run(self, steps: range, compute: Any = None) -> None:
        """Fill and renew, step after step."""
        for step in steps:
            self.fill(step)
            self.renew(step, compute)


class SketchingModel(Model):
    """Steps sketch some of the rows of two warm bases themselves: half of those of the first, all of the
    other's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sketches: dict[int, Sketch] = {}
        self.pieces = {0: self.rows[0].chunk(2), 4: (self.rows[4], None)}

    def lasting(self) -> list[Tensor]:
        """Return what replays of the step would overwrite."""
        kept = [piece for pieces in self.pieces.values() for piece in pieces[1:] if piece is not None]
        return [*self.rows, *kept, *(t for s in self.sketches.values() for t in (s.z, s.gram, s.count))]

    def put_aside(self, number: int, rows: Tensor) -> None:
        """Do as `Model` does, with a sketch of the rows where it has been before."""
        basis = self.bases[number]
        if number not in self.pieces or basis.state.phase != "warm":
            super().put_aside(number, rows)
            return
        first, rest = self.pieces[number]
        pending = Pending(rows=[first])
        sketch_pending([(basis.stand_in(), pending)])
        place = self.sketches.setdefault(number, pending.sketch)
        for name in ("z", "gram", "count"):
            getattr(place, name).copy_(getattr(pending.sketch, name))
        basis.put_aside(Pending(rows=[] if rest is None else [rest], sketch=place))


def assert_equal(one: Model, other: Model) -> None:
    for a, b in zip(one.bases, other.bases, strict=True):
        for name, value in a.tensors().items():
            assert torch.equal(value, b.tensors()[name]), (a.layer, a.operand, name)
        assert torch.equal(a.active, b.active) and torch.equal(a.active, a.state.v[:, : a.state.rank])


@pytest.mark.parametrize("spoiled", [None, "few rows", "deficient", "not finite"])
def test_a_replay_makes_the_bases_that_launches_make(graphs: type[RerunGraph], spoiled: str | None) -> None:
    """Eight renewals, the sixth spoiled: what is no regular case any more then is launched until it is."""
    launched, graphed = Model(), Model()
    compute = RenewalGraphs(lambda: None, lambda: graphed.rows)
    states = []
    for step in range(8):
        for model in (launched, graphed):
            model.fill(step, spoiled if step == 5 else None)
        launched.renew(step)
        graphed.renew(step, compute)
        assert_equal(launched, graphed)
        states.append([basis.state.v.clone() for basis in graphed.bases])
    # Steps 0 and 1 are cold, step 2 is launched, step 3 captured.
    (graph,) = graphs.made
    assert graph.num_replays == (4 if spoiled == "few rows" else 5)
    assert not any(torch.equal(a, b) for a, b in zip(states[-1], states[-2], strict=True))


@pytest.mark.parametrize("spoiled", [None, "deficient", "not finite"])
def test_a_graph_reads_what_the_step_has_sketched(graphs: type[RerunGraph], spoiled: str | None) -> None:
    launched, graphed = SketchingModel(), SketchingModel()
    compute = RenewalGraphs(lambda: None, graphed.lasting)
    for step in range(8):
        for model in (launched, graphed):
            model.fill(step, spoiled if step == 5 else None)
        launched.renew(step)
        graphed.renew(step, compute)
        assert_equal(launched, graphed)
    (graph,) = graphs.made
    assert graph.num_replays == 5
    other = Model()
    for step in range(8):  # the same rows, none of them sketched before
        other.fill(step, spoiled if step == 5 else None)
        other.renew(step)
    for one, two in zip(graphed.bases, other.bases, strict=True):
        assert one.state.num_refreshes == two.state.num_refreshes
    compute.forget([graphed.sketches[4].gram])
    assert graph.is_reset


def test_tensors_of_a_state_do_not_change_with_the_next_replay(graphs: type[RerunGraph]) -> None:
    model = Model()
    compute = RenewalGraphs(lambda: None, lambda: model.rows)
    held: list[tuple[Tensor, Tensor]] = []
    for step in range(7):
        model.fill(step)
        model.renew(step, compute)
        held += [(value, value.clone()) for basis in model.bases for value in basis.tensors().values()]
    assert graphs.made[0].num_replays == 4
    assert all(torch.equal(value, before) for value, before in held)


def test_rows_that_lie_elsewhere_are_launched_and_the_graph_stays(graphs: type[RerunGraph]) -> None:
    model = Model()
    compute = RenewalGraphs(lambda: None, lambda: model.rows)
    for step in range(5):
        model.fill(step)
        model.renew(step, compute, moved=True)
    assert graphs.made == []
    for step in range(5, 10):
        model.fill(step)
        model.renew(step, compute, moved=step % 2 == 0)
    (graph,) = graphs.made
    assert graph.num_replays == 3 and not graph.is_reset


def test_a_graph_goes_with_the_rows_that_it_reads(graphs: type[RerunGraph]) -> None:
    model = Model()
    compute = RenewalGraphs(lambda: None, lambda: model.rows)
    model.run(range(5), compute)
    (graph,) = graphs.made
    compute.forget([model.rows[0].clone()])
    assert not graph.is_reset
    compute.forget([model.rows[0]])
    assert graph.is_reset
    model.rows = [rows.clone() for rows in model.rows]
    model.run(range(5, 7), compute)
    assert len(graphs.made) == 2 and graphs.made[1].num_replays == 2


def test_every_set_of_rows_that_lasts_has_a_graph_up_to_some(graphs: type[RerunGraph]) -> None:
    model = Model()
    places = [[rows.clone() for rows in model.rows] for _ in range(MAX_GRAPHS + 1)]
    compute = RenewalGraphs(lambda: None, lambda: [rows for rows_of in places for rows in rows_of])
    model.run(range(3), compute)
    for step in range(3, 3 + 2 * len(places)):
        model.rows = places[step % len(places)] if step < 3 + len(places) else places[0]
        model.fill(step)
        model.renew(step, compute)
    made = graphs.made
    assert [graph.is_reset for graph in made] == [True] + [False] * (len(made) - 1)
    assert len(made) == MAX_GRAPHS + 1 and sum(graph.num_replays for graph in made) == 2 * len(places)


def test_other_bases_on_the_same_weights_get_a_graph_of_their_own(graphs: type[RerunGraph]) -> None:
    """Rows of a weight are the parameter, which outlives its bases."""
    model, other = Model(), Model()
    for one in (model, other):
        one.bases, one.rows = ([pieces[i] for i in (2, 5)] for pieces in (one.bases, one.rows))
    other.bases = [
        OperandBasis(layer=basis.layer, operand="weight", features=basis.features, rank=10,
                     config=replace(CONFIG, oversample=2), seed=1)
        for basis in model.bases
    ]  # fmt: skip
    compute = RenewalGraphs(lambda: None, list)
    model.run(range(6), compute)
    assert graphs.made[0].num_replays == 3
    launched = Model()
    launched.bases = [copy.deepcopy(basis) for basis in other.bases]
    other.rows = launched.rows = model.rows
    for step in range(6, 12):
        other.fill(step)
        other.renew(step, compute)
        launched.renew(step)
        assert_equal(other, launched)
    assert graphs.made[0].is_reset and graphs.made[1].num_replays == 3


def test_equal_bases_of_several_widths_are_launched(graphs: type[RerunGraph]) -> None:
    model = Model()
    odd = OperandBasis(layer="odd", operand="input", features=Axis.whole(64), rank=8,
                       config=replace(CONFIG, oversample=6), seed=1)  # fmt: skip
    model.bases[3] = odd
    compute = RenewalGraphs(lambda: None, lambda: model.rows)
    model.run(range(5), compute)
    assert graphs.made == []


def test_graphs_of_steps_and_of_renewals_go_together(graphs: type[RerunGraph], monkeypatch) -> None:
    """Real bases behind `StepGraphs`, whose replays leave the rows that renewals read."""
    model = Model()
    cores = [
        SimpleNamespace(
            recipe=SimpleNamespace(basis=CONFIG), weights=None, bases={"it": basis},
            own_bases=lambda basis=basis: [("it", basis)],
        )
        for basis in model.bases
    ]  # fmt: skip
    monkeypatch.setattr(step_graphs, "_quiet_engine", nullcontext)
    monkeypatch.setattr(step_graphs, "on_this_rank", lambda batch: batch)
    monkeypatch.setattr(StepGraphs, "_stage", lambda self, batches: SimpleNamespace(batches=batches))
    monkeypatch.setattr(initialize, "_AT_SHUT_DOWN", [])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(RerunGraph, "replay", RerunGraph.replay_if_renewal)
    args = Namespace(device="cuda", micro_batch_size=1, tensor_model_parallel_size=1)
    clock = TrainingClock()

    def passes(batches: Iterator[Any], num_microbatches: int) -> list[Any]:
        for basis, rows in zip(model.bases, model.rows, strict=True):
            if basis.operand != "weight":
                basis.add_rows(rows)
        return []

    steps = StepGraphs(args, cores, clock, passes, 1)
    for step in range(8):
        model.fill(step)
        clock.begin_step(step, 64)
        steps(iter([{"tokens": torch.zeros(1, 64)}]), 1)
        for basis, rows in zip(model.bases, model.rows, strict=True):
            if basis.operand == "weight":
                basis.add_weight(rows, Axis.whole(rows.shape[0]))
        renew_bases(model.bases, step, None, steps.renewals)
    renewals = [graph for graph in graphs.made if graph.outcome is not None]
    assert [graph.num_replays > 1 for graph in renewals] == [True]
    steps.release()
    assert all(graph.is_reset for graph in graphs.made)


def test_rows_of_a_step_that_is_not_replayed_do_not_last(graphs: type[RerunGraph]) -> None:
    model = Model()
    compute = RenewalGraphs(lambda: None, lambda: model.rows[:1])
    model.run(range(6), compute)
    assert graphs.made == []


def test_a_capture_that_fails_says_what_to_do(graphs: type[RerunGraph], monkeypatch) -> None:
    model = Model()
    compute = RenewalGraphs(lambda: None, lambda: model.rows)
    model.run(range(3), compute)

    def fail(*_: Any) -> Outcome:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(renewal_graph, "compute_outcome", fail)
    with pytest.raises(ConfigError, match=r"a renewal of bases cannot be captured \(operation not") as caught:
        model.renew(3, compute)
    assert caught.value.found_by_one_rank


def test_counts_and_verdicts_are_read_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = Model(), []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: (reads.append(tensor.numel()), original(tensor))[1])
    for step in range(3):
        model.fill(step)
        reads.clear()
        model.renew(step)
    assert reads == [4 + 6], "rows of x and g of two layers, verdicts of six bases"

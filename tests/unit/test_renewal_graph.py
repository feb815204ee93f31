"""When a renewal of bases becomes a graph, and that a replay makes what launches would, with a stand-in that
runs the captured computation again into the tensors it has made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metis.bases import OperandBasis
from metis.config import BasisConfig
from metis.decompose.sampling import MARK_COLUMNS
from metis.errors import ConfigError
from metis.operand import Axis
from metis.renewal import Outcome, Work, compute_outcome, renew_bases
from metis.training import renewal_graph
from metis.training.renewal_graph import RenewalGraph

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
        assert not self.is_reset and self.outcome is not None
        self.num_replays += 1
        again = compute_outcome([(basis, replace(p, rows=list(p.rows))) for basis, p in self.work])
        for target, value in zip(tensors_of(self.outcome), tensors_of(again), strict=True):
            target.copy_(value)

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
        graph.work = [(basis, replace(p, rows=list(p.rows))) for basis, p in work]
        graph.outcome = compute_outcome(work, token_group)
        for value in tensors_of(graph.outcome):  # a capture computes nothing
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

    def renew(self, step: int, compute: Any = None, *, moved: bool = False) -> None:
        """Put the rows aside, or copies of them, and renew."""
        for basis, rows in zip(self.bases, self.rows, strict=True):
            here = rows.clone() if moved else rows
            if basis.operand == "weight":
                basis.add_weight(here, Axis.whole(rows.shape[0]))
            else:
                basis.add_rows(here)
        renew_bases(self.bases, step, None, compute)


def assert_equal(one: Model, other: Model) -> None:
    for a, b in zip(one.bases, other.bases, strict=True):
        for name, value in a.tensors().items():
            assert torch.equal(value, b.tensors()[name]), (a.layer, a.operand, name)


@pytest.mark.parametrize("spoiled", [None, "few rows", "deficient", "not finite"])
def test_a_replay_makes_the_bases_that_launches_make(graphs: type[RerunGraph], spoiled: str | None) -> None:
    """Eight renewals, the sixth spoiled: what is no regular case any more then is launched until it is."""
    launched, graphed = Model(), Model()
    compute = RenewalGraph(lambda: None, lambda: graphed.rows)
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


def test_tensors_of_a_state_do_not_change_with_the_next_replay(graphs: type[RerunGraph]) -> None:
    model = Model()
    compute = RenewalGraph(lambda: None, lambda: model.rows)
    held: list[tuple[Tensor, Tensor]] = []
    for step in range(7):
        model.fill(step)
        model.renew(step, compute)
        held += [(value, value.clone()) for basis in model.bases for value in basis.tensors().values()]
    assert graphs.made[0].num_replays == 4
    assert all(torch.equal(value, before) for value, before in held)


def test_rows_that_lie_elsewhere_are_launched(graphs: type[RerunGraph]) -> None:
    model = Model()
    compute = RenewalGraph(lambda: None, lambda: model.rows)
    for step in range(5):
        model.fill(step)
        model.renew(step, compute, moved=True)
    assert graphs.made == []
    for step in range(5, 8):
        model.fill(step)
        model.renew(step, compute)
    (graph,) = graphs.made
    assert graph.num_replays == 3
    model.renew(8, compute, moved=True)
    assert graph.is_reset and len(graphs.made) == 1
    model.renew(9, compute)
    assert len(graphs.made) == 2 and graphs.made[1].num_replays == 1


def test_rows_of_a_step_that_is_not_replayed_do_not_last(graphs: type[RerunGraph]) -> None:
    model = Model()
    compute = RenewalGraph(lambda: None, lambda: model.rows[:1])
    for step in range(6):
        model.fill(step)
        model.renew(step, compute)
    assert graphs.made == []


def test_a_capture_that_fails_says_what_to_do(graphs: type[RerunGraph], monkeypatch) -> None:
    model = Model()
    compute = RenewalGraph(lambda: None, lambda: model.rows)
    for step in range(3):
        model.fill(step)
        model.renew(step, compute)

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

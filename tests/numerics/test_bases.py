"""Renewing the bases of many layers together: the same bases as one by one, in as many operations.

Layers have names, and so random numbers, of their own; what a group changes is who goes through a product
together. The order of float64 sums may differ with that, V in bf16 may not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metis import bases, renewal
from metis.clock import TrainingClock
from metis.config import BasisConfig, Recipe
from metis.decompose import sketch as sketches
from metis.decompose.basis import BasisState, state_tensors
from metis.decompose.orthonormal import orthonormal_columns, orthonormalize
from metis.nn import MetisLinear, advance_bases
from metis.recipes import METIS
from metis.rng import stream_key

TOKENS, SIZE = 128, 64
WHOLE = replace(METIS, basis=BasisConfig(row_sample_fraction=1.0))
"""Every row is sampled, so that all layers have equally many, as places of a fixed number have on a GPU."""

READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
MOST_OPERATIONS = 132  # for the three bases of one layer, views included; measured 130
MOST_FURTHER_OPERATIONS = 4
"""For each further layer; measured 3.75: its weight, views of three bases for their places, and what several
of a
shape take."""


class Operations(TorchDispatchMode):
    """Counts what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


class Model:
    def __init__(self, num_layers: int, recipe: Recipe = WHOLE) -> None:
        self.clock = TrainingClock(seed=2, num_tokens_per_step=2 * TOKENS)
        torch.manual_seed(0)
        self.layers = [
            MetisLinear(SIZE, SIZE, bias=False, recipe=recipe, name=f"l{i}", clock=self.clock)
            for i in range(num_layers)
        ]
        for layer in self.layers:
            torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))

    def step(self, number: int, gradient_scale: Callable[[int], float] = lambda layer: 1.0) -> None:
        """Two microbatches through every layer by itself; no bases are renewed yet."""
        self.clock.begin_step(number, 2 * TOKENS)
        for microbatch in (2 * number, 2 * number + 1):
            self.clock.begin_microbatch(microbatch)
            for index, layer in enumerate(self.layers):
                x, g = _draw(2 * microbatch), _draw(2 * microbatch + 1) * gradient_scale(index)
                layer(x.requires_grad_()).backward(g)

    def advance(self, number: int) -> None:
        advance_bases([(layer.core, layer.weight) for layer in self.layers], number)

    def states(self) -> list[BasisState]:
        return [basis.state for layer in self.layers for _, basis in layer.core.own_bases()]


def _draw(seed: int) -> Tensor:
    x = torch.randn(TOKENS, SIZE, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(4.0, 0.1, SIZE)


def _trained(model: Model, num_steps: int = 8) -> Model:
    for number in range(num_steps):
        model.step(number)
        model.advance(number)
    return model


def _assert_equal_bases(actual: list[BasisState], expected: list[BasisState]) -> None:
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a.v, e.v) and a.phase == e.phase == "warm", number
        assert (a.row_count, a.last_refresh_step, a.num_kept) == (
            e.row_count,
            e.last_refresh_step,
            e.num_kept,
        )


@pytest.mark.parametrize("recipe", [WHOLE, METIS], ids=["all rows", "sampled rows"])
def test_a_group_makes_the_bases_that_its_layers_make_alone(recipe: Recipe):
    together = _trained(Model(3, recipe))
    apart = Model(3, recipe)
    for number in range(8):
        apart.step(number)
        for layer in apart.layers:
            advance_bases([(layer.core, layer.weight)], number)
    _assert_equal_bases(together.states(), apart.states())
    assert all(state.last_refresh_step == 7 for state in together.states())


@pytest.mark.parametrize("limit", ["MAX_WAITING_BYTES", "MAX_GROUP_NUMEL"])
def test_limits_of_memory_do_not_change_the_bases(limit: str, monkeypatch: pytest.MonkeyPatch):
    expected = _trained(Model(3)).states()
    # Every microbatch is sketched in backward; weights in blocks of a few rows, every basis alone.
    home, value = {"MAX_WAITING_BYTES": (bases, 0), "MAX_GROUP_NUMEL": (renewal, 20 * SIZE)}[limit]
    monkeypatch.setattr(home, limit, value)
    model = _trained(Model(3), 7)
    model.step(7)
    waiting = [model.layers[0].core.bases[name]._pending for name in ("input", "grad_output")]
    assert [len(pending.rows) for pending in waiting] == ([0, 0] if limit == "MAX_WAITING_BYTES" else [2, 2])
    model.advance(7)
    _assert_equal_bases(model.states(), expected)


def test_rows_too_many_to_keep_are_sketched_inside_a_graph_by_the_basis_in_use(
    monkeypatch: pytest.MonkeyPatch,
):
    """Once it is warm: the V of a state is another tensor after every renewal, its place is not."""
    expected = _trained(Model(3), 16).states()
    monkeypatch.setattr(bases, "MAX_WAITING_BYTES", 0)
    monkeypatch.setattr(bases, "_is_captured", lambda rows: True)
    read: list[Tensor] = []
    taken = bases.sketch_pending
    monkeypatch.setattr(bases, "sketch_pending", lambda work: read.append(work[0][0].state.v) or taken(work))
    model = Model(3)
    for number in range(16):
        model.step(number)
        assert bool(read) == (number % 8 == 7), number
        own = [basis for layer in model.layers for _, basis in layer.core.own_bases()]
        places = {id(basis.active) for basis in own}
        assert {id(v) for v in read} <= places
        waiting = [basis.take_pending() for basis in own]
        for basis, pending in zip(own, waiting, strict=True):
            if pending is not None and number == 7:
                assert len(pending.rows) == 0 and pending.sketch is not None
            if pending is not None:
                basis.put_aside(pending)
        model.advance(number)
        read.clear()
    _assert_equal_bases(model.states(), expected)


def test_a_warm_refresh_asks_the_host_once_and_grows_little_with_layers(monkeypatch: pytest.MonkeyPatch):
    counts: list[int] = []
    reads: list[Tensor] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: reads.append(x) or tolist(x))
    for num_layers in (1, 5):
        model = _trained(Model(num_layers), 7)
        model.step(7)
        reads.clear()
        with Operations() as seen:
            model.advance(7)
        assert len(reads) == 1 and not [name for name in seen.names if name in READS]
        assert all(state.last_refresh_step == 7 for state in model.states())
        counts.append(len(seen.names))
    assert counts[0] <= MOST_OPERATIONS and counts[1] - counts[0] <= 4 * MOST_FURTHER_OPERATIONS, counts


def test_rows_put_aside_cost_nothing_but_picking_them():
    model = _trained(Model(1), 7)
    basis = model.layers[0].core.bases["input"]
    rows = torch.ones(16, SIZE + 16)
    with Operations() as seen:
        basis.add_rows(rows)
    assert seen.names == []


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_bad_sketch_keeps_its_own_basis_and_no_other(bad: float):
    expected = _trained(Model(3)).states()
    model = _trained(Model(3), 7)
    before = model.layers[1].core.bases["grad_output"].state
    model.step(7)
    pending = model.layers[1].core.bases["grad_output"]._pending
    for rows in pending.rows:
        rows[:, :SIZE] = bad
    model.advance(7)
    kept = model.layers[1].core.bases["grad_output"].state
    assert kept.num_kept == 1 and kept.last_refresh_step == 1 and torch.equal(kept.v, before.v)
    assert kept.row_count == 0 and not kept.z.any() and not kept.gram.any()
    others = [(a, e) for a, e in zip(model.states(), expected, strict=True) if a is not kept]
    assert len(others) == 8
    _assert_equal_bases(*map(list, zip(*others, strict=True)))


def test_a_sketch_of_low_rank_is_refilled_beside_regular_ones():
    model = _trained(Model(3), 7)
    model.step(7)
    pending = model.layers[2].core.bases["input"]._pending
    for rows in pending.rows:
        rows[:, 1:SIZE] = 0
    model.advance(7)
    state = model.layers[2].core.bases["input"].state
    gram = state.v[:, : state.rank].double().mT @ state.v[:, : state.rank].double()
    assert state.last_refresh_step == 7 and state.num_kept == 0
    assert abs(float(state.v[0, 0])) == 1.0, "the only direction that was sketched comes first"
    assert float((gram - torch.eye(state.rank)).abs().max()) < 1e-2  # bf16


def test_the_basis_in_use_is_one_tensor_that_is_overwritten():
    """A captured launch reads it where it was; a version counter tells others that it has changed."""
    model = _trained(Model(1), 7)
    basis = model.layers[0].core.bases["weight"]
    in_use = basis.active
    assert basis.active is in_use and torch.equal(in_use, basis.state.v[:, : basis.state.rank])
    copied = copy.deepcopy(basis)
    assert copied.active is not in_use and torch.equal(copied.active, in_use)
    before, version = in_use.clone(), in_use._version
    model.step(7)
    model.advance(7)
    assert basis.active is in_use and torch.equal(in_use, basis.state.v[:, : basis.state.rank])
    assert not torch.equal(in_use, before) and in_use._version > version
    assert torch.equal(copied.active, before), "a copy has a place of its own"


def test_new_bases_are_in_use_as_soon_as_they_are_renewed():
    """All at once, before anybody asks; a basis that nobody has asked for yet has no place."""
    model = _trained(Model(1), 7)
    bases = [basis for layer in model.layers for _, basis in layer.core.own_bases()]
    asked, places = bases[:-1], [basis.active for basis in bases[:-1]]
    model.step(7)
    bases[-1]._active = None
    model.advance(7)
    assert all(basis.state.last_refresh_step == 7 for basis in bases)
    for basis, place in zip(asked, places, strict=True):
        assert torch.equal(place, basis.state.v[:, : basis.state.rank]) and basis.active is place
    assert bases[-1]._active is None and torch.equal(
        bases[-1].active, bases[-1].state.v[:, : bases[-1].state.rank]
    )


def test_what_was_put_aside_can_be_put_aside_again():
    """A replayed step leaves the same tensors behind, with new numbers in them."""
    model = _trained(Model(1), 7)
    model.step(7)
    basis = model.layers[0].core.bases["input"]
    left = basis.take_pending()
    assert left is not None and basis.take_pending() is None
    left.sketch = renewal.Sketch(torch.ones(3), torch.ones(2), 4)
    rows, z = list(left.rows), left.sketch.z
    basis.put_aside(left)
    taken = basis.take_pending()
    taken.rows.clear()
    taken.sketch.z = taken.sketch.z * 2  # a sum over ranks takes its place
    assert [id(row) for row in left.rows] == [id(row) for row in rows] and rows
    assert left.sketch.z is z


def test_states_for_a_file_do_not_bring_their_group():
    """New bases of equal shape lie in one piece of memory; a file must hold each by itself."""
    model = _trained(Model(3))
    for state in model.states():
        for name, tensor in state_tensors(state).items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("num_rows", "runs"), [(0, 1), (31, 1), (96, 4), (72, 4)])
def test_sketches_in_chunks_are_sketches(
    num_rows: int, runs: int, parts: int, monkeypatch: pytest.MonkeyPatch
):
    """Against the plain products; and half of the chunks give half of Z, bit for bit, given all of B."""
    monkeypatch.setattr(sketches, "MIN_RUN_ROWS", 16)
    assert sketches.num_runs(num_rows) == runs
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, num_rows, SIZE, generator=generator).to(torch.bfloat16)
    v = torch.randn(3, SIZE, 8, generator=generator).to(torch.bfloat16)
    b = x.double() @ v.double()
    directions = sketches.directions_in_chunks(v, 4, parts)
    chunks = sketches.in_chunks(x, 4, parts)
    z, gram = sketches.sketch_in_chunks(chunks, directions, 3, parts, lambda part: b)
    for actual, expected in zip((z, gram), sketches.sketch(x, b), strict=True):
        assert actual.shape == expected.shape
        assert torch.allclose(actual, expected, rtol=0, atol=1e-11)  # of sums up to 1e4; measured 3e-14
    found: list[Tensor] = []
    sketches.sketch_in_chunks(chunks, directions, 3, parts, lambda part: found.append(part) or part)
    assert torch.allclose(found[0], b, rtol=0, atol=1e-12)  # measured 0: few enough bits

    def half(value: Tensor, axis: int) -> Tensor:
        return value.unflatten(axis, (parts, 2, -1)).select(axis + 1, 1).flatten(axis, axis + 1)

    mine, _ = sketches.sketch_in_chunks(
        sketches.in_chunks(half(x, 2), 2, parts),
        sketches.directions_in_chunks(half(v, 1), 2, parts),
        3,
        parts,
        lambda part: b,
    )
    assert torch.equal(mine, half(z, 1))


def test_orthonormal_columns_judge_every_matrix_by_itself():
    good = torch.randn(4, 40, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    good[1] *= 1e-160
    good[2] *= torch.logspace(150, -150, 8, dtype=torch.float64)
    z = good.repeat(2, 1, 1)
    z[4, :, 3] = 0
    z[5, :, 2] = -3 * z[5, :, 6]
    z[6, 5, 5] = float("nan")
    z[7, 0, 0] = float("inf")
    (v,), ok = orthonormal_columns(z)
    assert ok.tolist() == [True] * 4 + [False] * 4
    for index in range(4):
        alone = orthonormalize(z[index], refill_key=stream_key(0, "refill"), num_columns=8)
        assert alone.status == "cholesky" and torch.allclose(v[index], alone.v, rtol=0, atol=1e-14)
    assert not orthonormal_columns(torch.zeros(1, 40, 8, dtype=torch.float64))[1].any()


def test_matrices_of_any_shapes_are_made_orthonormal_together():
    """Against a Householder QR of each; a duplicate column fails by itself, noise counts by its own width."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(3, 40, 8), (1, 100, 24), (2, 30, 1)]
    zs = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    zs[0][1, :, 5] = zs[0][1, :, 2]
    vs, ok = orthonormal_columns(*zs)
    assert ok.tolist() == [True, False, True, True, True, True]
    for v, good, z in zip(vs, ok.split([3, 1, 2]), zs, strict=True):
        q, upper = torch.linalg.qr(z)
        q = q * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
        assert v.shape == z.shape and float((v - q)[good].abs().max()) < 1e-14  # measured 3e-16


@pytest.mark.parametrize("share", [0.5, 8.0])
def test_the_least_share_of_its_own_follows_the_columns_of_each_matrix(share: float):
    """Beside a wide matrix, a narrow one is judged by its own noise, 10 q eps of the energy."""
    q, eps = 4, torch.finfo(torch.float64).eps
    z = torch.eye(40, q, dtype=torch.float64)
    z[:, 3] = z[:, 0] + (share * 10 * q * eps) ** 0.5 * z[:, 3]
    wide = torch.eye(100, 64, dtype=torch.float64)
    assert orthonormal_columns(wide[None], z[None])[1].tolist() == [True, share > 1]
    assert orthonormal_columns(z[None])[1].tolist() == [share > 1]

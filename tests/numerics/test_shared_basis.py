"""Linears that read one input share one basis of it: one set of directions, sketched and renewed by its
owner.

Oracle: a linear with a basis of its own under the owner's name, which must come out bitwise the same.
"""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from metis.clock import TrainingClock
from metis.config import CELL_NAMES, CellConfig, RankConfig, Recipe, SplitConfig
from metis.errors import ConfigError
from metis.nn import MetisLinear, OperandBasis
from metis.recipes import BF16, MEAN_SPLIT, METIS, NVFP4
from tests.numerics._assertions import assert_bitwise_equal

TOKENS, IN, OUT = 128, 64, 48
GRADIENT_EXACT = 1e-12  # relative, float64; worst measured 6e-16
X_ALONE = Recipe(
    name="x_alone",
    fprop_input=CellConfig(split=SplitConfig()),
    wgrad_input=CellConfig(split=SplitConfig()),
    basis=METIS.basis,
)
"""Only x is split and nothing is quantised, so that the products are exact."""


class _Readers(nn.Module):
    """q, k and v of one input, with one clock; k and v use q's basis if `shared`."""

    def __init__(self, recipe: Recipe, *, shared: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.clock = TrainingClock(seed=3, num_tokens_per_step=TOKENS)
        torch.manual_seed(0)
        for name in ("q", "k", "v"):
            owner = self.q if shared and name != "q" else None
            # Unshared, all bear q's name: names key the random rows and directions.
            layer = MetisLinear(
                IN,
                OUT,
                bias=False,
                recipe=recipe,
                name=name if shared else "q",
                clock=self.clock,
                dtype=dtype,
                share_input_basis_with=owner,
            )
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    def step(self, number: int) -> list[Tensor]:
        """One step of gradient descent; returns y, dx and the weights' gradients."""
        dtype = self.q.weight.dtype
        x, g = _draw(number, TOKENS, IN).to(dtype).requires_grad_(), _draw(-number - 1, TOKENS, 3 * OUT)
        self.zero_grad()
        y = self(x)
        y.backward(g.to(dtype))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter -= 0.01 * parameter.grad
        for layer in (self.q, self.k, self.v):
            layer.after_step()
        self.clock.begin_step(number + 1, TOKENS)
        return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in self.parameters())]


def _draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    strong = torch.linspace(8.0, 0.1, shape[-1], dtype=torch.float64)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * strong


def _input_basis(layer: MetisLinear) -> OperandBasis:
    basis = layer.core.bases["input"]
    assert isinstance(basis, OperandBasis)
    return basis


def test_readers_use_the_basis_that_its_owner_would_have_alone():
    """Bitwise: directions, outputs and gradients of ten steps, whoever sketched."""
    shared, apart = _Readers(X_ALONE, shared=True), _Readers(X_ALONE, shared=False)
    for number in range(10):
        for actual, expected in zip(shared.step(number), apart.step(number), strict=True):
            assert_bitwise_equal(actual, expected, f"step {number}")
        v = _input_basis(apart.q).state.v
        for layer in (shared.q, shared.k, shared.v):
            assert_bitwise_equal(_input_basis(layer).state.v, v, layer.core.layer)
    assert _input_basis(shared.k).state.last_refresh_step == 7, "the basis was never in use"


def test_only_the_owner_sketches_and_renews(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, str]] = []

    def count(method: str) -> None:
        inner = getattr(OperandBasis, method)

        def counted(self: OperandBasis, *args: object) -> None:
            calls.append((method, f"{self.layer} {self.operand}"))
            inner(self, *args)

        monkeypatch.setattr(OperandBasis, method, counted)

    count("add_rows")
    count("refresh")
    readers = _Readers(METIS, shared=True)
    for number in range(2):
        readers.step(number)
        assert calls.count(("add_rows", "q input")) == calls.count(("refresh", "q input")) == number + 1
        assert calls.count(("refresh", "k grad_output")) == number + 1, "its other bases are its own"
    assert not any("k input" in name or "v input" in name for _, name in calls)
    assert _input_basis(readers.q).state.row_count == 0, "one step's rows, not three times as many"


def test_gradients_are_those_of_the_unsplit_products():
    """y = P V^T W^T + R W^T with q = identity, in float64, with a borrowed basis in use."""
    readers = _Readers(X_ALONE, shared=True, dtype=torch.float64)
    for number in range(3):
        x, g = _draw(number, TOKENS, IN), _draw(-number - 1, TOKENS, 3 * OUT)
        weights = torch.cat([layer.weight.detach().clone() for layer in (readers.q, readers.k, readers.v)])
        y, dx, *dw = readers.step(number)
        for name, actual, exact in (
            ("y", y, x @ weights.T),
            ("dx", dx, g @ weights),
            ("dw", torch.cat(dw), g.T @ x),
        ):
            assert float((actual - exact).norm() / exact.norm()) < GRADIENT_EXACT, (number, name)
    assert readers.k.core.bases["input"].active is not None


def test_state_round_trips_and_stays_shared():
    """Through a state dict, a copy and a change of device or dtype of the whole model."""
    first = _Readers(METIS, shared=True)
    for number in range(4):
        first.step(number)
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    loaded = _Readers(METIS, shared=True)
    loaded.load_state_dict(torch.load(stored))
    loaded.clock.begin_step(4, TOKENS)
    copied = copy.deepcopy(first).cpu()
    for other in (loaded, copied):
        assert _input_basis(other.q) is _input_basis(other.k) is _input_basis(other.v)
        assert _input_basis(other.q) is not _input_basis(first.q)
    for number in range(4, 9):
        expected = first.step(number)
        for name, other in (("loaded", loaded), ("copied", copied)):
            for a, e in zip(other.step(number), expected, strict=True):
                assert_bitwise_equal(a, e, f"{name}, step {number}")


@pytest.mark.parametrize(
    ("mine", "its", "message"),
    [
        (METIS, NVFP4, "k: input basis: must be split as q splits it"),
        (NVFP4, METIS, "k: input basis: must be split as q splits it"),
        (BF16, BF16, "with a rank, to share its basis; received None"),
        (MEAN_SPLIT, MEAN_SPLIT, "split as q splits it, with a rank"),
        (replace(METIS, basis=replace(METIS.basis, oversample=4)), METIS, "give both linears one recipe"),
        (
            replace(
                METIS,
                **{
                    name: replace(getattr(METIS, name), split=SplitConfig(rank=RankConfig(fixed=32)))
                    for name in CELL_NAMES
                },
            ),
            METIS,
            "give both linears one recipe",
        ),
    ],
)
def test_another_split_cannot_share(mine: Recipe, its: Recipe, message: str):
    owner = MetisLinear(IN, OUT, recipe=its, name="q")
    with pytest.raises(ConfigError, match=message):
        MetisLinear(IN, OUT, recipe=mine, name="k", share_input_basis_with=owner)


def test_another_input_or_a_borrower_cannot_be_shared_with():
    owner = MetisLinear(IN, OUT, recipe=METIS, name="q")
    with pytest.raises(ConfigError, match="k: input basis: must have the features of q, received 32 instead"):
        MetisLinear(32, OUT, recipe=METIS, name="k", share_input_basis_with=owner)
    borrower = MetisLinear(IN, OUT, recipe=METIS, name="k", share_input_basis_with=owner)
    with pytest.raises(ConfigError, match="must be shared with the linear that renews it, received k, which"):
        MetisLinear(IN, OUT, recipe=METIS, name="v", share_input_basis_with=borrower)
    with pytest.raises(ConfigError, match="must be shared with the linear that renews it"):
        owner.core.borrow_input_basis(owner.core)


def test_a_reader_copied_without_its_owner_has_a_basis_of_its_own():
    readers = _Readers(METIS, shared=True)
    readers.step(0)
    alone, together = copy.deepcopy(readers.k), copy.deepcopy(readers)
    assert readers.k.core.borrowed == together.k.core.borrowed == {"input"} and not alone.core.borrowed
    assert together.k.core.bases["input"] is together.q.core.bases["input"]
    before = alone.core.bases["input"].state.num_refreshes
    for _ in range(METIS.basis.refresh_interval_steps + 1):
        alone(torch.randn(TOKENS, IN)).sum().backward()
        alone.after_step()
        alone.clock.begin_step(alone.clock.step + 1, TOKENS)
    assert alone.core.bases["input"].state.num_refreshes > before
    assert readers.k.core.bases["input"].state.num_refreshes == before

"""Weights as U S V^T + W_R with all four trained: the same function at the start, the right gradients after.

Oracles: the unsplit weight, and autograd of the formula y = U (S o (V^T x)) + W_R x in float64.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metis.config import QuantizerConfig, RankConfig, ReparametrisationConfig
from metis.errors import ConfigError
from metis.nn import MetisLinear
from metis.operand import Axis
from metis.quantize import quantize
from metis.recipes import BF16_REPARAMETRISED, METIS_PAPER
from metis.reparametrised import FactorPath, split_by_svd
from tests.numerics._simulated_ranks import Team, shard_of, use_simulated_collectives

FUNCTION_PRESERVED = 1e-6  # relative, fp32; worst measured 2e-7 of y, 2e-8 of the weight
EXACT = 1e-12  # relative, float64; worst measured 1e-15
BF16_PRESERVED = 2.0**-9  # relative: the rounding of the weight itself; worst measured 1.1e-3
TOKENS, IN, OUT, RANK = 32, 64, 48, 16


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _relative(actual: Tensor, exact: Tensor) -> float:
    actual, exact = actual.detach().double(), exact.detach().double()
    return float((actual - exact).norm() / exact.norm())


def _path(
    quantizer: QuantizerConfig | None = None, in_axis: Axis | None = None, out_axis: Axis | None = None
) -> FactorPath:
    config = ReparametrisationConfig(rank=RankConfig(fixed=RANK), factor_quantizer=quantizer)
    return FactorPath(
        config=config,
        in_features=in_axis or Axis.whole(IN),
        out_features=out_axis or Axis.whole(OUT),
        amax_scope="global",
    )


def _factors() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x, u, s, v, g in float64."""
    shapes = ((TOKENS, IN), (OUT, RANK), (RANK,), (IN, RANK), (TOKENS, OUT))
    return tuple(_randn(*shape, seed=seed) for seed, shape in enumerate(shapes))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FUNCTION_PRESERVED), (torch.bfloat16, BF16_PRESERVED)]
)
def test_the_four_parts_give_the_weight_back(dtype: torch.dtype, tolerance: float):
    """In bf16 too: the residual is formed from the factors as they are kept."""
    weight = _randn(OUT, IN, seed=1)
    u, s, v, residual = split_by_svd(weight, RANK, dtype)
    assert {t.dtype for t in (u, s, v, residual)} == {dtype}
    back = (u.double() * s.double()) @ v.double().T + residual.double()
    assert _relative(back, weight) < tolerance
    top = torch.linalg.svdvals(weight)[:RANK]
    assert _relative(s, top) < 4 * tolerance, "S holds the largest singular values"


def test_a_rank_above_the_weight_is_refused():
    with pytest.raises(ConfigError, match=r"reparametrisation\.rank.*at most .* = 8, received 9"):
        split_by_svd(torch.zeros(8, 16), 9)


def test_a_new_layer_computes_what_the_unsplit_one_does():
    torch.manual_seed(3)
    plain = torch.nn.Linear(IN, OUT)
    torch.manual_seed(3)
    layer = MetisLinear(IN, OUT, recipe=BF16_REPARAMETRISED)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "u", "s", "v"}
    x = _randn(TOKENS, IN, seed=0).float()
    assert _relative(layer(x), plain(x)) < FUNCTION_PRESERVED
    assert _relative(layer.weight, plain.weight) > 0.1, "the weight must hold the residual only"


def test_gradients_are_those_of_the_formula():
    """dU = G V S, dS = diag(U^T G V), dV = G^T U S with G = g^T x, and dx."""
    x, u, s, v, g = _factors()
    ours = [t.clone().requires_grad_() for t in (x, u, s, v)]
    theirs = [t.clone().requires_grad_() for t in (x, u, s, v)]
    y = _path()(*ours)
    y.backward(g)
    expected = (theirs[0] @ theirs[3] * theirs[2]) @ theirs[1].T
    expected.backward(g)
    assert _relative(y.detach(), expected.detach()) < EXACT
    for name, a, e in zip(("dx", "du", "ds", "dv"), ours, theirs, strict=True):
        assert _relative(a.grad, e.grad) < EXACT, name
    big_g = g.T @ x
    for name, a, e in (
        ("du", ours[1], big_g @ v * s),
        ("ds", ours[2], (u.T @ big_g @ v).diagonal()),
        ("dv", ours[3], big_g.T @ u * s),
    ):
        assert _relative(a.grad, e) < EXACT, name


def test_quantised_factors_are_blocked_along_the_rank_and_along_k():
    """And their gradients pass straight through to the parameters."""
    x, u, s, v, g = (t.float() for t in _factors())
    u_q = quantize(u, block_shape=(1, 16)).dequantize()
    v_q = quantize(v.t().contiguous(), block_shape=(1, 16)).dequantize().t()
    leaves = [t.clone().requires_grad_() for t in (x, u, s, v)]
    y = _path(QuantizerConfig())(*leaves)
    y.backward(g)
    assert _relative(y.detach(), (x @ v_q * s) @ u_q.T) < FUNCTION_PRESERVED
    big_g = g.T @ x
    for name, leaf, expected in (
        ("dx", leaves[0], (g @ u_q * s) @ v_q.T),
        ("du", leaves[1], big_g @ v_q * s),
        ("ds", leaves[2], (u_q.T @ big_g @ v_q).diagonal()),
        ("dv", leaves[3], big_g.T @ u_q * s),
    ):
        assert _relative(leaf.grad, expected) < 10 * FUNCTION_PRESERVED, name
    assert _relative(y.detach(), (x @ v * s) @ u.T) > 0.01, "nothing was quantised"


@pytest.mark.parametrize("quantizer", [None, QuantizerConfig()], ids=["plain", "quantised"])
@pytest.mark.parametrize("sharded", ["out", "in"])
def test_shards_give_the_gradients_of_one_rank(
    monkeypatch: pytest.MonkeyPatch, sharded: str, quantizer: QuantizerConfig | None
):
    """Column parallel shards U, row parallel V; every rank has the whole gradient of a replicated factor."""
    use_simulated_collectives(monkeypatch)
    x, u, s, v, g = _factors()
    whole = [t.clone().requires_grad_() for t in (x, u, s, v)]
    whole_y = _path(quantizer)(*whole)
    whole_y.backward(g)
    team = Team(2)

    def work(shard: int) -> list[Tensor]:
        size = OUT if sharded == "out" else IN
        axis = shard_of(size, shard, team)
        here = slice(shard * size // 2, (shard + 1) * size // 2)
        if sharded == "out":
            path, tensors, g_local = _path(quantizer, out_axis=axis), (x, u[here], s, v), g[:, here]
        else:
            path, tensors, g_local = _path(quantizer, in_axis=axis), (x[:, here], u, s, v[here]), g
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = path(*leaves)
        y.backward(g_local)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    (y0, dx0, du0, ds0, dv0), (y1, dx1, du1, ds1, dv1) = team.run(work)
    if sharded == "out":
        actual = torch.cat([y0, y1], 1), dx0 + dx1, torch.cat([du0, du1]), ds0, dv0
        replicated = ((ds0, ds1), (dv0, dv1))
    else:
        actual = y0 + y1, torch.cat([dx0, dx1], 1), du0, ds0, torch.cat([dv0, dv1])
        replicated = ((ds0, ds1), (du0, du1))
    expected = whole_y.detach(), *(leaf.grad for leaf in whole)
    for name, a, e in zip(("y", "dx", "du", "ds", "dv"), actual, expected, strict=True):
        assert _relative(a, e) < EXACT, name
    assert all(torch.equal(a, b) for a, b in replicated)


def test_the_paper_recipe_trains_all_four_parts():
    torch.manual_seed(0)
    layer = MetisLinear(IN, OUT, recipe=METIS_PAPER)
    target = torch.nn.Linear(IN, OUT)
    layer.clock.num_tokens_per_step = 128
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    losses = []
    for step in range(30):
        x = torch.randn(128, IN, generator=torch.Generator().manual_seed(step))
        layer.zero_grad()
        loss = (layer(x) - target(x)).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for p in layer.parameters():
                p -= 0.5 * p.grad
        layer.after_step()
    assert losses[-1] < 0.3 * losses[0], losses
    for name, p in layer.named_parameters():
        assert not torch.equal(p, start[name]), f"{name} was not trained"
    assert set(layer.core.bases) == {"input", "grad_output"}


def test_quantised_factors_need_a_rank_of_whole_blocks():
    config = ReparametrisationConfig(rank=RankConfig(fixed=24), factor_quantizer=QuantizerConfig())
    with pytest.raises(ConfigError, match=r"reparametrisation\.rank: must give a multiple of 16 columns"):
        MetisLinear(IN, OUT, recipe=replace(METIS_PAPER, reparametrisation=config))

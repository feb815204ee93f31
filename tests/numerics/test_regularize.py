"""The dual-range regulariser: the gradient of its formula, once per step, the same for every layout.

Oracles: autograd of the formula in float64, and in the trainer the initial weights, which depend on the seed
alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metis.config import DualRangeConfig
from metis.nn import MetisLinear
from metis.recipes import BF16, BF16_REPARAMETRISED, METIS, METIS_PAPER, NVFP4
from metis.regularize import dual_range_gradient, dual_range_loss
from tests._distributed import run_ranks
from tests.multiproc._trainer_runs import parse

EXACT = 1e-12  # relative, float64; worst measured 2e-16
SINGLE = 1e-6  # relative, fp32 terms; worst measured 1e-7
SAME_NORM = 1e-6  # of gradient norms over layouts: summation order; worst measured 8e-8
DOMINATED = 1e-4  # of the gradient's norm, which the regulariser makes up; worst measured 5e-7
CONFIG = DualRangeConfig(strength=3.0, square_weight=0.7, inverse_weight=0.2, eps=1e-2)
LEAVES = {"strength": 1.5, "square_weight": 70.0, "inverse_weight": 0.4, "eps": 1e-3}
"""Another value of each leaf of `CONFIG`."""


def _weight(dtype: torch.dtype = torch.float64) -> Tensor:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 8
    weight[0, :4] = torch.tensor([0.0, 1e-30, -1e-3, 4.0])
    return weight.to(dtype)


def _by_formula(weight: Tensor, config: DualRangeConfig, num_entries: int) -> Tensor:
    large, small = (weight * weight).sum(), (1 / (weight * weight + config.eps)).sum()
    return config.strength / num_entries * (config.square_weight * large + config.inverse_weight * small)


def _relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, SINGLE), (torch.bfloat16, SINGLE)]
)
def test_gradient_is_that_of_the_formula(dtype: torch.dtype, tolerance: float):
    weight = _weight(dtype)
    leaf = weight.double().clone().requires_grad_()
    exact = _by_formula(leaf, CONFIG, 3072)
    exact.backward()
    loss = dual_range_loss(weight, CONFIG, 3072).detach()
    gradient = dual_range_gradient(weight, CONFIG, 3072)
    assert loss.dtype == torch.float64 and gradient.dtype == torch.promote_types(dtype, torch.float32)
    assert _relative(loss, exact.detach()) < tolerance
    assert _relative(gradient, leaf.grad) < tolerance
    ours = weight.detach().clone().requires_grad_()
    dual_range_loss(ours, CONFIG, 3072).backward()
    assert _relative(ours.grad, leaf.grad) < (2.0**-8 if dtype == torch.bfloat16 else tolerance)


def test_shards_of_a_matrix_have_the_gradient_of_the_whole_bitwise():
    weight = _weight(torch.float32)
    whole = dual_range_gradient(weight, CONFIG, weight.numel())
    pieces = [dual_range_gradient(piece, CONFIG, weight.numel()) for piece in weight.split(16, dim=1)]
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    losses = [dual_range_loss(piece, CONFIG, weight.numel()) for piece in weight.split(16, dim=1)]
    assert _relative(torch.stack(losses).sum(), dual_range_loss(weight, CONFIG, weight.numel())) < EXACT


def test_steep_at_zero_and_nothing_singular():
    """Small entries are pushed away from zero, large ones towards it; the public form blows up at -eps."""
    config = DualRangeConfig(strength=1.0, eps=1e-3)
    descent = -dual_range_gradient(torch.tensor([1e-2, -1e-2, 2.0, -2.0, 0.0, -1e-3]), config, 6)
    assert descent[0] > 0 > descent[1] and descent[2] < 0 < descent[3] and descent[4] == 0
    assert bool(torch.isfinite(descent).all()) and abs(float(descent[5])) < abs(float(descent[1]))


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_changes_loss_and_gradient(leaf: str):
    changed = replace(CONFIG, **{leaf: LEAVES[leaf]})
    assert set(LEAVES) == set(DualRangeConfig.__dataclass_fields__)
    for function in (dual_range_loss, dual_range_gradient):
        assert _relative(function(_weight(), changed, 9), function(_weight(), CONFIG, 9)) > 1e-2


# --- The layer on one rank -----------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [BF16, NVFP4, METIS, METIS_PAPER, BF16_REPARAMETRISED], ids=lambda r: r.name
)
def test_before_step_adds_to_the_weights_gradient_alone(recipe: Any):
    """Of a reparametrised linear that is the residual; u, s and v keep their gradients."""
    torch.manual_seed(0)
    layer = MetisLinear(64, 48, recipe=replace(recipe, dual_range=CONFIG))
    torch.manual_seed(0)
    without = MetisLinear(64, 48, recipe=recipe)
    assert layer.core.recipe.dual_range == CONFIG and not layer.core.recipe.is_high_precision
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    for _ in range(2):  # two microbatches, one regulariser
        for each in (layer, without):
            each(x).square().mean().backward()
    before = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.before_step()
    without.before_step()
    leaf = layer.weight.detach().double().requires_grad_()
    _by_formula(leaf, CONFIG, leaf.numel()).backward()
    for name, parameter in layer.named_parameters():
        added = parameter.grad - before[name]
        if name == "weight":
            assert _relative(added, leaf.grad) < 10 * SINGLE
        else:
            assert not added.any(), name
        other = dict(without.named_parameters())[name]
        torch.testing.assert_close(other.grad, before[name])


def test_before_step_alone_is_a_gradient_and_frozen_weights_have_none():
    layer = MetisLinear(64, 48, recipe=replace(BF16, dual_range=CONFIG))
    layer.before_step()
    assert torch.equal(layer.weight.grad, dual_range_gradient(layer.weight, CONFIG, 64 * 48))
    layer.weight.grad = None
    layer.weight.requires_grad_(False)
    layer.before_step()
    assert layer.weight.grad is None


# --- The trainer ------------------------------------------------------------------

STRONG = DualRangeConfig(strength=60.0, eps=1e-2)
RUN = (
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 255 --train-iters 2 --clip-grad 0 --policy all "
    "--seq-length 16 --max-position-embeddings 16 --log-interval 1"
)
ONE_RANK = {"one": "", "one microbatch": "--micro-batch-size 4"}
TWO_RANKS = {
    "tp2": "--tensor-model-parallel-size 2",
    "pp2": "--pipeline-model-parallel-size 2",
    "dp2": "",
    "dp2 zero": "--use-distributed-optimizer",
}


def _train(_rank: int, world_size: int, cases: dict[str, str]) -> dict[str, Any]:
    """Run the trainer per case; returns step results, what the regulariser added and the weights it read."""
    from metis.training.initialize import initialize, shut_down

    results = {}
    for name, line in cases.items():
        args, printed = parse(world_size, line), io.StringIO()
        with contextlib.redirect_stdout(printed):
            initialize(args)
            from metis.mcore.state import recipe_linears
            from metis.training import step as step_module
            from metis.training.loop import pretrain

            steps: list[Any] = []
            added: dict[str, Tensor] = {}
            weights: dict[str, Tensor] = {}
            real_add, real_step = step_module.add_weight_penalties, step_module.StepRunner.train_step

            def add(model: Any, scale: float, added=added, weights=weights, inner=real_add) -> float:
                linears = recipe_linears(model)
                before = [linear.weight.main_grad.clone() for linear in linears]
                for linear in linears:
                    linear.weight.main_grad.zero_()
                value = inner(model, scale)
                for linear, gradient in zip(linears, before, strict=True):
                    added.setdefault(linear.layer_name, linear.weight.main_grad.clone())
                    weights.setdefault(linear.layer_name, linear.weight.detach().clone())
                    linear.weight.main_grad.add_(gradient)
                return value

            def train_step(self: Any, *values: Any, steps=steps, inner=real_step) -> Any:
                steps.append(inner(self, *values))
                return steps[-1]

            step_module.add_weight_penalties, step_module.StepRunner.train_step = add, train_step
            try:
                pretrain(args)
            finally:
                step_module.add_weight_penalties, step_module.StepRunner.train_step = real_add, real_step
                shut_down(keep_process_group=True)
        results[name] = {
            "losses": [dict(step.losses) for step in steps],
            "norms": [step.grad_norm for step in steps],
            "added": added,
            "weights": weights,
            "printed": printed.getvalue(),
        }
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Outcome of every case by rank, and the folder of TensorBoard events."""
    folder = tmp_path_factory.mktemp("dual_range")
    recipe = folder / "strong.json"
    dual_range = {"strength": STRONG.strength, "eps": STRONG.eps}
    recipe.write_text(json.dumps({"base": "bf16", "dual_range": dual_range}))
    found: dict[str, Any] = {"folder": folder}
    for world_size, cases in ((1, {**ONE_RANK, "without": ""}), (2, TWO_RANKS)):
        lines = {name: f"{RUN} {line} --recipe {recipe}" for name, line in cases.items() if name != "without"}
        if world_size == 1:
            lines["one"] += f" --tensorboard-dir {folder}/tensorboard"
            lines["without"] = f"{RUN} --recipe bf16"
        by_rank = run_ranks(_train, world_size, lines, timeout=300.0)
        found |= {name: [rank[name] for rank in by_rank] for name in lines}
    return found


@pytest.mark.parametrize("case", [*ONE_RANK, *TWO_RANKS])
def test_the_trainers_loss_is_the_formula_over_all_linears(runs: dict[str, Any], case: str):
    """Not part of `lm loss`, which the first step has in common with a run without the regulariser."""
    weights = runs["one"][0]["weights"]
    assert len(weights) == 8, "four linears in each of two blocks"
    expected = sum(_by_formula(w.double(), STRONG, w.numel()) for w in weights.values())
    first = runs[case][-1]["losses"][0]
    assert set(first) == {"lm loss", "dual-range loss"}
    assert first["dual-range loss"] == pytest.approx(float(expected), rel=SINGLE)
    assert first["dual-range loss"] == pytest.approx(
        runs["one"][0]["losses"][0]["dual-range loss"], rel=EXACT
    )
    assert first["lm loss"] == pytest.approx(runs["without"][0]["losses"][0]["lm loss"], rel=SINGLE)
    assert set(runs["without"][0]["losses"][0]) == {"lm loss"}


@pytest.mark.parametrize("case", [*ONE_RANK, *TWO_RANKS])
def test_each_step_adds_it_once_whatever_the_layout(runs: dict[str, Any], case: str):
    """A second microbatch or data-parallel rank that counted again would double the norm, which it rules."""
    expected = torch.stack([g.double().norm() for g in runs["one"][0]["added"].values()]).norm()
    assert float(expected) > 100 * runs["without"][0]["norms"][0]
    for rank in runs[case]:
        assert rank["norms"][0] == pytest.approx(float(expected), rel=DOMINATED)
        assert rank["norms"] == pytest.approx(runs["one"][0]["norms"], rel=SAME_NORM)


@pytest.mark.parametrize("case", [*ONE_RANK, *TWO_RANKS])
def test_added_gradients_are_bitwise_those_of_one_rank(runs: dict[str, Any], case: str):
    whole = runs["one"][0]["added"]
    for layer, weight in runs["one"][0]["weights"].items():
        assert torch.equal(whole[layer], dual_range_gradient(weight, STRONG, weight.numel()))
        pieces = [rank["added"][layer] for rank in runs[case] if layer in rank["added"]]
        if case == "tp2" and layer.endswith("linear_fc1"):
            pieces = [torch.cat([p.unflatten(0, (2, -1)) for p in pieces], dim=1).flatten(0, 1)]
        elif case == "tp2":
            pieces = [torch.cat(pieces, dim=0 if layer.endswith("linear_qkv") else 1)]
        assert len(pieces) == (2 if case.startswith("dp2") else 1)
        for piece in pieces:
            assert torch.equal(piece, whole[layer]), layer


def test_the_value_is_logged_under_its_own_name(runs: dict[str, Any]):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = [losses["dual-range loss"] for losses in runs["one"][0]["losses"]]
    found = re.findall(r"dual-range loss: (\S+) \|", runs["one"][0]["printed"])
    assert found == [f"{value:.6E}" for value in values]
    assert "dual-range" not in runs["without"][0]["printed"]
    events = EventAccumulator(str(Path(runs["folder"]) / "tensorboard"))
    events.Reload()
    scalars = [scalar.value for scalar in events.Scalars("dual-range loss")]
    assert scalars == pytest.approx(values, rel=SINGLE)
    assert values[1] < values[0], "descent"

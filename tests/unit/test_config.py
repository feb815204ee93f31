"""Every setting of a recipe does something, and a wrong one is refused with a sentence that helps.

The leaf test walks the config dataclasses, so a new field without a case here fails. A leaf of a cell must
change the result of its own GEMM and of no other: each cell is read in exactly one place.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import typing
from argparse import Namespace
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from metis.config import (
    CELL_NAMES,
    BasisConfig,
    CellConfig,
    QuantizerConfig,
    RankConfig,
    Recipe,
    ReparametrisationConfig,
    SplitConfig,
    from_dict,
    to_dict,
)
from metis.errors import CheckpointError, ConfigError
from metis.functional import LinearPlan, fprop
from metis.nn import MetisLinear
from metis.operand import Axis
from metis.recipes import METIS, NVFP4, NVFP4_DIRECT
from metis.training.run_config import check_compatible
from tests.numerics._simulated_ranks import Team, shard_of, use_simulated_collectives

TOKENS, SIZE, STEPS = 96, 64, 6
RANK = RankConfig(fraction=1 / 8, multiple=4, minimum=4, maximum=16)  # 8 of 64
GEMM_OF_CELL = {name: {"fprop": "y", "dgrad": "dx", "wgrad": "dw"}[name.split("_")[0]] for name in CELL_NAMES}
ROWS = QuantizerConfig()
SR = QuantizerConfig(rounding="stochastic")

CHANGED_VALUES = {
    "*.block_shape": [16, 16],
    "*.rounding": "stochastic",
    "*.num_random_bits": 8,
    "*.rht": True,
    "*.rank.fixed": 12,
    "*.rank.fraction": 1 / 4,
    "*.rank.multiple": 16,
    "*.rank.minimum": 16,
    "*.rank.maximum": 4,
    "*.head_format": "literal",
    "basis.refresh_interval_steps": 2,
    "basis.row_sample_fraction": 1.0,
    "basis.oversample": 0,
    "basis.num_pinned_rows": 0,
    "basis.num_canonical_chunks": 2,
    "amax_scope": "te",
    "name": "another",
}
"""What each leaf is changed to, from the values of `_base`."""

REFUSED = {
    "fprop_weight.quantizer.rounding": "must round to nearest without rht",
    "fprop_weight.quantizer.num_random_bits": "no effect with rounding 'rne'",
    "fprop_weight.quantizer.rht": "must round to nearest without rht",
    "fprop_weight.split.head_format": "must be 'bf16'",
    "dgrad_weight.quantizer.rounding": "must round to nearest without rht",
    "dgrad_weight.quantizer.num_random_bits": "no effect with rounding 'rne'",
    "dgrad_weight.quantizer.rht": "must round to nearest without rht",
    "dgrad_weight.split.head_format": "must be 'bf16'",
    "fprop_input.quantizer.rht": "must rotate both operands",
    "dgrad_grad_output.quantizer.rht": "must rotate both operands",
    "wgrad_input.quantizer.block_shape": r"must be \[1, 16\]",
    "wgrad_grad_output.quantizer.block_shape": r"must be \[1, 16\]",
    "reparametrisation.factor_quantizer.block_shape": "must be 1x16 blocks",
    "reparametrisation.factor_quantizer.rounding": "must be 1x16 blocks",
    "reparametrisation.factor_quantizer.num_random_bits": "no effect with rounding 'rne'",
    "reparametrisation.factor_quantizer.rht": "must be 1x16 blocks",
}
"""Leaves with one legal value in their place: another one cannot take effect and is refused."""


def _sub_config(hint: Any) -> type | None:
    options = [hint, *typing.get_args(hint)]
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def leaves(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every setting below a config class."""
    for name, hint in typing.get_type_hints(cls).items():
        inner = _sub_config(hint)
        if inner is None:
            yield prefix + name
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def changed_value(path: str) -> Any:
    """Return the value a leaf is changed to; a leaf without one is new and needs a case."""
    for pattern, value in CHANGED_VALUES.items():
        if fnmatch.fnmatchcase(path, pattern):
            return value
    raise AssertionError(f"{path} is new: give it a value in CHANGED_VALUES and see that it has an effect")


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    """Return the recipe with leaves set by path (dots written as __)."""
    data = to_dict(recipe)
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        section = data
        for parent in parents:
            section = section[parent]
        section[leaf] = copy.deepcopy(value)
    return from_dict(Recipe, data, "test")


def _base(path: str) -> Recipe:
    """Return the recipe in which the leaf at `path`, and the leaf's cell alone, is in use."""
    if path.startswith("reparametrisation."):
        quantizer = ROWS if ".factor_quantizer." in path else None
        config = ReparametrisationConfig(rank=RANK, factor_quantizer=quantizer)
        return Recipe(name="base", reparametrisation=config)
    if path.startswith("basis."):
        cell = CellConfig(quantizer=ROWS, split=SplitConfig(rank=RANK))
        basis = BasisConfig(oversample=4, num_pinned_rows=4, row_sample_fraction=0.05)
        cells = dict.fromkeys(("fprop_input", "wgrad_input"), cell)
        others = dict.fromkeys(set(CELL_NAMES) - set(cells), CellConfig(quantizer=ROWS))
        return Recipe(name="base", basis=basis, **cells, **others)
    cell, *rest = path.split(".")
    if cell not in CELL_NAMES:
        return NVFP4_DIRECT
    stochastic = path.endswith("num_random_bits") and not cell.endswith("weight")
    split = None
    if rest[0] == "split":
        rank = RankConfig(fixed=16) if path.endswith("head_format") else RANK
        split = SplitConfig(rank=rank)
    cells = {name: CellConfig(quantizer=ROWS) for name in CELL_NAMES}
    cells[cell] = CellConfig(quantizer=SR if stochastic else ROWS, split=split)
    return Recipe(name="base", basis=BasisConfig(oversample=4) if split else None, **cells)


def _changed(path: str) -> Recipe:
    changes = {path.replace(".", "__"): changed_value(path)}
    if path.startswith("wgrad_") and path.endswith(".rht"):
        changes = {f"{name}__quantizer__rht": True for name in ("wgrad_input", "wgrad_grad_output")}
    return _with(_base(path), **changes)


@lru_cache(maxsize=64)
def _run(recipe: Recipe) -> dict[str, Tensor]:
    """Return y, dx and dw of a few steps with constant weights, so that nothing feeds back between GEMMs."""
    torch.manual_seed(0)
    layer = MetisLinear(SIZE, SIZE, bias=False, recipe=recipe)
    layer.clock.num_tokens_per_step = TOKENS
    results: dict[str, list[Tensor]] = {"y": [], "dx": [], "dw": []}
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        x = torch.randn(TOKENS, SIZE, generator=generator).requires_grad_()
        g = torch.randn(TOKENS, SIZE, generator=generator)
        layer.zero_grad()
        y = layer(x)
        y.backward(g)
        for name, value in (("y", y), ("dx", x.grad), ("dw", layer.weight.grad)):
            results[name].append(value.detach().clone())
        layer.after_step()
    return {name: torch.stack(values) for name, values in results.items()}


def _differences(first: Recipe, second: Recipe) -> set[str]:
    a, b = _run(first), _run(second)
    return {name for name in a if not torch.equal(a[name], b[name])}


SPECIAL = ("amax_scope", "name", "basis.num_canonical_chunks")
ALL_LEAVES = sorted(leaves(Recipe))
NUMERIC = [path for path in ALL_LEAVES if path not in REFUSED and path not in SPECIAL]


@pytest.mark.parametrize("path", NUMERIC)
def test_every_leaf_changes_its_own_gemm_and_no_other(path: str):
    different = _differences(_base(path), _changed(path))
    if path.startswith("basis."):
        expected = {"y", "dw"}  # the basis of x, in fprop and wgrad
    elif path.startswith("reparametrisation."):
        # The residual weight moves with the rank; dw is g^T x whatever the split.
        expected = {"y", "dx"}
    else:
        expected = {GEMM_OF_CELL[path.split(".")[0]]}
    assert different == expected


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_sections_that_are_absent_have_no_effect_and_present_ones_do(cell: str):
    """`split` and `quantizer` themselves: absence of a feature is absence of its section."""
    whole = _base(f"{cell}.quantizer.rounding")
    assert _differences(whole, _base(f"{cell}.split.rank.fixed")) == {GEMM_OF_CELL[cell]}
    gemm = cell.split("_")[0]
    pair = [name for name in CELL_NAMES if name.startswith(gemm)]
    unquantized = _with(whole, **{f"{name}__quantizer": None for name in pair})
    assert _differences(whole, unquantized) == {GEMM_OF_CELL[cell]}


def test_quantised_factors_differ_from_plain_ones():
    plain, quantized = (
        Recipe(
            name="factors",
            reparametrisation=ReparametrisationConfig(rank=RankConfig(fixed=16), factor_quantizer=quantizer),
        )
        for quantizer in (None, ROWS)
    )
    assert _differences(plain, quantized) == {"y", "dx"}


@pytest.mark.parametrize("path", REFUSED)
def test_a_value_that_cannot_take_effect_is_refused(path: str):
    with pytest.raises(ConfigError, match=REFUSED[path]):
        _changed(path)


def test_the_walk_knows_every_leaf():
    """No case is about a leaf that is gone, and a leaf that is added is seen."""
    assert set(REFUSED) | set(SPECIAL) <= set(ALL_LEAVES)
    assert len(ALL_LEAVES) == 6 * (4 + 6) + 5 + 5 + 4 + 2

    @dataclasses.dataclass
    class Extended:
        basis: BasisConfig | None = None
        brand_new: int = 0

    assert "brand_new" in set(leaves(Extended))
    with pytest.raises(AssertionError, match="brand_new is new"):
        changed_value("brand_new")


def test_amax_scope_decides_whose_amax_a_shard_is_scaled_by(monkeypatch: pytest.MonkeyPatch):
    use_simulated_collectives(monkeypatch)
    generator = torch.Generator().manual_seed(3)
    x, w = (torch.randn(32, SIZE, generator=generator) for _ in range(2))
    x[:, 0] *= 50.0
    results = {}
    for recipe in (_base("amax_scope"), _changed("amax_scope")):
        team = Team(2)

        def work(shard: int, recipe: Recipe = recipe, team: Team = team) -> Tensor:
            half = slice(shard * SIZE // 2, (shard + 1) * SIZE // 2)
            plan = LinearPlan(
                recipe=recipe,
                layer="l",
                tokens=Axis.whole(32),
                in_features=shard_of(SIZE, shard, team),
                out_features=Axis.whole(32),
            )
            return fprop(x[:, half], w[:, half], plan, torch.float32)

        results[recipe.amax_scope] = sum(team.run(work))
    assert not torch.equal(results["global"], results["te"])


def test_num_canonical_chunks_bounds_the_shards_of_a_split_operand():
    axis = Axis(size=SIZE, runs=((0, SIZE // 4),), num_shards=4, group=Team(1))
    recipe = _changed("basis.num_canonical_chunks")
    x, v = torch.ones(16, SIZE // 4), torch.ones(SIZE // 4, 8, dtype=torch.bfloat16)
    plan = LinearPlan(
        recipe=recipe,
        layer="l",
        tokens=Axis.whole(16),
        in_features=axis,
        out_features=Axis.whole(16),
        v_input=v,
    )
    with pytest.raises(ConfigError, match=r"received 2 chunks .* and 4 ranks"):
        plan.split(x, "fprop_input", plan.tokens, axis, None)


def test_another_name_is_another_recipe_on_resume():
    stored = {"recipe": to_dict(_base("name"))}
    check_compatible("ckpt", stored, Namespace(resolved_recipe=to_dict(_base("name"))), finetune=False)
    with pytest.raises(
        CheckpointError, match="another recipe: name stored 'nvfp4_direct', requested 'another'"
    ):
        check_compatible("ckpt", stored, Namespace(resolved_recipe=to_dict(_changed("name"))), finetune=False)


# --- Reading ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"name": "x", "fprop_inptu": {}},
            r"r\.fprop_inptu: is not a known setting; did you mean 'fprop_input'\?",
        ),
        (
            {"name": "x", "fprop_input": {"quantizer": {"ruonding": "rne"}}},
            r"r\.fprop_input\.quantizer\.ruonding: .*did you mean 'rounding'",
        ),
        (
            {"name": "x", "fprop_input": {"quantizer": {"rounding": "stochastc"}}},
            r"must be one of \['rne', 'stochastic'\], received 'stochastc'; did you mean 'stochastic'",
        ),
        (
            {"name": "x", "basis": {"oversample": "8"}},
            r"r\.basis\.oversample: must be of type int, received '8'",
        ),
        ({"name": "x", "basis": {"oversample": True}}, "must be of type int, received True"),
        ({"name": "x", "basis": {"row_sample_fraction": False}}, "must be of type float, received False"),
        ({"name": "x", "fprop_input": {"quantizer": {"rht": 1}}}, "must be of type bool, received 1"),
        ({"name": 5}, r"r\.name: must be of type str, received 5"),
        ({"name": "x", "basis": 3}, r"r\.basis: must be a mapping of settings, received int: 3"),
        ({"name": "x", "fprop_input": {"quantizer": {"block_shape": 16}}}, "must be a list of whole numbers"),
        ({"name": "x", "fprop_input": {"quantizer": {"block_shape": [1, 32]}}}, r"\[1, 16\] or \[16, 16\]"),
        ({}, "r: must set name"),
        ([1], "r: must be a mapping of settings, received list"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_expected(data: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        from_dict(Recipe, data, "r")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Recipe(name=""), "must not be empty"),
        (lambda: RankConfig(fixed=0), "remove the split instead of asking for rank 0"),
        (lambda: RankConfig(fraction=0.0), r"must lie in \(0, 1\]"),
        (lambda: RankConfig(fraction=float("nan")), r"must lie in \(0, 1\]"),
        (lambda: RankConfig(multiple=0), "at least 1, received 0"),
        (lambda: RankConfig(minimum=32, maximum=16), "minimum 32 and maximum 16"),
        (lambda: BasisConfig(refresh_interval_steps=0), "at least 1"),
        (lambda: BasisConfig(row_sample_fraction=1.5), r"must lie in \(0, 1\], received 1.5"),
        (lambda: BasisConfig(oversample=-1), "must not be negative"),
        (lambda: BasisConfig(num_pinned_rows=-1), "must not be negative"),
        (lambda: BasisConfig(num_canonical_chunks=6), "must be a power of two, received 6"),
        (lambda: QuantizerConfig(num_random_bits=16, rounding="stochastic"), "must be 8 or 24, received 16"),
        (lambda: QuantizerConfig(block_shape=(16, 16), rht=True), r"needs block_shape \[1, 16\]"),
        (lambda: dataclasses.replace(METIS, basis=None), "exactly when a cell has a split"),
        (lambda: dataclasses.replace(NVFP4, basis=BasisConfig()), "exactly when a cell has a split"),
        (
            lambda: dataclasses.replace(NVFP4, fprop_input=CellConfig()),
            "must quantise both operands or neither",
        ),
        (
            lambda: _with(METIS, wgrad_input__split__rank__fixed=8),
            "wgrad_input.split: must equal fprop_input.split or be absent",
        ),
        (
            lambda: dataclasses.replace(METIS, reparametrisation=ReparametrisationConfig()),
            "must be absent with reparametrisation",
        ),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(build: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        build()


def test_the_rank_is_a_rounded_share_within_limits():
    """r = d / 64 up to a multiple of 16, at least 16, at most 64, never above d (arXiv 2509.00404 v4)."""
    assert [RankConfig().columns(d) for d in (8, 16, 64, 1024, 1040, 2048, 4096, 14336)] == [
        *(8, 16, 16, 16, 32, 32, 64, 64)
    ]
    assert RankConfig(fixed=5).columns(64) == 5 and RankConfig(fixed=100).columns(64) == 64


def test_round_trip_through_plain_values():
    recipe = _with(METIS, fprop_input__split__rank__fixed=32, wgrad_input__split__rank__fixed=32)
    data = to_dict(recipe)
    assert data["fprop_weight"]["quantizer"]["block_shape"] == [16, 16]
    assert from_dict(Recipe, data, "r") == recipe
    assert from_dict(Recipe, {"name": "x", "basis": None}, "r") == Recipe(name="x")

"""Named recipes say what their papers say, and a recipe file means what it reads.

Oracles: arXiv 2509.25149 section 4 (nvfp4), arXiv 2509.00404 v4 (metis), written out here as a table.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metis.config import CELL_NAMES, BasisConfig, CellConfig, RankConfig, Recipe
from metis.errors import ConfigError
from metis.recipes import (
    METIS,
    NVFP4,
    RECIPES,
    recipe_from_dict,
    recipe_to_dict,
    resolve_recipe,
    with_overrides,
)

# rows: 1x16 blocks; tiles: 16x16; sr: stochastic; rht: rotated; +split: bf16 head; +literal: FP4 head
TABLE = {
    "bf16": ("-", "-", "-", "-", "-", "-"),
    "nvfp4": ("rows", "tiles", "rows sr", "tiles", "rows sr rht", "rows rht"),
    "nvfp4_direct": ("rows",) * 6,
    "metis": ("rows +bf16", "tiles +bf16", "rows sr +bf16", "tiles +bf16", "rows sr +bf16", "rows +bf16"),
    "metis_paper": ("rows +literal", "rows", "rows sr +literal", "rows", "rows sr +literal", "rows +literal"),
    "bf16_reparametrised": ("-", "-", "-", "-", "-", "-"),
}


def _words(cell: CellConfig) -> str:
    words = []
    if cell.quantizer is not None:
        words.append("rows" if cell.quantizer.block_shape == (1, 16) else "tiles")
        words += ["sr"] if cell.quantizer.rounding == "stochastic" else []
        words += ["rht"] if cell.quantizer.rht else []
    words += [f"+{cell.split.head_format}"] if cell.split is not None else []
    return " ".join(words) or "-"


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_are_those_of_the_table(name: str):
    recipe = resolve_recipe(name)
    assert tuple(_words(getattr(recipe, cell)) for cell in CELL_NAMES) == TABLE[name]
    assert recipe.name == name
    assert recipe.is_high_precision == (name == "bf16")
    assert recipe.is_quantized == ("fp4" in name or name.startswith("metis"))
    assert (recipe.reparametrisation is not None) == (name in ("metis_paper", "bf16_reparametrised"))
    assert recipe.amax_scope == "global"


def test_constants_of_metis_are_the_published_ones():
    basis = METIS.basis
    assert (basis.refresh_interval_steps, basis.row_sample_fraction, basis.num_pinned_rows) == (8, 0.05, 8)
    assert METIS.input_split == METIS.weight_split == METIS.grad_output_split
    assert RECIPES["metis_paper"].weight_split is None


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip_through_json(name: str):
    recipe = RECIPES[name]
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"--recipe: must be one of bf16, .*received 'metsi'; did you mean 'metis'"
    ):
        resolve_recipe("metsi")


def _file(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_file_overrides_its_base_and_null_removes(tmp_path: Path):
    text = """
base: metis
fprop_input: {split: {rank: {fixed: 32}}}
wgrad_input: {split: {rank: {fixed: 32}}}
fprop_weight: {split: null}
dgrad_weight: {split: null}
basis: {oversample: 4}
"""
    for suffix in (".yaml", ".YML"):
        recipe = resolve_recipe(_file(tmp_path, f"mine{suffix}", text))
        assert recipe.name == "mine", "without a name the file's own"
        assert recipe.input_split.rank == RankConfig(fixed=32) and recipe.weight_split is None
        assert recipe.basis == BasisConfig(oversample=4)
        assert recipe.grad_output_split == METIS.grad_output_split, "the rest is the base's"
    data = {"base": "nvfp4", "name": "quiet", "dgrad_grad_output": {"quantizer": {"rounding": "rne"}}}
    recipe = resolve_recipe(_file(tmp_path, "r.json", json.dumps(data)))
    assert recipe.name == "quiet" and recipe.dgrad_grad_output.quantizer.rounding == "rne"
    assert recipe.wgrad_grad_output == NVFP4.wgrad_grad_output


def test_a_file_without_a_base_starts_from_the_defaults(tmp_path: Path):
    rows = {"quantizer": {"block_shape": [1, 16]}}
    data = {"name": "forward_only", "fprop_input": rows, "fprop_weight": rows}
    recipe = resolve_recipe(_file(tmp_path, "r.json", json.dumps(data)))
    assert recipe == Recipe(
        name="forward_only",
        fprop_input=NVFP4.fprop_input,
        fprop_weight=CellConfig(quantizer=NVFP4.fprop_input.quantizer),
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.yaml", "base: meits", r"r\.yaml\.base: must be one of .*received 'meits'; did you mean 'metis'"),
        ("r.yaml", "base: [metis]", r"r\.yaml\.base: must be one of .*received \['metis'\]"),
        ("r.yaml", "base: metis\nbasis: {oversampel: 3}", r"basis\.oversampel: .*did you mean 'oversample'"),
        ("r.yaml", "base: metis\nbasis: null", "basis: must be given exactly when a cell has a split"),
        ("r.yaml", "a: [1", r"must hold valid yaml, received"),
        ("r.json", "{'a': 1}", r"must hold valid json, received"),
        ("r.yaml", "- a\n- b", "must hold a mapping of settings, received list"),
        ("r.yaml", "", "must hold a mapping of settings, received NoneType"),
        ("r.yaml", "fprop_input: {}", "must set name"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path: Path, name: str, text: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_recipe(_file(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--recipe: must name a readable file, .*No such file"):
        resolve_recipe(str(tmp_path / "none.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x9c")
    with pytest.raises(ConfigError, match=r"must name a readable file, .* \(not UTF-8 text\)"):
        resolve_recipe(str(tmp_path / "binary.yaml"))


def test_overrides_are_validated():
    assert with_overrides(METIS, name="m2").name == "m2"
    with pytest.raises(ConfigError, match="exactly when a cell has a split"):
        with_overrides(METIS, basis=None)

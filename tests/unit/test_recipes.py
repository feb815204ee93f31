"""Named recipes say what their papers say, and a recipe file means what it reads.

Oracles, written out here as a table: arXiv 2509.25149 section 4 (nvfp4), 2512.02010 (4 over 6), 2505.19115
(fp4_all_the_way), 2603.10444 (mean_split), 2509.00404 v4 and v1 (metis); Transformer Engine's FP8 recipes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from metis import config
from metis.config import (
    CELL_NAMES,
    GEMMS,
    BasisConfig,
    CellConfig,
    QuantizerConfig,
    RankConfig,
    Recipe,
    ReparametrisationConfig,
    SplitConfig,
)
from metis.errors import ConfigError
from metis.recipes import (
    METIS,
    NVFP4,
    RECIPES,
    SOURCES,
    recipe_from_dict,
    recipe_to_dict,
    resolve_recipe,
    with_overrides,
)

# Operands in order: fprop x and w, dgrad g and w, wgrad g and x.
# rows 1x16, tiles 16x16 (NVFP4); mx 1x32 (MXFP4); fp8 e4m3 or e5m2 per tensor, in rows of 128 or tiles of
# 128x128; pow2: power-of-two scales; sr: stochastic; rht: rotated by 16 fixed signs; 4/6: by mean absolute
# error; +FORMAT: split, its head in that format, merged: added back; +mean: the mean alone.
TABLE = {
    "bf16": ("-",) * 6,
    "nvfp4": ("rows", "tiles", "rows sr", "tiles", "rows sr rht", "rows rht"),
    "metis": ("rows +bf16", "tiles +bf16", "rows sr +bf16", "tiles +bf16", "rows sr +bf16", "rows +bf16"),
    "metis_merged": (
        *("rows +bf16 merged", "tiles +bf16 merged", "rows sr +bf16 merged"),
        *("tiles +bf16 merged", "rows sr +bf16 merged", "rows +bf16 merged"),
    ),
    "nvfp4_direct": ("rows",) * 6,
    "nvfp4_4over6": ("rows", "tiles 4/6", "rows sr", "tiles 4/6", "rows sr rht", "rows rht"),
    "nvfp4_forward_bf16": ("-", "-", "rows sr", "tiles", "rows sr rht", "rows rht"),
    "nvfp4_backward_bf16": ("rows", "tiles", "-", "-", "-", "-"),
    "fp4_all_the_way": ("rows", "rows", "rows sr", "rows", "rows sr", "rows sr"),
    "mean_split": ("rows +mean", "rows", "rows sr", "rows", "rows sr", "rows +mean"),
    "mxfp4": ("mx", "mx", "mx sr", "mx", "mx sr", "mx"),
    "fp8": ("e4m3", "e4m3", "e5m2", "e4m3", "e5m2", "e4m3"),
    "fp8_blocks": (
        *("e4m3 rows pow2", "e4m3 tiles pow2", "e4m3 rows pow2"),
        *("e4m3 tiles pow2", "e4m3 rows pow2", "e4m3 rows pow2"),
    ),
    "metis_paper": ("rows +literal", "rows", "rows sr +literal", "rows", "rows sr +literal", "rows +literal"),
    "metis_v1": ("rows +literal", "rows", "rows +literal", "rows", "rows +literal", "rows +literal"),
    "metis_v1_mxfp4": ("mx +literal", "mx", "mx +literal", "mx", "mx +literal", "mx +literal"),
    "metis_v1_fp8": ("e4m3 +literal", "e4m3", "e4m3 +literal", "e4m3", "e4m3 +literal", "e4m3 +literal"),
    "bf16_reparametrised": ("-",) * 6,
}
REPARAMETRISED = {"metis_paper", "metis_v1", "metis_v1_mxfp4", "metis_v1_fp8", "bf16_reparametrised"}
WITH_BASIS = {"metis", "metis_merged", "metis_paper", "metis_v1", "metis_v1_mxfp4", "metis_v1_fp8"}
SPECTRAL = {"metis_v1", "metis_v1_mxfp4", "metis_v1_fp8"}
HIGH_PRECISION = {"bf16", "bf16_reparametrised"}
BLOCK_WORDS = {
    ("nvfp4", (1, 16)): "rows",
    ("nvfp4", (16, 16)): "tiles",
    ("mxfp4", (1, 32)): "mx",
    ("fp8_e4m3", None): "e4m3",
    ("fp8_e5m2", None): "e5m2",
    ("fp8_e4m3", (1, 128)): "e4m3 rows",
    ("fp8_e4m3", (128, 128)): "e4m3 tiles",
}


def _quantizer_words(quantizer: QuantizerConfig) -> list[str]:
    words = [BLOCK_WORDS[quantizer.format, quantizer.block_shape]]
    words += ["pow2"] if quantizer.power_of_two_scales else []
    words += ["sr"] if quantizer.rounding == "stochastic" else []
    words += ["rht"] if quantizer.rht is not None else []
    words += ["4/6"] if quantizer.four_over_six == "mae" else []
    assert quantizer.num_terms == 1 and quantizer.scale_rounding == "standard"
    assert quantizer.num_random_bits == 16
    assert quantizer.rht is None or (quantizer.rht.size, quantizer.rht.sign_seed) == (16, None)
    return words


def _words(cell: CellConfig) -> str:
    words = [] if cell.quantizer is None else _quantizer_words(cell.quantizer)
    if cell.split is not None and cell.split.rank is None:
        words.append("+mean")
    elif cell.split is not None:
        assert not cell.split.mean_first
        words.append(f"+{cell.split.head_format}")
        words += ["merged"] if cell.split.head_placement == "merged" else []
    return " ".join(words) or "-"


def test_the_table_has_every_recipe_and_every_recipe_a_source():
    assert set(TABLE) == set(RECIPES) == set(SOURCES) and len(TABLE) == 18


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_are_those_of_the_table(name: str):
    recipe = resolve_recipe(name)
    assert tuple(_words(getattr(recipe, cell)) for cell in CELL_NAMES) == TABLE[name]
    assert recipe.name == name
    assert recipe.is_high_precision == (name == "bf16")
    assert recipe.is_quantized == (name not in HIGH_PRECISION)
    assert (recipe.reparametrisation is not None) == (name in REPARAMETRISED)
    assert (recipe.basis is not None) == (name in WITH_BASIS) == recipe.has_basis
    assert (recipe.spectral_learning_rate is not None) == (name in SPECTRAL)
    assert recipe.dual_range is None and not recipe.save_packed
    assert recipe.amax_scope == "global"


def test_constants_of_metis_are_the_published_ones():
    basis = METIS.basis
    assert (basis.refresh_interval_steps, basis.row_sample_fraction, basis.num_pinned_rows) == (8, 0.05, 8)
    assert (basis.oversample, basis.num_cold_steps, basis.num_canonical_chunks) == (8, 2, 8)
    assert basis.tp_mode == "exact"
    assert METIS.input_split == METIS.weight_split == METIS.grad_output_split == SplitConfig()
    rank = METIS.input_split.rank
    assert (rank.fixed, rank.fraction, rank.minimum, rank.maximum, rank.multiple) == (
        None,
        1 / 64,
        16,
        64,
        16,
    )
    assert RECIPES["metis_paper"].weight_split is None


@pytest.mark.parametrize("name", sorted(REPARAMETRISED | SPECTRAL))
def test_constants_of_the_papers_literal_recipes(name: str):
    """Factors and heads in the format of the operands; v1 scales dw by 1, 1.5 and 2 (arXiv 2509.00404 v1)."""
    recipe = RECIPES[name]
    assert recipe.reparametrisation.rank.maximum == 64
    factors = recipe.reparametrisation.factor_quantizer
    if name == "bf16_reparametrised":
        assert factors is None
        return
    assert factors == recipe.fprop_weight.quantizer == recipe.input_split.factor_quantizer
    assert recipe.grad_output_split == recipe.input_split
    assert factors.rounding == "rne", "heads round to nearest even where the gradient's residual does not"
    block = 1 if factors.block_shape is None else factors.block_shape[1]
    for features in (64, 1024, 1040, 4096):
        assert recipe.input_split.rank.columns(features) % block == 0
    if name in SPECTRAL:
        spectral = recipe.spectral_learning_rate
        scales = (spectral.leading_factor, spectral.head_factor, spectral.residual_factor)
        assert (spectral.schedule, spectral.num_leading, scales) == ("stepped", 5, (1.0, 1.5, 2.0))
        assert spectral.apply_to == "dw"


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


# --- docs/recipes.md ---------------------------------------------------------------------------------------

REPOSITORY = Path(__file__).resolve().parents[2]


def _page_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_recipe_page", REPOSITORY / "tools" / "make_recipe_page.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_page_is_up_to_date():
    """Regenerate with `python tools/make_recipe_page.py` after changing a recipe or a setting."""
    assert (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8") == _page_module().page()
    assert "docs/recipes.md" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_recipe_page_has_every_recipe_section_and_setting():
    module = _page_module()
    text = module.page()
    for name in RECIPES:
        assert f"### {name}\n" in text
    described = {cls for _, cls, _ in module.SECTIONS}
    known = {value for value in vars(config).values() if dataclasses.is_dataclass(value)}
    assert described == known
    for cls in known:
        for setting in dataclasses.fields(cls):
            assert f"| `{setting.name}` |" in text and setting.metadata["doc"] in text


@pytest.mark.parametrize(
    ("recipe", "gemm", "precision"),
    [
        ("bf16", "fprop", "compute dtype"),
        ("nvfp4_forward_bf16", "dgrad", "nvfp4 x nvfp4"),
        ("fp8", "wgrad", "fp8_e5m2 x fp8_e4m3"),
        ("mean_split", "wgrad", "nvfp4 x nvfp4 + thin heads"),
    ],
)
def test_the_recipe_page_says_what_each_gemm_multiplies(recipe: str, gemm: str, precision: str):
    left, right = next(cells for name, *cells in GEMMS if name == gemm)
    assert _page_module().precision(RECIPES[recipe], left, right) == precision


def test_ranks_do_not_round_up_on_binary_noise():
    assert RankConfig(fraction=0.07, maximum=4096).columns(1600) == 112


def test_a_removed_section_and_a_number_without_a_point_are_read(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "base: metis\nfprop_input: null\nfprop_weight: null\nbasis: {row_sample_fraction: 1e-1}\n"
    )
    recipe = resolve_recipe(str(path))
    assert recipe.fprop_input == CellConfig() and recipe.basis.row_sample_fraction == 0.1


def test_blocks_of_factors_count_for_the_features_that_they_run_along():
    factors = QuantizerConfig(format="mxfp4", block_shape=(1, 32))
    recipe = Recipe(name="x", reparametrisation=ReparametrisationConfig(factor_quantizer=factors))
    assert recipe.axis_multiple("in_features") == 32


def test_an_amax_scope_without_tensor_amaxes_is_refused():
    with pytest.raises(ConfigError, match="amax_scope: has no effect"):
        Recipe(name="x", amax_scope="te")

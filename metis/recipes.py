"""Named recipes as values, and how a recipe is found by name or read from a file.

Sources: NVIDIA's NVFP4 pretraining recipe (arXiv 2509.25149 section 4 and Transformer Engine's
NVFP4BlockScaling); Metis (arXiv 2509.00404 v4). A recipe file is YAML or JSON; `base: NAME` starts from a
named recipe, every other key overrides it, `null` removes a section:

    base: metis
    name: metis_rank32
    fprop_input: {split: {rank: {fixed: 32}}}
    wgrad_input: {split: {rank: {fixed: 32}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metis.config import (
    BasisConfig,
    CellConfig,
    QuantizerConfig,
    Recipe,
    ReparametrisationConfig,
    SplitConfig,
    from_dict,
    to_dict,
)
from metis.errors import ConfigError, nearest_name

_ROWS_RNE = QuantizerConfig()
_ROWS_SR = QuantizerConfig(rounding="stochastic")
_TILES_RNE = QuantizerConfig(block_shape=(16, 16))
_ROWS_RNE_RHT = QuantizerConfig(rht=True)
_ROWS_SR_RHT = QuantizerConfig(rounding="stochastic", rht=True)

BF16 = Recipe(name="bf16")

NVFP4 = Recipe(
    name="nvfp4",
    fprop_input=CellConfig(quantizer=_ROWS_RNE),
    fprop_weight=CellConfig(quantizer=_TILES_RNE),
    dgrad_grad_output=CellConfig(quantizer=_ROWS_SR),
    dgrad_weight=CellConfig(quantizer=_TILES_RNE),
    wgrad_grad_output=CellConfig(quantizer=_ROWS_SR_RHT),
    wgrad_input=CellConfig(quantizer=_ROWS_RNE_RHT),
)

_DIRECT = CellConfig(quantizer=_ROWS_RNE)
NVFP4_DIRECT = Recipe(
    name="nvfp4_direct",
    fprop_input=_DIRECT,
    fprop_weight=_DIRECT,
    dgrad_grad_output=_DIRECT,
    dgrad_weight=_DIRECT,
    wgrad_grad_output=_DIRECT,
    wgrad_input=_DIRECT,
)

_SPLIT_RNE = CellConfig(quantizer=_ROWS_RNE, split=SplitConfig())
_SPLIT_SR = CellConfig(quantizer=_ROWS_SR, split=SplitConfig())
_SPLIT_TILES = CellConfig(quantizer=_TILES_RNE, split=SplitConfig())
METIS = Recipe(
    name="metis",
    fprop_input=_SPLIT_RNE,
    fprop_weight=_SPLIT_TILES,
    dgrad_grad_output=_SPLIT_SR,
    dgrad_weight=_SPLIT_TILES,
    wgrad_grad_output=_SPLIT_SR,
    wgrad_input=_SPLIT_RNE,
    basis=BasisConfig(),
)

_LITERAL = SplitConfig(head_format="literal")
_LITERAL_RNE = CellConfig(quantizer=_ROWS_RNE, split=_LITERAL)
_LITERAL_SR = CellConfig(quantizer=_ROWS_SR, split=_LITERAL)
METIS_PAPER = Recipe(
    name="metis_paper",
    fprop_input=_LITERAL_RNE,
    fprop_weight=_DIRECT,
    dgrad_grad_output=_LITERAL_SR,
    dgrad_weight=_DIRECT,
    wgrad_grad_output=_LITERAL_SR,
    wgrad_input=_LITERAL_RNE,
    basis=BasisConfig(),
    reparametrisation=ReparametrisationConfig(factor_quantizer=_ROWS_RNE),
)

BF16_REPARAMETRISED = Recipe(name="bf16_reparametrised", reparametrisation=ReparametrisationConfig())

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe for recipe in (BF16, NVFP4, NVFP4_DIRECT, METIS, METIS_PAPER, BF16_REPARAMETRISED)
}


def resolve_recipe(spec: str) -> Recipe:
    """Return the recipe called `spec`, or the one in the YAML or JSON file `spec`.

    Raises ConfigError for an unknown name (with the nearest known one), an unreadable file or a wrong
    setting.
    """
    if spec in RECIPES:
        return RECIPES[spec]
    path = Path(spec)
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise ConfigError(
            "--recipe",
            f"must be one of {', '.join(RECIPES)} or a .yaml/.json file, received "
            f"{spec!r}{nearest_name(spec, RECIPES)}",
        )
    data = read_mapping(path, "--recipe")
    base = data.pop("base", None)
    if base is None:
        return from_dict(Recipe, data, f"--recipe {spec}")
    if not isinstance(base, str) or base not in RECIPES:
        raise ConfigError(
            f"--recipe {spec}.base",
            f"must be one of {', '.join(RECIPES)}, received {base!r}{nearest_name(str(base), RECIPES)}",
        )
    data.setdefault("name", path.stem)
    return from_dict(Recipe, _merged(to_dict(RECIPES[base]), data), f"--recipe {spec}")


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as nested plain values, as it is printed, saved in checkpoints and compared on
    resume.
    """
    return to_dict(recipe)


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """Inverse of `recipe_to_dict`."""
    return from_dict(Recipe, data, "recipe")


def with_overrides(recipe: Recipe, **changes: Any) -> Recipe:
    """Return `recipe` with top-level fields replaced, validated again."""
    return replace(recipe, **changes)


def read_mapping(path: Path, where: str) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping.

    Raises ConfigError naming the option and the file when it is missing, malformed or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(where, f"must name a readable file, received {str(path)!r} ({reason})") from None
    try:
        if path.suffix.lower() == ".json":
            data = json.loads(text)
        else:
            import yaml

            data = yaml.safe_load(text)
    except Exception as error:
        detail = " ".join(str(error).split())
        raise ConfigError(
            where, f"must hold valid {path.suffix[1:]}, received {str(path)!r}: {detail}"
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(
            where, f"must hold a mapping of settings, received {type(data).__name__} in {str(path)!r}"
        )
    return data


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result

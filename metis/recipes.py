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
    CELL_NAMES,
    BasisConfig,
    CellConfig,
    QuantizerConfig,
    RankConfig,
    Recipe,
    ReparametrisationConfig,
    RhtConfig,
    SpectralLearningRateConfig,
    SplitConfig,
    from_dict,
    to_dict,
)
from metis.errors import ConfigError, nearest_name

_ROWS_RNE = QuantizerConfig()
_ROWS_SR = QuantizerConfig(rounding="stochastic")
_TILES_RNE = QuantizerConfig(block_shape=(16, 16))


def _cells(
    activation: QuantizerConfig | None,
    weight: QuantizerConfig | None,
    gradient: QuantizerConfig | None,
    **others: CellConfig,
) -> dict[str, CellConfig]:
    """Return six unsplit cells from what inputs, weights and output gradients use; `others` replace cells."""
    x, w, g = (CellConfig(quantizer=quantizer) for quantizer in (activation, weight, gradient))
    cells = {
        "fprop_input": x,
        "fprop_weight": w,
        "dgrad_grad_output": g,
        "dgrad_weight": w,
        "wgrad_grad_output": g,
        "wgrad_input": x,
    }
    return cells | others


_WHOLE = CellConfig()

BF16 = Recipe(name="bf16")

NVFP4 = Recipe(
    name="nvfp4",
    **_cells(
        _ROWS_RNE,
        _TILES_RNE,
        _ROWS_SR,
        wgrad_grad_output=CellConfig(quantizer=replace(_ROWS_SR, rht=RhtConfig())),
        wgrad_input=CellConfig(quantizer=replace(_ROWS_RNE, rht=RhtConfig())),
    ),
)
NVFP4_DIRECT = Recipe(name="nvfp4_direct", **_cells(_ROWS_RNE, _ROWS_RNE, _ROWS_RNE))

_TILES_4OVER6 = CellConfig(quantizer=replace(_TILES_RNE, four_over_six="mae"))
NVFP4_4OVER6 = replace(NVFP4, name="nvfp4_4over6", fprop_weight=_TILES_4OVER6, dgrad_weight=_TILES_4OVER6)
NVFP4_FORWARD_BF16 = replace(NVFP4, name="nvfp4_forward_bf16", fprop_input=_WHOLE, fprop_weight=_WHOLE)
NVFP4_BACKWARD_BF16 = Recipe(
    name="nvfp4_backward_bf16", fprop_input=NVFP4.fprop_input, fprop_weight=NVFP4.fprop_weight
)

FP4_ALL_THE_WAY = Recipe(
    name="fp4_all_the_way",
    **_cells(_ROWS_RNE, _ROWS_RNE, _ROWS_SR, wgrad_input=CellConfig(quantizer=_ROWS_SR)),
)

_MEAN = CellConfig(quantizer=_ROWS_RNE, split=SplitConfig(rank=None, mean_first=True))
MEAN_SPLIT = Recipe(
    name="mean_split", **_cells(None, _ROWS_RNE, _ROWS_SR, fprop_input=_MEAN, wgrad_input=_MEAN)
)

_MX_RNE = QuantizerConfig(format="mxfp4", block_shape=(1, 32))
MXFP4 = Recipe(name="mxfp4", **_cells(_MX_RNE, _MX_RNE, replace(_MX_RNE, rounding="stochastic")))

_FP8_FORWARD = QuantizerConfig(format="fp8_e4m3", block_shape=None)
FP8 = Recipe(name="fp8", **_cells(_FP8_FORWARD, _FP8_FORWARD, replace(_FP8_FORWARD, format="fp8_e5m2")))
_FP8_ROWS = QuantizerConfig(format="fp8_e4m3", block_shape=(1, 128), power_of_two_scales=True)
FP8_BLOCKS = Recipe(
    name="fp8_blocks", **_cells(_FP8_ROWS, replace(_FP8_ROWS, block_shape=(128, 128)), _FP8_ROWS)
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


def _merged(cell: CellConfig) -> CellConfig:
    return replace(cell, split=SplitConfig(head_placement="merged"))


METIS_MERGED = replace(METIS, name="metis_merged", **{n: _merged(getattr(METIS, n)) for n in CELL_NAMES})


def _paper(
    name: str, quantizer: QuantizerConfig, gradient: QuantizerConfig, rank: RankConfig, **others: Any
) -> Recipe:
    """Return the paper's scheme read literally: reparametrised weights, both head factors quantised."""
    is_default = quantizer == QuantizerConfig()
    split = SplitConfig(rank=rank, head_format="literal", head_quantizer=None if is_default else quantizer)
    x, g = CellConfig(quantizer=quantizer, split=split), CellConfig(quantizer=gradient, split=split)
    return Recipe(
        name=name,
        **_cells(
            None,
            quantizer,
            None,
            fprop_input=x,
            wgrad_input=x,
            dgrad_grad_output=g,
            wgrad_grad_output=g,
        ),
        basis=BasisConfig(),
        reparametrisation=ReparametrisationConfig(rank=rank, factor_quantizer=quantizer),
        **others,
    )


METIS_PAPER = _paper("metis_paper", _ROWS_RNE, _ROWS_SR, RankConfig())
_V1 = {"spectral_learning_rate": SpectralLearningRateConfig()}
METIS_V1 = _paper("metis_v1", _ROWS_RNE, _ROWS_RNE, RankConfig(), **_V1)
METIS_V1_MXFP4 = _paper("metis_v1_mxfp4", _MX_RNE, _MX_RNE, RankConfig(multiple=32, minimum=32), **_V1)
METIS_V1_FP8 = _paper("metis_v1_fp8", _FP8_FORWARD, _FP8_FORWARD, RankConfig(), **_V1)

BF16_REPARAMETRISED = Recipe(name="bf16_reparametrised", reparametrisation=ReparametrisationConfig())

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        BF16,
        NVFP4,
        METIS,
        METIS_MERGED,
        NVFP4_DIRECT,
        NVFP4_4OVER6,
        NVFP4_FORWARD_BF16,
        NVFP4_BACKWARD_BF16,
        FP4_ALL_THE_WAY,
        MEAN_SPLIT,
        MXFP4,
        FP8,
        FP8_BLOCKS,
        METIS_PAPER,
        METIS_V1,
        METIS_V1_MXFP4,
        METIS_V1_FP8,
        BF16_REPARAMETRISED,
    )
}

SOURCES: Mapping[str, str] = {
    "bf16": "megatron-core's own linear",
    "nvfp4": "arXiv 2509.25149 section 4; Transformer Engine's NVFP4BlockScaling",
    "metis": "arXiv 2509.00404 v4, in projector form with bf16 heads and tracked weights",
    "metis_merged": "metis with heads added back into decoded operands, as fake quantisation does",
    "nvfp4_direct": "every operand alike: the reference point of arXiv 2509.00404 v4",
    "nvfp4_4over6": "nvfp4 with arXiv 2512.02010 on the weights; Transformer Engine's nvfp4_4over6",
    "nvfp4_forward_bf16": "arXiv 2509.25149 appendix D: the forward pass healed, backward in FP4",
    "nvfp4_backward_bf16": "arXiv 2509.25149 appendix D and 2505.19115 (fine-tuning): backward in bf16",
    "fp4_all_the_way": "arXiv 2505.19115: stochastic rounding of g, and of x in wgrad; no rotation, no tiles",
    "mean_split": "arXiv 2603.10444: the mean over tokens of x apart, no basis",
    "mxfp4": "OCP Microscaling 1.0 everywhere, stochastic rounding of g",
    "fp8": "per tensor, current scaling: E4M3 forward, E5M2 gradients (Transformer Engine's hybrid)",
    "fp8_blocks": "E4M3 in 1x128 and 128x128 blocks, power-of-two scales (Float8BlockScaling)",
    "metis_paper": "arXiv 2509.00404 v4, equations read literally: reparametrised weights, FP4 heads",
    "metis_v1": "arXiv 2509.00404 v1: metis_paper with nearest rounding and the spectral learning rate",
    "metis_v1_mxfp4": "metis_v1 in MXFP4",
    "metis_v1_fp8": "metis_v1 in FP8 (E4M3 per tensor)",
    "bf16_reparametrised": "the control of metis_paper: its weights, everything in high precision",
}
"""Where each recipe comes from."""


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
    return with_changes(RECIPES[base], data, f"--recipe {spec}")


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


def with_changes(recipe: Recipe, changes: Mapping[str, Any], where: str) -> Recipe:
    """Return `recipe` with nested plain `changes` merged in; None removes a section.

    Raises ConfigError with `where` extended by the path of an unknown or wrong setting.
    """
    return from_dict(Recipe, _merged(to_dict(recipe), changes), where)


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

            data = yaml.load(text, Loader=_strict_loader(yaml))
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


def _strict_loader(yaml: Any) -> Any:
    """Return a YAML loader that refuses a key given twice, of which plain YAML keeps the last."""

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key!r} is given twice, again in line {line}; keep one of them")
            seen.add(key)
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result

"""Where a recipe applies: ordered globs over the paths of the linear layers; first match wins, every rule
must match.

A path is `decoder.layers.<global layer index>.<self_attention.linear_qkv | self_attention.linear_proj |
mlp.linear_fc1 | mlp.linear_fc2>`. A rule names `run` (the run's own recipe), or another recipe by name or
file. The default policy, the same for every FP4 recipe, keeps the last round(0.125 L) blocks, at least one,
in bf16 (arXiv
2509.25149 section 4 keeps about 15 % of the linears, mostly at the end). A policy file is YAML or JSON:

    rules:
      - {match: "decoder.layers.0.*", recipe: bf16}
      - {match: "*.linear_proj", recipe: nvfp4}
      - {match: "*", recipe: run}
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metis.config import Recipe, from_dict, to_dict
from metis.errors import ConfigError
from metis.recipes import BF16, RECIPES, read_mapping, resolve_recipe

RUN_RECIPE = "run"
LINEAR_NAMES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
DEFAULT_BF16_FRACTION_AT_END = 0.125


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRule:
    """One line of a policy: linears whose path matches `match` (shell glob) use `recipe`.

    recipe: `run`, a known name, or a value. A file is read once, when the policy is, so that checkpoints hold
    and compare its content.
    """

    match: str
    recipe: str | Recipe = RUN_RECIPE


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """An ordered list of rules. A path that no rule matches is an error, and so is a rule that matches
    nothing.
    """

    rules: tuple[PolicyRule, ...]

    def recipe_for(self, path: str, run_recipe: Recipe) -> Recipe:
        """Return the recipe of the linear at `path`; raises ConfigError when no rule matches it."""
        for rule in self.rules:
            if fnmatch.fnmatchcase(path, rule.match):
                if isinstance(rule.recipe, Recipe):
                    return rule.recipe
                return run_recipe if rule.recipe == RUN_RECIPE else resolve_recipe(rule.recipe)
        raise ConfigError(
            "--policy", f"must cover every linear, but no rule matches {path!r}; end with match: '*'"
        )

    def check_matches(self, module_paths: Iterable[str]) -> None:
        """Raise ConfigError if a rule matches none of `module_paths`, or one of the paths has no rule.

        A rule counts as used when some path matches its glob and no earlier rule took that path.
        """
        used = set()
        for path in module_paths:
            for index, rule in enumerate(self.rules):
                if fnmatch.fnmatchcase(path, rule.match):
                    used.add(index)
                    break
            else:
                raise ConfigError(
                    "--policy", f"must cover every linear, but no rule matches {path!r}; end with match: '*'"
                )
        for index, rule in enumerate(self.rules):
            if index not in used:
                name = rule.recipe.name if isinstance(rule.recipe, Recipe) else rule.recipe
                raise ConfigError(
                    "--policy",
                    f"rule {index + 1} ({rule.match!r} -> {name}) must match at least one linear "
                    "that no "
                    "earlier rule takes, and matches none; paths look like 'decoder.layers.0.mlp.linear_fc1'",
                )

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested values, as saved in checkpoints."""
        return {"rules": [to_dict(rule) for rule in self.rules]}


def linear_paths(num_layers: int) -> list[str]:
    """Return the paths of all linears of a model with `num_layers` blocks, in order."""
    return [f"decoder.layers.{layer}.{name}" for layer in range(num_layers) for name in LINEAR_NAMES]


def edges_in_bf16(num_layers: int, num_at_start: int, num_at_end: int) -> Policy:
    """Return the policy that keeps the first `num_at_start` and last `num_at_end` blocks in bf16."""
    for option, number in (
        ("--num-layers-at-start-in-bf16", num_at_start),
        ("--num-layers-at-end-in-bf16", num_at_end),
    ):
        if not 0 <= number <= num_layers:
            raise ConfigError(
                option, f"must lie in [0, {num_layers}] (the number of layers), received {number}"
            )
    kept = [i for i in range(num_layers) if i < num_at_start or i >= num_layers - num_at_end]
    rules = [PolicyRule(match=f"decoder.layers.{i}.*", recipe=BF16.name) for i in kept]
    if len(kept) < num_layers:
        rules.append(PolicyRule(match="*"))
    return Policy(rules=tuple(rules))


def resolve_policy(
    spec: str | None, num_layers: int, num_start_bf16: int | None, num_end_bf16: int | None
) -> Policy:
    """Return the policy asked for: `spec` (None: default, 'all': every linear, else a file) or the two edge
    counts.

    Raises ConfigError for a conflict, a wrong file, or rules that do not fit a model of `num_layers` blocks.
    """
    by_count = num_start_bf16 is not None or num_end_bf16 is not None
    if spec is not None and by_count:
        raise ConfigError(
            "--policy", "must not be combined with --num-layers-at-start/-at-end-in-bf16; keep one of them"
        )
    if by_count:
        return edges_in_bf16(num_layers, num_start_bf16 or 0, num_end_bf16 or 0)
    if spec is None:
        return edges_in_bf16(
            num_layers, 0, min(num_layers, max(1, round(DEFAULT_BF16_FRACTION_AT_END * num_layers)))
        )
    if spec == "all":
        return Policy(rules=(PolicyRule(match="*"),))
    data = read_mapping(Path(spec), "--policy")
    unknown = set(data) - {"rules"}
    rules = data.get("rules")
    if unknown or not isinstance(rules, list) or not rules:
        raise ConfigError(
            f"--policy {spec}", "must hold one key, 'rules', with a list of {match, recipe} entries"
        )
    policy = Policy(
        rules=tuple(_read_rule(rule, f"--policy {spec}.rules[{i}]") for i, rule in enumerate(rules))
    )
    policy.check_matches(linear_paths(num_layers))
    return policy


def _read_rule(data: Any, where: str) -> PolicyRule:
    """Return one rule of a policy file; `recipe` may be written out, as it is in checkpoints."""
    recipe = data.get("recipe") if isinstance(data, Mapping) else None
    if isinstance(recipe, Mapping):
        rule = from_dict(PolicyRule, {key: data[key] for key in data if key != "recipe"}, where)
        return replace(rule, recipe=from_dict(Recipe, recipe, f"{where}.recipe"))
    rule = from_dict(PolicyRule, data, where)
    if rule.recipe == RUN_RECIPE:
        return rule
    try:
        found = resolve_recipe(str(rule.recipe))
    except ConfigError as error:
        raise ConfigError(f"{where}.recipe: {error.where}", error.message) from None
    return rule if rule.recipe in RECIPES else replace(rule, recipe=found)


def recipes_by_path(policy: Policy, run_recipe: Recipe, num_layers: int) -> dict[str, Recipe]:
    """Return the recipe of every linear of the model, keyed by path, in order."""
    return {path: policy.recipe_for(path, run_recipe) for path in linear_paths(num_layers)}

"""Where a recipe applies: first match wins, every rule must match, every linear must be covered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metis.errors import ConfigError
from metis.policy import (
    LINEAR_NAMES,
    Policy,
    PolicyRule,
    edges_in_bf16,
    linear_paths,
    recipes_by_path,
    resolve_policy,
)
from metis.recipes import BF16, METIS, NVFP4, NVFP4_DIRECT


def _layers_in_bf16(policy: Policy, num_layers: int) -> list[int]:
    recipes = recipes_by_path(policy, METIS, num_layers)
    kept = sorted({int(path.split(".")[2]) for path, recipe in recipes.items() if recipe == BF16})
    for path, recipe in recipes.items():
        assert (recipe == BF16) == (int(path.split(".")[2]) in kept), "a block is kept whole"
        assert recipe in (BF16, METIS)
    return kept


def test_paths_name_the_four_linears_of_every_block_in_order():
    paths = linear_paths(2)
    assert paths[:4] == [f"decoder.layers.0.{name}" for name in LINEAR_NAMES] and len(paths) == 8


@pytest.mark.parametrize(
    ("num_layers", "kept"), [(1, 1), (2, 1), (4, 1), (8, 1), (12, 2), (16, 2), (20, 2), (32, 4), (80, 10)]
)
def test_the_default_keeps_the_last_eighth_in_bf16_and_at_least_one(num_layers: int, kept: int):
    """round(0.125 L), ties to even as Python rounds (20 blocks keep 2)."""
    policy = resolve_policy(None, num_layers, None, None)
    assert _layers_in_bf16(policy, num_layers) == list(range(num_layers - kept, num_layers))
    policy.check_matches(linear_paths(num_layers))


def test_all_quantises_every_linear():
    assert _layers_in_bf16(resolve_policy("all", 4, None, None), 4) == []


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(1, 2, [0, 6, 7]), (0, 0, []), (8, 0, list(range(8))), (5, 5, list(range(8))), (None, 3, [5, 6, 7])],
)
def test_edges_replace_the_default(start: int | None, end: int, expected: list[int]):
    policy = resolve_policy(None, 8, start, end)
    assert _layers_in_bf16(policy, 8) == expected
    policy.check_matches(linear_paths(8))


@pytest.mark.parametrize(("start", "end", "option"), [(9, 0, "start"), (0, 9, "end"), (-1, 0, "start")])
def test_edges_outside_the_model_are_refused(start: int, end: int, option: str):
    with pytest.raises(ConfigError, match=rf"--num-layers-at-{option}-in-bf16: must lie in \[0, 8\]"):
        edges_in_bf16(8, start, end)


def test_a_policy_and_edge_counts_conflict():
    with pytest.raises(ConfigError, match="must not be combined with"):
        resolve_policy("all", 8, 1, None)


def _file(folder: Path, rules: object, name: str = "p.json") -> str:
    path = folder / name
    path.write_text(json.dumps(rules))
    return str(path)


def test_the_first_matching_rule_wins(tmp_path: Path):
    rules = [
        {"match": "decoder.layers.0.*", "recipe": "bf16"},
        {"match": "*.linear_proj", "recipe": "nvfp4"},
        {"match": "decoder.layers.[12].mlp.*", "recipe": "nvfp4_direct"},
        {"match": "*"},
    ]
    recipes = recipes_by_path(resolve_policy(_file(tmp_path, {"rules": rules}), 4, None, None), METIS, 4)
    assert recipes["decoder.layers.0.self_attention.linear_proj"] == BF16
    assert recipes["decoder.layers.2.self_attention.linear_proj"] == NVFP4
    assert recipes["decoder.layers.2.mlp.linear_fc1"] == NVFP4_DIRECT
    assert recipes["decoder.layers.3.mlp.linear_fc1"] == METIS
    assert recipes["decoder.layers.1.self_attention.linear_qkv"] == METIS


def test_layer_1_does_not_stand_for_layer_10(tmp_path: Path):
    rules = [{"match": "decoder.layers.1.*", "recipe": "bf16"}, {"match": "*"}]
    assert _layers_in_bf16(resolve_policy(_file(tmp_path, {"rules": rules}), 12, None, None), 12) == [1]


def test_yaml_and_recipe_files_inside_rules(tmp_path: Path):
    recipe_file = _file(tmp_path, {"base": "metis", "basis": {"oversample": 4}}, "mine.json")
    path = tmp_path / "p.yaml"
    path.write_text(f'rules:\n  - {{match: "*.linear_fc2", recipe: "{recipe_file}"}}\n  - {{match: "*"}}\n')
    recipes = recipes_by_path(resolve_policy(str(path), 2, None, None), NVFP4, 2)
    assert {recipe.name for recipe in recipes.values()} == {"mine", "nvfp4"}


def test_plain_values_hold_the_content_of_recipe_files_and_read_back(tmp_path: Path):
    recipe_file = _file(tmp_path, {"base": "metis", "basis": {"oversample": 4}}, "mine.json")
    path = _file(tmp_path, {"rules": [{"match": "*.linear_fc2", "recipe": recipe_file}, {"match": "*"}]})
    policy = resolve_policy(path, 2, None, None)
    _file(tmp_path, {"base": "metis", "basis": {"oversample": 5}}, "mine.json")
    assert policy.recipe_for("decoder.layers.0.mlp.linear_fc2", NVFP4).basis.oversample == 4
    assert policy.to_dict() != resolve_policy(path, 2, None, None).to_dict()
    plain = json.loads(json.dumps(policy.to_dict()))
    assert plain["rules"][0]["recipe"]["basis"]["oversample"] == 4
    assert resolve_policy(_file(tmp_path, plain, "stored.json"), 2, None, None) == policy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"rules": [{"match": "*"}, {"match": "decoder.layers.0.*"}]},
            r"rule 2 .*must match at least one linear",
        ),
        ({"rules": [{"match": "decoder.layers.4.*"}, {"match": "*"}]}, r"rule 1 \('decoder.layers.4"),
        ({"rules": [{"match": "decoder.layers.0.*"}]}, r"no rule matches 'decoder.layers.1.self_attention"),
        ({"rules": [{"mach": "*"}]}, r"rules\[0\]\.mach: is not a known setting; did you mean 'match'"),
        ({"rules": [{"recipe": "bf16"}]}, r"rules\[0\]: must set match"),
        ({"rules": [{"match": "*", "recipe": "metsi"}]}, r"received 'metsi'; did you mean 'metis'"),
        ({"rules": []}, "must hold one key, 'rules'"),
        ({"rules": [{"match": "*"}], "rule": []}, "must hold one key, 'rules'"),
        ({"rules": ["*"]}, r"rules\[0\]: must be a mapping of settings, received str"),
    ],
)
def test_a_wrong_policy_is_refused(tmp_path: Path, content: object, message: str):
    with pytest.raises(ConfigError, match=message):
        resolve_policy(_file(tmp_path, content), 4, None, None)


def test_a_missing_policy_file_is_refused():
    with pytest.raises(ConfigError, match="--policy: must name a readable file"):
        resolve_policy("/nowhere/p.yaml", 4, None, None)


def test_a_path_without_a_rule_is_refused_when_asked_for():
    policy = Policy(rules=(PolicyRule(match="decoder.layers.0.*"),))
    with pytest.raises(ConfigError, match=r"no rule matches 'decoder\.layers\.1"):
        policy.recipe_for("decoder.layers.1.mlp.linear_fc1", METIS)


def test_plain_values_hold_the_rules_in_order():
    policy = resolve_policy(None, 2, None, None)
    assert policy.to_dict() == {
        "rules": [{"match": "decoder.layers.1.*", "recipe": "bf16"}, {"match": "*", "recipe": "run"}]
    }

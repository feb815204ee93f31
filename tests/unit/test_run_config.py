"""`run_config.json`: what a stored run gives to the next one, and which differences are refused.

Oracle: the arguments of the first run, resolved by the same trainer.
"""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from metis.errors import CheckpointError
from metis.training import retention
from metis.training.arguments import parse_args, validate_args
from metis.training.preflight import preflight
from metis.training.run_config import RUN_CONFIG_NAME, build_run_config, check_compatible, to_json

TINY = "--preset tiny --mock-data --vocab-size 1000 --micro-batch-size 2 --lr 1e-3 --train-iters 10"


def _resolve(options: str, world_size: int = 1) -> Namespace:
    args = parse_args([*TINY.split(), *options.split()])
    validate_args(args, world_size)
    return args


def _stored(args: Namespace, folder: Path) -> dict:
    directory = folder / "iter_0000004"
    directory.mkdir()
    for name in (".metadata", retention.METADATA_NAME):
        (directory / name).touch()
    (folder / retention.TRACKER_NAME).write_text("4\n")
    text = to_json(build_run_config(args, 4, "none", versions={}))
    (directory / RUN_CONFIG_NAME).write_text(text)
    return json.loads(text)


def test_checkpoint_arguments_restore_a_policy_by_counts(tmp_path: Path):
    first = _resolve("--recipe nvfp4 --num-layers-at-start-in-bf16 2 --num-layers-at-end-in-bf16 0")
    stored = _stored(first, tmp_path)
    second = _resolve(f"--load {tmp_path} --use-checkpoint-args")
    assert second.resolved_policy == first.resolved_policy
    check_compatible("ckpt", stored, second, finetune=False)
    # What the command line says replaces the counts as a whole.
    policy = _resolve(f"--load {tmp_path} --use-checkpoint-args --policy all").resolved_policy
    assert policy == {"rules": [{"match": "*", "recipe": "run"}]}


def test_layout_of_a_checkpoint_includes_virtual_stages(tmp_path: Path):
    layout = (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 4"
    )
    _stored(_resolve(layout, 2), tmp_path)
    options = "--use-checkpoint-args --use-mp-args-from-checkpoint-args --global-batch-size 4"
    second = _resolve(f"--load {tmp_path} {options}", 2)
    assert (second.pipeline_model_parallel_size, second.virtual_pipeline_model_parallel_size) == (2, 2)
    # Outside a launcher the configuration is shown for the ranks that the stored layout needs.
    shown = parse_args([*TINY.split(), "--load", str(tmp_path), *options.split(), "--print-config"])
    assert shown.world_size == 2


@pytest.mark.parametrize("finetune", [False, True])
def test_factored_weights_are_not_read_as_plain_ones(tmp_path: Path, finetune: bool):
    stored = _stored(_resolve("--recipe metis_paper"), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"another reparametrisation: .*linear_qkv stored 16, requested None"
    ):
        check_compatible("ckpt", stored, _resolve("--recipe metis"), finetune=finetune)
    # The control keeps the same parameters in high precision.
    check_compatible("ckpt", stored, _resolve("--recipe bf16_reparametrised"), finetune=True)


def _without(value: object, names: set[str]) -> object:
    """Return nested plain values as a version wrote them that did not know some settings."""
    if isinstance(value, dict):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("place", ["recipe", "policy", "recipe_schedule"])
def test_settings_newer_than_the_checkpoint_had_their_defaults(tmp_path: Path, place: str):
    """One setting of a split and one of the whole recipe; what then differs is still named."""
    names = {"head_placement", "amax_scope"}
    (tmp_path / "mine.json").write_text(json.dumps({"base": "metis", "name": "mine"}))
    (tmp_path / "merged.json").write_text(json.dumps({"base": "metis_merged", "name": "mine"}))
    options = {}
    for name in ("mine", "merged"):
        path = f"{tmp_path}/{name}.json"
        if place == "recipe":
            options[name] = f"--recipe {path}"
            continue
        text = json.dumps(
            {"rules": [{"match": "*.0.*", "recipe": path}, {"match": "*"}]}
            if place == "policy"
            else {"phases": [{"at_step": 4, "recipe": path}]}
        )
        (tmp_path / f"{place}-{name}.json").write_text(text)
        option = "--policy" if place == "policy" else "--recipe-schedule"
        options[name] = f"{option} {tmp_path}/{place}-{name}.json"
    stored = _stored(_resolve(options["mine"]), tmp_path)
    assert "head_placement" in json.dumps(stored[place])
    stored = _without(stored, names)
    assert not any(name in json.dumps(stored) for name in names)
    check_compatible("ckpt", stored, _resolve(options["mine"]), finetune=False)
    with pytest.raises(CheckpointError, match="head_placement stored 'apart', requested 'merged'"):
        check_compatible("ckpt", stored, _resolve(options["merged"]), finetune=False)


@pytest.mark.parametrize("place", ["recipe", "policy"])
def test_bases_of_single_ranks_need_the_same_number_of_ranks(tmp_path: Path, place: str):
    """A basis per rank cannot be cut or joined; weights can, so --finetune may take them."""
    local = {"base": "metis", "name": "mine", "basis": {"tp_mode": "local"}}
    (tmp_path / "mine.json").write_text(json.dumps(local))
    rules = {"rules": [{"match": "*.0.*", "recipe": f"{tmp_path}/mine.json"}, {"match": "*"}]}
    (tmp_path / "policy.json").write_text(json.dumps(rules))
    options = f"--recipe {tmp_path}/mine.json" if place == "recipe" else f"--policy {tmp_path}/policy.json"
    first = _resolve(f"{options} --tensor-model-parallel-size 2", 2)
    stored = _stored(first, tmp_path)
    check_compatible("ckpt", stored, _resolve(f"{options} --tensor-model-parallel-size 2", 4), finetune=False)
    alone = _resolve(options)
    with pytest.raises(
        CheckpointError,
        match=r"ckpt: holds a basis per tensor-parallel rank .* must be loaded at tensor_model_parallel_size "
        "2, received 1; use that size, or --finetune",
    ):
        check_compatible("ckpt", stored, alone, finetune=False)
    check_compatible("ckpt", stored, alone, finetune=True)
    # The refusal is part of the checks that run before torch is imported.
    with pytest.raises(CheckpointError, match="must be loaded at tensor_model_parallel_size 2, received 1"):
        preflight(_resolve(f"{options} --load {tmp_path}"))


def test_one_basis_for_all_ranks_loads_at_any_number_of_them(tmp_path: Path):
    stored = _stored(_resolve("--recipe metis --tensor-model-parallel-size 2", 2), tmp_path)
    check_compatible("ckpt", stored, _resolve("--recipe metis"), finetune=False)


def test_another_vocabulary_is_another_model(tmp_path: Path):
    first, second = _resolve(""), _resolve("")
    first.true_vocab_size, second.true_vocab_size = 1001, 1002
    stored = _stored(first, tmp_path)
    with pytest.raises(CheckpointError, match="true_vocab_size stored 1001, requested 1002"):
        check_compatible("ckpt", stored, second, finetune=True)

"""`run_config.json`: what a checkpoint is, readable without torch.

One idea: the questions asked of a checkpoint before anything is loaded (is it this model, this recipe, this
policy? which options made it?) need names and numbers only, so they are answered from a JSON file beside
the shards, in milliseconds. `common.pt` keeps the same arguments in the reference trainer's form.

Traps: checkpoints of other trainers have no such file, then `common.pt` speaks for the model and the recipe
is not compared. The padded vocabulary depends on the tensor-parallel size and is therefore not part of the
model's identity.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import typing
from argparse import Namespace
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from metis.config import Recipe, to_dict
from metis.errors import CheckpointError
from metis.policy import Policy
from metis.training.retention import find_checkpoint

_NEW_RUN = "--finetune to start a new run from these weights"
RUN_CONFIG_NAME = "run_config.json"
FORMAT = 1

SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "group_query_attention",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "true_vocab_size",
    "swiglu",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
    "position_embedding_type",
    "apply_layernorm_1p",
)
"""Which tensors there are and their sizes: must agree whenever weights are loaded."""

BEHAVIOUR_FIELDS = (
    "layernorm_epsilon",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "tokenizer_type",
)
"""What the same tensors mean: must agree on resume; `--finetune` may change them."""

DESCRIPTIVE_FIELDS = (
    "seq_length",
    "max_position_embeddings",
    "make_vocab_size_divisible_by",
    "padded_vocab_size",
)
PARALLEL_FIELDS = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "data_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
    "device",
)
TRAINING_FIELDS = (
    "recipe",
    "recipe_schedule",
    "policy",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
    "params_dtype_name",
    "micro_batch_size",
    "global_batch_size",
    "train_iters",
    "train_samples",
    "lr",
    "seed",
    "tokenizer_model",
    "transformer_impl",
    "gemm_backend",
    "quantize_kernels",
)
_EDGE_FIELDS = ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
"""The policy by counts; a policy by file and by counts exclude each other."""

_PACKAGES = ("torch", "megatron-core", "metis-fp4", "transformer-engine", "numpy")


def build_run_config(
    args: Namespace, iteration: int, optimizer_sharding: str, versions: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the content of `run_config.json` for a checkpoint of `args` at `iteration`.

    `optimizer_sharding` is `fully_reshardable`, `dp_reshardable` or `none` (no optimizer state, or one that
    the distributed optimizer does not own). Options that `args` lacks are left out.
    """
    return {
        "format": FORMAT,
        "iteration": iteration,
        "model": _select(args, SHAPE_FIELDS + BEHAVIOUR_FIELDS + DESCRIPTIVE_FIELDS),
        "recipe": _recipe_after(args, iteration),
        "recipe_schedule": getattr(args, "resolved_schedule", None),
        "policy": getattr(args, "resolved_policy", None),
        "factored_linears": getattr(args, "factored_linears", None),
        "parallel": _select(args, PARALLEL_FIELDS),
        "training": _select(args, TRAINING_FIELDS),
        "versions": dict(versions) if versions is not None else installed_versions(),
        "optimizer_sharding": optimizer_sharding,
    }


def _select(args: Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide numerics, as far as installed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def to_json(config: Mapping[str, Any]) -> str:
    """Return `config` as indented JSON with a final newline."""
    return json.dumps(config, indent=2, sort_keys=False, allow_nan=True) + "\n"


def read_run_config(directory: Path) -> dict[str, Any] | None:
    """Return the run config of one checkpoint directory, or None when another trainer wrote the checkpoint.

    Raises CheckpointError when the file is there but cannot be read, or is of a newer format.
    """
    path = directory / RUN_CONFIG_NAME
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"must be a readable JSON file, received: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        received = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            str(path),
            f"must have format {FORMAT}, received {received!r}; use the metis version that wrote it",
        )
    return config


def check_compatible(where: str, stored: Mapping[str, Any], args: Namespace, *, finetune: bool) -> None:
    """Raise CheckpointError naming every field in which the checkpoint and this run are different models or
    recipes.

    `stored` is a run config. Shapes must always agree; meanings (RoPE base, norm epsilon, tokenizer),
    recipe and policy must agree unless `finetune`; which linears are reparametrised, and at which rank, must
    always agree, since their weights are stored as factors; bases that each tensor-parallel rank keeps for
    itself (`tp_mode: local`) need the same tensor-parallel size unless `finetune`, which starts them afresh.
    A field is compared only where both sides know it.
    """
    fields = SHAPE_FIELDS if finetune else SHAPE_FIELDS + BEHAVIOUR_FIELDS
    model = stored.get("model") or {}
    requested = _select(args, fields)
    _refuse(
        where,
        "model",
        {name: model[name] for name in fields if name in model},
        requested,
        "--use-checkpoint-args",
    )
    factored, wanted_factored = stored.get("factored_linears"), getattr(args, "factored_linears", None)
    if factored is not None and wanted_factored is not None:
        # A weight without its factors is another matrix, so --finetune cannot help either.
        remedy = (
            "a recipe and policy with the same reparametrised linears, or convert the checkpoint with "
            "tools/convert_weights.py (None: a plain weight, a number: the rank of its factors)"
        )
        _refuse(where, "reparametrisation", factored, wanted_factored, remedy)
    if finetune:
        return
    if stored.get("recipe") is not None and getattr(args, "resolved_recipe", None) is not None:
        _check_recipes(where, stored, args)
    policy = getattr(args, "resolved_policy", None)
    if stored.get("policy") is not None and policy is not None:
        _refuse(where, "policy", stored["policy"], _as_json(policy), _NEW_RUN)
    _refuse_other_shards(where, stored, args)


def _check_recipes(where: str, stored: Mapping[str, Any], args: Namespace) -> None:
    """Compare recipes: in all phases where a run has more than one, under `--skip-train` the one in force."""
    ours, theirs = getattr(args, "resolved_schedule", None), stored.get("recipe_schedule")
    if getattr(args, "skip_train", False) or (ours is None and theirs is None):
        recipe = _recipe_after(args, stored.get("iteration", 0))
        _refuse(where, "recipe", stored["recipe"], _as_json(recipe), _NEW_RUN)
        return
    theirs = theirs or {"start_steps": [0], "recipes": [stored["recipe"]]}
    ours = _as_json(ours or {"start_steps": [0], "recipes": [args.resolved_recipe]})
    starts = [{"start_steps": schedule["start_steps"]} for schedule in (theirs, ours)]
    _refuse(where, "recipe schedule", *starts, _NEW_RUN)
    pairs = zip(theirs["recipes"], ours["recipes"], strict=True)
    for step, (stored_recipe, recipe) in zip(ours["start_steps"], pairs, strict=True):
        _refuse(where, f"recipe from step {step} on", stored_recipe, recipe, _NEW_RUN)


def _recipe_after(args: Namespace, num_steps: int) -> Any:
    """Return the plain recipe that the model computes by after `num_steps` steps of a run of `args`."""
    schedule = getattr(args, "resolved_schedule", None)
    if schedule is None:
        return getattr(args, "resolved_recipe", None)
    return schedule["recipes"][bisect_right(schedule["start_steps"], max(0, num_steps - 1)) - 1]


def _as_json(value: Any) -> Any:
    """Return `value` as it comes back from a file: JSON turns tuples into lists."""
    return json.loads(json.dumps(value))


def _refuse_other_shards(where: str, stored: Mapping[str, Any], args: Namespace) -> None:
    """Refuse bases that belong to single tensor-parallel ranks when this run has another number of ranks."""
    name = "tensor_model_parallel_size"
    size, wanted = (stored.get("parallel") or {}).get(name), getattr(args, name, None)
    bases = _keeps_local_bases([stored.get("recipe"), stored.get("policy")])
    if bases and None not in (size, wanted) and size != wanted:
        raise CheckpointError(
            where,
            f"holds a basis per tensor-parallel rank (basis.tp_mode: local) and must be loaded at {name} "
            f"{size}, received {wanted}; use that size, or --finetune to start the bases afresh",
        )


def _keeps_local_bases(value: Any) -> bool:
    """Tell whether any recipe written out in a stored config has a basis with `tp_mode: local`."""
    if isinstance(value, Mapping):
        return value.get("tp_mode") == "local" or any(map(_keeps_local_bases, value.values()))
    return isinstance(value, list) and any(map(_keeps_local_bases, value))


def _with_defaults(stored: Any, hint: Any) -> Any:
    """Return plain values of a config class with the settings that they lack at their defaults, which mean
    what was done before there was such a setting.
    """
    cls = next((c for c in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(c)), None)
    if isinstance(stored, list) and cls is not None:
        return [_with_defaults(item, cls) for item in stored]
    if cls is None or not isinstance(stored, Mapping):
        return stored
    hints = typing.get_type_hints(cls)
    values = {name: _with_defaults(value, hints.get(name)) for name, value in stored.items()}
    for setting in dataclasses.fields(cls):
        if setting.name in values:
            continue
        if setting.default is not dataclasses.MISSING:
            values[setting.name] = _as_json(to_dict(setting.default))
        elif setting.default_factory is not dataclasses.MISSING:
            values[setting.name] = _as_json(to_dict(setting.default_factory()))
    return values


def _refuse(where: str, kind: str, stored: Any, requested: Any, remedy: str) -> None:
    hint = {"recipe": Recipe, "policy": Policy}.get(kind, Recipe if kind.startswith("recipe from") else None)
    stored, requested = _with_defaults(stored, hint), _with_defaults(requested, hint)
    differences = list(describe_differences(stored, requested, both_sides=kind == "model"))
    if differences:
        shown = "; ".join(differences[:6]) + (
            f"; and {len(differences) - 6} more" if len(differences) > 6 else ""
        )
        raise CheckpointError(
            where,
            f"is a checkpoint of another {kind}: {shown}; give the run the stored values, or pass {remedy}",
        )


def describe_differences(
    stored: Any, requested: Any, *, both_sides: bool = False, path: str = ""
) -> Iterator[str]:
    """Yield `name.of.field stored A, requested B` for every leaf that differs; `both_sides` skips one-sided
    keys.
    """
    if isinstance(stored, Mapping) and isinstance(requested, Mapping):
        for key in sorted(stored.keys() | requested.keys(), key=str):
            if both_sides and (key not in stored or key not in requested):
                continue
            inner = f"{path}.{key}" if path else str(key)
            yield from describe_differences(
                stored.get(key), requested.get(key), both_sides=both_sides, path=inner
            )
    elif _are_lists_of_sections(stored, requested):
        for number, pair in enumerate(zip(stored, requested, strict=True)):
            yield from describe_differences(*pair, both_sides=both_sides, path=f"{path}[{number}]")
    elif stored != requested:
        yield f"{path or 'value'} stored {stored!r}, requested {requested!r}"


def _are_lists_of_sections(*values: Any) -> bool:
    return (
        all(isinstance(value, list) for value in values)
        and len({len(value) for value in values}) == 1
        and all(isinstance(item, Mapping) for value in values for item in value)
    )


def load_args_from_checkpoint(args: Namespace, given: set[str]) -> None:
    """Take the model (and, if asked, the layout) of `args` from the checkpoint in `--load`:
    `--use-checkpoint-args`.

    `given` holds the dest names that the command line set; those win. `--use-mp-args-from-checkpoint-args`
    adds the tensor, pipeline and virtual pipeline sizes; `--no-use-tokenizer-model-from-checkpoint-args`
    leaves the tokenizer's file alone. Recipe, schedule and policy are taken over by name, the schedule unless
    a recipe is given. Needs neither torch nor megatron.

    Raises CheckpointError without `--load`, without a checkpoint there, or when it has no run config.
    """
    if not getattr(args, "load", None):
        raise CheckpointError(
            "--use-checkpoint-args", "needs a checkpoint to read, received no --load; pass --load DIR"
        )
    found = find_checkpoint(args.load, getattr(args, "ckpt_step", None))
    if found is None:
        raise CheckpointError(
            "--use-checkpoint-args", f"--load must hold a checkpoint, received none in {args.load}"
        )
    config = read_run_config(found[0])
    if config is None:
        raise CheckpointError(
            str(found[0] / RUN_CONFIG_NAME), "is missing, so --use-checkpoint-args has nothing to read"
        )
    taken = {
        name: value
        for name, value in config["model"].items()
        if name not in ("padded_vocab_size", "true_vocab_size", "tokenizer_type")
    }
    training = config["training"]
    by_count = given & set(_EDGE_FIELDS)
    places = () if by_count else ("policy",) if "policy" in given else ("policy", *_EDGE_FIELDS)
    recipes = ("recipe",) if given & {"recipe", "recipe_schedule"} else ("recipe", "recipe_schedule")
    taken.update({name: training[name] for name in (*recipes, *places) if name in training})
    taken["tokenizer_type"] = config["model"].get("tokenizer_type")
    if getattr(args, "use_tokenizer_model_from_checkpoint_args", True):
        taken["tokenizer_model"] = training.get("tokenizer_model")
    if getattr(args, "use_mp_args_from_checkpoint_args", False):
        taken.update({name: config["parallel"].get(name) for name in PARALLEL_FIELDS[1:3]})
        if "num_layers_per_virtual_pipeline_stage" not in given:
            virtual = "num_virtual_stages_per_pipeline_rank"
            taken[virtual] = config["parallel"].get("virtual_pipeline_model_parallel_size")
    for name, value in taken.items():
        if name not in given and (value is not None or not hasattr(args, name)):
            setattr(args, name, value)

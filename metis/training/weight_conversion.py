"""A checkpoint's weights in another form: plain W, or W = U diag(S) V^T + W_R with four trained parts.

One idea: the checkpoint says what it is, so the model is built twice by the trainer's own code on one CPU
process: once with the stored recipe's parameters, to read the weights from whatever layout saved them, and
once with the wanted recipe, to be filled and saved as the trainer saves. A linear whose form changes goes
through the whole matrix in float64: `u diag(s) v^T + w` to merge, an SVD to split, each result rounded to the
stored dtype. All others are copied bit by bit. So the function stays the same up to one rounding of a weight;
what a recipe then quantises is the recipe's business.

The result holds weights, counters and fresh bases, but neither optimizer nor random state: the optimizer's
moments belong to parameters that are gone. A new run takes it with `--load DIR --finetune` (from iteration
0) or `--load DIR --no-load-optim` (counters and place in the data go on; the optimizer and the
learning-rate schedule start anew).

Traps:
* The model's stored weights are read, under --bf16 rounded ones; the optimizer's fp32 copies are not.
* Of a recipe schedule the recipe of the checkpoint's iteration counts; the result has none.
* The source is built from recipes stripped of everything but their parameters, so that bases are neither
  needed nor read.
* Importing this file imports neither torch nor megatron, so that a mistake is refused at once.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis.config import Recipe, ReparametrisationConfig
from metis.errors import CheckpointError, ConfigError
from metis.recipes import recipe_from_dict, recipe_to_dict, resolve_recipe
from metis.training.arguments import parse_args, validate_args
from metis.training.retention import find_checkpoint
from metis.training.run_config import RUN_CONFIG_NAME, TRAINING_FIELDS, read_run_config
from metis.training.tokenizer import padded_vocab_size

if TYPE_CHECKING:
    from torch import Tensor, nn

_PLACE_FIELDS = (
    "policy",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What to convert.

    load: checkpoint directory (`--save` of a run). save: new directory. recipe: name or file of the recipe
    whose parameters the result has. ckpt_step: iteration, None for the latest. policy: where the recipe
    applies ('all' or a file), None for the stored policy.
    """

    load: str
    save: str
    recipe: str
    ckpt_step: int | None = None
    policy: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A checked conversion: arguments under which the trainer builds the source and the target.

    directory: of the checkpoint to read. config: its run config. changed: rank before and after (None: plain)
    of every linear that changes its form, by path.
    """

    directory: Path
    config: Mapping[str, Any]
    source: Namespace
    target: Namespace
    changed: Mapping[str, tuple[int | None, int | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a conversion has done: iteration of the checkpoint, linears split, merged, or split again, and
    the largest relative difference (Frobenius) between a whole weight before and after.
    """

    iteration: int
    num_split: int
    num_merged: int
    num_split_again: int
    largest_weight_error: float


def plan_conversion(request: Conversion, folder: Path) -> Plan:
    """Check everything that can be checked without torch and return the plan.

    folder: an existing directory for recipes and policies; it must outlive the building of both models.

    Raises CheckpointError for a missing or foreign checkpoint, ConfigError for an unknown recipe, a target
    that holds files already, and a conversion that would change nothing.
    """
    found = find_checkpoint(request.load, request.ckpt_step)
    if found is None:
        raise CheckpointError("--load", f"must hold a checkpoint, received none in {request.load}")
    config = read_run_config(found[0])
    if config is None or config.get("recipe") is None or config.get("policy") is None:
        raise CheckpointError(
            str(found[0] / RUN_CONFIG_NAME),
            "must describe model, recipe and policy, as checkpoints of this trainer do; convert it first",
        )
    resolve_recipe(request.recipe)
    _check_target(request.save)
    common = _common_options(request, config)
    source = _resolved([*common, *_stored_parameters(config, folder)])
    policy = request.policy
    if policy is None:
        policy = str(folder / "policy.json")
        Path(policy).write_text(json.dumps(config["policy"]))
    saving = ["--save", request.save, "--save-interval", "1", "--no-save-optim", "--no-save-rng"]
    target = _resolved([*common, "--policy", policy, "--recipe", request.recipe, *saving])
    for args in (source, target):
        _take_vocabulary(args, config)
    before, after = source.factored_linears, target.factored_linears
    paths = sorted(before.keys() | after.keys())
    changed = {p: (before.get(p), after.get(p)) for p in paths if before.get(p) != after.get(p)}
    if not changed:
        raise ConfigError("--recipe", _nothing_changes(request, config, before))
    return Plan(directory=found[0], config=config, source=source, target=target, changed=changed)


def _check_target(save: str) -> None:
    path = Path(save)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            "--save", f"must be a new or empty directory, received {save}, which exists; choose another"
        )


def _nothing_changes(request: Conversion, config: Mapping[str, Any], before: Mapping[str, int]) -> str:
    """Return why a conversion to the same form is refused."""
    form = f"{len(before)} linears split into factors" if before else "every weight plain"
    return (
        f"must give at least one linear another form, received {request.recipe!r}, under which the "
        "checkpoint "
        f"of recipe {config['recipe']['name']!r} keeps the form it has ({form}); train it with --load "
        f"{request.load} --finetune --recipe {request.recipe}, or change --policy"
    )


def _common_options(request: Conversion, config: Mapping[str, Any]) -> list[str]:
    training = config["training"]
    argv = ["--load", request.load, "--use-checkpoint-args", "--exit-on-missing-checkpoint", "--finetune"]
    argv += ["--no-load-optim", "--no-load-rng", "--skip-train", "--mock-data", "--device", "cpu"]
    argv += ["--micro-batch-size", str(training.get("micro_batch_size", 1))]
    argv += ["--transformer-impl", "local", "--seed", str(training.get("seed", 1234))]
    if request.ckpt_step is not None:
        argv += ["--ckpt-step", str(request.ckpt_step)]
    dtype = training.get("params_dtype_name")
    if dtype in ("bf16", "fp16"):
        argv.append(f"--{dtype}")
    return [*argv, "--exact-reductions"] if dtype == "fp64" else argv


def _stored_parameters(config: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the options for the stored recipe and policy, reduced to what parameters there are."""
    recipe, policy = folder / "source_recipe.json", folder / "source_policy.json"
    recipe.write_text(json.dumps(_parameters_of(recipe_from_dict(config["recipe"]))))
    rules = []
    for rule in config["policy"]["rules"]:
        used = rule["recipe"]
        if used != "run":
            full = recipe_from_dict(used) if isinstance(used, Mapping) else resolve_recipe(used)
            used = _parameters_of(full)
        rules.append({**rule, "recipe": used})
    policy.write_text(json.dumps({"rules": rules}))
    return ["--recipe", str(recipe), "--policy", str(policy)]


def _parameters_of(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe that has the parameters of `recipe` and computes in high precision."""
    factors = recipe.reparametrisation
    reduced = None if factors is None else ReparametrisationConfig(rank=factors.rank)
    return recipe_to_dict(Recipe(name=recipe.name, reparametrisation=reduced))


def _resolved(argv: list[str]) -> Namespace:
    args = parse_args(argv, single_process=True)
    if args.world_size != 1:
        raise ConfigError(
            "world size", f"must be 1: weights are converted by one process, received {args.world_size}"
        )
    validate_args(args, args.world_size)
    return args


def _take_vocabulary(args: Namespace, config: Mapping[str, Any]) -> None:
    """Set the vocabulary as stored, so that no tokenizer is needed."""
    args.true_vocab_size = config["model"]["true_vocab_size"]
    args.padded_vocab_size = padded_vocab_size(args.true_vocab_size, args.make_vocab_size_divisible_by, 1)


def convert(request: Conversion) -> Report:
    """Convert `request.load` to `request.save`; what the engine prints goes to standard error.

    Raises CheckpointError or ConfigError in one line for everything that does not fit.
    """
    with tempfile.TemporaryDirectory(prefix="metis_convert_") as folder:
        plan = plan_conversion(request, Path(folder))
        import torch.distributed as dist

        from metis.training.initialize import initialize, shut_down

        had_process_group = dist.is_initialized()
        with contextlib.redirect_stdout(sys.stderr):
            initialize(plan.target)
            try:
                return _convert(plan, request)
            finally:
                shut_down(keep_process_group=had_process_group)


def _convert(plan: Plan, request: Conversion) -> Report:
    """Read, fill, save; inside an initialised engine of one rank."""
    from metis.clock import TrainingClock
    from metis.training.checkpoint_load import load_checkpoint
    from metis.training.checkpointing import save_checkpoint
    from metis.training.model import build_model
    from metis.training.state import TrainState

    state = TrainState()
    source, target = (
        build_model(args, TrainingClock(seed=args.seed), wrap=False, initialize=False)
        for args in (plan.source, plan.target)
    )
    load_checkpoint(plan.source, state, source, None, None)
    error = _fill(target, _named_parameters(source), plan.changed)
    _restore_counters(state, plan)
    save_checkpoint(_arguments_to_save(plan, request), state, target, None, None)
    pairs = plan.changed.values()
    return Report(
        iteration=state.iteration,
        num_split=sum(before is None for before, _ in pairs),
        num_merged=sum(after is None for _, after in pairs),
        num_split_again=sum(None not in pair for pair in pairs),
        largest_weight_error=error,
    )


def _named_parameters(model: list[nn.Module]) -> dict[str, Tensor]:
    from metis.mcore.initialization import global_parameter_names

    return {name: parameter.detach() for parameter, name in global_parameter_names(model).items()}


def whole_weight(weights: Mapping[str, Tensor], path: str) -> Tensor:
    """Return what the linear at `path` multiplies with, float64 [N, K]: W, or u diag(s) v^T + W_R."""
    whole = weights[f"{path}.weight"].double()
    if f"{path}.u" in weights:
        u, s, v = (weights[f"{path}.{name}"].double() for name in ("u", "s", "v"))
        whole = whole + (u * s) @ v.t()
    return whole


def _fill(
    model: list[nn.Module],
    weights: Mapping[str, Tensor],
    changed: Mapping[str, tuple[int | None, int | None]],
) -> float:
    """Set all parameters of `model` from `weights`; return the largest relative error of a changed weight."""
    import torch

    targets, worst = _named_parameters(model), 0.0
    modules = {
        name.removeprefix("module."): module for chunk in model for name, module in chunk.named_modules()
    }
    of_changed = {f"{path}.{name}" for path in changed for name in ("weight", "u", "s", "v")}
    with torch.no_grad():
        for name, target in targets.items():
            if name not in of_changed:
                target.copy_(weights[name])
        for path in changed:
            whole = whole_weight(weights, path)
            if not bool(torch.isfinite(whole).all()):
                raise CheckpointError(path, "must hold finite weights, received NaN or infinity")
            if changed[path][1] is None:
                targets[f"{path}.weight"].copy_(whole)
            else:
                modules[path].load_full_weight(whole)
            difference = whole_weight(targets, path) - whole
            worst = max(worst, float(difference.norm() / whole.norm().clamp(min=1e-300)))
    return worst


def _restore_counters(state: Any, plan: Plan) -> None:
    """Take the counters of the source, which `--finetune` leaves at zero."""
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(plan.directory))
    state.restore(common.get("train_state", {}))


def _arguments_to_save(plan: Plan, request: Conversion) -> Namespace:
    """Return the target's arguments as its checkpoint describes them: those of the run that made the
    weights, with the new recipe.

    The temporary policy file gives way to what the run was given, unless another policy was asked for.
    """
    args, training = copy.copy(plan.target), plan.config["training"]
    own = {"recipe", "recipe_schedule", "params_dtype_name", "transformer_impl"}
    kept = set(TRAINING_FIELDS) - own - set(_PLACE_FIELDS)
    for name in (*kept, *(_PLACE_FIELDS if request.policy is None else ())):
        if name in training:
            setattr(args, name, training[name])
    return args

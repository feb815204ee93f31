"""When a recipe applies: phases of a run, each with a recipe from one optimizer step on
(`--recipe-schedule`).

A schedule file is YAML or JSON. Every entry says when (`at_step`, counted from 0, or `at_lr_fraction`) and
what: another `recipe` (name or file), a `change` merged into the recipe before (nested like a recipe file,
`null` removes a section), or both, the change on top of the recipe:

    phases:
      - {at_step: 0, recipe: metis}                     # optional; without it the run begins with --recipe
      - at_step: 1000
        change:                                         # x keeps 32 directions from here on
          fprop_input: {split: {rank: {fixed: 32}}}
          wgrad_input: {split: {rank: {fixed: 32}}}
      - {at_lr_fraction: 0.5, recipe: nvfp4_forward_bf16}   # forward healed while the learning rate is low
      - {at_lr_fraction: 0.1, recipe: bf16}

`at_lr_fraction: f` is the first step after warm-up whose learning rate is at most f times the maximum. It
becomes a step number once, from the arguments alone (`metis/training/learning_rate.py`), so that every rank,
every layout and every resumed run changes at the same step.

One idea: a schedule is resolved to (first step, recipe) pairs before training; after that nothing asks when
or why, only `recipe_at(step)`. A policy's rule `run` follows the schedule, every other rule keeps its recipe.

Traps:
* After n steps the model is still in the phase of step n - 1 (`index_after`): the change comes right before
  step n. Evaluations and checkpoints between the two belong to the old phase.
* A phase may change how linears compute, never which parameters there are: trained factors
  (reparametrisation) must be the same from the first step to the last.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from metis.config import Recipe, from_dict, to_dict
from metis.errors import ConfigError, nearest_name
from metis.policy import Policy, recipes_by_path
from metis.recipes import read_mapping, resolve_recipe, with_changes

OPTION = "--recipe-schedule"
PHASE_KEYS = ("at_step", "at_lr_fraction", "recipe", "change")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """`recipe` from optimizer step `start_step` (from 0) on."""

    start_step: int
    recipe: Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The phases of a run in order, the first from step 0."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        starts = self.start_steps
        assert starts and starts[0] == 0 and all(a < b for a, b in pairwise(starts))
        for before, after in pairwise(self.phases):
            require_same_parameters(OPTION, before.recipe, after.recipe)

    @classmethod
    def constant(cls, recipe: Recipe) -> Schedule:
        """Return the schedule of a run that never changes its recipe."""
        return cls(phases=(Phase(start_step=0, recipe=recipe),))

    @property
    def start_steps(self) -> list[int]:
        """First step of every phase."""
        return [phase.start_step for phase in self.phases]

    def index_at(self, step: int) -> int:
        """Return the number of the phase, from 0, that optimizer step `step` runs in."""
        return bisect_right(self.start_steps, step) - 1

    def index_after(self, num_steps: int) -> int:
        """Return the phase that the model is in after `num_steps` steps, before the next begins."""
        return self.index_at(max(0, num_steps - 1))

    def recipe_at(self, step: int) -> Recipe:
        """Return the recipe of optimizer step `step`."""
        return self.phases[self.index_at(step)].recipe

    def recipes_by_phase(self, policy: Policy, num_layers: int) -> dict[int, dict[str, Recipe]]:
        """Return the recipe of every linear by global path, for each phase, keyed by its first step."""
        return {phase.start_step: recipes_by_path(policy, phase.recipe, num_layers) for phase in self.phases}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: `start_steps` and, in the same order, the whole `recipes`."""
        return {
            "start_steps": self.start_steps,
            "recipes": [to_dict(phase.recipe) for phase in self.phases],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schedule:
        """Inverse of `to_dict`."""
        pairs = zip(data["start_steps"], data["recipes"], strict=True)
        return cls(
            phases=tuple(
                Phase(start_step=step, recipe=from_dict(Recipe, recipe, OPTION)) for step, recipe in pairs
            )
        )

    def describe(self) -> str:
        """Return the phases in one line, as logs show them."""
        return ", ".join(f"{phase.recipe.name} from step {phase.start_step}" for phase in self.phases)


def all_uses(recipes_by_phase: Mapping[int, Mapping[str, Recipe]]) -> dict[str, Recipe]:
    """Return the recipe of every linear in every phase under a key each: its path, later with the step."""
    return {
        f"{path}, from step {step}" if step else path: recipe
        for step, recipes in recipes_by_phase.items()
        for path, recipe in recipes.items()
    }


def schedule_of(resolved: Mapping[str, Any] | None, recipe: str) -> Schedule:
    """Return the schedule of a run: `resolved` (plain values), or without one `recipe` (name or file)."""
    if resolved is not None:
        return Schedule.from_dict(resolved)
    return Schedule.constant(resolve_recipe(recipe))


def require_same_parameters(where: str, before: Recipe, after: Recipe) -> None:
    """Raise ConfigError unless linears have the same trained parameters under both recipes."""
    old, new = (None if r.reparametrisation is None else r.reparametrisation.rank for r in (before, after))
    if old != new:
        raise ConfigError(
            where,
            "must keep the trained parameters of every linear (reparametrisation and its rank), received "
            f"recipe {after.name!r} after {before.name!r}, which differ in them; start a new run from "
            "converted weights instead",
        )


def read_schedule(
    path: str, run_recipe: Recipe, step_at_lr_fraction: Callable[[float], int | None]
) -> Schedule:
    """Return the schedule in the YAML or JSON file `path`; `run_recipe` is in force until a phase begins.

    step_at_lr_fraction: the step that a fraction of the maximum learning rate stands for, None for one that
    is never reached. Raises ConfigError, naming the entry, for anything that does not fit.
    """
    where = f"{OPTION} {path}"
    data = read_mapping(Path(path), OPTION)
    for key in data:
        if key != "phases":
            raise ConfigError(f"{where}.{key}", f"is not a known setting{nearest_name(str(key), ['phases'])}")
    entries = data.get("phases")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(where, "must hold one key, 'phases', with a list of phases")
    phases: list[Phase] = []
    for index, entry in enumerate(entries):
        here = f"{where}.phases[{index}]"
        step = _start_step(entry, here, step_at_lr_fraction)
        before = phases[-1].recipe if phases else run_recipe
        recipe = _phase_recipe(entry, before, here, len(phases) + (step > 0 and not phases))
        if phases and step <= phases[-1].start_step:
            raise ConfigError(
                here, f"must begin after the phase before it (step {phases[-1].start_step}), received {step}"
            )
        if not phases and step > 0:
            phases.append(Phase(start_step=0, recipe=run_recipe))
        if phases:
            require_same_parameters(here, phases[-1].recipe, recipe)
        phases.append(Phase(start_step=step, recipe=recipe))
    return Schedule(phases=tuple(phases))


def _start_step(entry: Any, where: str, step_at_lr_fraction: Callable[[float], int | None]) -> int:
    """Return the first step of a phase as written in the file."""
    if not isinstance(entry, Mapping):
        raise ConfigError(where, f"must be a mapping of settings, received {entry!r}")
    for key in entry:
        if key not in PHASE_KEYS:
            raise ConfigError(f"{where}.{key}", f"is not a known setting{nearest_name(str(key), PHASE_KEYS)}")
    if ("at_step" in entry) == ("at_lr_fraction" in entry):
        raise ConfigError(where, "must say either at_step or at_lr_fraction")
    if "at_step" in entry:
        step = entry["at_step"]
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ConfigError(f"{where}.at_step", f"must be a step number from 0 on, received {step!r}")
        return step
    fraction = entry["at_lr_fraction"]
    if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise ConfigError(
            f"{where}.at_lr_fraction",
            f"must lie in (0, 1], a share of the maximum learning rate, received {fraction!r}",
        )
    step = step_at_lr_fraction(float(fraction))
    if step is None:
        raise ConfigError(
            f"{where}.at_lr_fraction",
            f"must be reached by the learning rate, which never falls to {fraction:g} of its maximum; raise "
            "it, lower --min-lr or use at_step",
        )
    return step


def _phase_recipe(entry: Mapping[str, Any], before: Recipe, where: str, number: int) -> Recipe:
    """Return the recipe of a phase: `recipe`, or the one before, with `change` merged in."""
    if "recipe" not in entry and "change" not in entry:
        raise ConfigError(where, "must say what applies: a recipe, a change or both")
    recipe = before
    if "recipe" in entry:
        try:
            recipe = resolve_recipe(str(entry["recipe"]))
        except ConfigError as error:
            raise ConfigError(f"{where}.recipe: {error.where}", error.message) from None
    if "change" not in entry:
        return recipe
    change = entry["change"]
    if not isinstance(change, Mapping) or not change:
        raise ConfigError(f"{where}.change", f"must be a mapping of recipe settings, received {change!r}")
    return with_changes(recipe, {"name": f"{recipe.name}+{number}", **change}, f"{where}.change")

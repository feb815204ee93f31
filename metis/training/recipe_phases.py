"""Which phase of the recipe schedule the model is in, and the change from one to the next.

One idea: the phase follows from the number of steps done and from nothing else. Right before step n the model
enters the phase of step n; after n steps, in checkpoints and evaluations, it is still in that of step n - 1.
A resumed run enters the phase of the loaded iteration before anything is read, so that the bases in the model
are those in the checkpoint, and crosses a boundary as the uninterrupted run did.
"""

from __future__ import annotations

from argparse import Namespace

from torch import nn

from metis.mcore.state import set_model_recipes
from metis.schedule import schedule_of
from metis.training.model import recipes_by_phase
from metis.training.outputs import print_rank_0


class RecipePhases:
    """Moves the linears of `model` from phase to phase; a run without a schedule has one phase."""

    def __init__(self, args: Namespace, model: list[nn.Module]) -> None:
        self.model = model
        self.schedule = schedule_of(args.resolved_schedule, args.recipe)
        self.recipes = recipes_by_phase(args)  # once: a policy file may be gone when a phase begins
        self.index = 0
        if len(self.schedule.phases) > 1:
            print_rank_0(f" > recipe schedule: {self.schedule.describe()}")

    def enter(self, step: int) -> bool:
        """Make the model ready for optimizer step `step`, from 0; return whether its recipe has changed."""
        return self._enter(self.schedule.index_at(step), step)

    def restore(self, num_steps: int) -> bool:
        """Put the model into the phase that it was in after `num_steps` steps; return whether it changed."""
        return self._enter(self.schedule.index_after(num_steps), num_steps)

    def _enter(self, index: int, step: int) -> bool:
        if index == self.index:
            return False
        phase, self.index = self.schedule.phases[index], index
        set_model_recipes(self.model, self.recipes[phase.start_step])
        print_rank_0(
            f" > after {step} iterations: phase {index + 1} of {len(self.schedule.phases)} of the recipe "
            f"schedule, recipe {phase.recipe.name} (from step {phase.start_step} on)"
        )
        return True

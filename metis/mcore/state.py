"""The method's state across a whole model: find our linears, renew their bases, change their recipes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from metis.config import Recipe
from metis.mcore.linear import MetisColumnParallelLinear, MetisRowParallelLinear
from metis.nn import advance_bases
from metis.renewal import Compute

RecipeLinear = MetisColumnParallelLinear | MetisRowParallelLinear


def recipe_linears(model_chunks: Iterable[nn.Module]) -> list[RecipeLinear]:
    """Return the linears of this rank that compute by a recipe of ours, in order."""
    return [
        module
        for chunk in model_chunks
        for module in chunk.modules()
        if isinstance(module, MetisColumnParallelLinear | MetisRowParallelLinear)
    ]


def num_basis_bytes(model_chunks: Iterable[nn.Module]) -> int:
    """Return what the bases of this rank take between two refreshes, in bytes: V twice, kept and in use."""
    states = (basis.state for linear in recipe_linears(model_chunks) for basis in linear.core.bases.values())
    return sum(2 * state.v.nbytes + state.gram.nbytes for state in states)


def advance_model_bases(
    linears: Iterable[RecipeLinear], step: int, token_group: Any, compute: Compute | None = None
) -> None:
    """Renew every basis of this rank from the sketches of optimizer step `step`.

    linears: of `recipe_linears`. token_group: the data- and context-parallel ranks that saw the other tokens
    of the step. compute: as `metis.renewal.renew_bases` takes it.
    """
    advance_bases([(linear.core, linear.weight) for linear in linears], step, token_group, compute)


def set_model_recipes(model_chunks: Iterable[nn.Module], recipes: Mapping[str, Recipe]) -> None:
    """Give every linear of this rank its recipe out of `recipes`, keyed by global path; between optimizer
    steps, on every rank.

    Linears that are the engine's own class keep computing as they do.
    """
    chunks = list(model_chunks)
    with _without_forward_hooks(chunks):
        for linear in recipe_linears(chunks):
            linear.set_recipe(recipes[linear.layer_name])


@contextmanager
def _without_forward_hooks(chunks: list[nn.Module]) -> Iterator[None]:
    """Take the hooks of `--overlap-param-gather` off inside: the engine counts on the modules it has hooked.

    A change of recipe adds and removes modules (bases). Gathers under way are not touched.
    """
    hooked = [chunk for chunk in chunks if getattr(chunk, "use_forward_hook", False)]
    for chunk in hooked:
        chunk.disable_forward_pre_hook(param_sync=False)
    try:
        yield
    finally:
        for chunk in hooked:
            chunk.enable_forward_pre_hook()

"""On the CPU, megatron-core's `torch.compile` decorations become plain functions.

`megatron.core.jit.jit_fuser` is torch.compile, chosen when megatron-core is imported. On a CPU it would need
a C++ compiler at the first forward pass, and importing the compiler alone costs two seconds. So the engine is
imported here with `torch.compile` standing aside for a moment, and later imports find the no-op decorator.

Trap: if megatron-core was imported before, its functions are compiled ones already; torch's stance
"force_eager" then makes them run uncompiled for the rest of the process.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from megatron_patches.registry import Patch, Target

_ENGINE_FUNCTION_MODULES = (
    "megatron.core.activations",
    "megatron.core.fusions.fused_bias_dropout",
    "megatron.core.fusions.fused_bias_swiglu",
)


def silence_import_warnings() -> None:
    """Ignore megatron-core's remarks that Transformer Engine and Apex are missing: on a CPU they always
    are.
    """
    warnings.filterwarnings(
        "ignore", message="Transformer Engine and Apex are not installed", category=UserWarning
    )
    warnings.filterwarnings("ignore", message="Apex is not installed", category=UserWarning)


def import_engine() -> None:
    """Import megatron.core without compiling anything; no effect if it is imported already."""
    silence_import_warnings()
    if "megatron.core" in sys.modules:
        return
    compile_function = torch.compile
    torch.compile = _do_not_compile
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compile_function


def _do_not_compile(model: Callable[..., Any] | None = None, **_options: Any) -> Callable[..., Any]:
    return (lambda function: function) if model is None else model


def _activate() -> bool:
    jit = importlib.import_module("megatron.core.jit")
    already_off = jit.jit_fuser is jit.noop_decorator
    jit.disable_jit_fuser()
    if any(_is_compiled(sys.modules[name]) for name in _ENGINE_FUNCTION_MODULES if name in sys.modules):
        torch.compiler.set_stance("force_eager")
    return not already_off


def _is_compiled(module: Any) -> bool:
    """Whether a module of decorated functions was imported while torch.compile was in effect."""
    return any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(module).values())


PATCH = Patch(
    name="no_compile",
    why="torch.compile on the CPU needs a C++ compiler and costs seconds at import",
    reaches="every function decorated with jit_fuser: activations, bias-dropout-add, norms, losses",
    upstream="megatron/core/jit.py lines 7-38",
    delete_when="jit_fuser can be switched off by an option before megatron-core is imported",
    devices=("cpu",),
    relies_on=(
        Target(
            path="megatron.core.jit.disable_jit_fuser",
            source_hash="ac1a950de37d6f1dbc03949527ca1dfccb9d6362b201ae8f313d5f94630fc108",
        ),
        Target(
            path="megatron.core.jit.noop_decorator",
            source_hash="f0aa0f896caa8a90d17e3760e6c42c7d8d45d678b3f9ef51c75fb0b461891fa1",
        ),
    ),
    activate=_activate,
)

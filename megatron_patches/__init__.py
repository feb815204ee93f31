"""Cures for megatron-core 0.16.1 that no option, extension point or subclass can give.

Order of a run: parse arguments, `apply_patches(device)`, then import anything that imports megatron-core's
models. The patches for the CPU must come first because megatron-core decides at import whether functions are
compiled; a process that has imported megatron-core earlier still gets all of them, only more slowly.

Nothing here changes a process that does not call `apply_patches` or one of the `patch_...` functions. The
package imports torch, megatron-core and the standard library, never `metis`. `python -m megatron_patches`
lists what it contains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_patches.registry import Patch, PatchMismatch, Target, original_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Patch",
    "PatchMismatch",
    "Target",
    "all_patches",
    "apply_patches",
    "documentation",
    "original_of",
    "patch_exact_grad_norm",
    "patch_optimizer_passes",
    "patch_rotary",
    "patch_weight_gradients",
]


def all_patches() -> tuple[Patch, ...]:
    """Return every patch in the order in which it is applied, those of the exact mode last."""
    from megatron_patches import (
        async_save,
        cuda_on_cpu,
        distributed_optimizer,
        exact_reductions,
        foreach_optimizer,
        no_compile,
        pipeline_guard,
        recompute_context,
        recompute_without_te,
        rotary,
        weight_gradients,
    )

    return (
        no_compile.PATCH,
        *cuda_on_cpu.PATCHES,
        async_save.PATCH,
        *distributed_optimizer.PATCHES,
        recompute_without_te.PATCH,
        recompute_context.PATCH,
        pipeline_guard.PATCH,
        weight_gradients.PATCH,
        rotary.PATCH,
        *foreach_optimizer.PATCHES,
        *exact_reductions.PATCHES,
    )


def apply_patches(device: str) -> list[str]:
    """Apply what `device` ('cpu' or 'cuda') needs and return the names of the newly applied patches.

    Idempotent: a second call returns an empty list. Raises `PatchMismatch`, with nothing changed, if the
    installed megatron-core differs from the source that a patch was written for.
    """
    from megatron_patches import no_compile, registry

    if device not in registry.DEVICES:
        raise ValueError(f"device must be one of {registry.DEVICES}, received {device!r}")
    if device == "cpu":
        no_compile.import_engine()
    return registry.install(
        [
            patch
            for patch in all_patches()
            if device in patch.devices and not (patch.only_exact or patch.on_request)
        ]
    )


def patch_exact_grad_norm() -> list[str]:
    """Let the engine train float64 parameters, with every norm formed in float64; return the new patches'
    names.

    For the test mode in which a layout may not change a result: see `megatron_patches.exact_reductions`. Call
    it after `apply_patches`. Idempotent. Raises `PatchMismatch`.
    """
    from megatron_patches import registry

    return registry.install([patch for patch in all_patches() if patch.only_exact])


def patch_weight_gradients(accumulate: Callable[[Tensor, Tensor, Tensor], object]) -> list[str]:
    """Let `gradient_accumulation_fusion` take effect without Apex; return the names of the new patches.

    accumulate: `accumulate(input [M, K], grad_output [M, N], main_grad [N, K])` adds grad_output^T input to
    main_grad, which is fp32 or of the operands' dtype. Without effect where Apex's extension is installed.
    Raises `PatchMismatch`.
    """
    from megatron_patches import registry, weight_gradients

    return registry.install([weight_gradients.with_function(accumulate)])


def patch_rotary(
    rotate: Callable[..., Tensor], rotate_qkv: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> list[str]:
    """Let `apply_rope_fusion` and `fused_single_qkv_rope` take effect through the two functions; return the
    names of the new patches.

    rotate: `rotate(x [s, b, H, d], angles [s, 1, 1, r], interleaved=False)`. rotate_qkv: `rotate_qkv(mixed
    [s, b, G, (Q + 2) d], q_angles, k_angles, [Q d, d, d])` gives query, key and value. Both take the place
    of Transformer Engine's where that is installed. Raises `PatchMismatch`.
    """
    from megatron_patches import registry, rotary

    return registry.install([rotary.with_functions(rotate, rotate_qkv)])


def patch_optimizer_passes() -> list[str]:
    """Let gradient norm, clipping and the copies into the parameters be a few launches each, without TE and
    Apex; return the names of the new patches.

    The norm is summed in another order than before. Raises `PatchMismatch`.
    """
    from megatron_patches import foreach_optimizer, registry

    return registry.install(list(foreach_optimizer.PATCHES))


def documentation() -> str:
    """Return all patches as text: targets with source hashes, reason, reach, upstream lines and expiry."""
    from megatron_patches import no_compile, registry

    no_compile.silence_import_warnings()
    return registry.table(all_patches())

"""Exact resume of the distributed optimizer when neither Transformer Engine nor Apex is installed.

With torch's own AdamW as the inner optimizer, megatron-core 0.16.1 cannot load a distributed-optimizer
checkpoint: asking for the state to load into fails, since AdamW has no state before its first step. Past
that, the per-parameter `step` is either missing or overwritten, and finally shared: every parameter gets the
same `step` tensor, so one optimizer step advances it once per parameter and the bias corrections drift from
the second step on, silently. Fused optimizers keep `step` in their parameter groups and never see any of
this, so nothing changes for them.

Trap: the three patches belong together; the last one alone decides whether a resumed run equals an
uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_patches.registry import Patch, Target

_CLASS = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"


def _uses_torch_adam(optimizer: Any) -> bool:
    """Whether per-parameter `step` tensors exist: the inner optimizer is torch's own."""
    return isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _replace_state_dict(original: Callable[..., Any], path: str) -> Callable[..., Any]:
    def state_dict(self: Any) -> dict[str, Any]:
        """Give AdamW the state it would have before its first step, then ask for it."""
        if not getattr(self, "is_stub_optimizer", False) and _uses_torch_adam(self):
            _initialise_state(self.optimizer)
        return original(self)

    return state_dict


def _initialise_state(adam: torch.optim.Optimizer) -> None:
    """Zero moments and step 0 for each parameter that has no state yet."""
    for group in adam.param_groups:
        for param in group["params"]:
            if not adam.state[param]:
                adam.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(param, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(param, requires_grad=False),
                }


def _replace_load_state_dict(original: Callable[..., Any], path: str) -> Callable[..., Any]:
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        """Load, then give each parameter a `step` of its own."""
        original(self, state_dict)
        if not getattr(self, "is_stub_optimizer", False) and _uses_torch_adam(self):
            for param_state in self.optimizer.state.values():
                if "step" in param_state:
                    param_state["step"] = param_state["step"].detach().clone()

    return load_state_dict


def _replace_set_states(original: Callable[..., Any], path: str) -> Callable[..., Any]:
    @torch.no_grad()
    def _set_main_param_and_optimizer_states(
        self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]
    ) -> None:
        """Copy parameter and moments; `step` comes from the parameter groups and stays as it is.

        Without gradients, because a float32 parameter of the model is its own main parameter: a view of a
        leaf.
        """
        if not _uses_torch_adam(self) or self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            original(self, model_param, tensors)
            return
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        for key, destination in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if key != "step":
                destination.copy_(tensors[key])

    return _set_main_param_and_optimizer_states


PATCHES = (
    Patch(
        name="distributed_optimizer_state_before_first_step",
        why="without TE and Apex, a distributed optimizer that has not stepped cannot be loaded into",
        reaches="DistributedOptimizer.state_dict, sharded_state_dict(is_loading=True) of every sharding type",
        upstream="megatron/core/optimizer/distrib_optimizer.py lines 628-688, `assert len(steps) == 1`",
        delete_when="state_dict tolerates an inner optimizer without state",
        targets=(
            Target(
                path=f"{_CLASS}.state_dict",
                source_hash="fe621ae6a622b58752df0330a2a30056dda222d73f22dc6bce6a5d1ac2bfa3d8",
            ),
        ),
        replace=_replace_state_dict,
    ),
    Patch(
        name="distributed_optimizer_keeps_step_on_load",
        why="loading fails for want of 'step' (fully_reshardable) or resets it to 0 (dp_reshardable)",
        reaches="load_parameter_state_from_{fully_reshardable,dp_reshardable,dp_zero,fs_model_space}",
        upstream="megatron/core/optimizer/distrib_optimizer.py lines 911-940",
        delete_when="_set_main_param_and_optimizer_states skips 'step' and runs without gradients",
        targets=(
            Target(
                path=f"{_CLASS}._set_main_param_and_optimizer_states",
                source_hash="93c254228283b2df0147fe436a2fe5d9e754ab4b7276a96f023be179c737329f",
            ),
        ),
        replace=_replace_set_states,
    ),
    Patch(
        name="distributed_optimizer_step_per_parameter",
        why="after loading, all parameters share one 'step' tensor: wrong bias correction, silently",
        reaches="DistributedOptimizer.load_state_dict, hence every resume without TE and Apex",
        upstream='megatron/core/optimizer/distrib_optimizer.py lines 690-881, `s["step"] = step`',
        delete_when="load_state_dict clones step for each parameter, as it does for HybridDeviceOptimizer",
        targets=(
            Target(
                path=f"{_CLASS}.load_state_dict",
                source_hash="15f257b4c4f9a7ef6d6660e829de088d39997615c2a4e52ec5e7e1306b465f04",
            ),
        ),
        replace=_replace_load_state_dict,
    ),
)

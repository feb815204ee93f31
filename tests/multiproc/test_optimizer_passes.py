"""The optimizer's passes in a few launches: fused AdamW, and norm, clipping and copies by torch's foreach
functions.

Oracles: the engine's loops over tensors, torch's AdamW without the flag, and the norm in float64.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests._distributed import run_ranks

STEPS = 3
# Largest relative difference of loss or gradient norm from the loops; measured worst case in brackets.
CURVE_TOLERANCE = 1e-6  # [1.4e-7]
ADAM_TOLERANCE = 1e-6  # [1.5e-8] of one parameter after four steps
NORM_TOLERANCE = 1e-6  # [1.3e-8]
CASES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "distributed": {"dtype": "float32", "distributed_optimizer": True},
    "distributed_bfloat16": {"dtype": "bfloat16", "distributed_optimizer": True, "overlap": True},
    "tied": {"dtype": "bfloat16", "distributed_optimizer": True, "tied": True},
}


def count(torch: Any, name: str, counts: dict[str, int]) -> None:
    original = getattr(torch, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] = counts.get(name, 0) + 1
        return original(*args, **kwargs)

    setattr(torch, name, counted)


def train(rank: int, world_size: int) -> dict[str, Any]:
    import torch

    from megatron_patches import patch_optimizer_passes
    from metis.training.optimizer import fuse_adamw
    from tests._tiny_engine import Case, Run

    counts: dict[str, int] = {}
    for name in ("_foreach_norm", "_foreach_mul_", "_foreach_copy_", "_fused_adamw_"):
        count(torch, name, counts)
    results: dict[str, Any] = {}
    cases = {name: Case(**{**case, "dtype": getattr(torch, case["dtype"])}) for name, case in CASES.items()}
    plain = {name: Run(case).curve(STEPS) for name, case in cases.items()}
    assert not counts
    results["patches"] = patch_optimizer_passes(), patch_optimizer_passes()
    for name, case in cases.items():
        counts.clear()
        patched = Run(case).curve(STEPS)
        by_foreach = dict(counts)
        counts.clear()
        fused = Run(case)
        num_adams = fuse_adamw(fused.optimizer)
        curve = fused.curve(STEPS)
        inner = getattr(fused.optimizer, "chained_optimizers", [fused.optimizer])
        flags = [group["fused"] for each in inner for group in each.optimizer.param_groups]
        results[name] = plain[name], patched, by_foreach, curve, dict(counts), num_adams, flags
    return results


def difference(curve: list[tuple[float, float]], oracle: list[tuple[float, float]]) -> float:
    pairs = [pair for step in zip(curve, oracle, strict=True) for pair in zip(*step, strict=True)]
    return max(abs(value - expected) / abs(expected) for value, expected in pairs)


@pytest.mark.parametrize("world_size", [1, 2])
def test_passes_in_a_few_launches_train_like_loops(world_size: int) -> None:
    for results in run_ranks(train, world_size):
        first, second = results.pop("patches")
        assert second == [] and first == [
            "foreach_norm_and_scale", "foreach_copy_to_parameters", "foreach_copy_to_parameter_shards",
        ]  # fmt: skip
        for name, (plain, patched, by_foreach, curve, counts, num_adams, flags) in results.items():
            assert difference(patched, plain) <= CURVE_TOLERANCE, name
            assert difference(curve, plain) <= CURVE_TOLERANCE, name
            # The norm and clipping of every step, the copies of a step that has any.
            assert by_foreach["_foreach_norm"] == by_foreach["_foreach_mul_"] == STEPS, name
            assert by_foreach.get("_foreach_copy_", 0) == (0 if name == "float32" else STEPS), name
            assert "_fused_adamw_" not in by_foreach
            assert num_adams == 1 and counts["_fused_adamw_"] >= STEPS, name
            assert set(flags) == {None}, "the flag must not reach a checkpoint"


def test_norm_and_scale_follow_their_formulas() -> None:
    import torch

    from megatron_patches.foreach_optimizer import foreach_l2_norm, foreach_scale

    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (1, 7, 1000)]
    norm, _ = foreach_l2_norm(0, torch.zeros(1), [tensors], False)
    exact = torch.cat(tensors).double().norm()
    assert norm.shape == (1,) and abs(float(norm) - float(exact)) <= NORM_TOLERANCE * float(exact)
    expected = [tensor * 0.3 for tensor in tensors]
    others = [torch.empty_like(tensor) for tensor in tensors]
    foreach_scale(0, torch.zeros(1), [tensors, others], 0.3)
    foreach_scale(0, torch.zeros(1), [tensors, tensors], 0.3)
    for result in (others, tensors):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_fused_adamw_resumes_from_a_checkpoint_of_an_unfused_one() -> None:
    """Step counts of an unfused AdamW lie on the host; the fused one reads them beside the parameter."""
    import torch

    from metis.training import optimizer as module

    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 5, device="meta"))
    adam = torch.optim.AdamW([parameter])
    adam.state[parameter] = {"step": torch.tensor(3.0)}
    module._before_step(adam)
    assert adam.state[parameter]["step"].device == parameter.device
    assert adam.param_groups[0]["fused"] is True
    module._after_step(adam)
    assert adam.state_dict()["param_groups"][0]["fused"] is None

    def four_steps(fused: bool) -> torch.Tensor:
        weights = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        adam = torch.optim.AdamW([weights], lr=1e-2, weight_decay=0.1)
        for step in range(4):
            if step == 2 and fused:
                adam.register_step_pre_hook(module._before_step)
            weights.grad = torch.sin(weights.detach() * step)
            adam.step()
        return weights.detach()

    assert (four_steps(True) - four_steps(False)).abs().max() <= ADAM_TOLERANCE


@pytest.mark.parametrize(
    ("options", "fuses"),
    [("", True), ("--no-optimizer-fusion", False), ("--exact-reductions", False), ("--device cpu", False)],
)
def test_a_gpu_fuses_the_passes_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, options: str, fuses: bool
) -> None:
    import torch

    import megatron_patches
    from metis.training import optimizer as module
    from metis.training.arguments import parse_args

    adam = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    printed: list[str] = []
    patched: list[bool] = []
    monkeypatch.setattr(module, "get_megatron_optimizer", lambda *_, **__: SimpleNamespace(optimizer=adam))
    monkeypatch.setattr(module, "print_rank_0", printed.append)
    monkeypatch.setattr(megatron_patches, "patch_optimizer_passes", lambda: patched.append(True))
    args = parse_args(f"--device cuda --lr 1e-3 {options}".split())
    args.params_dtype_name = "fp32"
    module.build_optimizer(args, [], None)
    assert bool(patched) == bool(printed) == bool(adam._optimizer_step_pre_hooks) == fuses

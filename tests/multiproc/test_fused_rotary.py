"""The engine calls the rotation that it is handed, for query and key by themselves and for the whole QKV
projection, without Transformer Engine.

Plain torch functions stand in for the kernels (`tests/numerics/test_step_kernels.py` compares those). Oracle:
the same case with the engine's own unfused rotation, bitwise.
"""

from typing import Any

import pytest

from tests._distributed import run_ranks

STEPS = 2
NUM_LAYERS, NUM_MICROBATCHES = 4, 4
GROUPED = {"num_query_groups": 2}
CASES = {
    1: {"plain": {}, "grouped": {"model": GROUPED}, "recompute": {"model": {"recompute_granularity": "full",
        "recompute_method": "uniform", "recompute_num_layers": 1}}},
    2: {"tp2": {"tp": 2, "model": GROUPED}, "tp2_sequence_parallel": {"tp": 2, "model": GROUPED | {
        "sequence_parallel": True}}},
}  # fmt: skip


def train(rank: int, world_size: int) -> dict[str, Any]:
    import torch
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_patches import patch_rotary
    from tests._tiny_engine import Case, Run

    calls = {"rotate": 0, "rotate_qkv": 0}

    def rotate(x: torch.Tensor, angles: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        assert not interleaved and angles.shape == (x.shape[0], 1, 1, x.shape[3])
        calls["rotate"] += 1
        return rope_utils._apply_rotary_pos_emb_bshd(x, angles)

    def rotate_qkv(mixed: torch.Tensor, q_angles: Any, k_angles: Any, widths: list[int]) -> Any:
        assert q_angles is k_angles and sum(widths) == mixed.shape[3]
        calls["rotate_qkv"] += 1
        q, k, v = torch.split(mixed, widths, dim=3)
        q = q.reshape(*q.shape[:2], -1, widths[1])
        apply = rope_utils._apply_rotary_pos_emb_bshd
        return apply(q, q_angles), apply(k, k_angles), v

    with pytest.raises(ValueError, match="apply_rope_fusion is not available"):
        Run(Case(model={"apply_rope_fusion": True}))
    installed = patch_rotary(rotate, rotate_qkv), patch_rotary(rotate, rotate_qkv)
    results: dict[str, Any] = {"installed": installed}
    for name, case in CASES[world_size].items():
        curves = []
        for flags in ((), ("apply_rope_fusion",), ("apply_rope_fusion", "fused_single_qkv_rope")):
            model = {**case.get("model", {}), **dict.fromkeys(flags, True)}
            before = dict(calls)
            curve = Run(Case(dtype=torch.bfloat16, **{**case, "model": model})).curve(STEPS)
            curves.append(
                (curve, calls["rotate"] - before["rotate"], calls["rotate_qkv"] - before["rotate_qkv"])
            )
        results[name] = curves
    return results


@pytest.mark.parametrize("world_size", tuple(CASES))
def test_the_engine_calls_the_rotation_it_was_handed(world_size: int) -> None:
    (results, *_) = run_ranks(train, world_size)
    assert results.pop("installed") == (["rotary_without_te"], [])
    for name, (plain, by_tensor, whole) in results.items():
        forwards = STEPS * NUM_LAYERS * NUM_MICROBATCHES * (2 if name == "recompute" else 1)
        assert [run[1:] for run in (plain, by_tensor, whole)] == [(0, 0), (2 * forwards, 0), (0, forwards)]
        assert plain[0] == by_tensor[0] == whole[0], name

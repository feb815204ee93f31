"""Weight gradients that add to the main gradient inside the product, in the engine's own linears, without
Apex.

A plain torch product stands in for cuBLAS. Oracles: the same case unfused (bitwise in fp32, where only the
place of the addition differs) and, for the calls, their count.
"""

from typing import Any

import pytest

from tests._distributed import run_ranks

STEPS = 3
NUM_LINEARS = 4 * 4 + 1  # four in each block, and the output layer
# Largest relative difference of loss or gradient norm; measured worst case in brackets.
TOLERANCE_TIED_FP32 = (
    1e-5  # [2.5e-7, tied] the embedding's gradient joins after the product instead of before
)
TOLERANCE_BF16 = 1e-2  # [5.3e-3, pp2_tied] unfused gradients are rounded to bf16
CASES_OF_1 = {
    "plain": {},
    "overlap": {"overlap": True, "distributed_optimizer": True},
    "tied": {"tied": True},
    "tied_overlap": {"tied": True, "overlap": True, "distributed_optimizer": True},
    "recompute": {
        "model": {
            "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
        }
    },
}  # fmt: skip
CASES_OF_2 = {
    "tp2": {"tp": 2},
    "tp2_sequence_parallel": {"tp": 2, "model": {"sequence_parallel": True}},
    "dp2_overlap": {"overlap": True, "distributed_optimizer": True},
    "pp2": {"pp": 2},
    "pp2_tied": {"pp": 2, "tied": True},
}
NUM_MICROBATCHES = {"dp2_overlap": 2}
NUM_LINEARS_OF_STAGE = {"pp2": (8, 9), "pp2_tied": (8, 9)}


def train_both(rank: int, world_size: int, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    import torch
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    from megatron_patches import patch_weight_gradients
    from metis.mcore.embedding import MainGradEmbedding, _Lookup
    from tests._tiny_engine import Case, Run

    calls: list[tuple[int, ...]] = []
    num_lookups = [0]
    lookup_backward = _Lookup.backward

    def counted(*args: Any) -> Any:
        num_lookups[0] += 1
        return lookup_backward(*args)

    _Lookup.backward = staticmethod(counted)

    def accumulate(x: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        assert x.dtype == grad_output.dtype and main_grad.dtype == torch.float32
        main_grad.add_(grad_output.to(main_grad.dtype).t() @ x.to(main_grad.dtype))
        calls.append(tuple(main_grad.shape))

    first = patch_weight_gradients(accumulate)
    results: dict[str, Any] = {"patched": (first, patch_weight_gradients(accumulate))}
    for name, case in cases.items():
        for dtype in (torch.float32, torch.bfloat16):
            plain = Run(Case(dtype=dtype, **case)).curve(STEPS)
            assert not calls
            fused_model = {**case.get("model", {}), "gradient_accumulation_fusion": True}
            fused_case = Case(dtype=dtype, **{**case, "model": fused_model})
            fused = Run(fused_case).curve(STEPS)
            run = Run(fused_case)
            num_embeddings = 0
            for module in (each for chunk in run.chunks for each in chunk.modules()):
                if isinstance(module, VocabParallelEmbedding):
                    MainGradEmbedding.take_over(module)
                    num_embeddings += 1
            result = plain, fused, len(calls), run.curve(STEPS), num_lookups[0], num_embeddings
            results[f"{name}_{str(dtype).removeprefix('torch.')}"] = result
            calls.clear()
            num_lookups[0] = 0
    return results


def refusal(rank: int, world_size: int) -> str:
    from tests._tiny_engine import Case, Run

    try:
        Run(Case(model={"gradient_accumulation_fusion": True}))
    except RuntimeError as error:
        return str(error)
    return "built"


def difference(curve: list[tuple[float, float]], oracle: list[tuple[float, float]]) -> float:
    pairs = [pair for step in zip(curve, oracle, strict=True) for pair in zip(*step, strict=True)]
    return max(abs(value - expected) / abs(expected) for value, expected in pairs)


@pytest.mark.parametrize(("world_size", "cases"), [(1, CASES_OF_1), (2, CASES_OF_2)])
def test_fused_weight_gradients_train_like_unfused_ones(
    world_size: int, cases: dict[str, dict[str, Any]]
) -> None:
    for rank, results in enumerate(run_ranks(train_both, world_size, cases)):
        assert results.pop("patched") == (["weight_gradients_without_apex"], [])
        for name, (plain, fused, num_calls, looked_up, num_lookups, num_embeddings) in results.items():
            case, dtype = name.rsplit("_", 1)
            linears = NUM_LINEARS_OF_STAGE.get(case, (NUM_LINEARS, NUM_LINEARS))[rank]
            assert num_calls == STEPS * NUM_MICROBATCHES.get(case, 4) * linears, name
            if dtype == "float32" and "tied" not in case:
                assert fused == plain, name
            else:
                tolerance = TOLERANCE_TIED_FP32 if dtype == "float32" else TOLERANCE_BF16
                found = difference(fused, plain)
                assert found <= tolerance, f"{name}: {found:.2e}"
                assert found > 0 or dtype == "float32", f"{name}: nothing was fused"
            found = difference(looked_up, plain)
            assert found <= (TOLERANCE_TIED_FP32 if dtype == "float32" else TOLERANCE_BF16), (name, found)
            assert num_embeddings == (0 if case.startswith("pp2") and rank else 1)
            assert num_lookups == STEPS * NUM_MICROBATCHES.get(case, 4) * num_embeddings, name


def test_without_the_patch_the_engine_refuses_the_fusion() -> None:
    assert "fused_weight_gradient_mlp_cuda" in run_ranks(refusal, 1)[0]

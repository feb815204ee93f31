"""The Triton kernels around the linears, under Triton's interpreter: `tests/gpu/step_kernels.py` in a process
of its own, because Triton reads TRITON_INTERPRET when it is first imported.

Errors are against float64, in units of the last place; `plain` is what torch's or megatron-core's unfused
functions give for the same inputs. On a GPU the same script gives the same figures, with other sums.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests._distributed import run_ranks
from tests.integration._trainer import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]

# In ulps of the length of the rotated pair; measured worst case in brackets.
ROTARY_FUSED_FP32 = 2.5  # [1.42] three roundings under the interpreter, two with FMA
ROTARY_FUSED = 0.501  # [0.5] bf16 and fp16: one rounding
ROTARY_APART = 2.0  # [2.0] from the plain function, whose own error reaches 1.51
# Of the element itself for y, of the largest of its row for dx, of the largest of all for dw.
NORM_FP32 = 6.0  # [3.5]
NORM_16_BIT = {"y": 0.0, "dx": 0.501, "dw": 0.0}  # y and dw: distance from the plain function; dx: [0.5]
# Of loss plus largest logit; of the larger of probability and label, times the loss's gradient.
LOSS_FP32 = 1.0  # [0.5]; plain 1.5 for 39000 columns
LOGITS_GRADIENT_FP32 = 50.0  # [33] of exp(x - max) after the difference was rounded; plain 130
LOGITS_GRADIENT_16_BIT = 0.501  # [0.5]
# Largest relative difference of loss or gradient norm from the unfused run.
RUN_FP32 = 1e-6  # [1.7e-8] of three steps of four blocks
RUN_BF16 = 5e-3  # [5.4e-4]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "tests/gpu/step_kernels.py", "--device", "cpu"], cwd=REPOSITORY, env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_rotary_is_rounded_once_and_closer_to_float64_than_the_plain_function(
    measured: dict[str, Any],
) -> None:
    cases = measured["rotary"]
    assert len(cases) == 3 * 4 * 2
    for name, error in cases.items():
        limit = ROTARY_FUSED_FP32 if name.startswith("fp32") else ROTARY_FUSED
        assert error["fused"] <= limit and error["apart"] <= ROTARY_APART, (name, error)
        if not name.startswith("fp32"):
            assert error["fused"] < error["plain"] and error["fused_rms"] < error["plain_rms"], name


def test_norm_keeps_the_roundings_of_the_plain_function(measured: dict[str, Any]) -> None:
    cases = measured["norm"]
    assert len(cases) == 3 * 4 * 3
    for name, error in cases.items():
        part = name.rsplit(", ", 1)[1]
        if name.startswith("fp32"):
            assert error["fused"] <= NORM_FP32, (name, error)
        else:
            assert error["fused" if part == "dx" else "apart"] <= NORM_16_BIT[part], (name, error)


def check_cross_entropy(cases: dict[str, Any]) -> None:
    assert len(cases) == 4 * 3 * 2
    for name, error in cases.items():
        if name.endswith("loss"):
            limit = LOSS_FP32
        else:
            limit = LOGITS_GRADIENT_FP32 if name.startswith("fp32") else LOGITS_GRADIENT_16_BIT
        assert error["fused"] <= limit, (name, error)


def test_cross_entropy_excludes_padding_and_is_rounded_once(measured: dict[str, Any]) -> None:
    check_cross_entropy(measured["cross_entropy"])


def on_two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    import torch

    from megatron_patches import apply_patches

    apply_patches("cpu")
    from types import SimpleNamespace

    from megatron.core import parallel_state

    from metis.mcore.cross_entropy import vocab_parallel_cross_entropy
    from metis.mcore.norm import RMSNorm
    from tests.gpu.step_kernels import cross_entropy_errors, round_like_a_gpu

    round_like_a_gpu()
    parallel_state.initialize_model_parallel(world_size)
    found: dict[str, Any] = {
        "cases": cross_entropy_errors("cpu", parallel_state.get_tensor_model_parallel_group())
    }
    logits = torch.randn(5, 2, 24, generator=torch.Generator().manual_seed(rank))
    labels = torch.full((5, 2), 40)
    for fusion in (False, True):
        x = logits.clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(x * 1, labels, vocab_size=37, fusion=fusion)
        loss.backward(torch.zeros_like(loss), retain_graph=True)
        found[f"dummy label {fusion}"] = loss.tolist(), x.grad.tolist(), type(loss.grad_fn).__name__
    try:
        loss.backward(torch.zeros_like(loss))
    except RuntimeError as error:
        found["twice"] = str(error)
    for fused in (False, True):
        config = SimpleNamespace(layernorm_zero_centered_gamma=False, sequence_parallel=True,
                                 persist_layer_norm=fused, params_dtype=torch.float32)  # fmt: skip
        norm = RMSNorm(config, 8)
        assert norm.weight.sequence_parallel
        found[f"norm {fused}"] = [
            type(norm(torch.ones(2, 8, dtype=dtype)).grad_fn).__name__
            for dtype in (torch.float32, torch.float64)
        ]
    return found


def test_two_ranks_share_a_vocabulary_and_switches_choose_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for found in run_ranks(on_two_ranks, 2, patched=False):
        check_cross_entropy(found["cases"])
        (plain_loss, plain_grad, plain), (loss, grad, fused) = (
            found[f"dummy label {fusion}"] for fusion in (False, True)
        )
        assert (plain, fused) == ("_VocabParallelCrossEntropyBackward", "_FusedCrossEntropyBackward")
        assert loss == plain_loss and min(min(row) for row in loss) > 3e38
        assert not np.any(grad) and not np.any(plain_grad)
        assert "backward has run" in found["twice"]
        assert found["norm False"] == ["_RMSNormFunctionBackward"] * 2
        assert found["norm True"] == ["_FusedRMSNormBackward", "_RMSNormFunctionBackward"]


RUN = (
    "--mock-data --train-iters 2 --eval-iters 0 --tensor-model-parallel-size 2 --sequence-parallel "
    "--num-layers 2 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 2"
)


def train_on_two_ranks(rank: int, world_size: int, folder: str) -> tuple[list[str], int]:
    """Train with every pass fused that a GPU fuses, and without, on the CPU; return errors and the number of
    embeddings that add to the main gradient themselves.
    """
    import torch

    from metis.mcore.embedding import MainGradEmbedding
    from metis.training import model
    from metis.training.fusions import Fusions
    from tests.gpu.step_kernels import round_like_a_gpu
    from tests.integration._trainer import TOKENIZER, run_case

    errors, taken_over = [], []
    take_over = MainGradEmbedding.take_over
    MainGradEmbedding.take_over = lambda module: (taken_over.append(module), take_over(module))
    for name in ("plain", "fused"):
        for dtype, option in (("fp32", ""), ("bf16", "--bf16")):
            metrics = f"--metrics-file {folder}/{name}_{dtype}.jsonl"
            errors.append(run_case(world_size, f"{RUN} {TOKENIZER} {option} {metrics}").error)
        if name == "plain":
            round_like_a_gpu()
            model.resolve_fusions = lambda args, use_te: everything(torch, Fusions)
    return errors, len(taken_over)


def everything(torch: Any, fusions: Any) -> Any:
    import megatron_patches
    from metis.mcore.rotary import FusedRotary

    def accumulate(x: Any, grad_output: Any, main_grad: Any) -> None:
        main_grad.add_(grad_output.float().t() @ x.float())

    rotary = FusedRotary()
    megatron_patches.patch_weight_gradients(accumulate)
    megatron_patches.patch_rotary(rotary.rotate, rotary.rotate_qkv)
    return fusions(weight_gradients=True, rotary=True, rotary_qkv=True, norm=True, cross_entropy=True)


def test_a_run_with_every_pass_fused_trains_like_one_with_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    results = run_ranks(train_on_two_ranks, 2, str(tmp_path), patched=False, timeout=300)
    assert results == [([""] * 4, 2)] * 2
    for dtype, tolerance in (("fp32", RUN_FP32), ("bf16", RUN_BF16)):
        plain, fused = (read_metrics(tmp_path / f"{name}_{dtype}.jsonl") for name in ("plain", "fused"))
        assert len(plain) == len(fused) == 2
        for field in ("lm_loss", "grad_norm"):
            for a, b in zip(plain, fused, strict=True):
                assert abs(a[field] - b[field]) <= tolerance * abs(a[field]), (
                    dtype,
                    field,
                    a[field],
                    b[field],
                )

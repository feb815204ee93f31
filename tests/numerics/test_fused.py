"""A linear whose operands are quantised by kernels computes the bits of one that uses plain PyTorch.

The kernels run under Triton's interpreter, which must be chosen before Triton is imported: the linears live
in a process of their own. Packed activations and the bytes of a gather are read as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metis.config import QuantizerConfig
from metis.errors import ConfigError
from metis.fused import can_fuse
from metis.gemm import EmulatedGemm
from metis.nn import MetisLinear
from metis.recipes import METIS

pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = """
from dataclasses import replace
import torch
from metis.config import CellConfig, QuantizerConfig, RhtConfig
from metis.fused import FusedTensor
from metis.functional import _layout, gather_codes
from metis.gemm import EmulatedGemm
from metis.nn import MetisLinear
from metis.observe import OperandMeter
from metis.operand import Axis, encode
from metis.recipes import RECIPES

torch.set_num_threads(1)
rotated = CellConfig(quantizer=QuantizerConfig(rht=RhtConfig(size=32, sign_seed=3)))
recipes = [RECIPES[name] for name in ("nvfp4", "metis", "mxfp4", "nvfp4_4over6")]
recipes += [
    replace(RECIPES["nvfp4"], name="packed", save_packed=True),
    replace(RECIPES["nvfp4_direct"], name="rotated", wgrad_input=rotated, wgrad_grad_output=rotated),
]


def train(recipe, kernels, dtype):
    torch.manual_seed(0)
    layer = MetisLinear(64, 32, recipe=recipe, dtype=dtype, backend=EmulatedGemm(kernels=kernels))
    found = []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, 64, generator=generator).to(dtype).requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(torch.randn(64, 32, generator=generator).to(dtype) * 1e-3)
        found += [y.detach(), x.grad, layer.weight.grad.clone()]
        layer.after_step()
    return found


for recipe in recipes:
    # With a split in bf16 the linear runs on kernels of its own rounding: see test_fused_linear.py.
    dtype = torch.bfloat16 if recipe.name == "nvfp4" else torch.float32
    for a, b in zip(train(recipe, "torch", dtype), train(recipe, "triton", dtype), strict=True):
        assert torch.equal(a, b), recipe.name
    print("same", recipe.name)

x, axes = torch.randn(32, 64), (Axis.whole(32), Axis.whole(64))
plain, fused = (
    encode(x, QuantizerConfig(), *axes, amax_scope="global", kernels=kernels, want_bytes=True).terms[0]
    for kernels in ("torch", "triton")
)
assert isinstance(fused, FusedTensor) and _layout(fused) == _layout(plain) | {"fused": True}
assert torch.equal(fused.dequantize(), plain.dequantize()) and torch.equal(fused.values, plain.values)
for along_columns in (False, True):
    whole = gather_codes(fused, Axis.whole(64 if along_columns else 32), along_columns)
    assert isinstance(whole, FusedTensor)
    assert torch.equal(whole.operand(torch.float32), plain.operand(torch.float32))
print("same bytes")


def metrics(kernels):
    torch.manual_seed(0)
    layer = MetisLinear(64, 32, recipe=RECIPES["nvfp4"], backend=EmulatedGemm(kernels=kernels))
    meter, found = OperandMeter(), []
    layer.clock.watch.observer = lambda *seen: found.append(meter.measure(*seen))
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer(x).square().sum().backward()
    assert layer.clock.watch.take_nonfinite() == []
    return found


for a, b in zip(metrics("torch"), metrics("triton"), strict=True):
    assert a == b and a["relative_error"] > 0.05
print("same metrics")
"""


def test_kernels_and_plain_torch_give_a_linear_the_same_bits():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[6:] == ["same bytes", "same metrics"]


def test_kernels_that_cannot_run_are_an_error_when_asked_for_and_left_alone_by_auto(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(16, 64)
    assert not can_fuse(x, QuantizerConfig(), "auto") and not can_fuse(x, QuantizerConfig(), "torch")
    layer = MetisLinear(64, 32, recipe=METIS, backend=EmulatedGemm(kernels="triton"))
    with pytest.raises(ConfigError, match="--quantize-kernels triton: needs a CUDA device"):
        layer(x)

"""The fused passes around the linears against plain torch or megatron-core and float64, on the GPU or under
Triton's interpreter.

    python tests/gpu/step_kernels.py                                   # on a GPU, with times
    TRITON_INTERPRET=1 python tests/gpu/step_kernels.py --device cpu   # what tests/numerics runs

Ends with a JSON object of errors by kernel and case. `plain` and `fused` are the largest error against
float64 in units of the last place of the largest element nearby; `apart` is the distance of the two.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def round_like_a_gpu() -> None:
    """Let Triton's interpreter round fp32 to bf16 to the nearest, ties to even; by itself it truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return original(self, src, dst_type)
        rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view("uint16"), tl.bfloat16)

    builder.cast_impl = cast_impl


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def with_gradients(function: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Return the outputs of a function and the gradients of its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    torch.autograd.backward(outputs, [grad.to(y.dtype) for grad, y in zip(grads, outputs, strict=True)])
    return [y.detach() for y in outputs] + [x.grad for x in leaves]


def errors(
    fused: list[Tensor], plain: list[Tensor], exact: list[Tensor], size: list[Tensor]
) -> dict[str, float]:
    """Largest errors in ulps of `size`, a magnitude for every element of every result."""
    ulp, smallest = torch.finfo(fused[0].dtype).eps, torch.finfo(fused[0].dtype).smallest_normal
    worst = {"fused": 0.0, "plain": 0.0, "apart": 0.0, "fused_rms": 0.0, "plain_rms": 0.0}
    for f, p, e, s in zip(fused, plain, exact, size, strict=True):
        assert f.dtype == p.dtype and f.shape == p.shape == e.shape, (f.shape, p.shape, e.shape)
        unit = ulp * 2.0 ** torch.floor(torch.log2(s.double().clamp_min(smallest)))
        for name, a, b in (("fused", f, e), ("plain", p, e), ("apart", f, p)):
            distance = (a.double() - b.double()).abs() / unit
            worst[name] = max(worst[name], float(distance.max()))
            if name != "apart":
                rms = float(distance.square().mean().sqrt())
                worst[f"{name}_rms"] = max(worst[f"{name}_rms"], rms)
    return {name: round(value, 4) for name, value in worst.items()}


# --- rotary embedding --------------------------------------------------------------------------------------


def rotary_errors(device: str) -> dict[str, dict[str, float]]:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as apply_plain

    from metis.mcore.rotary import FusedRotary

    found = {}
    # name: s, b, G, Q, d, r, first position
    cases = {
        "gqa": (9, 2, 2, 4, 16, 16, 0), "one head each": (5, 1, 3, 1, 8, 8, 1000),
        "partial": (4, 2, 2, 2, 20, 12, 7), "odd sizes": (3, 3, 3, 3, 24, 24, 4090),
    }  # fmt: skip
    for dtype_name, dtype in DTYPES.items():
        for name, (s, b, groups, per_group, d, rotated, first) in cases.items():
            frequencies = 1.0 / (10000 ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated))
            # As context parallelism deals them: two runs of positions that do not touch.
            positions = torch.cat([torch.arange(s // 2), torch.arange(s // 2, s) + 37]) + float(first)
            angles = torch.outer(positions, frequencies)
            angles = torch.cat([angles, angles], dim=-1)[:, None, None, :].to(device)
            mixed = random((s, b, groups, (per_group + 2) * d), dtype, device)
            widths = [per_group * d, d, d]
            heads = (groups * per_group, groups, groups)
            grads = [random((s, b, count, d), dtype, device, 2 + i) for i, count in enumerate(heads)]

            def plain(x: Tensor, angles: Tensor = angles, widths: list[int] = widths, d: int = d) -> Any:
                q, k, v = torch.split(x, widths, dim=3)
                q = q.reshape(*q.shape[:2], -1, d)
                return apply_plain(q, angles), apply_plain(k, angles), v

            fused = FusedRotary()
            results = with_gradients(lambda x: fused.rotate_qkv(x, angles, angles, widths), [mixed], grads)  # noqa: B023
            oracle = with_gradients(plain, [mixed], grads)
            doubled = angles.double()
            exact = with_gradients(
                lambda x: plain(x, doubled), [mixed.double()], [g.double() for g in grads]  # noqa: B023
            )  # fmt: skip
            size = [_pair_norm(x, rotated, d) for x in exact]
            found[f"{dtype_name}, {name}"] = errors(results, oracle, exact, size)
            # One tensor by itself, in the memory order that attention's backward gives.
            q = random((b, heads[0], s, d), dtype, device, 9).permute(2, 0, 1, 3)
            grad = random((b, heads[0], s, d), dtype, device, 10).permute(2, 0, 1, 3)
            one = with_gradients(lambda x: fused.rotate(x, angles), [q], [grad])  # noqa: B023
            oracle = with_gradients(lambda x: apply_plain(x, angles), [q], [grad])  # noqa: B023
            exact = with_gradients(lambda x: apply_plain(x, doubled), [q.double()], [grad.double()])  # noqa: B023
            size = [_pair_norm(x, rotated, d) for x in exact]
            before = fused.rotate(q, angles)
            angles.mul_(2.0)
            assert not torch.equal(fused.rotate(q, angles), before), "angles have changed in place"
            found[f"{dtype_name}, {name}, alone"] = errors(one, oracle, exact, size)
    return found


def _pair_norm(x: Tensor, rotated: int, channels: int) -> Tensor:
    """The length of the pair that each channel is rotated with: a rotation loses no more than ulps of it."""
    shape = x.shape
    x = x.reshape(*shape[:2], -1, channels)
    halves = x[..., :rotated].unflatten(-1, (2, -1))
    length = halves.norm(dim=-2, keepdim=True).expand_as(halves).flatten(-2)
    return torch.cat([length, x[..., rotated:].abs()], dim=-1).reshape(shape)


# --- RMSNorm -----------------------------------------------------------------------------------------------


def norm_errors(device: str) -> dict[str, dict[str, float]]:
    from metis.mcore.fused_norm import rms_norm
    from metis.mcore.norm import _RMSNormFunction

    found = {}
    eps = 1e-5

    def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    for dtype_name, dtype in DTYPES.items():
        # Rows by columns: many short rows, a width that is no power of two, rows longer than a tile.
        for shape in ((7, 3, 128), (50, 1, 96), (3, 2, 5000), (1, 40)):
            x = random(shape, dtype, device) * 3
            x[..., 0] *= 30  # an outlier channel
            weight = random(shape[-1:], dtype, device, 2)
            grad = random(shape, dtype, device, 3)
            fused = with_gradients(lambda *t: rms_norm(*t, eps), [x, weight], [grad])
            plain = with_gradients(lambda *t: _RMSNormFunction.apply(*t, eps), [x, weight], [grad])
            exact = with_gradients(exact_norm, [x.double(), weight.double()], [grad.double()])
            y, grad_x, grad_weight = exact
            row_max = grad_x.abs().amax(-1, keepdim=True).expand_as(grad_x)
            size = [y.abs(), row_max, grad_weight.abs().amax().expand_as(grad_weight)]
            for index, part in enumerate(("y", "dx", "dw")):
                three = [[results[index]] for results in (fused, plain, exact, size)]
                found[f"{dtype_name}, {'x'.join(map(str, shape))}, {part}"] = errors(*three)
    return found


# --- cross entropy -----------------------------------------------------------------------------------------


class OneRank:
    """A process group of this process alone."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def cross_entropy_errors(device: str, group: Any = OneRank()) -> dict[str, dict[str, float]]:  # noqa: B008
    """Every rank of a group holds its columns of the same logits."""
    from metis.mcore.fused_cross_entropy import fused_cross_entropy

    found = {}
    # padded vocabulary, true one, tokens; 20 of 48: with two ranks the second holds padding alone.
    for padded, vocab, shape in (
        (48, 48, (5, 2)),
        (48, 37, (5, 2)),
        (48, 20, (3, 1)),
        (40000, 39000, (3, 1)),
    ):
        width = padded // group.size()
        part = slice(group.rank() * width, (group.rank() + 1) * width)
        num_true = min(max(vocab - part.start, 0), width)
        labels = (torch.arange(shape[0] * shape[1]).view(shape) * 7919 % vocab).to(device)
        grad = random(shape, torch.float32, device, 4)
        grad[0] = 0.0  # a token that a loss mask removes
        for dtype_name, dtype in DTYPES.items():
            full = random((*shape, padded), dtype, device) * 4

            def plain(x: Tensor, vocab: int = vocab, labels: Tensor = labels) -> Tensor:
                x = x.float() if x.dtype != torch.float64 else x
                loss = torch.nn.functional.cross_entropy(x[..., :vocab].flatten(0, 1), labels.view(-1),
                                                         reduction="none")  # fmt: skip
                return loss.view(labels.shape)

            fused = with_gradients(
                lambda x: fused_cross_entropy(x * 1, labels, num_true, group), [full[..., part]], [grad]  # noqa: B023
            )  # fmt: skip
            oracle = with_gradients(plain, [full], [grad])
            exact = with_gradients(plain, [full.double()], [grad.double()])
            target = torch.nn.functional.one_hot(labels, padded)
            probability = torch.softmax(full.double()[..., :vocab], -1)
            probability = torch.nn.functional.pad(probability, (0, padded - vocab))
            largest = torch.maximum(probability, target) * grad.double().unsqueeze(-1).abs()
            name = f"{dtype_name}, {vocab} of {padded}"
            scale = exact[0].abs() + full.double().abs().amax(-1)
            found[f"{name}, loss"] = errors([fused[0]], [oracle[0]], [exact[0]], [scale])
            pieces = [[x[..., part]] for x in (oracle[1], exact[1], largest)]
            found[f"{name}, grad"] = errors([fused[1]], *pieces)
            assert not fused[1][..., num_true:].any(), "padding has no gradient"
    return found


KERNELS: dict[str, Callable[[str], dict[str, dict[str, float]]]] = {
    "rotary": rotary_errors,
    "norm": norm_errors,
    "cross_entropy": cross_entropy_errors,
}


# --- times -------------------------------------------------------------------------------------------------


def milliseconds(function: Callable[[], object]) -> float:
    """Median of 20 runs on the GPU, after 5."""
    times = []
    for index in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if index >= 5:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def rotary_times() -> dict[str, float]:
    """One block of LLaMA-3 8B, 4096 tokens, forward and backward."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as apply_plain

    from metis.mcore.rotary import FusedRotary

    s, groups, per_group, d = 4096, 8, 4, 128
    widths = [per_group * d, d, d]
    angles = torch.rand(s, 1, 1, d, device="cuda") * 1000
    mixed = random((s, 1, groups, (per_group + 2) * d), torch.bfloat16, "cuda").requires_grad_()
    fused = FusedRotary()

    def plain(x: Tensor) -> Any:
        q, k, v = torch.split(x, widths, dim=3)
        return apply_plain(q.reshape(s, 1, -1, d), angles), apply_plain(k, angles), v

    def run(function: Callable[[Tensor], Any]) -> Callable[[], object]:
        outputs = function(mixed)
        grads = [torch.randn_like(y) for y in outputs]
        return lambda: torch.autograd.grad(function(mixed), mixed, grads)

    return {
        "plain": milliseconds(run(plain)),
        "fused": milliseconds(run(lambda x: fused.rotate_qkv(x, angles, angles, widths))),
    }


def norm_times() -> dict[str, float]:
    """4096 tokens of hidden size 4096, forward and backward."""
    from metis.mcore.fused_norm import rms_norm
    from metis.mcore.norm import _RMSNormFunction

    x = random((4096, 1, 4096), torch.bfloat16, "cuda").requires_grad_()
    weight = torch.ones(4096, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    grad = torch.randn_like(x)
    run = torch.autograd.grad
    return {
        "plain": milliseconds(lambda: run(_RMSNormFunction.apply(x, weight, 1e-5), [x, weight], grad)),
        "fused": milliseconds(lambda: run(rms_norm(x, weight, 1e-5), [x, weight], grad)),
    }


def cross_entropy_times() -> dict[str, float]:
    """4096 tokens of a vocabulary of 128256, forward and backward, with a copy of the logits in both."""
    from metis.mcore.fused_cross_entropy import fused_cross_entropy

    logits = random((4096, 1, 128256), torch.bfloat16, "cuda").requires_grad_()
    labels = torch.randint(128000, (4096, 1), device="cuda")
    grad = torch.ones(4096, 1, device="cuda")

    def plain(x: Tensor) -> Tensor:
        loss = torch.nn.functional.cross_entropy(x.float().squeeze(1), labels.view(-1), reduction="none")
        return loss.view(labels.shape)

    run = torch.autograd.grad
    return {
        "plain": milliseconds(lambda: run(plain(logits * 1), logits, grad)),
        "fused": milliseconds(
            lambda: run(fused_cross_entropy(logits * 1, labels, 128000, OneRank()), logits, grad)
        ),
        "copy": milliseconds(lambda: run(logits * 1, logits, logits)),
    }


TIMES: dict[str, Callable[[], dict[str, float]]] = {
    "rotary": rotary_times,
    "norm": norm_times,
    "cross_entropy": cross_entropy_times,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--kernels", nargs="+", choices=tuple(KERNELS), default=tuple(KERNELS))
    args = parser.parse_args()
    import megatron_patches

    megatron_patches.apply_patches(args.device)
    torch.set_num_threads(1)
    if args.device == "cpu":
        round_like_a_gpu()
    result: dict[str, Any] = {name: KERNELS[name](args.device) for name in args.kernels}
    if args.device == "cuda":
        result["milliseconds"] = {name: TIMES[name]() for name in args.kernels if name in TIMES}
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

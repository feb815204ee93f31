"""Launching a kernel that has been compiled before, without asking Triton what to compile.

Triton looks at every argument of every launch (types, alignment, divisibility) and at its settings; on a slow
host that takes longer than the kernels do. Here the answer is remembered under a key that fixes all of it:
the values of sizes and strides, alignment and dtype of tensors, compile-time constants. What changes from
step to step (`volatile`) is outside the key, and is never specialised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Launcher:
    """One Triton kernel; its parameters in order: tensors and sizes, volatile ints, constants."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int],
        args: tuple[Tensor | int | float | None, ...],
        constants: tuple[Any, ...],
        volatile: tuple[int, ...] = (),
        **options: Any,
    ) -> None:
        """Launch on a grid of two axes; options: num_warps, num_stages, enable_fp_fusion.

        bf16 tensors reach the kernel as int16 pointers.
        """
        first = args[0]
        assert isinstance(first, Tensor)
        if not first.is_cuda:  # the interpreter, or a compilation without a device
            self._compile(grid, args, constants, volatile, options)
            return
        device = first.device.index
        key: list[Any] = [device, grid, constants, *options.values()]
        for argument in args:
            if isinstance(argument, Tensor):
                key.append((argument.data_ptr() & 15, argument.dtype))
            else:
                key.append(argument)
        kind = tuple(key)
        run = self._compiled.get(kind)
        if run is None:
            compiled = self._compile(grid, args, constants, volatile, options)
            self._compiled[kind] = compiled[(*grid, 1)]
        else:
            # The stream is named, or Triton would look it up through its driver's proxy.
            run(*args, *volatile, *constants, stream=torch._C._cuda_getCurrentRawStream(device))

    def _compile(
        self,
        grid: tuple[int, int],
        args: tuple[Any, ...],
        constants: tuple[Any, ...],
        volatile: tuple[int, ...],
        options: dict[str, Any],
    ) -> Any:
        loadable = (
            argument.view(torch.int16)
            if isinstance(argument, Tensor) and argument.dtype == torch.bfloat16
            else argument
            for argument in args
        )
        return self.kernel[grid](*loadable, *volatile, *constants, **options)

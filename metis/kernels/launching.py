"""Launching a kernel that has been compiled before, without asking Triton what to compile.

Triton looks at every argument of every launch (types, alignment, divisibility) and at its settings, which on
a slow host takes longer than the kernels do. Here a caller describes a launch by a key (shapes, strides,
dtypes, alignment, options) once; checks, grid, sizes and compile-time constants are worked out when the key
is new. Then only pointers are passed, and what changes from step to step (`volatile`), which is never
specialised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Key = tuple[Any, ...]


class Prepared:
    """One kind of launch of one kernel. kept: tensors that go with it (signs, indices)."""

    __slots__ = ("_constants", "_grid", "_kernel", "_numbers", "_options", "_run", "kept")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        numbers: tuple[int | float, ...],
        constants: tuple[Any, ...],
        options: dict[str, Any],
        kept: tuple[Tensor | None, ...],
    ) -> None:
        self._kernel, self._grid, self._numbers = kernel, grid, numbers
        self._constants, self._options, self.kept = constants, options, kept
        self._run: Any = None

    def __call__(self, tensors: Sequence[Tensor | None], volatile: tuple[int, ...] = ()) -> None:
        """Launch; bf16 tensors reach the kernel as int16 pointers."""
        first = tensors[0]
        assert first is not None
        if self._run is not None:
            # The stream is named, or Triton would look it up through its driver's proxy.
            stream = torch._C._cuda_getCurrentRawStream(first.get_device())
            self._run(*tensors, *self._numbers, *volatile, *self._constants, stream=stream)
            return
        loadable = (
            tensor.view(torch.int16) if tensor is not None and tensor.dtype == torch.bfloat16 else tensor
            for tensor in tensors
        )
        compiled = self._kernel[self._grid](
            *loadable, *self._numbers, *volatile, *self._constants, **self._options
        )
        if first.is_cuda:  # else the interpreter, or a compilation without a device
            self._run = compiled[(*self._grid, 1)]


class Launcher:
    """One Triton kernel; its parameters in order: tensors, numbers, volatile ints, constants."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._prepared: dict[Key, Prepared] = {}

    def ready(self, key: Key) -> Prepared | None:
        """Return the launch of a key that has been prepared."""
        return self._prepared.get(key)

    def prepare(
        self,
        key: Key,
        grid: tuple[int, int],
        numbers: tuple[int | float, ...],
        constants: tuple[Any, ...],
        kept: tuple[Tensor | None, ...] = (),
        **options: Any,
    ) -> Prepared:
        """Remember a launch; options: num_warps, num_stages, enable_fp_fusion."""
        self._prepared[key] = Prepared(self._kernel, grid, numbers, constants, options, kept)
        return self._prepared[key]

    def __call__(
        self,
        grid: tuple[int, int],
        args: tuple[Tensor | int | float | None, ...],
        constants: tuple[Any, ...],
        volatile: tuple[int, ...] = (),
        **options: Any,
    ) -> None:
        """Launch with a key made of everything: for launches that are not worth one of their own."""
        tensors = tuple(a for a in args if a is None or isinstance(a, Tensor))
        numbers = tuple(a for a in args if isinstance(a, int | float))
        key = (*(layout(tensor) for tensor in tensors), grid, numbers, constants)
        ready = self.ready(key) or self.prepare(key, grid, numbers, constants, **options)
        ready(tensors, volatile)


def layout(tensor: Tensor | None) -> Key:
    """Return what a key must know of a tensor: device, dtype, shape, strides, alignment."""
    if tensor is None:
        return ()
    return (
        tensor.get_device(), tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() & 15,
    )  # fmt: skip

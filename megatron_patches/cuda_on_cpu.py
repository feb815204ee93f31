"""Lets megatron-core run on a CPU: its CUDA literals mean the CPU, and its CUDA streams mean nothing.

megatron-core writes `device="cuda"`, `torch.cuda.current_device()`, `.cuda()`, `pin_memory=True` and compares
`tensor.type()` with 'torch.cuda.FloatTensor' in some hundred places. One function mode answers all of them
where torch is called, instead of a hundred patches where it is written; a few names of `torch.cuda` that
raise without a GPU become inert.

Traps: a function mode belongs to one thread, so threads that create tensors on "cuda" are not covered
(autograd on the CPU runs in the calling thread, forked processes inherit the mode). On the CPU there is one
generator: what the engine calls the CUDA state is the CPU state, and `Tensor.type()` keeps its own answer for
callers outside megatron.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_patches.registry import Patch, Target

_CALLERS_THAT_EXPECT_CUDA = ("megatron.", "megatron_patches.")
_RNG_LOGGER = "megatron.core.tensor_parallel.random"


def called_from_engine(depth: int) -> bool:
    """Return whether the Python frame `depth` levels above the caller of this function belongs to
    megatron.
    """
    return sys._getframe(depth + 1).f_globals.get("__name__", "").startswith(_CALLERS_THAT_EXPECT_CUDA)


def is_type_query(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a torch call is `tensor.type()`, the form that answers with a name."""
    return function == torch.Tensor.type and len(args) == 1 and not kwargs


class CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices in torch calls of this thread to the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one torch call; see the class."""
        kwargs = kwargs or {}
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs = {**kwargs, "device": "cpu"}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func in _SPECIAL:
            if func == torch.Tensor.to:
                args = tuple("cpu" if _is_cuda(value) else value for value in args)
            elif func == torch.Tensor.type:
                name = func(*args, **kwargs)
                if is_type_query(func, args, kwargs) and called_from_engine(1):
                    return name.replace("torch.", "torch.cuda.", 1) if "cuda" not in name else name
                return name
            else:  # .cuda() and .pin_memory()
                return args[0]
        return func(*args, **kwargs)


_SPECIAL = frozenset(
    {
        torch.Tensor.to,
        torch.Tensor.cuda,
        torch.Tensor.pin_memory,
        torch.Tensor.type,
    }
)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _enter_mode() -> bool:
    stack = torch.overrides._get_current_function_mode_stack()
    if any(isinstance(mode, CudaMeansCpu) for mode in stack):
        return False
    CudaMeansCpu().__enter__()  # for the life of the process
    return True


class _Stream:
    """A CUDA stream where there is none: work is done when the call returns."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        """Nothing is in flight."""

    def query(self) -> bool:
        """Nothing is in flight."""
        return True

    def wait_stream(self, stream: Any) -> None:
        """Nothing is in flight."""

    def wait_event(self, event: Any) -> None:
        """Nothing is in flight."""

    def record_event(self, event: Any = None) -> Any:
        """Return the event, or a new one."""
        return event if event is not None else _Event()


class _Event:
    """A CUDA event where there is none: it has always happened."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Nothing is in flight."""

    def wait(self, stream: Any = None) -> None:
        """Nothing is in flight."""

    def query(self) -> bool:
        """Nothing is in flight."""
        return True

    def synchronize(self) -> None:
        """Nothing is in flight."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return 0 milliseconds: events are not timed on a CPU."""
        return 0.0


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing: there is no GPU."""


@contextlib.contextmanager
def _no_context(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    yield


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _stub(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """A fresh function for each target, because a target's marker is an attribute of its replacement."""

    def stub(*args: Any, **kwargs: Any) -> Any:
        return implementation(*args, **kwargs)

    return stub


_STUBS: dict[str, Callable[..., Any] | type] = {
    "torch.cuda.Stream": _Stream,
    "torch.cuda.Event": _Event,
    "torch.cuda.stream": _no_context,
    "torch.cuda.current_stream": _Stream,
    "torch.cuda.default_stream": _Stream,
    "torch.cuda.set_stream": _nothing,
    "torch.cuda.synchronize": _nothing,
    "torch.cuda.current_device": lambda: "cpu",
    "torch.cuda.set_device": _nothing,
    "torch.cuda.empty_cache": _nothing,
    "torch.cuda.reset_peak_memory_stats": _nothing,
    "torch.cuda.get_rng_state": _get_rng_state,
    "torch.cuda.set_rng_state": _set_rng_state,
    "torch.cuda.random.get_rng_state": _get_rng_state,
    "torch.cuda.random.set_rng_state": _set_rng_state,
    "torch.cuda.manual_seed": _manual_seed,
    "torch.cuda.nvtx.range_push": _nothing,
    "torch.cuda.nvtx.range_pop": _nothing,
    "torch.cuda.nvtx.range": _no_context,
    "torch.Tensor.record_stream": _nothing,  # not in the mode: torch parses the stream argument first
}


def _replace_torch_cuda(original: Any, path: str) -> Any:
    stub = _STUBS[path]
    # Stream and Event stay classes: annotations such as `torch.cuda.Stream | None` are evaluated at import.
    return stub if isinstance(stub, type) and isinstance(original, type) else _stub(stub)


def _replace_set_rng_state(original: Callable[..., None], path: str) -> Callable[..., None]:
    def _set_cuda_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        """Set the CPU generator; upstream would queue the call until CUDA starts."""
        torch.default_generator.set_state(new_state)

    return _set_cuda_rng_state


class _OneGenerator(logging.Filter):
    """Drops 'CPU RNG state changed within GPU RNG context': on the CPU it is true of every fork."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown."""
        return "CPU RNG state changed" not in record.getMessage()


def _filter_rng_warning() -> bool:
    log = logging.getLogger(_RNG_LOGGER)
    if any(isinstance(existing, _OneGenerator) for existing in log.filters):
        return False
    log.addFilter(_OneGenerator())
    return True


PATCHES = (
    Patch(
        name="torch_cuda_stubs",
        why="names of torch.cuda that raise without a GPU",
        reaches="timers, DDP streams, p2p synchronisation, checkpoint staging, RNG states, profiler ranges",
        upstream="torch.cuda; about 120 uses in megatron/core, e.g. timers.py:152",
        delete_when="megatron-core asks a device abstraction instead of torch.cuda",
        devices=("cpu",),
        targets=tuple(Target(path=path) for path in _STUBS),
        replace=_replace_torch_cuda,
    ),
    Patch(
        name="cuda_means_cpu",
        why="CUDA device literals, pinned memory and names of CUDA tensor types",
        reaches="every torch call of the thread that applied the patches, and of processes forked from it",
        upstream=(
            "literals all over megatron/core; Tensor.type() in optimizer/optimizer.py:671-690, "
            "optimizer/distrib_optimizer.py:361-420, optimizer/clip_grads.py:167"
        ),
        delete_when="megatron-core creates tensors on the device of its parameters",
        devices=("cpu",),
        relies_on=(
            Target(
                path="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups",
                source_hash="1b9f0ec06718f817fe8ce6b8bc62ae2a4e096a3cf599a19511ce9d9355f3b7f8",
            ),
            Target(
                path="megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.__init__",
                source_hash="1d470dedcf8e2f0ee8cf6e02bef57a96debdbc7bebbad78a52b50001d9b8b839",
            ),
            Target(
                path="megatron.core.optimizer.clip_grads.clip_grad_by_total_norm_fp32",
                source_hash="8edb9da5365045a5d1c21c4ca81697412bbdbab725209db8df00dc90d03363e1",
            ),
        ),
        activate=_enter_mode,
    ),
    Patch(
        name="rng_tracker_on_cpu",
        why="the RNG tracker sets the state of a CUDA generator that does not exist",
        reaches="get_cuda_rng_tracker().fork(), add(), recompute's _set_all_rng_states",
        upstream="megatron/core/tensor_parallel/random.py lines 72-114, the filtered warning: line 265",
        delete_when="megatron-core's RNG tracker takes a device",
        devices=("cpu",),
        targets=(
            Target(
                path="megatron.core.tensor_parallel.random._set_cuda_rng_state",
                source_hash="b179c9d95438b61c1d9b58e8e13cc6534f2ae2f870d991c42438de53829ed398",
            ),
        ),
        relies_on=(
            Target(
                path="megatron.core.tensor_parallel.random._get_cuda_rng_state",
                source_hash="aa26caaa069c5c4feff0f9f4e69f0f2ab6d6fc7940f71c3a6d0fe9303447d3dc",
            ),
            Target(
                path="megatron.core.tensor_parallel.random.CudaRNGStatesTracker",
                source_hash="0194c15fce9418b7826af22775a0ec4e3e9db6d1e25b8a40d732a4b79f9f7112",
            ),
        ),
        replace=_replace_set_rng_state,
        activate=_filter_rng_warning,
    ),
)

"""Whether Triton kernels can run on a device; asks without loading Triton."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

MINIMAL_CAPABILITY = (8, 0)
"""Ampere: the first generation with bf16 arithmetic."""


def reason_unavailable(device: torch.device | str) -> str | None:
    """Return why kernels cannot run on `device`, or None when they can."""
    device = torch.device(device)
    if not _has_triton():
        return "Triton is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "a CPU runs them only under Triton's interpreter (TRITON_INTERPRET=1, for tests)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"there are none for {device.type}{' (ROCm)' if torch.version.hip else ''}"
    return _cuda_reason(device)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # hidden on purpose
        return False


@lru_cache(maxsize=64)
def _cuda_reason(device: torch.device) -> str | None:
    """Asked before every launch, hence remembered."""
    if not torch.cuda.is_available():
        return "CUDA is not available"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMAL_CAPABILITY:
        return f"compute capability {capability} is below {MINIMAL_CAPABILITY}"
    return None


def is_available(device: torch.device | str) -> bool:
    """Return whether the kernels run on `device`: CUDA from Ampere on, or a CPU under the interpreter."""
    return reason_unavailable(device) is None

"""One cuBLAS call for `out = alpha A B^T + out`, with alpha read from the GPU.

Torch's products take alpha as a host number, so a scale that lives on the device costs a pass of its own over
an fp32 accumulator, and an fp32 gradient accumulator another one. cuBLAS does both in the product's epilogue:
alpha is multiplied in fp32 before the one rounding to the output's type. The library and the handle are the
ones that torch has loaded; only the entry point is called directly.

Traps:
* cuBLAS is column-major: it is handed the transposed problem, out^T = alpha B A^T.
* The handle's pointer mode is put back after each call; torch relies on host pointers.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from metis.errors import ConfigError, ShapeError

_NAMES = ("libcublas.so.13", "libcublas.so.12")
_OP_N, _OP_T = 0, 1
_POINTER_MODE_HOST, _POINTER_MODE_DEVICE = 0, 1
_COMPUTE_32F = 68
_DEFAULT_ALGORITHM = -1
_DATA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """Return cuBLAS as torch has loaded it, None where there is none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    torch.cuda.current_blas_handle()  # makes torch load it
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.cublasSetPointerMode_v2.argtypes = [ctypes.c_void_p, ctypes.c_int]
        library.cublasGemmEx.argtypes = [
            ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int,
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int,
            ctypes.c_int,
        ]  # fmt: skip
        return library
    return None


def is_available() -> bool:
    """Whether `gemm` can run here."""
    return _library() is not None


@lru_cache(maxsize=64)
def _constants(device_index: int) -> tuple[Tensor, Tensor]:
    """Return 1 and 0 in fp32 on a GPU."""
    one, zero = torch.tensor([1.0, 0.0], dtype=torch.float32, device=f"cuda:{device_index}")
    return one, zero


def gemm(
    a: Tensor, b: Tensor, out: Tensor, *, alpha: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """Compute `out = alpha a b^T`, or `out += alpha a b^T` with `accumulate`; returns `out`.

    a: [M, K], b: [N, K], both bf16 (or both fp16, both fp32), each contiguous along one of its axes. out:
    [M, N] fp32 or the operands' dtype, contiguous along N. alpha: fp32 0-dim on the same device; None: 1.
    Products are summed in fp32; `alpha * sum (+ out)` is formed in fp32 and rounded once to out's dtype.

    Raises ShapeError where shapes, dtypes or strides do not fit, ConfigError where there is no cuBLAS.
    """
    library = _library()
    if library is None:
        raise ConfigError("metis.gemm.cublas", "needs a CUDA build of torch and a GPU; use torch.mm")
    m, k = a.shape
    n = b.shape[0]
    if b.shape[1] != k or out.shape != (m, n) or a.dtype != b.dtype or out.stride(1) != 1:
        raise ShapeError(
            "metis.gemm.cublas",
            f"needs a [M, K], b [N, K] of one dtype and out [M, N] contiguous along N, received "
            f"{tuple(a.shape)} {a.dtype}, {tuple(b.shape)} {b.dtype}, {tuple(out.shape)} with strides "
            f"{out.stride()}",
        )
    op_a, lda = _operation(a, is_left=False)
    op_b, ldb = _operation(b, is_left=True)
    one, zero = _constants(a.device.index)
    alpha = one if alpha is None else alpha
    beta = one if accumulate else zero
    handle = torch.cuda.current_blas_handle()
    library.cublasSetPointerMode_v2(handle, _POINTER_MODE_DEVICE)
    status = library.cublasGemmEx(
        handle, op_b, op_a, n, m, k, alpha.data_ptr(), b.data_ptr(), _DATA_TYPES[b.dtype], ldb,
        a.data_ptr(), _DATA_TYPES[a.dtype], lda, beta.data_ptr(), out.data_ptr(), _DATA_TYPES[out.dtype],
        max(out.stride(0), n), _COMPUTE_32F, _DEFAULT_ALGORITHM,
    )  # fmt: skip
    library.cublasSetPointerMode_v2(handle, _POINTER_MODE_HOST)
    if status != 0:
        raise RuntimeError(
            f"cublasGemmEx failed with status {status} for [{m}, {k}] x [{n}, {k}]^T, {a.dtype} to "
            f"{out.dtype}"
        )
    return out


def _operation(matrix: Tensor, is_left: bool) -> tuple[int, int]:
    """Return (operation, leading dimension) of a matrix [rows, K] that cuBLAS reads as [rows, K] (on the
    left) or [K, rows].

    Row-major memory is a column-major [K, rows]. The stride of an axis of size one says nothing.
    """
    num_rows, num_columns = matrix.shape
    by_row, by_column = matrix.stride()
    if by_column == 1 and (by_row >= num_columns or num_rows == 1):
        return (_OP_T if is_left else _OP_N), max(by_row, num_columns)
    if by_row == 1 and (by_column >= num_rows or num_columns == 1):
        return (_OP_N if is_left else _OP_T), max(by_column, num_rows)
    raise ShapeError(
        "metis.gemm.cublas",
        "an operand must be contiguous along one axis, and its rows must not overlap, received strides "
        f"{matrix.stride()} for {tuple(matrix.shape)}",
    )

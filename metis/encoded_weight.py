"""What a linear's products read of its weight, made once per optimizer step.

One idea: the weight does not change between optimizer steps, so its split, its codes and the thin products
with the bases in use are made by the first microbatch and read by all others, in forward and in backward.

Two ways to keep the codes, with the same products, bit for bit:

    "operand"   decoded, in buffers as wide as the products want them: 2 bytes per weight
    "codes"     4-bit codes and block scales (NVFP4: 0.5625 bytes per weight in blocks of 16, 0.504 in tiles);
                each product decodes them into a buffer of its own, which goes when the product is formed.
                A weight whose head is added back has no codes: it is kept as an operand

Where both products read the same tiles one copy serves both. A buffer has the same strides either way, so
that the library that multiplies is asked the same. Each product fills in what depends on its own alpha.

Traps:
* An engine may write parameters through another tensor, and anybody through `.data`, which no version counter
  sees; the training loop therefore clears the cache after every optimizer step, and `MetisLinear` keeps
  nothing of a pass without gradients.
* Only `WeightCache.get` looks at anything but tensors on the device; encoding and decoding launch the same
  kernels on the same places every time, and the host reads nothing back.

Shape letters: K in_features, N out_features, r_x, r_w, r_g ranks of the bases of x, w and g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metis.config import QuantizerConfig
from metis.errors import ConfigError
from metis.functional import LinearPlan
from metis.fused_operand import (
    amaxes,
    basis_of,
    decode_into,
    head_basis_of,
    is_merged,
    place_all,
    quantize_into,
    quantize_to_bytes,
    split,
    wide,
    width_of,
)
from metis.gemm import scaled_product
from metis.kernels import Thin

KEEP = ("operand", "codes")
"""What a `WeightCache` can hold."""

CHOICES = ("auto", *KEEP)

SMALL_WEIGHT = 2**22
"""Weights (8 MiB in bf16) below which "auto" keeps the operand, which takes fewer launches; a choice, not
measured.
"""

_CELLS = ("fprop_weight", "dgrad_weight")
_COLUMNS, _ROWS = 1, 0

_Quantizers = tuple[QuantizerConfig | None, QuantizerConfig | None]
_Pair = tuple[Tensor | None, Tensor | None]
"""Of fprop's side and dgrad's."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a buffer is divided along `axis`: the weight, room for a factor that carries 1 / alpha, the head.

    sizes: of the three, along `axis`; other: of the other axis. row_stride: numbers from one row to the next.
    """

    axis: int
    sizes: tuple[int, int, int]
    other: int
    row_stride: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the buffer."""
        total = sum(self.sizes)
        return (self.other, total) if self.axis == _COLUMNS else (total, self.other)

    def new_buffer(self, like: Tensor) -> Tensor:
        """Return an uninitialised buffer."""
        rows, cols = self.shape
        return wide(like, rows, self.row_stride)[:, :cols]

    def cut_from(self, whole: Tensor) -> Tensor:
        """Return the buffer as a view of one with the same or more rows and columns."""
        rows, cols = self.shape
        return whole[:rows, :cols]

    def weight_in(self, buffer: Tensor) -> Tensor:
        """Return the place of the weight, [N, K]; a view."""
        return buffer.narrow(self.axis, 0, self.sizes[0])

    def scaled_in(self, buffer: Tensor) -> Tensor:
        """Return the place of the factor that carries 1 / alpha; a view."""
        return buffer.narrow(self.axis, self.sizes[0], self.sizes[1])

    def head_in(self, buffer: Tensor) -> Tensor:
        """Return the place of the head; a view."""
        return buffer.narrow(self.axis, self.sizes[0] + self.sizes[1], self.sizes[2])


@dataclass(frozen=True, slots=True)
class _Codes:
    """Packed codes and scale bytes of the weight, or of its transpose [K, N]."""

    packed: Tensor
    scale_bytes: Tensor
    quantizer: QuantizerConfig
    is_transposed: bool

    def decode(self, place: Tensor) -> None:
        """Write the operand into `place` [N, K]."""
        turned = place.t() if self.is_transposed else place
        decode_into(turned, self.packed, self.scale_bytes, self.quantizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSide:
    """The weight as one product reads it: [N, K + r_x + r_w] for fprop, [N + r_g + r_w, K] for dgrad.

    kept: that buffer, complete but for the columns or rows of `scaled`, or the codes that it is made from.
    scaled: the factor that goes in times 1 / alpha, fp32, w V_x [N, r_x] or V_g^T w [r_g, K]. head: the one
    that goes in as it is, bf16, U [N, r_w] or V_w^T [r_w, K]. amax: of what was quantised, None where nothing
    is scaled by it. is_merged: the head has been added back, and the tensor scale is in the operand.
    """

    layout: _Layout
    kept: Tensor | _Codes
    scaled: Tensor | None
    head: Tensor | None
    amax: Tensor | None
    is_merged: bool = False

    def open(self) -> tuple[Tensor, list[Thin]]:
        """Return the buffer of one product and what has to be placed there before it is multiplied."""
        layout, factors = self.layout, []
        if isinstance(self.kept, Tensor):
            buffer = self.kept
        else:
            buffer = layout.new_buffer(self.kept.packed)
            self.kept.decode(layout.weight_in(buffer))
            if self.head is not None:
                factors.append(Thin(self.head, layout.head_in(buffer), False))
        if self.scaled is not None:
            factors.append(Thin(self.scaled, layout.scaled_in(buffer), True))
        return buffer, factors


@dataclass(frozen=True, slots=True)
class EncodedWeight:
    """What a linear's products read of its weight in one optimizer step.

    fprop, dgrad: None where the cell does not quantise: that product reads the weight itself. u = P of the
    weight, [N, r_w].
    """

    fprop: EncodedSide | None = None
    dgrad: EncodedSide | None = None
    u: Tensor | None = None


class WeightCache:
    """Keeps the encoded weight of the running step; `clear` whenever the weight may have changed.

    keep: "operand" or "codes", see above, or "auto": the operand where a rank holds fewer than `SMALL_WEIGHT`
    weights, else codes. The training loop clears it after the optimizer step
    (`advance_bases`). Another tensor in the weight's place and an in-place change that torch counts (an
    optimizer's, a `load_state_dict`) are noticed without that, and so are another step and other bases. A
    copied or unpickled cache is empty. Raises ConfigError for another `keep`.
    """

    def __init__(self, keep: str = "auto") -> None:
        if keep not in CHOICES:
            raise ConfigError("weight cache", f"must keep one of {CHOICES}, received {keep!r}")
        self.keep = keep
        self._key: tuple[Any, ...] | None = None
        self._held: tuple[Tensor | None, ...] = ()
        self._encoded: EncodedWeight | None = None

    def clear(self) -> None:
        """Forget the weight."""
        self._key, self._held, self._encoded = None, (), None

    def get(self, w_NK: Tensor, plan: LinearPlan) -> EncodedWeight:
        """Return the weight as this step's products read it."""
        tensors = (w_NK, plan.v_input, plan.v_weight, plan.v_grad_output)
        # By memory and version: a view of the same basis is the same basis.
        places = tuple(None if t is None else (t.data_ptr(), _version(t)) for t in tensors)
        key = (plan.position.step, *places)
        if key != self._key:
            self.clear()  # the old one goes before the new one comes
            self._encoded = encode_weight(w_NK, plan, self.keep)
            # Kept, so that no other tensor can come to lie where these lie.
            self._held = tuple(None if t is None else t.detach() for t in tensors)
            self._key = key
        assert self._encoded is not None
        return self._encoded

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        return WeightCache(self.keep)

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightCache, (self.keep,)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def encode_weight(w_NK: Tensor, plan: LinearPlan, keep: str = "auto") -> EncodedWeight:
    """Split and quantise a weight for both products that read it, with the factors that go beside it.

    w: bf16 [N, K], contiguous along K. keep: see `WeightCache`.
    """
    cells = tuple(getattr(plan.recipe, name) for name in _CELLS)
    quantizers = cells[0].quantizer, cells[1].quantizer
    if quantizers == (None, None):
        return EncodedWeight()
    if keep == "auto":
        keep = "operand" if w_NK.numel() < SMALL_WEIGHT else "codes"
    num_out, num_in = w_NK.shape
    v_x, v_g = head_basis_of(plan, "fprop_input"), head_basis_of(plan, "dgrad_grad_output")
    its_cell = _CELLS[0] if cells[0].split is not None else _CELLS[1]
    v_w, merges = basis_of(plan, its_cell), is_merged(plan, its_cell)
    u, amax, residual = None, None, w_NK
    if v_w is not None:
        u, amax, residual, _ = split(w_NK, v_w, plan.in_features, plan)
    if merges:
        u = v_w = None
    r_x, r_g, r_w = width_of(v_x), width_of(v_g), width_of(v_w)
    known = amaxes(residual, plan, _CELLS, quantizers, amax)
    width = num_in + r_x + r_w
    layouts = (
        _Layout(_COLUMNS, (num_in, r_x, r_w), num_out, width),
        _Layout(_ROWS, (num_out, r_g, r_w), num_in, width if _share_tiles(quantizers) else num_in),
    )
    heads = u, None if v_w is None else v_w.t()
    kept: Sequence[Tensor | _Codes | None]
    if keep == "codes" and not merges:
        kept = _codes(residual, plan, quantizers, known)
    else:
        whole = w_NK if merges else None
        kept = _operands(residual, plan, quantizers, known, layouts, heads, whole)
    scaled = (
        None if v_x is None else _fp32(w_NK, v_x.t()),
        None if v_g is None else _fp32(v_g.t(), w_NK.t()),
    )
    fprop, dgrad = (
        None
        if its is None
        else EncodedSide(layout=layout, kept=its, scaled=thin, head=head, amax=of_it, is_merged=merges)
        for its, layout, thin, head, of_it in zip(kept, layouts, scaled, heads, known, strict=True)
    )
    return EncodedWeight(fprop, dgrad, u)


def _share_tiles(quantizers: _Quantizers) -> bool:
    """Whether both products read the same codes: those of tiles are their transpose's."""
    return quantizers[0] is not None and quantizers[0] == quantizers[1] and not quantizers[0].is_1d


def _codes(residual: Tensor, plan: LinearPlan, quantizers: _Quantizers, known: _Pair) -> list[_Codes | None]:
    """Return the codes of either side, the same ones where tiles serve both."""
    kept: list[_Codes | None] = []
    for side, quantizer in enumerate(quantizers):
        if quantizer is None:
            kept.append(None)
        elif side == 1 and _share_tiles(quantizers):
            kept.append(kept[0])
        else:
            matrix = residual.t() if side == 1 else residual
            codes = quantize_to_bytes(matrix, quantizer, plan, _CELLS[side], known[side])
            kept.append(_Codes(*codes, quantizer, side == 1))
    return kept


def _operands(
    residual: Tensor,
    plan: LinearPlan,
    quantizers: _Quantizers,
    known: _Pair,
    layouts: tuple[_Layout, _Layout],
    heads: _Pair,
    whole_weight: Tensor | None,
) -> list[Tensor | None]:
    """Return the buffer of either side with weight and head in place; views of one where tiles serve both.

    whole_weight: what the residual is left of, where the head is added back to the operand.
    """
    shares = _share_tiles(quantizers)
    if shares:
        whole = wide(residual, sum(layouts[1].sizes), layouts[0].row_stride)
    kept: list[Tensor | None] = []
    thin: list[Thin] = []
    for side, (quantizer, layout, head) in enumerate(zip(quantizers, layouts, heads, strict=True)):
        if quantizer is None:
            kept.append(None)
            continue
        buffer = layout.cut_from(whole) if shares else layout.new_buffer(residual)
        kept.append(buffer)
        if side == 0 or not shares:
            sides = [residual, whole_weight, layout.weight_in(buffer)]
            if side == 1:
                sides = [None if matrix is None else matrix.t() for matrix in sides]
            matrix, source, place = sides
            assert matrix is not None and place is not None
            quantize_into(matrix, quantizer, plan, _CELLS[side], known[side], place, whole=source)
        if head is not None:
            thin.append(Thin(head, layout.head_in(buffer), False))
    place_all(thin, None)
    return kept


def _fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T in fp32."""
    return scaled_product(a, b, torch.empty(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device))

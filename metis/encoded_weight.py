"""What a linear's products read of its weight, made once per optimizer step.

One idea: the weight does not change between optimizer steps, so its split, its codes and the thin products
with the bases in use are made by the first microbatch and read by all others, in forward and in backward. The
buffers are as wide as the products want them; each product fills in what depends on its own alpha.

Trap: an engine may write parameters through another tensor, which no version counter sees; the training loop
therefore clears the cache after every optimizer step.

Shape letters: K in_features, N out_features, r_x, r_w, r_g ranks of the bases of x, w and g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metis.functional import LinearPlan
from metis.fused_operand import amaxes, basis_of, place_all, quantize_into, split, wide, width_of
from metis.gemm import scaled_product
from metis.kernels import Thin


@dataclass(frozen=True, slots=True)
class EncodedSide:
    """The weight as one product reads it, in a buffer whose further columns (or rows) hold thin factors.

    amax: of what was quantised, None where nothing is scaled by it.
    """

    buffer: Tensor
    amax: Tensor | None


@dataclass(frozen=True, slots=True)
class EncodedWeight:
    """What a linear's products read of its weight in one optimizer step.

    fprop: [N, K + r_x + r_w]; dgrad: [N + r_g + r_w, K]; one buffer where both cells quantise alike in tiles.
    t_input = w V_x, fp32 [N, r_x]; t_grad = V_g^T w, fp32 [r_g, K]. u = P of the weight, [N, r_w].
    """

    fprop: EncodedSide
    dgrad: EncodedSide
    t_input: Tensor | None
    t_grad: Tensor | None
    u: Tensor | None


class WeightCache:
    """Keeps the encoded weight of the running step; `clear` whenever the weight may have changed.

    The training loop clears it after the optimizer step (`advance_bases`). Another tensor in the weight's
    place and an in-place change that torch counts (an optimizer's, a `load_state_dict`) are noticed without
    that, and so are another step and other bases. A copied or unpickled cache is empty.
    """

    def __init__(self) -> None:
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
        places = tuple(None if t is None else (t.data_ptr(), t._version) for t in tensors)
        key = (plan.position.step, *places)
        if key != self._key:
            self.clear()  # the old one goes before the new one comes
            self._encoded = encode_weight(w_NK, plan)
            # Kept, so that no other tensor can come to lie where these lie.
            self._held = tuple(None if t is None else t.detach() for t in tensors)
            self._key = key
        assert self._encoded is not None
        return self._encoded

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        return WeightCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightCache, ()


def encode_weight(w_NK: Tensor, plan: LinearPlan) -> EncodedWeight:
    """Split and quantise a weight for both products that read it, with the factors that go beside it.

    w: bf16 [N, K], contiguous along K.
    """
    names = ("fprop_weight", "dgrad_weight")
    cells = tuple(getattr(plan.recipe, name) for name in names)
    quantizers = cells[0].quantizer, cells[1].quantizer
    if quantizers == (None, None):
        plain = EncodedSide(w_NK, None)
        return EncodedWeight(plain, plain, None, None, None)
    num_out, num_in = w_NK.shape
    v_x, v_g = basis_of(plan, "fprop_input"), basis_of(plan, "dgrad_grad_output")
    v_w = basis_of(plan, names[0] if cells[0].split is not None else names[1])
    r_x, r_g, r_w = width_of(v_x), width_of(v_g), width_of(v_w)
    u, amax, residual = None, None, w_NK
    if v_w is not None:
        u, amax, residual, _ = split(w_NK, v_w, plan.in_features, plan)
    known = amaxes(residual, plan, names, quantizers, amax)
    fprop = dgrad = w_NK
    heads: list[Thin] = []
    shares = quantizers[0] == quantizers[1] and not quantizers[0].is_1d
    if shares:
        whole = wide(w_NK, num_out + r_g + r_w, num_in + r_x + r_w)
        fprop, dgrad = whole[:num_out], whole[:, :num_in]
    if quantizers[0] is not None:
        if not shares:
            fprop = wide(w_NK, num_out, num_in + r_x + r_w)
        quantize_into(residual, quantizers[0], plan, names[0], known[0], fprop[:, :num_in])
        if u is not None:
            heads.append(Thin(u, fprop[:, num_in + r_x :], False))
    if quantizers[1] is not None:
        if not shares:
            dgrad = wide(w_NK, num_out + r_g + r_w, num_in)
            quantize_into(residual.t(), quantizers[1], plan, names[1], known[1], dgrad[:num_out].t())
        if v_w is not None:
            heads.append(Thin(v_w.t(), dgrad[num_out + r_g :], False))
    place_all(heads, None)
    return EncodedWeight(
        fprop=EncodedSide(fprop, known[0]),
        dgrad=EncodedSide(dgrad, known[1]),
        t_input=None if v_x is None else _fp32(w_NK, v_x.t()),
        t_grad=None if v_g is None else _fp32(v_g.t(), w_NK.t()),
        u=u,
    )


def _fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T in fp32."""
    return scaled_product(a, b, torch.empty(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device))

"""Column- and row-parallel linears that compute by a recipe: megatron-core's own classes with another
`_forward_impl`.

Allocation, biases, reductions of the output and checkpoint keys stay the engine's. What is ours lives in
`core` (`metis.nn.LinearCore`, shared with the one-rank `MetisLinear`): the six cells and the bases. Under
sequence parallelism the input of a column-parallel linear and the output gradient of a row-parallel one are
split and quantised on the shard and gathered as codes, with the same bits as if the matrix had been gathered
first (which is what happens where blocks along tokens would cross ranks, and for reparametrised linears).

The recipe can change between steps. While nothing is quantised or split the engine's own `_forward_impl`
runs (or, with an exchange, the overlapped one), so such a phase is bitwise what the engine's class computes.

Reparametrised linears hold u [N, r], s [r], v [K, r] beside `weight` (the residual). Column-parallel: u
sharded with the outputs; row-parallel: v sharded with the inputs; the other factor and s are replicated and
their gradients are summed over the tensor-parallel group in backward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import (
    get_pg_rank,
    get_pg_size,
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)
from torch import Tensor

from metis.clock import TrainingClock
from metis.config import Recipe
from metis.exchange import Exchange
from metis.gemm import GemmBackend
from metis.mcore.axes import qkv_axis, sequence_shard_axis, sharded_axis, token_axis
from metis.mcore.overlapped_linear import OverlappedColumnParallelLinear, OverlappedRowParallelLinear
from metis.nn import LinearCore, OperandBasis, SequenceShard
from metis.operand import Axis
from metis.reparametrised import FactorPath, split_by_svd


class _RecipeLinear(torch.nn.Module):
    """What both parallel linears share; mixed in before the engine's class."""

    core: LinearCore
    exchange: Exchange | None
    is_reparametrized = False

    def _set_up(
        self,
        recipe: Recipe,
        layer: str,
        clock: TrainingClock,
        backend: GemmBackend | None,
        axes: tuple[Axis, Axis],
    ) -> None:
        self.recipe, self.layer_name = recipe, layer
        in_features, out_features = axes
        device = self.weight.device
        self.core = LinearCore(
            recipe=recipe,
            layer=layer,
            in_features=in_features,
            out_features=out_features,
            clock=clock,
            device=device,
            backend=backend,
        )
        if recipe.reparametrisation is None:
            return
        self.is_reparametrized = True
        config = recipe.reparametrisation
        rank = config.rank.columns(in_features.size)
        self.factors = FactorPath(
            config=config, in_features=in_features, out_features=out_features, amax_scope=recipe.amax_scope
        )
        for name, axis in (("u", out_features), ("s", None), ("v", in_features)):
            shape = (rank,) if axis is None else (axis.local_size, rank)
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=self.weight.dtype, device=device))
            if axis is not None and axis.is_sharded:
                set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            parameter.allreduce = True  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    def set_recipe(self, recipe: Recipe) -> None:
        """Compute by `recipe` from the next forward pass on, with `LinearCore.set_recipe`'s terms; on every
        rank.
        """
        self.core.set_recipe(recipe, self.weight.device)
        self.recipe = recipe
        if self.is_reparametrized:
            self.factors = self.factors.under(recipe)

    @torch.no_grad()
    def load_full_weight(self, full: Tensor) -> None:
        """Set u, s, v and the residual weight from the whole matrix, fp32 [N, K] in the engine's order."""
        u, s, v, residual = split_by_svd(full, self.s.numel(), self.weight.dtype)
        rows, cols = self.core.out_features, self.core.in_features
        self.u.copy_(rows.local_rows(u))
        self.s.copy_(s)
        self.v.copy_(cols.local_rows(v))
        self.weight.copy_(cols.local_rows(rows.local_rows(residual).t().contiguous()).t())

    def _compute(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, sequence: SequenceShard | None = None
    ) -> Tensor:
        """Return hidden w^T + bias for hidden [s, b, K]; `sequence` as in `LinearCore.forward`."""
        s, b = hidden.shape[0], hidden.shape[1]
        if sequence is not None and sequence.operand == "input":
            s *= get_pg_size(self.tp_group)
        x = hidden.reshape(-1, hidden.shape[-1])
        y = self.core(x, weight, self._tokens(s, b), sequence)
        if self.is_reparametrized:
            y = y + self.factors(x, self.u, self.s, self.v)
        if bias is not None:
            y = y + bias
        return y.view(-1, b, y.shape[-1])

    def _sequence_shard(self, operand: str, sequence: int, batch: int) -> SequenceShard | None:
        """Return how `sequence` positions lie over the tensor-parallel ranks, None where they must be
        gathered before they are encoded: blocks along tokens would cross ranks, factors read the whole input,
        or every rank splits by a basis of its own.
        """
        basis = self.recipe.basis
        if self.is_reparametrized or (basis is not None and basis.tp_mode == "local"):
            return None
        group, tp_size = self.tp_group, get_pg_size(self.tp_group)
        tokens = self._tokens(sequence, batch)
        everyone, shard, num_shards = group, get_pg_rank(group), tp_size
        if tokens.is_sharded:
            everyone = parallel_state.get_tensor_and_context_parallel_group()
            shard, num_shards = get_pg_rank(everyone), get_pg_size(everyone)
        axis = sequence_shard_axis(
            tokens,
            tp_rank=get_pg_rank(group),
            tp_size=tp_size,
            shard=shard,
            num_shards=num_shards,
            group=everyone,
        )
        multiple = self.recipe.axis_multiple("tokens")
        if any(length % multiple for _, length in axis.runs):
            return None
        gather = sharded_axis(tokens.local_size, shard=get_pg_rank(group), num_shards=tp_size, group=group)
        return SequenceShard(operand=operand, tokens=axis, gather=replace(gather, exchange=self.exchange))

    @staticmethod
    def _tokens(sequence: int, batch: int) -> Axis:
        cp_size = parallel_state.get_context_parallel_world_size()
        if cp_size == 1:
            return token_axis(sequence, batch)
        return token_axis(
            sequence,
            batch,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=cp_size,
            group=parallel_state.get_context_parallel_group(),
        )

    def _own_sharded_state(
        self, weight_axis: int, bias_axis: int | None, prefix: str, offsets: tuple, metadata: dict | None
    ) -> dict[str, Any]:
        """Return the engine's entries for weight and bias plus one entry per layer for factors and bases.

        Weights of all layers are stacked into one tensor with a leading layer axis. Factors and bases exist
        only in the layers that a policy gives them to, so their keys carry the global layer instead.
        """
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        if groups["dp_cp_group"] is None:
            groups["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        own = {"u", "s", "v"} if self.is_reparametrized else set()
        plain = {
            name: value
            for name, value in self.state_dict(prefix="", keep_vars=True).items()
            if name not in own and not name.startswith("core.")
        }
        tp_axes = {"weight": weight_axis} | ({} if bias_axis is None else {"bias": bias_axis})
        sharded = make_sharded_tensors_for_checkpoint(plain, prefix, tp_axes, offsets, **groups)
        suffix = f".layer_{self.layer_name.split('.')[2]}"
        for name, axis in (("u", self.core.out_features), ("s", None), ("v", self.core.in_features)):
            if name in own:
                key = f"{prefix}{name}"
                sharded[key] = _sharded(getattr(self, name), key + suffix, axis, groups)
        for operand, basis in self.core.bases.items():
            assert isinstance(basis, OperandBasis)
            for name, value in basis.tensors().items():
                key = f"{prefix}core.bases.{operand}.{name}"
                if basis.config.tp_mode == "local" and get_pg_size(self.tp_group) > 1:
                    # Every rank's own basis: stacked along a leading axis of ranks.
                    sharded[key] = make_tp_sharded_tensor_for_checkpoint(
                        value[None], key + suffix, 0, **groups
                    )
                    continue
                axis = basis.features if name in ("v", "z") else None
                sharded[key] = _sharded(value, key + suffix, axis, groups, as_view=True)
        return sharded


def _sharded(value: Tensor, key: str, axis: Axis | None, groups: dict, as_view: bool = False) -> Any:
    """Return the ShardedTensor of a tensor whose first axis is `axis` (None: replicated over tensor-parallel
    ranks).

    A two-part axis (gate|up) is stored so that another tensor-parallel size can cut it: state as a [parts,
    width, ...] view sharded along axis 1, parameters through the engine's SwiGLU factory, which the optimizer
    follows.
    """
    if axis is None or (not axis.is_sharded and axis.parts == 1):
        return make_sharded_tensor_for_checkpoint(value, key, **groups)
    if axis.parts == 1:
        return make_tp_sharded_tensor_for_checkpoint(value, key, 0, **groups)
    if as_view:
        view = value.unflatten(0, (axis.parts, -1))
        return make_tp_sharded_tensor_for_checkpoint(view, key, 1, **groups)
    return apply_swiglu_sharded_factory(make_tp_sharded_tensor_for_checkpoint(value, key, 0, **groups), ())


class MetisColumnParallelLinear(_RecipeLinear, OverlappedColumnParallelLinear):
    """y = x w^T with the rows of w (outputs) sharded; the layer spec binds recipe, layer name, clock and
    backend."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        recipe: Recipe,
        layer: str,
        clock: TrainingClock,
        backend: GemmBackend | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **kwargs)
        shard = {
            "shard": get_pg_rank(self.tp_group),
            "num_shards": get_pg_size(self.tp_group),
            "group": self.tp_group,
        }
        config = self.config
        if layer.endswith("linear_qkv"):
            heads = config.num_attention_heads // config.num_query_groups
            out_features = qkv_axis(config.num_query_groups, heads, config.kv_channels, **shard)
        else:
            parts = 2 if layer.endswith("linear_fc1") and config.gated_linear_unit else 1
            out_features = sharded_axis(output_size, parts=parts, **shard)
        self._set_up(recipe, layer, clock, backend, (Axis.whole(input_size), out_features))

    def _forward_impl(  # type: ignore[override]
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **engine_options: Any,
    ) -> Tensor:
        if self.recipe.is_high_precision:
            return super()._forward_impl(
                input=input,
                weight=weight,
                bias=bias,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                tp_group=tp_group,
                **engine_options,
            )
        if sequence_parallel:
            s, b = input.shape[0] * get_pg_size(tp_group), input.shape[1]
            sequence = self._sequence_shard("input", s, b)
            if sequence is not None:
                return self._compute(input, weight, bias, sequence)
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        return self._compute(input, weight, bias)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the engine's entries (outputs sharded) plus factors and bases."""
        return self._own_sharded_state(0, 0, prefix, sharded_offsets, metadata)


class MetisRowParallelLinear(_RecipeLinear, OverlappedRowParallelLinear):
    """y = x w^T with the columns of w (inputs) sharded; the engine sums the ranks' outputs."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        recipe: Recipe,
        layer: str,
        clock: TrainingClock,
        backend: GemmBackend | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **kwargs)
        in_features = sharded_axis(
            input_size,
            shard=get_pg_rank(self.tp_group),
            num_shards=get_pg_size(self.tp_group),
            group=self.tp_group,
        )
        self._set_up(recipe, layer, clock, backend, (in_features, Axis.whole(output_size)))

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (output, bias) as the engine's class does; the reduce-scatter of sequence parallelism is
        part of the product when the output's gradient is encoded before it is gathered.
        """
        sequence = None
        if self.sequence_parallel and self.input_is_parallel and not self.recipe.is_high_precision:
            sequence = self._sequence_shard("grad_output", input_.shape[0], input_.shape[1])
        if sequence is None:
            if self.recipe.is_high_precision:
                return super().forward(input_)
            return RowParallelLinear.forward(self, input_)
        output = self._compute(input_, self.weight, None, sequence)
        if self.bias is not None and not self.skip_bias_add:
            return output + self.bias, None
        return output, self.bias

    def _forward_impl(  # type: ignore[override]
        self, input: Tensor, weight: Tensor, bias: Tensor | None, **engine_options: Any
    ) -> Tensor:
        if self.recipe.is_high_precision:
            return super()._forward_impl(input=input, weight=weight, bias=bias, **engine_options)
        return self._compute(input, weight, bias)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the engine's entries (inputs sharded) plus factors and bases."""
        return self._own_sharded_state(1, None, prefix, sharded_offsets, metadata)

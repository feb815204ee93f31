"""The linear layer on one rank, and what any linear keeps and does.

`LinearCore` is what `MetisLinear` (torch only) and the parallel linears of megatron-core share: recipe,
feature axes, bases (`metis.bases`), and the way from a 2-D input to an output.

Timing: rows for sketches are picked in the passes of the steps that want them, and `advance_bases` turns them
into new bases after the optimizer step. So the basis used in step t was fixed before step t began.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metis.bases import OperandBasis, overwrite_active
from metis.clock import TrainingClock
from metis.config import Recipe, ReparametrisationConfig
from metis.errors import ConfigError, ShapeError
from metis.functional import LinearPlan, SpectralFactors
from metis.fused_linear import WeightCache, is_fusable, quantized_linear
from metis.gemm import EmulatedGemm, GemmBackend
from metis.operand import Axis
from metis.recipes import resolve_recipe
from metis.regularize import dual_range_gradient
from metis.renewal import Compute, renew_bases
from metis.reparametrised import FactorPath, split_by_svd
from metis.rng import NoisePosition
from metis.schedule import require_same_parameters

OPERANDS = ("input", "weight", "grad_output")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceShard:
    """Sequence parallelism of one linear: which operand arrives as a shard of its tokens, and who has the
    rest.

    operand: "input" (column-parallel) or "grad_output" (row-parallel). tokens: the axis of the shard, with
    every rank that holds other tokens of the microbatch. gather: the same axis among the tensor-parallel
    ranks only.
    """

    operand: str
    tokens: Axis
    gather: Axis


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sketcher:
    """The `BasisSketch` of one forward pass: position and axes as they were then."""

    bases: Mapping[str, OperandBasis]
    axes: Mapping[str, Axis]
    shards: Mapping[str, Axis]
    position: NoisePosition
    num_window_tokens: int

    def pick(self, operand: str, matrix: Tensor) -> Tensor | None:
        """Return the rows that the next basis of `operand` wants, None without one to make."""
        if operand not in self.bases:
            return None
        return self.bases[operand].pick_rows(
            matrix, self.axes[operand], self.position, self.num_window_tokens
        )

    def add(self, operand: str, rows: Tensor) -> None:
        """Add picked rows to this step's sketch."""
        self.bases[operand].add_rows(rows, self.shards.get(operand))


class LinearCore(nn.Module):
    """What every linear of ours keeps and does, whatever ranks hold its weight.

    layer: global name. in_features, out_features: axes of K and N. clock: the run's position. backend: who
    multiplies FP4 operands (None: emulated).
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        layer: str,
        in_features: Axis,
        out_features: Axis,
        clock: TrainingClock,
        device: Any = "cpu",
        backend: GemmBackend | None = None,
    ) -> None:
        super().__init__()
        self.recipe, self.layer, self.clock = recipe, layer, clock
        self.backend = backend or EmulatedGemm()
        self.in_features, self.out_features = in_features, out_features
        _check_features(recipe, layer, in_features, out_features)
        _check_backend(recipe, layer, self.backend)
        self.bases = self._bases_for(recipe, nn.ModuleDict(), device)
        self._set_weights()
        self._lender: tuple[LinearCore, ...] = ()  # in a tuple: the owner is no submodule of this one
        self._borrow(frozenset())

    def _set_weights(self) -> None:
        """Start a cache of the encoded weight where kernels cover the recipe; only the emulated backend reads
        one.
        """
        sizes, backend = (self.in_features.size, self.out_features.size), self.backend
        is_read = isinstance(backend, EmulatedGemm) and is_fusable(self.recipe, *sizes)
        self.weights = WeightCache(backend.weight_cache) if is_read else None

    def _bases_for(self, recipe: Recipe, old: nn.ModuleDict, device: Any) -> nn.ModuleDict:
        """Return the bases that `recipe` keeps, each going on from the one of its operand in `old`."""
        bases = nn.ModuleDict()
        for operand in OPERANDS:
            split = getattr(recipe, f"{operand}_split")
            if split is None or split.rank is None:
                continue
            features = self.out_features if operand == "grad_output" else self.in_features
            assert recipe.basis is not None
            basis = OperandBasis(
                layer=self.layer,
                operand=operand,
                features=features,
                rank=split.rank.columns(features.size),
                config=recipe.basis,
                seed=self.clock.seed,
                centred=split.mean_first,
                ordered=operand == "grad_output" and recipe.spectral_learning_rate is not None,
                device=device,
            )
            if operand in old:
                basis.take_over(old[operand])  # type: ignore[arg-type]
            bases[operand] = basis
        return bases

    def set_recipe(self, recipe: Recipe, device: Any) -> None:
        """Compute by `recipe` from the next forward pass on; call it between optimizer steps, on every rank.

        What an operand is split along carries over (`OperandBasis.take_over`); an operand that gains a split
        runs unsplit until its first refresh, one that loses it forgets its basis. A borrowed basis is given
        back: change the owner first, then borrow again.
        Raises ConfigError for other trained parameters, ShapeError where sizes do not fit.
        """
        if recipe == self.recipe:
            return
        require_same_parameters(f"{self.layer}: recipe", self.recipe, recipe)
        _check_features(recipe, self.layer, self.in_features, self.out_features)
        _check_backend(recipe, self.layer, self.backend)
        self.bases = self._bases_for(recipe, nn.ModuleDict(dict(self._own_bases)), device)
        self.recipe, self._lender = recipe, ()
        self._borrow(frozenset())
        self._set_weights()

    def borrow_input_basis(self, owner: LinearCore) -> None:
        """Use the input basis of `owner`, a linear that reads the same input; only the owner sketches and
        renews it.

        Both keep it under their own name in a state dict, with equal contents. For linears that read one
        input apart, such as q, k and v of a model on torch alone; megatron-core fuses q|k|v and gate|up, so
        that there each input has one reader already.

        Raises ConfigError unless both read equal features and their recipes split the input in the same way,
        with a basis.
        """
        where = f"{self.layer}: input basis"
        if owner is self or "input" in owner.borrowed:
            raise ConfigError(
                where,
                f"must be shared with the linear that renews it, received {owner.layer}, which does not",
            )
        if self.in_features != owner.in_features:
            raise ConfigError(
                where,
                f"must have the features of {owner.layer}, received {self.in_features.size} instead of "
                f"{owner.in_features.size}",
            )
        mine, its = self.recipe.input_split, owner.recipe.input_split
        if mine is None or mine.rank is None or mine != its or self.recipe.basis != owner.recipe.basis:
            raise ConfigError(
                where,
                f"must be split as {owner.layer} splits it, with a rank, to share its basis; received {mine} "
                f"and {its}; give both linears one recipe",
            )
        self.bases["input"] = owner.bases["input"]
        self._lender = (owner,)
        self._borrow(frozenset({"input"}))

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearCore:
        """Copy it; without the owner of a borrowed basis, which has been copied before or is not, the copy
        keeps and renews its own.
        """
        is_alone = bool(self._lender) and id(self._lender[0]) not in memo
        clone = memo[id(self)] = self.__class__.__new__(self.__class__)
        state = vars(self) | ({"_lender": ()} if is_alone else {})
        clone.__setstate__(copy.deepcopy(state, memo))
        if is_alone:
            clone._borrow(frozenset())
        return clone

    def _borrow(self, names: frozenset[str]) -> None:
        self.borrowed = names
        # Listed once: modules look their submodules up slowly, and every step asks for all of them.
        self._own_bases = tuple((name, basis) for name, basis in self.bases.items() if name not in names)

    def forward(
        self, x_MK: Tensor, w_NK: Tensor, tokens: Axis, sequence: SequenceShard | None = None
    ) -> Tensor:
        """Return this rank's x w^T, [M, N] in x's dtype.

        tokens: of all rows that this rank multiplies. sequence: x (or the output, and so its gradient) is a
        shard of those rows.
        """
        return self.multiply(x_MK, w_NK, self.plan(tokens, sequence))

    def multiply(self, x_MK: Tensor, w_NK: Tensor, plan: LinearPlan) -> Tensor:
        """Return x w^T as `plan` says; raises ShapeError for tokens that do not fill whole blocks."""
        multiple = self.recipe.axis_multiple("tokens", forward_only=not torch.is_grad_enabled())
        for axis in (plan.tokens, *(() if plan.token_shard is None else (plan.token_shard,))):
            _check_tokens(multiple, self.layer, axis)
        return quantized_linear(x_MK, w_NK, plan)

    def plan(
        self, tokens: Axis, sequence: SequenceShard | None = None, position: NoisePosition | None = None
    ) -> LinearPlan:
        """Return the plan of a forward pass that starts now. position: instead of the clock's."""
        clock = self.clock
        position = clock.position if position is None else position
        basis = self.recipe.basis
        assert sequence is None or basis is None or basis.tp_mode != "local", "no shared basis to gather by"
        for owner in self._lender:
            if "input" not in owner.bases or owner.bases["input"] is not self.bases["input"]:
                raise ConfigError(
                    f"{self.layer}: input basis",
                    f"must be the one that {owner.layer} renews, which has another since its recipe changed; "
                    "borrow it again",
                )
        active = {f"v_{name}": basis.active for name, basis in self.bases.items()}  # type: ignore[operator]
        sketching = {
            name: basis
            for name, basis in self.bases.items()
            if self.training
            and name != "weight"
            and name not in self.borrowed
            and basis.wants_sketch(clock.step)  # type: ignore[operator]
        }
        shard = {} if sequence is None else {sequence.operand: sequence}
        sketcher = _Sketcher(
            bases=sketching,  # type: ignore[arg-type]
            axes={name: shard[name].tokens if name in shard else tokens for name in sketching},
            shards={name: shard[name].gather for name in sketching if name in shard},
            position=position,
            num_window_tokens=clock.num_tokens_per_step,
        )
        return LinearPlan(
            recipe=self.recipe,
            layer=self.layer,
            tokens=tokens,
            in_features=self.in_features,
            out_features=self.out_features,
            token_shard=None if sequence is None else sequence.tokens,
            gather=None if sequence is None else sequence.gather,
            gathered_operand="" if sequence is None else sequence.operand,
            seed=clock.seed,
            position=position,
            spectral=self._spectral_factors(),
            sketch=sketcher if sketching else None,
            backend=self.backend,
            watch=clock.watch,
            weights=self.weights,
            **active,
        )

    def _spectral_factors(self) -> SpectralFactors | None:
        """Return what the adaptive spectral learning rate multiplies with, None without a basis in use."""
        config = self.recipe.spectral_learning_rate
        energies = None if config is None else self.bases["grad_output"].active_energies
        if config is None or energies is None:
            return None
        if config.schedule == "smooth":
            sigma = energies.sqrt()  # type: ignore[operator]
            head = 2.0 / (1.0 + sigma / sigma.amax().clamp(min=torch.finfo(torch.float64).tiny))
            return SpectralFactors(head=head.float(), residual=2.0, on_dx=config.apply_to == "dw_and_dx")
        head = torch.full(energies.shape, config.head_factor, device=energies.device)  # type: ignore[arg-type]
        head[: config.num_leading] = config.leading_factor
        return SpectralFactors(
            head=head, residual=config.residual_factor, on_dx=config.apply_to == "dw_and_dx"
        )

    def own_bases(self) -> tuple[tuple[str, OperandBasis], ...]:
        """Return (operand, basis) of every basis that this linear sketches and renews itself."""
        return self._own_bases  # type: ignore[return-value]


def advance_bases(
    linears: Iterable[tuple[LinearCore, Tensor]],
    step: int,
    token_group: Any = None,
    compute: Compute | None = None,
) -> None:
    """Turn the sketches of optimizer step `step` into new bases; call it after the optimizer step, on every
    rank. The weights have changed: what was encoded of them is forgotten.

    linears: each core with its current weight. token_group: ranks that saw other tokens of the step (data
    and context parallel); their sketches are summed in float64, in one message, so that all keep the same
    bases. compute: as `renew_bases` takes it.
    """
    linears = list(linears)
    for core, weight in linears:
        if core.weights is not None:
            core.weights.clear()
        for operand, basis in core.own_bases():
            if operand == "weight" and basis.wants_sketch(step):
                basis.add_weight(weight, core.out_features)
    bases = [basis for core, _ in linears for _, basis in core.own_bases()]
    renew_bases(bases, step, token_group, compute)
    overwrite_active(bases)


def _check_backend(recipe: Recipe, layer: str, backend: GemmBackend) -> None:
    if backend.reads_bytes and recipe.has_merged_heads:
        raise ConfigError(
            f"backend of {layer or 'a linear'}",
            f"must not be {backend.name}, which multiplies codes, with recipe {recipe.name!r}, "
            "whose heads are added back into operands; use EmulatedGemm, or head_placement: apart",
        )


def _check_features(recipe: Recipe, layer: str, in_features: Axis, out_features: Axis) -> None:
    for setting, rank, multiple in recipe.quantized_ranks(in_features.size, out_features.size):
        if rank % multiple:
            raise ConfigError(
                f"{layer}: recipe {recipe.name!r}: {setting}",
                f"must give a multiple of {multiple} columns where blocks run along the rank, received "
                f"{rank}",
            )
    for name, axis in (("in_features", in_features), ("out_features", out_features)):
        per_part, multiple = axis.local_size // axis.parts, recipe.axis_multiple(name)
        if per_part % multiple or axis.local_size % axis.parts:
            raise ShapeError(
                layer,
                f"{name} held by one rank must be a multiple of {multiple} per projection (blocks of recipe "
                f"{recipe.name!r}), received {per_part}; change the size or the tensor-parallel size, or "
                "keep "
                "this layer in bf16 with a policy",
            )


def _check_tokens(multiple: int, layer: str, tokens: Axis) -> None:
    for _, length in tokens.runs:
        if length % multiple:
            raise ShapeError(
                layer,
                f"tokens per microbatch and rank must be a multiple of {multiple} (blocks run along "
                f"tokens), received a run of {length}; change the sequence length or the micro batch size",
            )


class MetisLinear(nn.Module):
    """Drop-in for `torch.nn.Linear` that computes by a recipe (a value, a name or a file); one rank, torch
    only.

    Call `after_step()` once after every optimizer step: it advances the clock and renews the bases; where the
    recipe regularises weights, call `before_step()` before that step. The recipe `bf16` is
    `torch.nn.functional.linear`, bitwise. With reparametrisation `weight` is the residual of the initial
    weight and `u` [N, r], `s` [r], `v` [K, r] are parameters beside it. backend: who multiplies FP4 operands
    (None: emulated). clock: position in training, shared by the layers of a model, which the caller advances;
    without one the layer keeps its own: its seed is drawn from torch's generator, a microbatch ends with
    its backward unless the caller announces each one on `clock`, and seed and step are part of the state
    dict. share_input_basis_with: a linear that reads the same input; this one uses its input basis and keeps
    none of its own (`LinearCore.borrow_input_basis`); a copy made without that linear does.

    Activation checkpointing recomputes the same bits. (Where several microbatches are announced before the
    first backward, wrap the function in `megatron_patches.recompute_context.rerun_in_first_context`.) Kernels
    encode the weight once per step: write it between steps, not between microbatches.

    Raises ShapeError when a size is no multiple of 16, on construction for features and in training for
    tokens.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: Recipe | str,
        name: str = "linear",
        clock: TrainingClock | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        backend: GemmBackend | None = None,
        share_input_basis_with: MetisLinear | None = None,
    ) -> None:
        super().__init__()
        recipe = resolve_recipe(recipe) if isinstance(recipe, str) else recipe
        plain = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.weight, self.bias = plain.weight, plain.bias
        self.owns_clock = clock is None
        self.clock = TrainingClock() if clock is None else clock
        self._is_seeded, self._num_backwards, self._num_tokens = False, 0, 0
        self._seed_for(recipe)
        # A basis has values from the start, which the meta device cannot keep.
        place = torch.device("cpu") if self.weight.is_meta else self.weight.device
        with place if self.weight.is_meta else nullcontext():
            self.core = LinearCore(
                recipe=recipe,
                layer=name,
                in_features=Axis.whole(in_features),
                out_features=Axis.whole(out_features),
                clock=self.clock,
                device=place,
                backend=backend,
            )
        if share_input_basis_with is not None:
            self.core.borrow_input_basis(share_input_basis_with.core)
        self.factors: FactorPath | None = None
        if recipe.reparametrisation is not None:
            self._reparametrise(recipe, recipe.reparametrisation)

    def _seed_for(self, recipe: Recipe) -> None:
        """Draw the seed of a clock of one's own when random numbers are first needed.

        As initial weights are drawn: two layers without names must not share their random numbers.
        """
        if self.owns_clock and not self._is_seeded and not recipe.is_high_precision:
            self.clock.seed, self._is_seeded = int(torch.randint(2**31, (), device="cpu")), True

    @torch.no_grad()
    def _reparametrise(self, recipe: Recipe, config: ReparametrisationConfig) -> None:
        axes = {"in_features": self.core.in_features, "out_features": self.core.out_features}
        if self.weight.is_meta:
            raise ConfigError(
                f"{self.core.layer}: device",
                f"must not be meta under recipe {recipe.name!r}, which factors the initial weight; "
                "build the layer where it computes",
            )
        self.factors = FactorPath(config=config, amax_scope=recipe.amax_scope, **axes)
        rank = config.rank.columns(self.core.in_features.size)
        u, s, v, residual = split_by_svd(self.weight, rank, self.weight.dtype)
        self.u, self.s, self.v = nn.Parameter(u), nn.Parameter(s), nn.Parameter(v)
        self.weight.copy_(residual)

    def forward(self, x: Tensor) -> Tensor:
        """Return x w^T + bias; x: [..., K]; rows in the order of `x.flatten(0, -2)` are the tokens."""
        if self.core.recipe.is_high_precision:
            return nn.functional.linear(x, self.weight, self.bias)
        if x.shape[-1] != self.weight.shape[1]:
            raise ShapeError(
                f"{self.core.layer}: input",
                f"must have {self.weight.shape[1]} features in its last axis, received shape "
                f"{tuple(x.shape)}",
            )
        if x.dtype != self.weight.dtype or x.dtype == torch.float16:
            raise ShapeError(
                f"{self.core.layer}: input",
                f"must have the weight's dtype, float32 or bfloat16, received {x.dtype} and a weight in "
                f"{self.weight.dtype}; convert one of them",
            )
        x_MK = x.reshape(-1, x.shape[-1])
        if x_MK.shape[0] == 0:
            return nn.functional.linear(x, self.weight, self.bias)
        y = self.core.multiply(x_MK, self.weight, self._plan(x_MK.shape[0]))
        if self.factors is not None:
            y = y + self.factors(x_MK, self.u, self.s, self.v)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)

    def _plan(self, num_tokens: int) -> LinearPlan:
        """Return the plan of a forward pass that starts now, of so many tokens."""
        clock, has_gradients = self.clock, torch.is_grad_enabled()
        position: NoisePosition | None = None
        more: dict[str, Any] = {}
        if self.owns_clock and not clock.is_announced:
            position = NoisePosition(clock.step, self._num_backwards)
        if self.owns_clock and self.training and has_gradients:
            clock.num_tokens_per_step = max(clock.num_tokens_per_step, num_tokens)
            more["after_backward"] = partial(self._count_backward, num_tokens)
        plan = self.core.plan(Axis.whole(num_tokens), position=position)
        if plan.weights is not None and not has_gradients:
            more["weights"] = WeightCache(plan.weights.keep)
        return replace(plan, **more) if more else plan

    def _count_backward(self, num_tokens: int) -> None:
        """Note that a microbatch is done: after its backward, so that recomputation sees its forward's."""
        self._num_backwards += 1
        self._num_tokens += num_tokens

    def extra_repr(self) -> str:
        """Return sizes, bias and recipe for `repr`."""
        n, k = self.weight.shape
        return f"{k}, {n}, bias={self.bias is not None}, recipe={self.core.recipe.name!r}"

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the gradient of the recipe's dual-range regulariser to `weight.grad`.

        Call it once per optimizer step, after the last backward and before clipping. With reparametrisation
        it acts on the residual weight. Does nothing under a recipe without the regulariser.
        """
        config = self.core.recipe.dual_range
        if config is None or not self.weight.requires_grad:
            return
        gradient = dual_range_gradient(self.weight, config, self.weight.numel())
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        self.weight.grad.add_(gradient)

    def set_recipe(self, recipe: Recipe | str) -> None:
        """Compute by another recipe (a value, a name or a file) from the next forward pass on.

        Call it between optimizer steps; bases carry over as in `LinearCore.set_recipe`, with its errors.
        """
        recipe = resolve_recipe(recipe) if isinstance(recipe, str) else recipe
        self._seed_for(recipe)
        self.core.set_recipe(recipe, self.weight.device)
        if self.factors is not None:
            self.factors = self.factors.under(recipe)

    def after_step(self) -> None:
        """Renew the bases from this step's sketches and enter the next step (with a clock of one's own)."""
        advance_bases([(self.core, self.weight)], self.clock.step)
        if self.owns_clock:
            self.clock.begin_step(self.clock.step + 1, self._num_tokens or self.clock.num_tokens_per_step)
            self._num_backwards = self._num_tokens = 0

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_seeded:
            clock = self.clock
            values = [clock.seed, clock.step, clock.num_tokens_per_step]
            destination[prefix + "clock"] = torch.tensor(values, dtype=torch.int64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        stored = state_dict.pop(prefix + "clock", None)
        super()._load_from_state_dict(state_dict, prefix, *others)
        if stored is None or not self.owns_clock:
            return
        state_dict[prefix + "clock"] = stored
        self.clock.seed, step, num_tokens = (int(value) for value in stored)
        self.clock.begin_step(step, num_tokens)
        self._is_seeded, self._num_backwards, self._num_tokens = True, 0, 0
        for _, basis in self.core.own_bases():
            basis.seed = self.clock.seed

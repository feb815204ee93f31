"""Forward and backward of one linear by every contender, taken in turn in one process.

One idea: a contender is a small object that runs one microbatch and ends a step; all of them are timed step
by step in turn, so that clocks drift alike. Steps that renew bases are told apart by what the bases say
beforehand, and reported apart: refreshing costs `refresh - plain` once in so many steps. Where every step
refreshes (an interval of 1) there is nothing to subtract: the step is what it takes with its refresh.

    grad        dw is left in `weight.grad`, in the weight's dtype, as with plain PyTorch main_grad   dw is
    added to an fp32 `weight.main_grad`, as in training on megatron-core: by a pass of its own
                (torch.nn.Linear, as the engine does without fused kernels), or by the layer itself

The ceiling is the three bare products of the same shape, timed in the same turn.

Traps: inputs are leaves, so each microbatch also writes dx, in every contender alike. Memory is the
allocator's: what the contender keeps between steps plus the peak of one step over that.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metis.benchmark.shapes import LinearShape
from metis.benchmark.timing import Samples, Stopwatch, num_inputs_for
from metis.clock import TrainingClock
from metis.config import Recipe
from metis.errors import MetisError
from metis.gemm import EmulatedGemm, cublas
from metis.nn import MetisLinear

CEILING = "three products"
TORCH, TORCH_FUSED, TE = "torch.nn.Linear", "torch.nn.Linear, fused", "te.pytorch.Linear"
GRADIENTS = ("grad", "main_grad")
_SEED = 5
_COLD_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearJob:
    """What is measured: a shape, tokens of a microbatch, microbatches of a step, steps of each contender."""

    shape: LinearShape
    tokens: int
    num_microbatches: int
    num_rounds: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def flops(self) -> float:
        """FLOPs of a step: three products per microbatch."""
        return 6.0 * self.num_microbatches * self.tokens * self.shape.in_features * self.shape.out_features


class Contender:
    """One way to compute a linear; `layer` maps [M, K] to [M, N] and owns `weight` [N, K]."""

    def __init__(self, name: str, layer: nn.Module, gradient: str, recipe: str = "bf16") -> None:
        self.name, self.layer, self.gradient, self.recipe = name, layer, gradient, recipe
        self.weight: nn.Parameter = layer.weight  # type: ignore[assignment]
        if gradient == "main_grad":
            self.weight.main_grad = torch.zeros_like(self.weight, dtype=torch.float32)  # type: ignore[attr-defined]
            self.weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def microbatch(self, number: int, x: Tensor, g: Tensor) -> None:
        """Run forward and backward, and deliver dw as the engine's hook would."""
        self.layer(x).backward(g)
        x.grad = None
        if self.gradient == "main_grad":
            weight: Any = self.weight
            if weight.grad is not None and not weight.grad_added_to_main_grad:
                weight.main_grad.add_(weight.grad)
            weight.grad, weight.grad_added_to_main_grad = None, False

    def end_step(self) -> None:
        """Do what follows the optimizer step."""
        self.weight.grad = None

    @property
    def refresh_interval(self) -> int | None:
        """Steps from one renewal of its bases to the next, None without bases."""
        return None

    @property
    def num_cold_steps(self) -> int:
        """Steps until it runs as it always will."""
        return _COLD_STEPS

    def is_refreshing(self) -> bool:
        """Whether the coming step sketches and renews bases."""
        return False


class MetisContender(Contender):
    """A `MetisLinear` with a clock of its own, advanced as the trainer advances the run's."""

    def __init__(
        self, recipe: Recipe, gradient: str, job: LinearJob, device: torch.device, kernels: Any
    ) -> None:
        self.clock = TrainingClock(_SEED, job.tokens * job.num_microbatches)
        layer = MetisLinear(
            job.shape.in_features, job.shape.out_features, bias=False, recipe=recipe, clock=self.clock,
            device=device, dtype=job.dtype, backend=EmulatedGemm(kernels=kernels),
        )  # fmt: skip
        super().__init__(f"metis.nn.MetisLinear, {recipe.name}", layer, gradient, recipe.name)
        self.metis: MetisLinear = layer

    def microbatch(self, number: int, x: Tensor, g: Tensor) -> None:
        """Announce the microbatch, then run it."""
        self.clock.begin_microbatch(self.clock.step * 1024 + number)
        super().microbatch(number, x, g)

    def end_step(self) -> None:
        """Renew the bases and enter the next step."""
        super().end_step()
        self.metis.after_step()
        self.clock.begin_step(self.clock.step + 1, self.clock.num_tokens_per_step)

    @property
    def refresh_interval(self) -> int | None:
        """The recipe's, where it keeps bases."""
        bases, config = self.metis.core.own_bases(), self.metis.core.recipe.basis
        return config.refresh_interval_steps if bases and config is not None else None

    @property
    def num_cold_steps(self) -> int:
        """As many as its bases need at least."""
        config = self.metis.core.recipe.basis
        return max(_COLD_STEPS, config.num_cold_steps if config is not None else 0)

    def is_refreshing(self) -> bool:
        """Ask the bases."""
        return any(basis.wants_sketch(self.clock.step) for _, basis in self.metis.core.own_bases())


class _FusedLinear(torch.autograd.Function):
    """x w^T whose dw goes into `weight.main_grad` in the product's epilogue."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensors
        dx = g @ weight
        cublas.gemm(g.t(), x.t(), ctx.weight.main_grad, accumulate=True)
        return dx, None


class FusedTorchLinear(nn.Linear):
    """`torch.nn.Linear` without bias whose backward accumulates dw in fp32 as fused kernels do."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x w^T."""
        return _FusedLinear.apply(x, self.weight)


@dataclass(slots=True)
class Entrant:
    """A row in the making: how to build the contender, and what came of it."""

    name: str
    gradient: str
    recipe: str
    build: Callable[[], Contender]
    contender: Contender | None = None
    reason: str | None = None
    failed: bool = False
    memory_bytes: int | None = None
    host_seconds: float | None = None
    plain: list[float] = field(default_factory=list)
    refresh: list[float] = field(default_factory=list)


def entrants(
    job: LinearJob, recipes: Sequence[Recipe], gradients: Sequence[str], device: torch.device, kernels: str
) -> list[Entrant]:
    """Return every contender of a job, `torch.nn.Linear` first for each kind of gradient."""
    sizes = {"bias": False, "device": device, "dtype": job.dtype}
    k, n = job.shape.in_features, job.shape.out_features
    found = []
    for gradient in gradients:
        found.append(
            Entrant(TORCH, gradient, "bf16", lambda g=gradient: Contender(TORCH, nn.Linear(k, n, **sizes), g))
        )
        if gradient == "main_grad":
            found.append(Entrant(TORCH_FUSED, gradient, "bf16", lambda: _fused(k, n, sizes)))
        found.append(Entrant(TE, gradient, "bf16", lambda g=gradient: _transformer_engine(job, g, device)))
        for recipe in recipes:
            if recipe.is_high_precision and recipe.name == "bf16":
                continue  # torch.nn.functional.linear, bitwise
            found.append(
                Entrant(
                    f"metis.nn.MetisLinear, {recipe.name}", gradient, recipe.name,
                    lambda r=recipe, g=gradient: MetisContender(r, g, job, device, kernels),
                )
            )  # fmt: skip
    return found


class _AbsentError(Exception):
    """Something optional is not installed or cannot run here."""


def _fused(k: int, n: int, sizes: dict[str, Any]) -> Contender:
    if not cublas.is_available():
        raise _AbsentError("needs cuBLAS")
    return Contender(TORCH_FUSED, FusedTorchLinear(k, n, **sizes), "main_grad")


def _transformer_engine(job: LinearJob, gradient: str, device: torch.device) -> Contender:
    if device.type != "cuda":
        raise _AbsentError("Transformer Engine needs a GPU")
    try:
        import transformer_engine.pytorch as te
    except Exception as error:  # not installed, or built for another torch
        raise _AbsentError(f"Transformer Engine does not load ({type(error).__name__})") from None
    layer = te.Linear(
        job.shape.in_features, job.shape.out_features, bias=False, params_dtype=job.dtype, device=device,
        fuse_wgrad_accumulation=gradient == "main_grad",
    )  # fmt: skip
    return Contender(TE, layer, gradient)


class Products:
    """The three products of a microbatch and nothing else, into memory that is there already."""

    def __init__(self, job: LinearJob, xs: list[Tensor], gs: list[Tensor]) -> None:
        k, n = job.shape.in_features, job.shape.out_features
        self.xs, self.gs, self.num_microbatches = [x.detach() for x in xs], gs, job.num_microbatches
        self.w = torch.randn(n, k, device=xs[0].device, dtype=job.dtype)
        self.y, self.dx, self.dw = (
            torch.empty_like(gs[0]),
            torch.empty_like(self.xs[0]),
            torch.empty_like(self.w),
        )

    def step(self) -> None:
        """Run fprop, dgrad and wgrad of every microbatch."""
        for number in range(self.num_microbatches):
            x, g = self.xs[number % len(self.xs)], self.gs[number % len(self.gs)]
            torch.mm(x, self.w.t(), out=self.y)
            torch.mm(g, self.w, out=self.dx)
            torch.mm(g.t(), x, out=self.dw)


def measure(
    job: LinearJob,
    recipes: Sequence[Recipe],
    gradients: Sequence[str],
    stopwatch: Stopwatch,
    kernels: str = "auto",
) -> list[dict[str, Any]]:
    """Return a row for the ceiling and one per contender and kind of gradient."""
    device = stopwatch.device
    generator = torch.Generator(device).manual_seed(_SEED)
    width = min(job.shape.in_features, job.shape.out_features)
    count = num_inputs_for(2 * job.tokens * width, device)

    def made(features: int) -> list[Tensor]:
        shape = (job.tokens, features)
        return [torch.randn(shape, dtype=job.dtype, device=device, generator=generator) for _ in range(count)]

    xs = [x.requires_grad_() for x in made(job.shape.in_features)]
    gs = made(job.shape.out_features)
    products = Products(job, xs, gs)
    products.step()  # also allocates cuBLAS's workspace, which is nobody's memory
    cycle = _Cycle(xs, gs)
    rows = entrants(job, recipes, gradients, device, kernels)
    for entrant in rows:
        _prepare(entrant, job, cycle, stopwatch)
    ceiling: list[float] = []
    for _ in range(job.num_rounds):
        ceiling.append(stopwatch.seconds(products.step))
        for entrant in rows:
            if entrant.contender is not None:
                _time_step(entrant, job, cycle, stopwatch)
    return _rows(job, rows, Samples(tuple(ceiling)))


@dataclass(slots=True)
class _Cycle:
    """Hands out the inputs in turn, so that none is in the L2 cache."""

    xs: list[Tensor]
    gs: list[Tensor]
    position: int = 0

    def next(self) -> tuple[Tensor, Tensor]:
        self.position += 1
        index = self.position % len(self.xs)
        return self.xs[index], self.gs[index]


def _step(contender: Contender, job: LinearJob, cycle: _Cycle) -> None:
    for number in range(job.num_microbatches):
        contender.microbatch(number, *cycle.next())
    contender.end_step()


def _skip_refreshes(contender: Contender, job: LinearJob, cycle: _Cycle) -> None:
    """Run the steps before the next plain one; no more than an interval, after which each step refreshes."""
    for _ in range(contender.refresh_interval or 0):
        if not contender.is_refreshing():
            return
        _step(contender, job, cycle)


def _prepare(entrant: Entrant, job: LinearJob, cycle: _Cycle, stopwatch: Stopwatch) -> None:
    """Build a contender, run it past its first regular refresh, and take its memory and launch time."""
    on_gpu = stopwatch.on_gpu
    gc.collect()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    try:
        contender = entrant.build()
        for _ in range(contender.num_cold_steps + (contender.refresh_interval or 0)):
            _step(contender, job, cycle)
        _skip_refreshes(contender, job, cycle)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        _step(contender, job, cycle)
        if on_gpu:
            entrant.memory_bytes = torch.cuda.max_memory_allocated() - before
        entrant.host_seconds = _host_seconds(contender, job, cycle, stopwatch)
        _skip_refreshes(contender, job, cycle)  # the first timed step is a plain one, if there are any
    except (_AbsentError, MetisError) as error:
        entrant.reason = str(error)
    except Exception as error:  # one broken contender must not hide the others
        entrant.reason, entrant.failed = f"{type(error).__name__}: {str(error)[-200:]}", True
    else:
        entrant.contender = contender


def _host_seconds(contender: Contender, job: LinearJob, cycle: _Cycle, stopwatch: Stopwatch) -> float | None:
    """Return the host's time for one step, a plain one if there are any, launched while the GPU is busy."""
    seconds = []
    for _ in range(3):
        _skip_refreshes(contender, job, cycle)
        one = stopwatch.host_seconds(lambda _: _step(contender, job, cycle), num_calls=1)
        if one is None:
            return None
        seconds.append(one)
    return Samples(tuple(seconds)).median


def _time_step(entrant: Entrant, job: LinearJob, cycle: _Cycle, stopwatch: Stopwatch) -> None:
    contender = entrant.contender
    assert contender is not None
    times = entrant.refresh if contender.is_refreshing() else entrant.plain
    times.append(stopwatch.seconds(lambda: _step(contender, job, cycle), 1.5 * (entrant.host_seconds or 0.0)))


def _rows(job: LinearJob, measured: list[Entrant], ceiling: Samples) -> list[dict[str, Any]]:
    """Return rows in order, with ratios to the ceiling and to `torch.nn.Linear` with the same gradient."""
    common = {
        "shape": f"{job.shape.in_features}x{job.shape.out_features}", "linear": job.shape.name,
        "tokens": job.tokens, "num_microbatches": job.num_microbatches,
    }  # fmt: skip
    per_step = 1e-12 * job.flops
    rows: list[dict[str, Any]] = [
        common
        | {
            "name": CEILING, "gradient": "-", "recipe": "bf16", "ms": 1e3 * ceiling.median, "failed": False,
            "spread_ms": 1e3 * ceiling.spread, "tflops": per_step / ceiling.median, "of_ceiling": 1.0,
            "samples_ms": [1e3 * seconds for seconds in ceiling.seconds],
        }
    ]  # fmt: skip
    reference = {
        entrant.gradient: Samples(tuple(entrant.plain)).median
        for entrant in measured
        if entrant.name == TORCH and entrant.plain
    }
    for entrant in measured:
        row = common | {
            "name": entrant.name, "gradient": entrant.gradient, "recipe": entrant.recipe,
            "reason": entrant.reason, "failed": entrant.failed,
        }  # fmt: skip
        rows.append(row)
        if entrant.contender is None:
            continue
        row |= _numbers(entrant, entrant.contender, per_step, ceiling.median)
        if entrant.gradient in reference:
            row["to_bf16"] = 1e-3 * row["ms"] / reference[entrant.gradient]
    return rows


def _numbers(entrant: Entrant, contender: Contender, tera_flops: float, ceiling: float) -> dict[str, Any]:
    interval = contender.refresh_interval
    refreshes_always = not entrant.plain
    step = Samples(tuple(entrant.refresh if refreshes_always else entrant.plain))
    numbers: dict[str, Any] = {
        "ms": 1e3 * step.median,
        "spread_ms": 1e3 * step.spread,
        "host_ms": None if entrant.host_seconds is None else 1e3 * entrant.host_seconds,
        "tflops": tera_flops / step.median,
        "of_ceiling": ceiling / step.median,
        "memory_mb": None if entrant.memory_bytes is None else entrant.memory_bytes / 1e6,
        "samples_ms": [1e3 * seconds for seconds in entrant.plain],
    }
    if interval is not None and entrant.refresh:
        numbers |= {
            "refresh_interval_steps": interval,
            "refreshes_always": refreshes_always,
            "refresh_samples_ms": [1e3 * seconds for seconds in entrant.refresh],
        }
        if not refreshes_always:
            more = 1e3 * (Samples(tuple(entrant.refresh)).median - step.median)
            numbers |= {
                "refresh_ms": more,
                "refresh_percent": 100.0 * more / interval / (1e3 * step.median),
            }
    return numbers

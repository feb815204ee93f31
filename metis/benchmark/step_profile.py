"""Where the GPU's time of a step goes, from the trace that torch's profiler writes.

One idea: a kernel's name says what it is when a library wrote it (GEMM, attention, NCCL), and where it was
launched says it when torch's own elementwise kernels did the work: the innermost telling operation of the
host around the launch (our linear's function, the optimizer, a gradient's accumulation) decides then. Without
a GPU host operations, each less those inside it, stand for kernels.

Traps: categories add kernel times, which overlap on several streams; `busy` is the time in which any kernel
runs, and idle is a step's wall-clock time (taken without the profiler) less that. Names of kernels change
between versions: what ends in `other` is listed by name.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

GEMM, ATTENTION, QUANTISE = "GEMM", "attention", "quantise and split"
NORM, LOSS, OPTIMIZER = "norm, activation, rope", "loss and embedding", "optimizer"
ACCUMULATE, COMMUNICATION, COPIES, OTHER = "gradient accumulation", "communication", "copies", "other"
CATEGORIES = (
    GEMM, ATTENTION, QUANTISE, NORM, LOSS, ACCUMULATE, OPTIMIZER, COMMUNICATION, COPIES, OTHER,
)  # fmt: skip
NUM_NAMES = 15

_BY_NAME = (
    (COMMUNICATION, r"nccl|all_?reduce|all_?gather|reduce_?scatter"),
    (ATTENTION, r"sdpa|flash|fmha|attention"),
    (GEMM, r"gemm|nvjet|cutlass|cublas|splitk|wgmma|gemv|::(mm|addmm|bmm|baddbmm|matmul|linear)$"),
    (OPTIMIZER, r"multi_tensor|adam|lpnorm|l2norm|_foreach|_fused_adam"),
    (NORM, r"rms_?norm|layer_?norm|swiglu|silu|rope|rotary"),
    (LOSS, r"cross_entropy|nll_loss|softmax|embedding"),
)
"""What a library's kernel is, whoever launched it."""

_BY_SCOPE = (
    (QUANTISE, r"_QuantizedLinear"),
    (OPTIMIZER, r"Optimizer\.step|Optimizer\.zero_grad"),
    (ACCUMULATE, r"AccumulateGrad"),
    (LOSS, r"CrossEntropy|cross_entropy|Embedding|embedding|nll_loss|log_softmax"),
    (NORM, r"[Nn]orm|[Aa]ctivation|[Ss]wi[Gg][Ll][Uu]|[Ss]ilu|[Rr]ope|[Rr]otary"),
    (ATTENTION, r"[Aa]ttention"),
)
"""Whose work an elementwise kernel, reduction or copy is, by the operation around its launch."""

_COPY_NAMES = re.compile(r"copy|memcpy|memset|fill|CatArray|\bcat\b", re.IGNORECASE)
_COMPILED = re.compile(r"^triton_")
_KERNEL_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH_KINDS = ("cuda_runtime", "cuda_driver")


@dataclass(slots=True)
class Profile:
    """GPU milliseconds per step: by category, of any kernel at all, and the longest names in each."""

    milliseconds: dict[str, float]
    busy_ms: float
    num_kernels: float
    names: dict[str, list[tuple[str, float]]] = field(default_factory=dict)


def read_profile(trace: Path, num_steps: int) -> Profile:
    """Return the profile of a trace that covers `num_steps` steps."""
    return profile_of(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"], num_steps)


def profile_of(events: Iterable[Mapping[str, Any]], num_steps: int) -> Profile:
    """Return the profile of a trace's events."""
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    scopes, host_work = _host_scopes(complete)
    running = [event for event in complete if event.get("cat") in _KERNEL_KINDS]
    work = [
        _Work(event["name"], scopes.get(event.get("args", {}).get("correlation")), event["dur"])
        for event in running
    ]
    if not work:
        running, work = [event for event in complete if event.get("cat") == "cpu_op"], host_work
    times: dict[str, Counter[str]] = defaultdict(Counter)
    for piece in work:
        times[categorise(piece.name, piece.scope)][piece.name] += piece.microseconds
    to_ms = 1e-3 / num_steps
    return Profile(
        milliseconds={name: to_ms * sum(times[name].values()) for name in CATEGORIES},
        busy_ms=to_ms * _union([(event["ts"], event["ts"] + event["dur"]) for event in running]),
        num_kernels=len(work) / num_steps,
        names={
            category: [(name[:120], to_ms * us) for name, us in times[category].most_common(NUM_NAMES)]
            for category in CATEGORIES
            if times[category]
        },
    )


def categorise(name: str, scope: str | None) -> str:
    """Return the category of a kernel by its name, else `scope`: that of the operation around its launch."""
    own = own_kernels().get(name)
    if own is not None:
        return own
    for category, pattern in _BY_NAME:
        # torch.compile's kernels carry the names of everything that was fused into them.
        if re.search(pattern, name, re.IGNORECASE) and not (_COMPILED.match(name) and category == GEMM):
            return category
    if scope is not None:
        return scope
    if _COMPILED.match(name):
        return NORM  # the engine compiles activations, rotations and biases
    return COPIES if _COPY_NAMES.search(name) else OTHER


def _scope_category(name: str) -> str | None:
    return next((category for category, pattern in _BY_SCOPE if re.search(pattern, name)), None)


@dataclass(slots=True)
class _Work:
    """A kernel's time, or a host operation's without those inside it, and the category of what is around."""

    name: str
    scope: str | None
    microseconds: float


def _host_scopes(events: Iterable[Mapping[str, Any]]) -> tuple[dict[int, str | None], list[_Work]]:
    """Return the scope of every launch by correlation, and the work of all host operations."""
    by_thread: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation", *_LAUNCH_KINDS):
            by_thread[event.get("pid"), event.get("tid")].append(event)
    scopes: dict[int, str | None] = {}
    work: list[_Work] = []
    for thread in by_thread.values():
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        stack: list[tuple[float, str | None, _Work | None]] = []
        for event in thread:
            while stack and stack[-1][0] <= event["ts"]:
                stack.pop()
            around, parent = stack[-1][1:] if stack else (None, None)
            if event["cat"] in _LAUNCH_KINDS:
                scopes[event.get("args", {}).get("correlation")] = around
                continue
            scope, own = _scope_category(event["name"]) or around, parent
            if event["cat"] == "cpu_op":
                own = _Work(event["name"], scope, event["dur"])
                work.append(own)
                if parent is not None:
                    parent.microseconds -= event["dur"]
            stack.append((event["ts"] + event["dur"], scope, own))
    return scopes, work


def _union(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


@lru_cache(maxsize=1)
def own_kernels() -> dict[str, str]:
    """Return the category of each Triton function in our source, read without loading Triton."""
    package = Path(__file__).resolve().parents[1]
    found = {}
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "triton.jit" not in text:
            continue
        category = _scope_category(path.stem) or QUANTISE
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.unparse(d) for d in node.decorator_list
            ):
                found[node.name] = category
    return found

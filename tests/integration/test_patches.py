"""Each patch of megatron-core cures what it says, and changes nothing else that can be seen.

The engine is run on 1, 2 and 4 gloo ranks (`tests/_tiny_engine.py`); oracles are the same case on one rank,
an uninterrupted run, `math.fsum`, or the upstream symbol put back for a moment (`_upstream`), which must show
the failure. Cases that can share a process group share one `run_ranks` call.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import logging
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_patches import (
    Patch,
    PatchMismatch,
    Target,
    all_patches,
    documentation,
    no_compile,
    original_of,
    registry,
)
from tests._distributed import REPOSITORY, RankError, run_ranks, use_fast_checkpoint_queue

STEPS = 3
# Largest relative difference of loss or gradient norm from one rank over STEPS steps, measured in brackets.
LAYOUT_TOLERANCE_FP32 = 1e-5  # [3.0e-6, tp2]
LAYOUT_TOLERANCE_BF16 = 1e-2  # [4.4e-3, tp2_sequence_parallel]
LAYOUT_TOLERANCE_EXACT = 1e-13  # [6.3e-16, tp2]
FLOAT32_ULP = 2.0**-23
DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
RANDOM = "megatron.core.tensor_parallel.random"

LAYOUTS_OF_2 = {
    "dp2": {},
    "dp2_distributed_optimizer": {"distributed_optimizer": True},
    "dp2_distributed_optimizer_overlap": {"distributed_optimizer": True, "overlap": True},
    "tp2": {"tp": 2},
    "tp2_sequence_parallel": {"tp": 2, "model": {"sequence_parallel": True}},
    "pp2": {"pp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "pp2_vpp2_distributed_optimizer": {"pp": 2, "vpp": 2, "distributed_optimizer": True},
}
# 16-bit types take other paths through the optimizers; float32 and float64 cover the layouts.
LAYOUTS_OF_2_IN_BF16 = ("dp2", "dp2_distributed_optimizer_overlap", "tp2_sequence_parallel", "pp2_vpp2")
LAYOUTS_OF_4 = {
    "tp2_dp2": {
        "tp": 2,
        "distributed_optimizer": True,
        "overlap": True,
        "model": {"sequence_parallel": True},
    },
    "tp2_pp2": {"tp": 2, "pp": 2, "distributed_optimizer": True},
    "pp4": {"pp": 4},
}
RECOMPUTE = {
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]},
}


@contextlib.contextmanager
def _upstream(path: str) -> Iterator[None]:
    """Put the upstream symbol back for the time of a with block (in a rank's process)."""
    owner, name, patched = registry.resolve(path)
    setattr(owner, name, original_of(path))
    try:
        yield
    finally:
        setattr(owner, name, patched)


def _relative_difference(curve: list[tuple[float, float]], oracle: list[tuple[float, float]]) -> float:
    assert len(curve) == len(oracle)
    return max(
        abs(value - expected) / abs(expected)
        for step, expected_step in zip(curve, oracle, strict=True)
        for value, expected in zip(step, expected_step, strict=True)
    )


def _error_of(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# Layouts ----------------------------------------------------------------------------------------------------


def _curves(rank: int, world_size: int, dtype: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    import torch

    from tests._tiny_engine import Case, Run

    if dtype == "float64":
        from megatron_patches import patch_exact_grad_norm

        patch_exact_grad_norm()
    return {name: Run(Case(dtype=getattr(torch, dtype), **case)).curve(STEPS) for name, case in cases.items()}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("float32", LAYOUT_TOLERANCE_FP32),
        ("bfloat16", LAYOUT_TOLERANCE_BF16),
        ("float64", LAYOUT_TOLERANCE_EXACT),
    ],
)
def test_every_layout_trains_like_one_rank(dtype: str, tolerance: float) -> None:
    oracle = run_ranks(_curves, 1, dtype, {"one": {}})[0]["one"]
    assert all(norm > 0.1 for _, norm in oracle), "clipping must be active, or it is not tested"
    layouts = LAYOUTS_OF_2_IN_BF16 if dtype == "bfloat16" else LAYOUTS_OF_2
    of_2 = run_ranks(_curves, 2, dtype, {name: LAYOUTS_OF_2[name] for name in layouts})
    of_4 = run_ranks(_curves, 4, dtype, LAYOUTS_OF_4) if dtype == "float64" else [{}]
    assert of_2[0] == of_2[1]
    for name, curve in {**of_2[0], **of_4[0]}.items():
        difference = _relative_difference(curve, oracle)
        assert difference <= tolerance, f"{name}: {difference:.2e}"


# Resume of the distributed optimizer ------------------------------------------------------------------------


def _resume_curves(
    rank: int, world_size: int, folder: str, exact: bool, cases: dict[str, tuple[dict[str, Any], str]]
) -> dict[str, tuple[bool, bool]]:
    """Per case: whether 2 + 2 steps equal 4 steps bitwise, in losses and norms, and in parameters."""
    import torch

    from tests._tiny_engine import Case, Run

    use_fast_checkpoint_queue()
    if exact:
        from megatron_patches import patch_exact_grad_norm

        patch_exact_grad_norm()
    equal = {}
    for name, (fields, sharding_type) in cases.items():
        case = Case(**{**fields, "dtype": getattr(torch, fields["dtype"])})
        through = Run(case)
        whole = through.curve(4)
        first = Run(case)
        halves = first.curve(2)
        first.save(_new_folder(folder, name), sharding_type)
        second = Run(case)
        second.load(f"{folder}/{name}", sharding_type)
        halves += second.curve(2)
        expected, received = through.parameters(), second.parameters()
        equal[name] = (
            halves == whole,
            all(torch.equal(expected[key], received[key]) for key in expected),
        )
    return equal


def _new_folder(folder: str, name: str) -> str:
    import torch.distributed as dist

    path = Path(folder, name)
    if dist.get_rank() == 0:
        path.mkdir()
    dist.barrier()
    return str(path)


RESUME_CASES = {
    f"{sharding_type}_{dtype}{suffix}": (
        {"dtype": dtype, "distributed_optimizer": True, **fields},
        sharding_type,
    )
    for sharding_type in ("fully_reshardable", "dp_reshardable")
    for dtype, suffix, fields in (
        ("float32", "", {}),
        ("bfloat16", "_overlap", {"overlap": True}),
        ("bfloat16", "_pp2_vpp2", {"pp": 2, "vpp": 2}),
    )
}


def test_distributed_optimizer_resumes_bitwise() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = run_ranks(_resume_curves, 2, folder, False, RESUME_CASES)
    for equal in results:
        assert equal == dict.fromkeys(RESUME_CASES, (True, True))


def test_exact_mode_resumes_bitwise() -> None:
    cases = {
        kind: ({"dtype": "float64", "distributed_optimizer": True}, kind)
        for kind in ("fully_reshardable", "dp_reshardable")
    }
    with tempfile.TemporaryDirectory() as folder:
        results = run_ranks(_resume_curves, 2, folder, True, cases)
    assert results == [dict.fromkeys(cases, (True, True))] * 2
    with tempfile.TemporaryDirectory() as folder:
        results = run_ranks(_resume_through_float32, 2, folder, cases)
    assert [found["fully_reshardable"] for found in results] == [(False, False)] * 2


def _resume_through_float32(rank: int, world_size: int, folder: str, cases: dict[str, Any]) -> dict[str, Any]:
    from megatron_patches import patch_exact_grad_norm

    patch_exact_grad_norm()
    with _upstream(f"{DISTRIBUTED}.get_parameter_state_dp_zero"):
        # False: applying the patches again would put back the one that is missing here.
        return _resume_curves(
            rank, world_size, folder, False, {"fully_reshardable": cases["fully_reshardable"]}
        )


def _resume_without_a_patch(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    from tests._tiny_engine import Case, Run

    use_fast_checkpoint_queue()
    case = Case(distributed_optimizer=True)
    first = Run(case)
    first.curve(2)
    kinds = ("fully_reshardable", "dp_reshardable")
    for kind in kinds:
        first.save(_new_folder(folder, kind), kind)
    whole = first.curve(3)

    def load(kind: str) -> Any:
        run = Run(case)
        run.load(f"{folder}/{kind}", kind)
        return run

    found: dict[str, Any] = {}
    with _upstream(f"{DISTRIBUTED}.state_dict"):
        found["state"] = _error_of(load, kinds[0])
    with _upstream(f"{DISTRIBUTED}._set_main_param_and_optimizer_states"):
        found["step"] = [_error_of(load, kind) for kind in kinds]
    with _upstream(f"{DISTRIBUTED}.load_state_dict"):
        found["shared"] = load(kinds[0]).curve(3) == whole
    found["patched"] = load(kinds[0]).curve(3) == whole
    return found


def test_distributed_optimizer_without_its_patches_does_not_resume() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for found in run_ranks(_resume_without_a_patch, 2, folder):
            assert found["state"].startswith("AssertionError")
            assert "KeyError: 'step'" in found["step"][0]
            assert "leaf" in found["step"][1]
            assert not found["shared"]
            assert found["patched"]


# Recompute --------------------------------------------------------------------------------------------------

microbatch: contextvars.ContextVar[int] = contextvars.ContextVar("microbatch", default=-1)


def _recompute(rank: int, world_size: int) -> dict[str, Any]:
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    from tests._tiny_engine import Case, Run

    found: dict[str, Any] = {"none": Run(Case()).curve(STEPS)}
    for name, fields in RECOMPUTE.items():
        found[name] = Run(Case(model=fields)).curve(STEPS)
    with _upstream(f"{RANDOM}.CheckpointWithoutOutput.__init__"):
        found["without_te"] = _error_of(lambda: Run(Case(model=RECOMPUTE["selective"])).step())

    def seen(kind: str) -> list[int]:
        """The microbatch that a layer sees in two forwards and then in their recomputations."""
        values: list[int] = []

        def layer(x: torch.Tensor) -> torch.Tensor:
            values.append(microbatch.get())
            return x * x

        outputs = []
        for number in (1, 2):
            microbatch.set(number)
            x = torch.ones(3, requires_grad=True)
            if kind == "output":
                outputs.append(tensor_parallel.checkpoint(layer, False, x))
            else:
                checkpoint = CheckpointWithoutOutput()
                discarded = checkpoint.checkpoint(layer, x)
                kept = discarded * 1.0
                checkpoint.discard_output_and_register_recompute(kept)
                outputs.append(kept)
        for output in reversed(outputs):
            output.sum().backward()
        return values

    def nested() -> list[int]:
        """The microbatch in a checkpoint within a checkpoint; and what a forward sets stays set."""
        values: list[int] = []

        def inner(x: torch.Tensor) -> torch.Tensor:
            values.append(microbatch.get())
            return x * x

        def outer(x: torch.Tensor) -> torch.Tensor:
            microbatch.set(7)
            return tensor_parallel.checkpoint(inner, False, x)

        microbatch.set(3)
        output = tensor_parallel.checkpoint(outer, False, torch.ones(3, requires_grad=True))
        values.append(microbatch.get())
        microbatch.set(9)
        output.sum().backward()
        values.append(microbatch.get())
        return values

    found["seen"] = [seen("output"), seen("without_output")]
    found["nested"] = nested()
    with (
        _upstream("megatron.core.tensor_parallel.checkpoint"),
        _upstream(f"{RANDOM}.CheckpointWithoutOutput.checkpoint"),
    ):
        found["seen_upstream"] = [seen("output"), seen("without_output")]
    return found


def test_recompute_is_bitwise_and_sees_the_context_of_its_forward() -> None:
    found = run_ranks(_recompute, 1)[0]
    assert found["full"] == found["none"]
    assert found["selective"] == found["none"]
    assert "FP8GlobalStateManager" in found["without_te"]
    assert found["seen"] == [[1, 2, 2, 1]] * 2
    assert found["seen_upstream"] == [[1, 2, 2, 2]] * 2
    # forward, after it, recompute of outer (runs inner), recompute of inner, caller
    assert found["nested"] == [7, 7, 7, 7, 9]


def _dropout(rank: int, world_size: int) -> dict[str, Any]:
    """Curves with dropout, and what the RNG tracker remarks meanwhile, with its filter and without."""
    from tests._tiny_engine import Case, Run

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    log = logging.getLogger(RANDOM)
    log.addHandler(handler)
    dropout = {"attention_dropout": 0.3, "hidden_dropout": 0.3}
    found: dict[str, Any] = {
        name: Run(Case(model={**dropout, **fields})).curve(STEPS)
        for name, fields in {"none": {}, **RECOMPUTE}.items()
    }
    found["heard"] = list(heard)
    log.filters.clear()
    Run(Case(model=dropout)).step()
    found["heard_unfiltered"] = heard
    return found


def test_dropout_is_the_same_when_recomputed() -> None:
    found = run_ranks(_dropout, 1)[0]
    assert found["full"] == found["none"]
    assert found["selective"] == found["none"]
    assert found["heard"] == []
    assert any("CPU RNG state changed" in message for message in found["heard_unfiltered"])


# Pipeline ---------------------------------------------------------------------------------------------------


def _batched_interleaved(rank: int, world_size: int) -> dict[str, Any]:
    from tests._tiny_engine import Case, Run

    case = Case(pp=2, vpp=2, model={"overlap_p2p_comm": False, "batch_p2p_comm": True})
    found: dict[str, Any] = {"patched": _error_of(Run(case).step)}
    with _upstream("megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator.__init__"):
        found["upstream"] = Run(case).curve(STEPS)
    found["right"] = Run(Case(pp=2, vpp=2)).curve(STEPS)
    found["two_stages_without_vpp"] = Run(Case(pp=2)).curve(STEPS)  # batched, and right
    return found


def test_two_interleaved_stages_with_batched_p2p_are_refused_because_wrong() -> None:
    found = run_ranks(_batched_interleaved, 2)[0]
    assert found["patched"].startswith("ValueError: two pipeline stages")
    assert "batch_p2p_comm=False" in found["patched"]
    assert _relative_difference(found["upstream"], found["right"]) > 1e-2
    assert _relative_difference(found["two_stages_without_vpp"], found["right"]) < LAYOUT_TOLERANCE_FP32


# Exact reductions -------------------------------------------------------------------------------------------


def _exact(rank: int, world_size: int) -> dict[str, Any]:
    import torch
    from megatron.core.optimizer import clip_grads, optimizer

    from megatron_patches import patch_exact_grad_norm
    from tests._tiny_engine import Case, Run

    found: dict[str, Any] = {}
    case = Case(dtype=torch.float64, distributed_optimizer=True)
    found["refused"] = _error_of(Run, case)
    patch_exact_grad_norm()
    found["again"] = patch_exact_grad_norm()
    # Large and small values: float32 sums lose the small ones.
    generator = torch.Generator().manual_seed(5)
    full = torch.cat([torch.full((1,), 3e4), torch.randn(20000, generator=generator)])
    mine = list(full.chunk(world_size)[rank].split(1000))
    found["norm"] = optimizer.get_grad_norm_fp32(mine)
    found["inf"] = clip_grads.get_grad_norm_fp32(mine, norm_type=math.inf)
    found["one"] = clip_grads.get_grad_norm_fp32(mine, norm_type=1)
    found["empty"] = clip_grads.get_grad_norm_fp32(mine if rank == 0 else [])
    found["upstream"] = original_of("megatron.core.optimizer.clip_grads.get_grad_norm_fp32")(mine)
    found["values"] = full.double().tolist()
    params = [torch.nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
    params.append(torch.nn.Parameter(torch.zeros(4)))  # without a gradient
    for param in params[:2]:
        param.grad = torch.full_like(param, 3.0)
    clip_grads.clip_grad_by_total_norm_fp32(params, max_norm=10.0, total_norm=9.0)
    found["below"] = [param.grad.tolist() for param in params[:2]]
    clip_grads.clip_grad_by_total_norm_fp32(params, max_norm=1.0, total_norm=6.0)
    found["above"] = [param.grad.tolist() for param in params[:2]]
    tp = Case(tp=world_size, dtype=torch.float64)
    found["tp"] = Run(tp).curve(STEPS)
    with _upstream(
        "megatron.core.tensor_parallel.cross_entropy.VocabParallelCrossEntropy.calculate_logits_max"
    ):
        found["tp_float32_loss"] = Run(tp).curve(STEPS)
    with _upstream(f"{DISTRIBUTED}._copy_model_grads_to_main_grads"):
        found["grads"] = _error_of(Run(case).step)
    return found


def test_exact_mode_sums_in_float64_and_needs_each_of_its_patches() -> None:
    found = run_ranks(_exact, 2)[0]
    values = found["values"]
    assert "Wrapped parameters must be one of" in found["refused"]
    assert found["again"] == []
    assert found["norm"] == _as_float32(math.sqrt(math.fsum(value * value for value in values)))
    assert found["one"] == _as_float32(math.fsum(map(abs, values)))
    assert found["inf"] == max(map(abs, values))
    half = values[: -(-len(values) // 2)]
    assert found["empty"] == _as_float32(math.sqrt(math.fsum(value * value for value in half)))
    assert found["upstream"] != found["norm"]
    assert found["below"] == [[3.0] * 4] * 2
    coefficient = 1.0 / (6.0 + 1e-6)
    assert found["above"][0] == [3.0 * coefficient] * 4
    assert found["above"][1] == pytest.approx([3.0 * coefficient] * 4, rel=FLOAT32_ULP)
    assert _relative_difference(found["tp"], found["tp_float32_loss"]) > 1e-9
    assert "dtype" in found["grads"]


def _as_float32(value: float) -> float:
    import struct

    return struct.unpack("f", struct.pack("f", value))[0]


# CUDA literals on the CPU -----------------------------------------------------------------------------------


def _cuda_names(rank: int, world_size: int, patched: bool) -> dict[str, Any]:
    import torch

    engine: dict[str, Any] = {"__name__": "megatron.core.somewhere", "torch": torch}
    exec("def type_name(tensor): return tensor.type()", engine)
    plain = torch.ones(2)

    def stream() -> str:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            plain.record_stream(torch.cuda.current_stream())
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            event.wait(torch.cuda.current_stream())
            torch.cuda.synchronize()
            return str(event.query())

    def ranges() -> str:
        torch.cuda.nvtx.range_push("a")
        torch.cuda.nvtx.range_pop()
        with torch.cuda.nvtx.range("b"):
            return "done"

    def seeded() -> str:
        torch.cuda.manual_seed(11)
        first = torch.rand(1)
        state = torch.cuda.get_rng_state()
        second = torch.rand(1)
        torch.cuda.set_rng_state(state)
        return str(torch.equal(torch.rand(1), second) and not torch.equal(first, second))

    def tracker() -> str:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        outside = torch.get_rng_state()
        with get_cuda_rng_tracker().fork():
            first = torch.rand(1)
        with get_cuda_rng_tracker().fork():
            second = torch.rand(1)
        moved_on = not torch.equal(first, second)
        return str(moved_on and torch.equal(outside, torch.get_rng_state()))

    def worker() -> str:
        from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

        PersistentAsyncCaller()
        return "started"

    def timers() -> str:
        from megatron.core.timers import Timers

        timers = Timers(2, "minmax")
        timers("interval", log_level=0).start(barrier=True)
        timers("interval").stop()
        return str("interval" in timers.get_all_timers_string(["interval"]))

    def uncompiled() -> str:
        from megatron.core import jit
        from megatron.core.fusions import fused_bias_swiglu

        return str(
            jit.jit_fuser is jit.noop_decorator
            and not hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable")
        )

    probes = {
        "literal": lambda: str(torch.zeros(1, device="cuda").device),
        "device_object": lambda: str(torch.empty_like(plain, device=torch.device("cuda", 0)).device),
        "current_device": lambda: str(torch.zeros(1, device=torch.cuda.current_device()).device),
        "to": lambda: str(plain.to("cuda").device),
        "to_keyword": lambda: str(plain.to(device="cuda", dtype=torch.float64).device),
        "cuda": lambda: str(torch.nn.Linear(2, 2).cuda().weight.cuda().device),
        "pinned": lambda: str(torch.ones(2, pin_memory=True).pin_memory().device),
        "type_seen_by_engine": lambda: engine["type_name"](plain.bfloat16()),
        "type_seen_by_others": lambda: plain.bfloat16().type(),
        "type_converts": lambda: str(plain.type(torch.float64).dtype),
        "stream": stream,
        "ranges": ranges,
        "seeded": seeded,
        "tracker": tracker,
        "worker": worker,
        "timers": timers,
        "uncompiled": uncompiled,
        "threads": lambda: str(torch.get_num_threads()),
    }
    found = {}
    for name, probe in probes.items():
        try:
            found[name] = probe()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


CUDA_NAMES_ON_CPU = {
    **dict.fromkeys(
        ("literal", "device_object", "current_device", "to", "to_keyword", "cuda", "pinned"), "cpu"
    ),
    "type_seen_by_engine": "torch.cuda.BFloat16Tensor",
    "type_seen_by_others": "torch.BFloat16Tensor",
    "type_converts": "torch.float64",
    "stream": "True",
    "ranges": "done",
    "seeded": "True",
    "tracker": "True",
    "timers": "True",
    "uncompiled": "True",
    "threads": "1",
}
SAME_WITHOUT_PATCHES = {"type_seen_by_others", "type_converts", "threads"}


def test_cuda_names_mean_the_cpu_and_fail_without_patches() -> None:
    patched = run_ranks(_cuda_names, 1, True)[0]
    assert patched.pop("worker").startswith("RuntimeError: the persistent asynchronous checkpoint worker")
    assert patched == CUDA_NAMES_ON_CPU
    unpatched = run_ranks(_cuda_names, 1, False, patched=False)[0]
    for name, value in CUDA_NAMES_ON_CPU.items():
        assert (unpatched[name] == value) == (name in SAME_WITHOUT_PATCHES), (name, unpatched[name])


def _async_loop(rank: int, world_size: int) -> str:
    path = "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller.async_loop"
    loop = original_of(path)
    return _error_of(getattr(loop, "__func__", loop), 0, None, None, None, logging.WARNING)


def test_persistent_worker_is_refused_because_it_divides_by_the_number_of_gpus() -> None:
    assert run_ranks(_async_loop, 1)[0].startswith("ZeroDivisionError")


def test_patches_work_after_the_engine_was_imported() -> None:
    """In a process that imported megatron-core first, its compiled functions run uncompiled."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch\n"
        "from megatron.core.fusions.fused_bias_swiglu import swiglu\n"
        "assert hasattr(swiglu, '_torchdynamo_orig_callable')\n"
        "threads = torch.get_num_threads()\n"
        "from megatron_patches import apply_patches\n"
        "assert 'no_compile' in apply_patches('cpu')\n"
        "assert apply_patches('cpu') == []\n"
        "assert torch.get_num_threads() == threads\n"
        "x = torch.randn(3, 8, device='cuda')\n"
        "a, b = x.chunk(2, -1)\n"
        "assert torch.equal(swiglu(x), torch.nn.functional.silu(a) * b)\n"
        "assert not torch._dynamo.utils.counters['frames'], torch._dynamo.utils.counters\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# Registry ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _engine() -> None:
    """Import the engine into this process the quick way; the registry asks for its version."""
    no_compile.import_engine()


@pytest.fixture
def upstream_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module standing for upstream code, so that a changed upstream can be tested."""
    (tmp_path / "pretend_upstream.py").write_text(
        "def answer():\n    return 41\n\n\nclass Box:\n    size = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "pretend_upstream"
    sys.modules.pop("pretend_upstream", None)


def _patch(path: str, source_hash: str | None, optional: bool = False) -> Patch:
    def replace(original: Any, path: str) -> Any:
        def answer() -> int:
            return original() + 1

        return answer

    return Patch(
        name="pretend",
        why="41 is not the answer",
        reaches="callers of answer",
        upstream="pretend_upstream.py lines 1-2",
        delete_when="it returns 42",
        targets=(Target(path=path, source_hash=source_hash, optional=optional),),
        replace=replace,
    )


def test_patch_replaces_once_keeps_the_original_and_logs(
    upstream_module: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = importlib.import_module(upstream_module)
    original, path = module.answer, f"{upstream_module}.answer"
    patch = _patch(path, registry.source_hash(original))
    with caplog.at_level(logging.INFO, logger="megatron_patches"):
        assert registry.install([patch]) == ["pretend"]
    assert module.answer() == 42
    assert registry.install([patch]) == []
    assert module.answer() == 42
    assert original_of(path) is original
    assert [record.getMessage() for record in caplog.records] == [
        "megatron_patches: pretend (41 is not the answer)"
    ]


def test_changed_upstream_raises_and_changes_nothing(upstream_module: str) -> None:
    module = importlib.import_module(upstream_module)
    good = _patch(f"{upstream_module}.answer", registry.source_hash(module.answer))
    changed = _patch(f"{upstream_module}.answer", "0" * 64)
    with pytest.raises(PatchMismatch) as caught:
        registry.install([good, changed])
    message = str(caught.value)
    assert message.startswith("pretend_upstream.answer: expected source 0000000000000000, found source ")
    assert registry.source_hash(module.answer)[:16] in message
    assert "megatron-core 0.16.1" in message and "\n" not in message
    assert module.answer() == 41


@pytest.mark.parametrize(
    "path", ["pretend_upstream.nothing", "pretend_upstream.Box.nothing", "no_such_module.f"]
)
def test_missing_upstream_symbol_is_named(upstream_module: str, path: str) -> None:
    with pytest.raises(PatchMismatch, match=path):
        registry.install([_patch(path, None)])
    assert registry.install([_patch(path, None, optional=True)]) == []


def test_other_version_of_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "megatron_core_version", lambda: "0.17.0")
    with pytest.raises(PatchMismatch, match=r"expected version 0\.16\.1, found version 0\.17\.0"):
        registry.install([])


def test_every_patch_is_documented_and_pinned_to_a_source() -> None:
    text = documentation()
    names = [patch.name for patch in all_patches()]
    assert len(set(names)) == len(names)
    for patch in all_patches():
        assert patch.name in text and patch.delete_when in text
        for target in (*patch.targets, *patch.relies_on):
            assert target.path in text
            assert target.source_hash is not None or target.path.startswith("torch.")


def test_unknown_device_is_refused() -> None:
    from megatron_patches import apply_patches

    with pytest.raises(ValueError, match="'tpu'"):
        apply_patches("tpu")


# Scaffolding ------------------------------------------------------------------------------------------------


def _misbehave(rank: int, world_size: int, how: str) -> int:
    import os
    import time

    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    if rank == 1 and how == "raise":
        raise ValueError("rank one fails")
    if rank == 1 and how == "die":
        os._exit(3)
    if rank == 1 and how == "hang":
        time.sleep(60)
    return int(total) + rank


@pytest.mark.parametrize(
    ("how", "timeout", "message"),
    [
        ("raise", 60.0, r"rank 1 of 2 failed:[\s\S]*ValueError: rank one fails"),
        ("die", 60.0, "rank 1 died without a result, exit code 3"),
        ("hang", 3.0, r"ranks \[(0, )?1\] did not finish within 3 s"),
    ],
)
def test_run_ranks_reports_the_rank_that_failed(how: str, timeout: float, message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_ranks(_misbehave, 2, how, timeout=timeout)


def test_run_ranks_returns_results_by_rank() -> None:
    assert run_ranks(_misbehave, 3, "well") == [3, 4, 5]

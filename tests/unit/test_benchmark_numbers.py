"""The arithmetic behind the benchmarks: shapes, medians, tables, categories, which steps are which."""

from __future__ import annotations

import itertools
import json
import subprocess
from dataclasses import replace

import pytest
import torch

from metis.benchmark import kernel_cases, report, shapes, step_profile, step_runs
from metis.benchmark.timing import Samples, num_inputs_for, require_device
from metis.errors import ConfigError
from metis.training.arguments import parse_args

PARAMETERS = {"llama-30m": 30e6, "llama-125m": 125e6, "llama3-8b-4layers": 1.13e9}
PARAMETER_TOLERANCE = 0.02  # relative; worst measured 0.004 (llama3-8b-4layers)


# --- shapes ------------------------------------------------------------------------------------------------


def test_the_linears_of_llama3_8b_are_those_of_its_published_config():
    sizes = {
        linear.name: (linear.in_features, linear.out_features) for linear in shapes.linears_of("llama3-8b")
    }
    assert sizes == {"qkv": (4096, 6144), "proj": (4096, 4096), "fc1": (4096, 28672), "fc2": (14336, 4096)}


def test_matrices_are_inputs_gradients_and_weights_without_repetition():
    matrices = shapes.matrices_of("llama3-8b", 8192)
    assert len(matrices) == len(set(matrices))
    assert {(8192, 4096), (8192, 6144), (8192, 28672), (8192, 14336), (28672, 4096)} <= set(matrices)
    sizes = [rows * cols for rows, cols in matrices]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    "text", ["8192", "8192x", "x16", "-16x16", "0x16", "8192x4095", "16 x 16", "16x16x16"]
)
def test_shapes_that_are_none_are_refused(text: str):
    with pytest.raises(ConfigError, match="multiples of 16"):
        shapes.parse_shape("--shapes", text)


def test_names_that_are_the_same_are_refused_with_what_they_stand_for():
    shapes.require_distinct("--recipes", ["metis", "a/x.yaml"], ["metis", "x"])
    with pytest.raises(ConfigError, match=r"--recipes: .*received 'x' 2 times \(a/x.yaml, b/x.json\)"):
        shapes.require_distinct("--recipes", ["a/x.yaml", "metis", "b/x.json"], ["x", "metis", "x"])


def test_an_unknown_model_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'llama-125m'"):
        shapes.step_model("llama-125")


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_for_measuring_have_the_size_that_their_name_says(name: str):
    """The count is the trainer's own."""
    settings = step_runs.StepSettings(model=shapes.step_model(name), device="cpu")
    contender = step_runs.contenders(["bf16"], False)[0]
    step_runs.resolve(settings, contender)
    assert contender.config["parameters"] == pytest.approx(PARAMETERS[name], rel=PARAMETER_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "device", "is_captured"),
    [("llama-30m", "cuda", True), ("llama-30m", "cpu", False), ("llama3-8b-4layers", "cuda", False)],
)
def test_steps_of_small_models_are_captured_on_a_gpu_unless_the_user_says_no(
    name: str, device: str, is_captured: bool
):
    contender = step_runs.contenders(["metis"], False)[0]
    settings = step_runs.StepSettings(model=shapes.step_model(name), device=device)
    options = step_runs.trainer_options(settings, contender, 3)
    assert parse_args(options).cuda_graph_impl == ("local" if is_captured else "none")
    said = replace(settings, more=("--cuda-graph-impl", "none"))
    assert parse_args(step_runs.trainer_options(said, contender, 3)).cuda_graph_impl == "none"


# --- numbers -----------------------------------------------------------------------------------------------


def test_median_and_interquartile_range():
    samples = Samples((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (samples.median, samples.spread) == (3.0, 2.0)
    assert (Samples((7.0,)).median, Samples((7.0,)).spread) == (7.0, 0.0)


def test_a_gpu_that_is_not_there_is_one_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a GPU"):
        require_device("cuda")
    assert require_device("auto") == torch.device("cpu")


def test_inputs_are_enough_to_leave_the_cache(monkeypatch):
    properties = type("Properties", (), {"L2_cache_size": 60 * 2**20})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for megabytes, expected in ((64, 3), (200, 2), (1, 16)):
        assert num_inputs_for(megabytes * 2**20, torch.device("cuda", 0)) == expected


# --- report ------------------------------------------------------------------------------------------------


def test_table_is_markdown_with_reasons_in_place_of_numbers():
    columns = (report.Column("name", "kernel"), report.Column("us", "us", 1), report.Column("x", "x copy", 2))
    rows = [{"name": "a", "us": 12.34, "x": 1.0}, {"name": "b", "reason": "no GPU"}]
    assert report.table(columns, rows).splitlines() == [
        "| kernel | us   | x copy |",
        "| ------ | ---- | ------ |",
        "| a      | 12.3 | 1.00   |",
        "| b      | -    | not measured: no GPU |",
    ]


def test_commit_is_gits_with_edits_named_or_what_the_environment_states(monkeypatch):
    answers = {"--short": "abc1234", "--show-toplevel": str(report.REPOSITORY), "--porcelain": " M file"}
    monkeypatch.setattr(report, "_git", lambda *arguments: answers[arguments[1]])
    monkeypatch.setenv("METIS_COMMIT", "def5678")
    assert report.commit() == "abc1234 with uncommitted edits"
    answers["--porcelain"] = ""
    assert report.commit() == "abc1234"
    answers["--show-toplevel"] = str(report.REPOSITORY.parent)
    assert report.commit() == "def5678", "a copy in another repository is not of its commit"

    def no_repository(*arguments: str) -> str:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(report, "_git", no_repository)
    monkeypatch.delenv("METIS_COMMIT", raising=False)
    assert report.commit() == "unknown"
    monkeypatch.setenv("METIS_COMMIT", "def5678")
    assert report.commit() == "def5678"


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be writable"):
        report.require_writable(str(tmp_path / "file" / "x.json"))


# --- kernel cases ------------------------------------------------------------------------------------------


@pytest.fixture
def cases(monkeypatch) -> list[kernel_cases.KernelCase]:
    """All of them, as on a machine that has kernels; none is run."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return kernel_cases.kernel_cases(32, 64, torch.device("cpu"), tiles=True)


def test_cases_have_distinct_names_and_references_that_exist(cases):
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) > 40 and names[0] == kernel_cases.COPY
    assert {case.reference for case in cases} - {None} <= set(names)
    assert all(case.num_bytes > 0 and case.call is not None for case in cases)


def test_a_glob_keeps_the_copy_and_what_is_compared_with(cases):
    names = {case.name for case in kernel_cases.select(cases, "16x16 rne, 4*")}
    assert names == {kernel_cases.COPY, "16x16 rne", "16x16 rne, 4-over-6"}
    with pytest.raises(ConfigError, match="must match a row"):
        kernel_cases.select(cases, "fp8*")


# --- profile -----------------------------------------------------------------------------------------------


def _event(kind: str, name: str, ts: float, dur: float, correlation: int | None = None, tid: int = 1) -> dict:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": kind, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}


ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"
TRACE = [
    _event("cpu_op", "_QuantizedLinear", 0, 100),
    _event("cpu_op", "aten::add", 10, 20),
    _event("cuda_runtime", "cudaLaunchKernel", 15, 2, 1),
    _event("cpu_op", "aten::mm", 40, 20),
    _event("cuda_driver", "cuLaunchKernelEx", 45, 2, 2),
    _event("user_annotation", "Optimizer.step#AdamW.step", 200, 50),
    _event("cuda_runtime", "cudaLaunchKernel", 210, 2, 3),
    _event("cuda_runtime", "cudaLaunchKernel", 300, 2, 4),
    _event("kernel", ELEMENTWISE, 1000, 100, 1, tid=7),
    _event("kernel", "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", 1100, 300, 2, tid=7),
    _event("kernel", ELEMENTWISE, 1500, 40, 3, tid=7),
    _event("kernel", ELEMENTWISE, 1600, 10, 4, tid=7),
    _event("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 1050, 100, 9, tid=8),
    {"ph": "i", "name": "marker", "ts": 0},
]


def test_kernels_are_told_apart_by_name_and_by_where_they_were_launched():
    profile = step_profile.profile_of(TRACE, num_steps=2)
    expected = {
        step_profile.QUANTISE: 0.05, step_profile.GEMM: 0.15, step_profile.OPTIMIZER: 0.02,
        step_profile.OTHER: 0.005, step_profile.COMMUNICATION: 0.05,
    }  # fmt: skip
    assert {name: ms for name, ms in profile.milliseconds.items() if ms} == pytest.approx(expected)
    assert profile.busy_ms == pytest.approx(0.5e-3 * (100 + 300 + 40 + 10))  # NCCL runs beside the others
    assert profile.num_kernels == 2.5
    assert profile.names[step_profile.OTHER] == [(ELEMENTWISE, pytest.approx(0.005))]


def test_without_a_gpu_operations_count_less_those_inside_them():
    profile = step_profile.profile_of(TRACE[:8], num_steps=1)
    assert profile.milliseconds[step_profile.QUANTISE] == pytest.approx(0.080)
    assert profile.milliseconds[step_profile.GEMM] == pytest.approx(0.020)
    assert profile.busy_ms == pytest.approx(0.100)


@pytest.mark.parametrize(
    ("name", "category"),
    [
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128",
            step_profile.ATTENTION,
        ),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", step_profile.GEMM),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", step_profile.GEMM),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", step_profile.OPTIMIZER),
        ("triton_poi_fused_add_addmm_mul_silu_0", step_profile.NORM),
        ("triton_per_fused_3", step_profile.NORM),
        ("Memcpy DtoD (Device -> Device)", step_profile.COPIES),
        ("void at::native::CatArrayBatchedCopy<OpaqueType>", step_profile.COPIES),
        ("something_new", step_profile.OTHER),
        ("_quantize_kernel", step_profile.QUANTISE),
        ("_amax_kernel", step_profile.QUANTISE),
    ],
)
def test_names_of_kernels(name: str, category: str):
    assert step_profile.categorise(name, None) == category


# --- steps -------------------------------------------------------------------------------------------------


def _contender(interval: int | None) -> step_runs.Contender:
    contender = step_runs.Contender("r", "r", ())
    basis = None if interval is None else {"refresh_interval_steps": interval}
    contender.config = {"recipe": {"basis": basis}, "num_quantized_linears": 3}
    return contender


def test_steps_are_sorted_into_warm_up_plain_and_refreshing():
    """Iterations count from 1; bases are renewed after every eighth."""
    rows = [
        {"iteration": i, "step_seconds": 10.0 if i % 8 == 0 else 1.0, "lm_loss": 2.0} for i in range(1, 25)
    ]
    contender = _contender(8)
    contender.take(rows, warmup=8)
    assert (len(contender.plain), contender.refresh) == (14, [10.0, 10.0])
    assert contender.amortised_seconds == pytest.approx((7 * 1.0 + 10.0) / 8)
    without = _contender(None)
    without.take(rows, warmup=8)
    assert len(without.plain) == 16 and not without.refresh and without.amortised_seconds == 1.0


def test_where_every_timed_step_renews_bases_the_mean_is_theirs_or_unknown():
    rows = [{"iteration": i, "step_seconds": 4.0, "lm_loss": 2.0} for i in range(1, 9)]
    always, once = _contender(1), _contender(8)
    always.take(rows, warmup=6)
    assert (always.plain, always.refresh, always.amortised_seconds) == ([], [4.0, 4.0], 4.0)
    once.take(rows, warmup=7)
    assert (once.plain, once.refresh, once.amortised_seconds) == ([], [4.0], None)


def test_no_profiled_step_renews_bases():
    for steps, profiled, interval in itertools.product(range(1, 40), range(1, 5), (5, 8, 16, None)):
        after = step_runs.profile_after(steps, profiled, interval)
        traced = range(after + 2, after + 2 + profiled)
        assert after >= steps and (interval is None or after < steps + interval + 1)
        assert interval is None or not any(step % interval == 0 for step in traced)


def test_options_of_the_user_win():
    model = shapes.step_model("llama3-8b-4layers")
    contender = step_runs.contenders(["nvfp4"], False)[0]
    settings = step_runs.StepSettings(model=model, device="cpu", more=("--num-layers", "2"))
    step_runs.resolve(settings, contender)
    assert contender.config["model"]["num_layers"] == 2
    assert contender.config["training"]["global_batch_size"] == 4


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--train-iters", "3"),
        ("--metrics-file", "x"),
        ("--recipe", "nvfp4"),
        ("--fp4-format", "e2m1"),
        ("--preset", "tiny"),
        ("--device", "cpu"),
    ],
)
def test_options_of_the_benchmark_are_refused_however_they_are_spelled(option: str, value: str):
    contender = step_runs.contenders(["nvfp4"], False)[0]
    for spelling in ((option, value), (f"{option}={value}",)):
        settings = step_runs.StepSettings(model=shapes.step_model("tiny"), device="cpu", more=spelling)
        with pytest.raises(ConfigError, match=f"{option}: must not be among"):
            step_runs.resolve(settings, contender)


def test_ratios_are_to_our_own_bf16_over_a_refresh_interval():
    settings = step_runs.StepSettings(model=shapes.step_model("llama-30m"), device="cpu", num_gpus=2)
    found = step_runs.contenders(["bf16", "metis"], True)
    assert [contender.name for contender in found] == ["bf16", "bf16, Transformer Engine", "metis"]
    for contender, interval in zip(found, (None, None, 4), strict=True):
        contender.config = {
            "recipe": {"basis": interval and {"refresh_interval_steps": interval}},
            "num_quantized_linears": 1, "num_linears": 2, "flops_per_iteration": 8e12,
            "tokens_per_iteration": 100,
        }  # fmt: skip
    found[0].plain, found[2].plain, found[2].refresh = [2.0], [2.0, 2.0, 2.0], [6.0]
    found[1].reason = "exit status 1"
    rows = step_runs.rows_of(settings, found, 8e12)
    assert [row.get("to_bf16") for row in rows] == [1.0, None, 1.5]
    assert rows[1]["failed"] and not rows[0]["failed"]
    found[2].plain, found[2].refresh = [], [6.0]
    row = step_runs.rows_of(settings, found, 8e12)[2]
    assert row["refresh_ms"] == 6000.0 and not row["failed"]
    assert {row[key] for key in ("ms", "amortised_ms", "refresh_percent", "tflops", "to_bf16")} == {None}
    assert rows[0]["tflops"] == 2.0 and rows[0]["of_ceiling"] == 0.25 and rows[2]["refresh_percent"] == 50.0
    json.dumps(rows)


def test_overlapped_messages_get_more_than_one_queue_of_launches_unless_the_caller_says(monkeypatch):
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.delenv(name, raising=False)
    assert step_runs.environment(["--sequence-parallel"])[name] == "1"
    assert step_runs.environment(["--sequence-parallel", "--tp-comm-overlap"])[name] == "8"
    monkeypatch.setenv(name, "4")
    assert step_runs.environment(["--tp-comm-overlap"])[name] == "4"

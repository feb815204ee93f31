"""Triton kernels equal their torch oracles bit by bit, under Triton's interpreter.

The comparisons are those of tests/gpu/kernel_bits.py, which runs them on real hardware too. Here they run in
one process of their own: the interpreter must be chosen before Triton is first imported, and another test may
have imported it. What the interpreter cannot show, contraction and flushing, is read from compiled code
(tests/gpu/kernel_code.py), for which no GPU is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metis import kernels
from metis.errors import ConfigError, ShapeError
from metis.rng import NoisePosition

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "tests" / "gpu"

MINIMAL_CHECKS = {
    "controls": 1,
    "amax": 100,
    "nvfp4": 400,
    "reduced amax": 40,
    "four over six": 200,
    "mxfp4": 350,
    "stochastic": 300,
    "memory orders": 100,
    "tall grid": 6,
    "shards": 16,
    "positions": 15,
    "rotation": 250,
    "amax both": 60,
    "decoding": 30,
    "added heads": 250,
    "split": 70,
    "widening": 26,
    "large": 9,
}
"""Comparisons per group: fewer means that a group lost inputs."""

pytest.importorskip("triton", reason="Triton is not installed")


def run_script(name: str, *arguments: str, interpret: bool) -> dict[str, Any]:
    """Run a script of tests/gpu in a process of its own; returns the JSON object of its last line."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(SCRIPTS / name), *arguments],
        env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert result.stdout.strip(), result.stderr[-2000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def compare(*arguments: str) -> dict[str, Any]:
    """Compare kernels with oracles under the interpreter."""
    return run_script("kernel_bits.py", "--device", "cpu", *arguments, interpret=True)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return compare()


@pytest.mark.parametrize("group", MINIMAL_CHECKS)
def test_kernels_equal_their_oracles_bitwise(report: dict[str, Any], group: str):
    different = {name: what for name, what in report["different"].items() if name.startswith(f"{group}:")}
    assert not different
    assert report["counts"][group] >= MINIMAL_CHECKS[group]


@pytest.mark.long
def test_kernels_equal_their_oracles_bitwise_on_larger_matrices():
    report = compare("--rows", "112", "--cols", "336")
    assert not report["different"]
    assert sum(report["counts"].values()) >= sum(MINIMAL_CHECKS.values())


def test_compiled_kernels_round_every_operation_and_keep_denormals():
    """The interpreter never contracts or flushes; this reads the code that a GPU would run."""
    code = run_script("kernel_code.py", interpret=False)
    assert len(code["found"]) >= 7
    assert not {name: found for name, found in code["found"].items() if found}
    assert code["compiled_for_steps"] == 0


def test_compiled_products_read_no_register_before_it_is_written():
    """What ptxas 12.8 made of an earlier form of the residual, in three lines, and what is made of this
    one.
    """
    sys.path.insert(0, str(SCRIPTS))
    try:
        from machine_code import undefined_reads
    finally:
        sys.path.remove(str(SCRIPTS))
    broken = (
        "/*1010*/ UIADD3 UR26, UP0, UR26, 0x20, URZ ;\n"
        "/*1050*/ UMOV UR27, 0xc0000010 ;\n"
        "/*28e0*/ HGMMA.64x16x16.F32.BF16 R56, R28, gdesc[UR24].tnspB, R56 ;"
    )
    copied = "/*1000*/ UMOV UR26, UR5 ;\n"
    assert [line[:4] for line in undefined_reads(broken)] == ["1010"]
    assert [line[:4] for line in undefined_reads(copied + broken)] == ["1000"]
    assert undefined_reads("/*0ff0*/ ULDC.64 UR4, c[0x0][0x258] ;\n" + copied + broken) == []
    report = run_script("machine_code.py", interpret=False)
    assert report["compiled"] >= 10 and report["found"] == {}


@pytest.mark.long
def test_every_variant_compiles_and_the_reader_sees_contraction():
    assert not any(run_script("kernel_code.py", "--full", interpret=False)["found"].values())
    fused = run_script("kernel_code.py", "--fuse", interpret=False)["found"]
    assert sum("fma" in found for found in fused.values()) >= 5


def test_the_package_can_be_asked_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from metis import kernels\n"
        "print(kernels.is_available('cpu'), kernels.is_available('cuda'))\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.stdout.split() == ["False", "False"], result.stderr


def test_a_cpu_has_kernels_only_under_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.is_available("cpu")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not kernels.is_available("cpu")
    with pytest.raises(ConfigError, match=r"TRITON_INTERPRET=1.*use metis\.quantize"):
        kernels.amax(torch.ones(16, 16))


def noise(tokens: tuple[tuple[int, int], ...], features: tuple[tuple[int, int], ...]) -> Any:
    return kernels.KernelNoise(
        key=(1, 2), position=NoisePosition(0, 0), tokens=tokens, features=features
    )  # fmt: skip


WRONG_CALLS = {
    "fp64": (ShapeError, "float32, bfloat16 or float16", lambda q, x, a: q(x.double(), a)),
    "vector": (ShapeError, "non-empty matrix", lambda q, x, a: q(x[0], a)),
    "ragged": (ShapeError, "multiple of 16", lambda q, x, a: q(x[:, :24], a)),
    "ragged tile": (ShapeError, "axis 0 must be a multiple of 16", lambda q, x, a: q(
        x[:24], a, block_shape=(16, 16))),
    "ragged rotation": (ShapeError, "rotation of 32", lambda q, x, a: q(x[:, :48], a, sign_vector=(1,) * 32)),
    "block": (ShapeError, "block_shape", lambda q, x, a: q(x, a, block_shape=(1, 32))),
    "signs": (ConfigError, "sign_vector", lambda q, x, a: q(x, a, sign_vector=(1,) * 8)),
    "rounding": (ConfigError, "rounding", lambda q, x, a: q(x, a, rounding="nearest")),
    "no noise": (ConfigError, "noise", lambda q, x, a: q(x, a, rounding="stochastic")),
    "needless noise": (ConfigError, "noise", lambda q, x, a: q(x, a, noise=noise(((0, 32),), ((0, 64),)))),
    "foreign noise": (ShapeError, "runs describe", lambda q, x, a: q(
        x, a, rounding="stochastic", noise=noise(((0, 16),), ((0, 64),)))),
    "bits": (ConfigError, "num_random_bits", lambda q, x, a: q(
        x, a, rounding="stochastic", noise=noise(((0, 32),), ((0, 64),)), num_random_bits=12)),
    "scales": (ConfigError, "scale_rounding", lambda q, x, a: q(x, a, scale_rounding="even")),
    "no output": (ConfigError, "want_packed", lambda q, x, a: q(x, a, want_operand=False)),
    "other whole": (ShapeError, "must be .*as its residual", lambda q, x, a: q(x, a, whole=x.bfloat16())),
    "whole for codes": (ConfigError, "no effect on codes", lambda q, x, a: q(
        x, a, whole=x, want_operand=False, want_packed=True)),
    "whole and 4over6": (ConfigError, "must be None with four_over_six", lambda q, x, a: q(
        x, a, whole=x, four_over_six="mae")),
    "host amax": (ShapeError, "amax must be a 0-dim", lambda q, x, a: q(x, a[None])),
    "4over6 error": (ConfigError, "'mae' or 'mse'", lambda q, x, a: q(x, a, four_over_six="max")),
    "4over6 rotated": (ConfigError, "four_over_six", lambda q, x, a: q(
        x, a, four_over_six="mae", sign_vector=(1,) * 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls_are_refused_before_a_launch(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    error, message, call = WRONG_CALLS[name]
    with pytest.raises(error, match=message):
        call(kernels.quantize_nvfp4, torch.ones(32, 64), torch.tensor(1.0))


@pytest.mark.parametrize("what", ["fp32", "offset", "narrow rows", "rank 8", "rank 80", "wide F"])
def test_only_what_compiles_rightly_is_split_in_one_launch(what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from metis.kernels import splitting

    monkeypatch.setattr(splitting, "MIN_ROWS", 64)
    features = 200 if what == "narrow rows" else 192
    x = torch.zeros(64, features + 1 if what == "offset" else features, dtype=torch.bfloat16)
    rank = {"rank 8": 8, "rank 80": 80}.get(what, 16)
    v = torch.zeros(features, rank, dtype=torch.bfloat16)
    f = torch.zeros(features, 80, dtype=torch.bfloat16) if what == "wide F" else None
    good = torch.zeros(64, 192, dtype=torch.bfloat16), torch.zeros(192, 16, dtype=torch.bfloat16)
    assert splitting.can_split(*good, None, 8) and not splitting.can_split(*good, None, 16)
    assert not splitting.can_split(good[0][:63], good[1], None, 8)
    x = x.float() if what == "fp32" else x[:, 1:] if what == "offset" else x
    assert not splitting.can_split(x, v, f, 8)
    with pytest.raises(ShapeError, match="use project, fold and residual"):
        splitting.split(x, v, 8, factor=f)


def test_runs_that_cannot_be_indices_are_refused():
    with pytest.raises(ShapeError, match="runs need"):
        noise(((-1, 4),), ((0, 4),))
    with pytest.raises(ShapeError, match="runs need"):
        noise(((0, 4),), ((2**31 - 2, 4),))


def test_words_on_another_device_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    elsewhere = torch.zeros(2, dtype=torch.int32, device="meta")
    foreign = kernels.KernelNoise(
        key=(1, 2), position=NoisePosition(0, 0, elsewhere), tokens=((0, 16),), features=((0, 16),)
    )
    with pytest.raises(ConfigError, match="on cpu, received meta"):
        foreign.counter_words(torch.device("cpu"))


def test_bytes_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    packed, scales = torch.zeros(16, 16, dtype=torch.uint8), torch.zeros(16, 2, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="must have shape"):
        kernels.decode_operand(packed, scales[:8])
    with pytest.raises(ConfigError, match="format"):
        kernels.decode_operand(packed, scales, format="fp8_e4m3")
    with pytest.raises(ShapeError, match="row-major uint8"):
        kernels.decode_operand(packed.to(torch.int32), scales)
    with pytest.raises(ConfigError, match="amax"):
        kernels.dequantize(packed, scales)

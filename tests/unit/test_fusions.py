"""Which passes are fused follows from device, switches and what is installed, and is printed with reasons."""

from __future__ import annotations

from typing import Any

import pytest

import megatron_patches
from metis.errors import ConfigError
from metis.gemm import cublas
from metis.training import fusions
from metis.training.arguments import parse_args
from metis.training.fusions import Fusions, resolve_fusions
from metis.training.validation import validate_args

TINY = "--preset tiny --mock-data --vocab-size 1000 --micro-batch-size 2 --lr 1e-3 --train-iters 10"


def resolve(
    monkeypatch: pytest.MonkeyPatch,
    options: str = "",
    *,
    device: str = "cuda",
    kernels: str | None = None,
    blas: bool = True,
    transformer_engine: bool = False,
) -> tuple[Fusions, list[str]]:
    """Return what is fused on a pretended device, and the patches that were asked for."""
    patched: list[str] = []
    monkeypatch.setattr(fusions, "print_rank_0", print)
    monkeypatch.setattr(fusions, "reason_unavailable", lambda device: kernels)
    monkeypatch.setattr(cublas, "is_available", lambda: blas)
    for name in ("patch_weight_gradients", "patch_rotary"):
        monkeypatch.setattr(megatron_patches, name, lambda *functions, name=name: patched.append(name))
    args = parse_args(f"{TINY} {options}".split())
    validate_args(args, 1)
    args.device = device
    monkeypatch.setattr(fusions, "_fused_rotary", lambda: (None, None))
    return resolve_fusions(args, transformer_engine), patched


ALL = Fusions(weight_gradients=True, rotary=True, rotary_qkv=True, norm=True, cross_entropy=True)


def test_a_gpu_fuses_everything_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve(monkeypatch) == (ALL, ["patch_weight_gradients", "patch_rotary"])
    assert capsys.readouterr().out == " > fused: weight gradients, rotary, norm, cross entropy\n"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("--no-gradient-accumulation-fusion", "weight_gradients"),
        ("--no-rope-fusion", "rotary"),
        ("--no-persist-layer-norm", "norm"),
        ("--no-cross-entropy-loss-fusion", "cross_entropy"),
    ],
)
def test_a_switch_turns_its_pass_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, name: str
) -> None:
    found, patched = resolve(monkeypatch, options)
    off = {name: False} | ({"rotary_qkv": False} if name == "rotary" else {})
    assert found == Fusions(**{**vars_of(ALL), **off})
    assert ("patch_rotary" in patched) == (name != "rotary")
    assert ("patch_weight_gradients" in patched) == (name != "weight_gradients")
    assert f" > not fused: {name.replace('_', ' ')} ({options})\n" in capsys.readouterr().out


def vars_of(found: Fusions) -> dict[str, Any]:
    return {name: getattr(found, name) for name in Fusions.__slots__}


def test_the_cpu_fuses_nothing_by_itself_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve(monkeypatch, device="cpu") == (Fusions(), [])
    asked = resolve(monkeypatch, "--cross-entropy-loss-fusion", device="cpu")
    assert asked == (Fusions(cross_entropy=True), [])
    assert capsys.readouterr().out == ""


def test_without_triton_only_products_are_fused_and_the_reason_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = resolve(monkeypatch, kernels="Triton is not installed")
    assert found == Fusions(weight_gradients=True)
    assert capsys.readouterr().out.count("(Triton is not installed)") == 3
    with pytest.raises(ConfigError, match=r"must be left out.*Triton is not installed"):
        resolve(monkeypatch, "--cross-entropy-loss-fusion", kernels="Triton is not installed")


def test_exact_reductions_fuse_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(monkeypatch, "--exact-reductions") == (Fusions(), [])


def test_transformer_engine_rotates_and_normalises_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found, patched = resolve(monkeypatch, transformer_engine=True, kernels="none for a test", blas=False)
    assert found == Fusions(rotary=True, norm=True) and patched == []


def test_the_projection_is_cut_first_where_a_norm_stands_between(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = resolve(monkeypatch, "--qk-layernorm")
    assert found.rotary and not found.rotary_qkv


def test_contradicting_switches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="contradicts --cross-entropy-loss-fusion"):
        resolve(monkeypatch, "--cross-entropy-loss-fusion --no-cross-entropy-loss-fusion")

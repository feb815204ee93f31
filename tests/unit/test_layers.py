"""Who may import whom, read from the source of every file; imports inside functions count.

A file of the method imports only from rows above its own. The two halves of the numerics (`quantize`,
`decompose`) and the kernels are strangers. What checks arguments must not pull in torch, not even through
another file, or a mistyped option would cost ten seconds.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

ROWS = (
    ("metis.errors", "metis.formats"),
    ("metis.config",),
    ("metis.recipes",),
    ("metis.policy",),
    ("metis.schedule",),
    ("metis.rng", "metis.rounding"),
    ("metis.clock", "metis.exchange"),
    ("metis.quantize", "metis.decompose", "metis.kernels"),
    ("metis.fused",),
    ("metis.operand",),
    ("metis.gemm",),
    ("metis.functional",),
    ("metis.fused_operand",),
    ("metis.encoded_weight",),
    ("metis.fused_products",),
    ("metis.fused_linear",),
    ("metis.reparametrised", "metis.regularize"),
    ("metis.renewal",),
    ("metis.bases",),
    ("metis.nn",),
    ("metis.diagnostics",),
    ("metis.observe",),
    ("metis.mcore",),
    ("metis.training",),
    ("metis.export", "metis.benchmark"),
)
"""From the bottom up. A folder is one entry; its files may import each other."""

ALLOWED = {
    "metis.decompose": {"metis.errors", "metis.rng"},
    "metis.kernels": {"metis.errors", "metis.formats", "metis.rng"},
    "metis.gemm": {"metis.errors", "metis.formats", "metis.quantize"},
}
"""Where the row alone allows too much: decompose and kernels know no recipe, decompose knows no FP4."""

MEETS_MEGATRON = ("metis.mcore", "metis.training", "metis.export")

TORCH_FREE = (
    "pretrain_llama",
    "metis.benchmark.shapes",
    "metis.errors",
    "metis.formats",
    "metis.config",
    "metis.recipes",
    "metis.policy",
    "metis.schedule",
    "metis.training.arguments",
    "metis.training.options",
    "metis.training.presets",
    "metis.training.preflight",
    "metis.training.validation",
    "metis.training.validation_checks",
    "metis.training.validation_layout",
    "metis.training.validation_run",
    "metis.training.accounting",
    "metis.training.foreign_options",
    "metis.training.gemm_backend",
    "metis.training.generation",
    "metis.training.learning_rate",
    "metis.training.run_config",
    "metis.training.retention",
    "metis.training.tokenizer",
    "metis.training.weight_conversion",
)
SLOW_PACKAGES = {"torch", "numpy", "megatron", "transformers", "triton"}


def imported_modules(source: str, *, top_level_only: bool = False) -> Iterator[str]:
    """Yield the dotted name of everything that `source` imports; `from a import b` yields a and a.b.

    top_level_only: leave out what is imported inside functions or under `if TYPE_CHECKING`.
    """
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports hide who imports whom"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not (top_level_only and (lazy or typing_only)):
            pending.extend(ast.iter_child_nodes(node))


def source_files(*folders: str) -> dict[str, str]:
    """Return the source of every module below the folders, keyed by dotted name."""
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    paths += [REPOSITORY / f"{folder}.py" for folder in folders if (REPOSITORY / f"{folder}.py").exists()]
    named = {}
    for path in paths:
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    assert named, f"no source below {folders}"
    return named


def entry_of(module: str) -> str | None:
    """Return the entry of `ROWS` that a module of the method belongs to; None for anything else."""
    head = ".".join(module.split(".")[:2])
    return head if any(head in row for row in ROWS) else None


def row_of(entry: str) -> int:
    """Return the number of the row that holds `entry`."""
    return next(number for number, row in enumerate(ROWS) if entry in row)


def violations(module: str, source: str) -> list[str]:
    """Return one line per import of `module` that its place in the layers forbids."""
    own = entry_of(module)
    assert own is not None, f"{module} has no place in the layers; give it one in ROWS"
    found = []
    for name in imported_modules(source):
        if name.split(".")[0] == "megatron" and own not in MEETS_MEGATRON:
            found.append(f"{module} imports {name}, but only {', '.join(MEETS_MEGATRON)} may know megatron")
        if name.split(".")[0] in ("tools", "tests", "examples", "pretrain_llama"):
            found.append(f"{module} imports {name}, which stands on the library")
        other = entry_of(name)
        if other is None or other == own:
            continue
        if own in ALLOWED:
            if other not in ALLOWED[own]:
                found.append(f"{module} imports {name}, allowed are {sorted(ALLOWED[own])}")
        elif row_of(other) >= row_of(own):
            found.append(f"{module} imports {name}, which does not stand below it")
    return found


def test_every_file_imports_only_from_the_rows_below_it():
    sources = source_files("metis")
    found = [
        line for module, text in sources.items() if module != "metis" for line in violations(module, text)
    ]
    assert not found, "\n".join(found)
    assert not list(imported_modules(sources["metis"])), "metis/__init__.py is imported by everybody"


def test_the_slow_reference_is_for_tests_alone():
    for module, text in source_files("metis", "tools", "megatron_patches").items():
        assert "metis.quantize.reference" not in set(imported_modules(text)), module


def test_patches_know_nothing_of_the_method():
    for module, text in source_files("megatron_patches").items():
        known = {name.split(".")[0] for name in imported_modules(text)}
        assert not known & {"metis", "tools", "tests"}, f"{module} imports {known}"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_argument_checks_reach_no_slow_package(module: str):
    """Follows imports at module level through our own files."""
    sources = source_files("metis", "megatron_patches", "pretrain_llama")
    assert module in sources, f"{module} is gone; take it off the list"
    seen: dict[str, str] = {module: module}
    pending = [module]
    while pending:
        current = pending.pop()
        for name in imported_modules(sources[current], top_level_only=True):
            assert name.split(".")[0] not in SLOW_PACKAGES, f"{seen[current]} -> {name}"
            if name in sources and name not in seen:
                seen[name] = f"{seen[current]} -> {name}"
                pending.append(name)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("metis.quantize.nvfp4", "from metis.decompose import basis", "does not stand below"),
        ("metis.decompose.basis", "def f():\n    from metis.rounding import x", "allowed are"),
        ("metis.kernels.fused", "import metis.quantize.nvfp4", "allowed are"),
        ("metis.nn", "def f():\n    import megatron.core", "may know megatron"),
        ("metis.recipes", "from metis import policy", "does not stand below"),
        ("metis.functional", "from metis.nn import MetisLinear", "does not stand below"),
        ("metis.training.loop", "from tools.generate import main", "stands on the library"),
    ],
)
def test_the_checker_sees_each_kind_of_violation(module: str, source: str, message: str):
    assert any(message in line for line in violations(module, source))


def test_the_checker_tells_lazy_imports_from_others():
    source = "import a\ndef f():\n    import b\nif TYPE_CHECKING:\n    import c\nclass D:\n    import d\n"
    assert set(imported_modules(source)) == {"a", "b", "c", "d"}
    assert set(imported_modules(source, top_level_only=True)) == {"a", "d"}


WITHOUT_TRITON = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("there is no Triton here")

sys.meta_path.insert(0, Absent())
import torch
from metis.nn import MetisLinear

layer = MetisLinear(64, 32, recipe="metis")
layer(torch.randn(64, 64)).sum().backward()
layer.after_step()
import metis.mcore.linear, metis.training.step  # noqa: E401
assert "triton" not in sys.modules
"""


def test_a_machine_without_triton_trains() -> None:
    """Kernels are loaded where they run, not where their arguments are named."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=REPOSITORY, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]

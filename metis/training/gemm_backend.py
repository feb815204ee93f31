"""Who multiplies FP4 operands: `--gemm-backend` is checked and resolved here and nowhere else.

    emulated            exact operands in a BF16 GEMM; runs anywhere
    scaled_mm           torch's native FP4 GEMM; quantisation stays ours; recipes in NVFP4
    transformer_engine  Transformer Engine's linears under megatron-core's own FP4 switches; recipe nvfp4 only
    auto                scaled_mm on compute capability 10.x where the recipe allows it, else emulated

One idea: nothing falls back silently. What was asked for either runs or is one error; only `auto` chooses,
and it prints its choice with the reason. What the command line alone can tell is checked without torch
(`check_gemm_backend`), the device when the run starts (`resolve_gemm_backend`).

Traps:
* Neither native backend has run on Blackwell.
* Transformer Engine draws its own random numbers and takes tensor amaxes per rank, whatever `amax_scope`
  says, so its curves are not those of the other backends bit for bit, nor the same for every layout.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING

from metis.config import CELL_NAMES, Recipe
from metis.errors import ConfigError
from metis.policy import LINEAR_NAMES
from metis.recipes import NVFP4
from metis.training.validation_checks import require

if TYPE_CHECKING:
    from metis.gemm import GemmBackend

OPTION = "--gemm-backend"
TRANSFORMER_ENGINE = "transformer_engine"
NATIVE = ("scaled_mm", TRANSFORMER_ENGINE)
SCALED_MM_FORMATS = frozenset({"nvfp4"})
MINIMUM_TE_VERSION = (2, 7)


def check_gemm_backend(args: Namespace, recipes: Mapping[str, Recipe]) -> None:
    """Check `--gemm-backend` against the other arguments; recipes: of every linear, by global path.

    Raises ConfigError for a native backend on the CPU, with exact reductions or with recipes that it cannot
    compute.
    """
    backend = args.gemm_backend
    if backend not in NATIVE:
        return
    require(
        not args.exact_reductions,
        OPTION,
        f"{backend} must not be combined with --exact-reductions, which sums in float64; use emulated or "
        "auto",
    )
    if backend == TRANSFORMER_ENGINE:
        edge_counts(recipes)
        _check_transformer_engine(args)
    else:
        wrong = other_formats(recipes)
        require(
            not wrong,
            OPTION,
            f"scaled_mm must have recipes in {_listed(SCALED_MM_FORMATS)}, received {_listed(wrong)}; use "
            "emulated or auto",
        )
        merging = _merging(recipes)
        require(
            not merging,
            OPTION,
            "scaled_mm must have recipes that keep heads apart, because it reads codes, received "
            f"{_listed(merging)}; use emulated or auto, or head_placement: apart",
        )
    require(
        args.device != "cpu",
        OPTION,
        f"{backend} needs a Blackwell GPU (compute capability 10.0 or higher), received --device cpu; use "
        "emulated or auto",
    )


def check_quantize_kernels(args: Namespace, recipes: Mapping[str, Recipe]) -> None:
    """Refuse kernels on a device that is known to have none (`auto` is resolved later), and codes of weights
    that have none.
    """
    quantized = {recipe.name: recipe for recipe in recipes.values() if recipe.is_quantized}
    require(
        args.weight_cache != "codes" or not quantized or len(_merging(quantized)) < len(quantized),
        "--weight-cache",
        f"codes has no effect on {_listed(_merging(quantized))}, which adds heads back into operands; "
        "use auto or operand",
    )
    require(
        args.quantize_kernels != "triton" or args.device != "cpu",
        "--quantize-kernels",
        "triton needs a CUDA device, received --device cpu; use auto or torch",
    )


def other_formats(recipes: Mapping[str, Recipe]) -> set[str]:
    """Return the formats of quantised operands that scaled_mm is not used for."""
    cells = [getattr(recipe, name) for recipe in recipes.values() for name in CELL_NAMES]
    return {cell.quantizer.format for cell in cells if cell.quantizer is not None} - SCALED_MM_FORMATS


def _merging(recipes: Mapping[str, Recipe]) -> set[str]:
    """Return the names of recipes that multiply operands with their heads added back."""
    return {recipe.name for recipe in recipes.values() if recipe.has_merged_heads}


def edge_counts(recipes: Mapping[str, Recipe]) -> tuple[int, int]:
    """Return how many blocks at the start and at the end stay in bf16, as megatron-core counts them.

    Raises ConfigError unless whole blocks are bf16 or exactly nvfp4 (by any name), and the nvfp4 ones are
    one run.
    """
    blocks: dict[int, set[bool]] = {}
    for path, recipe in recipes.items():
        native = replace(recipe, name=NVFP4.name) == NVFP4
        require(
            native or recipe.is_high_precision,
            OPTION,
            f"transformer_engine computes the recipe nvfp4 only, received {recipe.name!r} for {path}; use "
            "scaled_mm, emulated or auto",
        )
        blocks.setdefault(int(path.split(".")[2]), set()).add(native)
    quantized = [index for index, kinds in sorted(blocks.items()) if True in kinds]
    require(
        bool(quantized),
        OPTION,
        "transformer_engine must have at least one nvfp4 linear, received none; use --recipe nvfp4 or auto",
    )
    first, last = quantized[0], quantized[-1]
    require(
        quantized == list(range(first, last + 1)) and all(len(kinds) == 1 for kinds in blocks.values()),
        OPTION,
        "transformer_engine needs a policy that keeps whole blocks at the start and at the end in bf16, "
        f"received one that mixes within or between blocks ({', '.join(LINEAR_NAMES)} of a block go "
        "together); "
        "use --num-layers-at-start-in-bf16 and --num-layers-at-end-in-bf16, or another backend",
    )
    return first, len(blocks) - 1 - last


def _check_transformer_engine(args: Namespace) -> None:
    require(
        args.transformer_impl != "local",
        OPTION,
        "transformer_engine must not be combined with --transformer-impl local; remove one of them",
    )
    require(
        args.bf16,
        OPTION,
        "transformer_engine rotates bf16 tensors only and needs --bf16; add it or use another backend",
    )
    version = _te_version()
    wanted = ".".join(map(str, MINIMUM_TE_VERSION))
    require(
        version is not None,
        OPTION,
        f"transformer_engine needs Transformer Engine {wanted} or newer, received none installed; install "
        "the "
        "extra [te], or use emulated or auto",
    )
    assert version is not None
    require(
        tuple(int(part) for part in version.split(".")[:2]) >= MINIMUM_TE_VERSION,
        OPTION,
        f"transformer_engine needs Transformer Engine {wanted} or newer, received {version}; upgrade it, or "
        "use emulated or auto",
    )


def _te_version() -> str | None:
    try:
        return metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return None


def resolve_gemm_backend(args: Namespace, recipes: Mapping[str, Recipe]) -> GemmBackend | None:
    """Return who multiplies, for the resolved `args.device`; None: the quantised linears are Transformer
    Engine's.

    Replaces `auto` in args.gemm_backend by the choice, and prints it with the reason.
    Raises ConfigError for a native backend that this device lacks.
    """
    from metis.gemm import EmulatedGemm
    from metis.gemm.scaled_mm import is_training_family, require_native_gemm, scaled_mm_backend
    from metis.training.outputs import print_rank_0

    if args.gemm_backend == "auto":
        args.gemm_backend, why = _automatic(args, recipes)
        if why:
            print_rank_0(f"GEMM backend: {args.gemm_backend} (auto: {why})")
    if args.gemm_backend == "emulated":
        return EmulatedGemm(kernels=args.quantize_kernels, weight_cache=args.weight_cache)
    if args.gemm_backend == "scaled_mm":
        return scaled_mm_backend(args.device, args.quantize_kernels)
    require_native_gemm(args.device, args.gemm_backend)
    if not is_training_family(args.device):
        raise ConfigError(
            OPTION,
            "transformer_engine trains in FP4 on compute capability 10.x only, received a later family; use "
            "scaled_mm or emulated",
        )
    return None


def _automatic(args: Namespace, recipes: Mapping[str, Recipe]) -> tuple[str, str]:
    """Return the backend that `auto` means and why; no reason where nothing is quantised."""
    from metis.gemm.scaled_mm import is_training_family, native_gemm_available

    if not any(recipe.is_quantized for recipe in recipes.values()):
        return "emulated", ""
    if args.exact_reductions:
        return "emulated", "--exact-reductions"
    if wrong := other_formats(recipes):
        return "emulated", f"operands in {_listed(wrong)}"
    if merging := _merging(recipes):
        return "emulated", f"{_listed(merging)} adds heads back into operands"
    available, found = native_gemm_available(args.device)
    if available and is_training_family(args.device):
        return "scaled_mm", found
    return "emulated", found if available else f"{found}, not Blackwell"


def _listed(names: set[str] | frozenset[str]) -> str:
    return ", ".join(sorted(names))

"""Shapes by the names of models, so that nobody types them: for kernels, for linears, for whole steps.

Torch-free: a mistyped shape is answered at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metis.errors import ConfigError, nearest_name
from metis.training.presets import PRESETS

MULTIPLE = 16
"""Both sizes of every matrix: NVFP4 blocks run along either axis."""


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear of `in_features` to `out_features`."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class StepModel:
    """A model to train for a few steps: a preset of the trainer and options that come after it.

    is_small: the host is slower than a GPU there, so that steps are captured in CUDA graphs.
    """

    preset: str
    options: Mapping[str, Any]
    is_small: bool = False


STEP_MODELS: Mapping[str, StepModel] = {
    # Four layers fill one GPU's time as 32 do; a small vocabulary keeps the logits from dominating them.
    "llama3-8b-4layers": StepModel(
        "llama3-8b",
        {"--num-layers": 4, "--vocab-size": 31999, "--seq-length": 4096, "--global-batch-size": 4},
    ),
    "llama-125m": StepModel(
        "tiny",
        {
            "--num-layers": 12, "--hidden-size": 768, "--ffn-hidden-size": 2048, "--num-attention-heads": 12,
            "--num-query-groups": 12, "--kv-channels": 64, "--vocab-size": 26111, "--seq-length": 2048,
            "--max-position-embeddings": 2048, "--micro-batch-size": 8, "--global-batch-size": 16,
        },
        is_small=True,
    ),
    "llama-30m": StepModel(
        "tiny",
        {
            "--num-layers": 8, "--hidden-size": 384, "--ffn-hidden-size": 1024, "--num-attention-heads": 6,
            "--num-query-groups": 6, "--kv-channels": 64, "--vocab-size": 20479, "--seq-length": 2048,
            "--max-position-embeddings": 2048, "--micro-batch-size": 8, "--global-batch-size": 16,
        },
        is_small=True,
    ),
} | {name: StepModel(name, {}) for name in PRESETS}  # fmt: skip
"""By the name that `--preset` of train_step.py takes; --vocab-size does not count the end of document."""


def _named(option: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ConfigError(
            option, f"must be one of {', '.join(known)}, received {name!r}{nearest_name(name, known)}"
        )
    return known[name]


def step_model(name: str) -> StepModel:
    """Return the model called `name`; ConfigError for an unknown one, with the nearest."""
    return _named("--preset", name, STEP_MODELS)


def parse_shape(option: str, text: str) -> tuple[int, int]:
    """Return the two sizes of `text`, such as 8192x4096.

    Raises ConfigError unless both are positive multiples of 16.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    sizes = tuple(map(int, match.groups())) if match else (0, 0)
    if not all(size > 0 and size % MULTIPLE == 0 for size in sizes):
        raise ConfigError(
            option, f"must be two multiples of {MULTIPLE}, such as 8192x4096, received {text!r}"
        )
    return sizes  # type: ignore[return-value]


def require_tokens(tokens: int) -> int:
    """Return `tokens`; ConfigError unless it is a positive multiple of 16."""
    if tokens < 1 or tokens % MULTIPLE:
        raise ConfigError("--tokens", f"must be a positive multiple of {MULTIPLE}, received {tokens}")
    return tokens


def require_distinct(option: str, given: Sequence[str], names: Sequence[str]) -> None:
    """Refuse what was `given` if two of its `names`, by which rows and files are told apart, are the same."""
    for name in names:
        same = [what for what, other in zip(given, names, strict=True) if other == name]
        if len(same) > 1:
            raise ConfigError(
                option,
                f"must have different names, received {name!r} {len(same)} times ({', '.join(same)}); "
                "rename all but one or leave them out",
            )


def linears_of(model: str) -> list[LinearShape]:
    """Return the four linears of a block of preset `model`; ConfigError for an unknown name."""
    values = _named("--model", model, PRESETS)
    hidden, ffn, channels = values["hidden_size"], values["ffn_hidden_size"], values["kv_channels"]
    query, key = values["num_attention_heads"] * channels, values["num_query_groups"] * channels
    return [
        LinearShape("qkv", hidden, query + 2 * key),
        LinearShape("proj", query, hidden),
        LinearShape("fc1", hidden, 2 * ffn if values["swiglu"] else ffn),
        LinearShape("fc2", ffn, hidden),
    ]


def matrices_of(model: str, tokens: int) -> list[tuple[int, int]]:
    """Return the shapes of inputs, output gradients and weights of a block, each once, smallest first."""
    shapes: set[tuple[int, int]] = set()
    for linear in linears_of(model):
        shapes |= {(tokens, linear.in_features), (tokens, linear.out_features)}
        shapes.add((linear.out_features, linear.in_features))
    return sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))

"""Named starting points: the shapes of public LLaMA models and the AdamW values they are usually trained
with.

One idea: a preset is a dict of argument names; it stands between Megatron's defaults and the command line, so
any option given explicitly wins, even when its value equals the default. A preset never chooses a layout, a
batch size, a learning rate or a precision.

Sources: the `config.json` published with meta-llama/Meta-Llama-3-8B, Meta-Llama-3-70B and Llama-3.2-1B;
optimizer values from "The Llama 3 Herd of Models" (arXiv 2407.21783) and the LLaMA papers before it.

Traps: megatron-core fixes the low and high frequency factors (1, 4) and the original length (8192) of RoPE
scaling, which are Llama 3.2's values; only the factor is a setting. Llama-3-8B's own 8192 positions need no
scaling. `tiny` has no vocabulary of its own: its tokenizer decides.
"""

from __future__ import annotations

from typing import Any

from metis.errors import ConfigError, nearest_name

_LLAMA: dict[str, Any] = {
    "group_query_attention": True,
    "position_embedding_type": "rope",
    "rotary_base": 500000,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.02,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "llama3-8b": _LLAMA
    | {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 128,
        "vocab_size": 128256,
        "seq_length": 8192,
        "max_position_embeddings": 8192,
        "untie_embeddings_and_output_weights": True,
    },
    "llama3-70b": _LLAMA
    | {
        "num_layers": 80,
        "hidden_size": 8192,
        "ffn_hidden_size": 28672,
        "num_attention_heads": 64,
        "num_query_groups": 8,
        "kv_channels": 128,
        "vocab_size": 128256,
        "seq_length": 8192,
        "max_position_embeddings": 8192,
        "untie_embeddings_and_output_weights": True,
    },
    "llama3.2-1b": _LLAMA
    | {
        "num_layers": 16,
        "hidden_size": 2048,
        "ffn_hidden_size": 8192,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 64,
        "vocab_size": 128256,
        "seq_length": 8192,
        "max_position_embeddings": 131072,
        "use_rope_scaling": True,
        "rope_scaling_factor": 32.0,
    },
    "tiny": _LLAMA
    | {
        "num_layers": 4,
        "hidden_size": 256,
        "ffn_hidden_size": 704,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 32,
        "seq_length": 256,
        "max_position_embeddings": 1024,
        "untie_embeddings_and_output_weights": True,
    },
}


def preset_values(name: str | None) -> dict[str, Any]:
    """Return the argument values of preset `name` (a new dict), or an empty dict for None.

    Raises ConfigError for an unknown name, with the nearest known one.
    """
    if name is None:
        return {}
    if name not in PRESETS:
        raise ConfigError(
            "--preset", f"must be one of {', '.join(PRESETS)}, received {name!r}{nearest_name(name, PRESETS)}"
        )
    return dict(PRESETS[name])

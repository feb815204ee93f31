"""The LLaMA-type model: megatron-core's `GPTModel` with a loss over the true vocabulary.

What differs from the base class is `compute_language_model_loss` (see `metis.mcore.cross_entropy` for why),
with `gradient_accumulation_fusion` the embedding's backward (`metis.mcore.embedding`), and with an exchange
the output layer's messages (`metis.mcore.overlapped_linear`). Layers, linears
and norms come from the layer spec.

Trap: `vocab_size` means the *padded* size in megatron (it sizes the embedding), and keeps that meaning here.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from metis.errors import ConfigError
from metis.exchange import Exchange
from metis.mcore.cross_entropy import vocab_parallel_cross_entropy
from metis.mcore.embedding import MainGradEmbedding
from metis.mcore.overlapped_linear import OverlappedColumnParallelLinear


class LlamaModel(GPTModel):
    """`GPTModel` whose dummy vocabulary entries take no part in the loss.

    `vocab_size` is the padded vocabulary (a multiple of TP), `true_vocab_size` the tokenizer's; all other
    arguments are those of `GPTModel` (0.16.1), by keyword, and the exchange of the tensor-parallel group.
    Works on any pipeline stage and with tied or untied embeddings.

    Raises `ConfigError` for a true vocabulary above the padded one, and for a fused cross entropy by
    Transformer Engine, whose kernel has not been checked against the masked columns.
    """

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: ModuleSpec,
        vocab_size: int,
        max_sequence_length: int,
        *,
        true_vocab_size: int,
        exchange: Exchange | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0 < true_vocab_size <= vocab_size:
            raise ConfigError(
                "--vocab-size", f"must be between 1 and the padded size {vocab_size}, got {true_vocab_size}"
            )
        if config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl != "native":
            raise ConfigError(
                "--cross-entropy-fusion-impl", f"must be native, got {config.cross_entropy_fusion_impl}"
            )
        super().__init__(config, transformer_layer_spec, vocab_size, max_sequence_length, **kwargs)
        self.true_vocab_size = true_vocab_size
        if config.gradient_accumulation_fusion and hasattr(self, "embedding"):
            MainGradEmbedding.take_over(self.embedding.word_embeddings)
        if exchange is not None and hasattr(self, "output_layer"):
            OverlappedColumnParallelLinear.take_over(self.output_layer, exchange)

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the loss of every token, [b, s]; `labels` [b, s], `logits` [s, b, V/tp] (overwritten)."""
        loss_sb = vocab_parallel_cross_entropy(
            logits,
            labels.transpose(0, 1).contiguous(),
            vocab_size=self.true_vocab_size,
            fusion=self.config.cross_entropy_loss_fusion,
        )
        return loss_sb.transpose(0, 1).contiguous()

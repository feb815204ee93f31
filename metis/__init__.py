"""Metis: FP4 pretraining of LLaMA-type models on megatron-core, with a spectral split of every operand."""

__version__ = "0.1.0"

"""A tiny GPT on the real engine, for tests that compare layouts or runs: one `Case` in, a `Run` to step out.

Use it inside a rank of `run_ranks`, after the patches. Weights depend on parameter names alone and batches on
sample numbers alone, so every layout of the same `Case` trains the same model on the same data; what differs
is the order of sums. Trap: the MLP is not gated, because the engine interleaves gate and up per
tensor-parallel rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

NUM_LAYERS = 4
HIDDEN_SIZE = 32
NUM_HEADS = 4
VOCAB_SIZE = 64
SEQUENCE_LENGTH = 16
MICRO_BATCH_SIZE = 1
GLOBAL_BATCH_SIZE = 4
SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration; data parallelism is what the world size leaves over."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    dtype: torch.dtype = torch.float32
    distributed_optimizer: bool = False
    overlap: bool = False
    model: dict[str, Any] = field(default_factory=dict)  # further TransformerConfig fields
    clip_grad: float = 0.1
    tied: bool = False  # embedding and output layer share one matrix


class SequenceParallelLayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm with the mark by which the engine reduces gradients of sequence-parallel
    parameters.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> None:
        super().__init__(hidden_size, eps)
        for param in self.parameters():
            param.sequence_parallel = config.sequence_parallel


class Run:
    """Model chunks and optimizer of a case; `step()` trains on the next global batch."""

    def __init__(self, case: Case) -> None:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            case.tp, case.pp, virtual_pipeline_model_parallel_size=case.vpp, create_gloo_process_groups=True
        )
        model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
        self.case = case
        self.iteration = 0
        self.config = _transformer_config(case)
        self.chunks = [self._wrap(chunk) for chunk in self._build_chunks()]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                min_lr=1e-2,
                weight_decay=0.1,
                clip_grad=case.clip_grad,
                bf16=case.dtype == torch.bfloat16,
                params_dtype=case.dtype,
                use_distributed_optimizer=case.distributed_optimizer,
                overlap_param_gather=case.overlap,
                log_num_zeros_in_grad=True,
            ),
            self.chunks,
        )
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        if case.overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def _build_chunks(self) -> Iterator[torch.nn.Module]:
        case, config = self.case, self.config
        for vp_stage in range(case.vpp) if case.vpp else [None]:
            spec = get_gpt_layer_local_spec()
            if config.sequence_parallel:  # the engine's own norm refuses it
                norm = SequenceParallelLayerNorm
                spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
                num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
                spec = TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)
            chunk = GPTModel(
                config,
                spec,
                VOCAB_SIZE,
                SEQUENCE_LENGTH,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                position_embedding_type="rope",
                share_embeddings_and_output_weights=case.tied,
                vp_stage=vp_stage,
            )
            _fill_by_name(chunk)
            yield Float16Module(config, chunk) if case.dtype == torch.bfloat16 else chunk.to(case.dtype)

    def _wrap(self, chunk: torch.nn.Module) -> DistributedDataParallel:
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=self.case.dtype == torch.bfloat16,
            overlap_grad_reduce=self.case.overlap,
            overlap_param_gather=self.case.overlap,
            use_distributed_optimizer=self.case.distributed_optimizer,
            bucket_size=4000,
        )
        return DistributedDataParallel(self.config, ddp_config, chunk)

    def step(self) -> tuple[float, float]:
        """Train on one global batch; return (loss averaged over it, gradient norm), the same on all ranks."""
        dp = parallel_state.get_data_parallel_world_size()
        microbatches = GLOBAL_BATCH_SIZE // (MICRO_BATCH_SIZE * dp)
        first = self.iteration * GLOBAL_BATCH_SIZE + parallel_state.get_data_parallel_rank() * microbatches
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[_batches(first, self.case.dtype) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=microbatches,
            seq_length=SEQUENCE_LENGTH,
            micro_batch_size=MICRO_BATCH_SIZE,
            forward_only=False,
        )
        succeeded, grad_norm, num_zeros = self.optimizer.step()
        assert succeeded and num_zeros >= 0
        self.iteration += 1
        total = torch.tensor(
            [sum(float(entry["loss"]) for entry in losses), len(losses)], dtype=torch.float64
        )
        dist.all_reduce(total)  # stages without a loss add (0, 0); tensor-parallel ranks agree
        return float(total[0] / total[1]), float(grad_norm)

    def curve(self, steps: int) -> list[tuple[float, float]]:
        """Return `step()` repeated."""
        return [self.step() for _ in range(steps)]

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return this rank's parameters by name, chunk number first."""
        self._finish_param_sync()
        return {
            f"{number}.{name}": param.detach().clone()
            for number, chunk in enumerate(self.chunks)
            for name, param in chunk.named_parameters()
        }

    def _finish_param_sync(self) -> None:
        """With overlap, the last step's parameters are gathered by the next forward only."""
        for chunk in self.chunks if self.case.overlap else []:
            chunk.start_param_sync(force_sync=True)

    def sharded_state(self, sharding_type: str, is_loading: bool) -> dict[str, Any]:
        """Return the sharded state dict of model and optimizer."""
        metadata = {
            "distrib_optim_sharding_type": sharding_type,
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        state: dict[str, Any] = {}
        for number, chunk in enumerate(self.chunks):
            key = "model" if len(self.chunks) == 1 else f"model{number}"
            state[key] = _unwrapped(chunk).sharded_state_dict(metadata=metadata)
        state["optimizer"] = self.optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=metadata
        )
        state["iteration"] = self.iteration
        return state

    def save(self, folder: str, sharding_type: str) -> None:
        """Write a torch_dist checkpoint into an existing empty folder."""
        self._finish_param_sync()
        dist_checkpointing.save(self.sharded_state(sharding_type, is_loading=False), folder)

    def load(self, folder: str, sharding_type: str) -> None:
        """Read what `save` wrote."""
        state = dist_checkpointing.load(self.sharded_state(sharding_type, is_loading=True), folder)
        for number, chunk in enumerate(self.chunks):
            _unwrapped(chunk).load_state_dict(state["model" if len(self.chunks) == 1 else f"model{number}"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]


def _transformer_config(case: Case) -> TransformerConfig:
    fields: dict[str, Any] = {
        "num_layers": NUM_LAYERS,
        "hidden_size": HIDDEN_SIZE,
        "num_attention_heads": NUM_HEADS,
        "ffn_hidden_size": 2 * HIDDEN_SIZE,
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": case.vpp,
        "pipeline_dtype": case.dtype,
        "params_dtype": case.dtype,
        "bf16": case.dtype == torch.bfloat16,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "add_bias_linear": False,
        "gradient_accumulation_fusion": False,
        "attention_softmax_in_fp32": case.dtype != torch.float64,
        "persist_layer_norm": False,
        "overlap_p2p_comm": case.vpp is not None,
        "batch_p2p_comm": case.vpp is None,
    }
    return TransformerConfig(**{**fields, **case.model})


def _unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _fill_by_name(chunk: torch.nn.Module) -> None:
    """Initialise from the global parameter name: the same full matrix in every layout, sliced for this
    rank.
    """
    layers = getattr(chunk.decoder, "layers", [])
    numbers = {f"decoder.layers.{local}.": layer.layer_number - 1 for local, layer in enumerate(layers)}
    for name, param in chunk.named_parameters():
        for prefix, number in numbers.items():
            if name.startswith(prefix):
                name = f"decoder.layers.{number}.{name.removeprefix(prefix)}"
                break
        if "norm" in name:
            continue
        shape, dim = list(param.shape), getattr(param, "partition_dim", -1)
        ranks = parallel_state.get_tensor_model_parallel_world_size() if dim >= 0 else 1
        shape[dim] *= ranks
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        full = torch.randn(shape, generator=generator) * 0.1
        rank = parallel_state.get_tensor_model_parallel_rank() if ranks > 1 else 0
        param.data.copy_(full.chunk(ranks, dim=dim)[rank])


def _batches(first_sample: int, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    sample = first_sample
    while True:
        generator = torch.Generator().manual_seed(sample)
        tokens = torch.randint(VOCAB_SIZE, (MICRO_BATCH_SIZE, SEQUENCE_LENGTH + 1), generator=generator)
        yield {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
        sample += MICRO_BATCH_SIZE


def _forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[
    torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
]:
    batch = next(data_iterator)
    tokens = batch["tokens"]
    positions = torch.arange(SEQUENCE_LENGTH).unsqueeze(0)
    causal = torch.triu(torch.ones(SEQUENCE_LENGTH, SEQUENCE_LENGTH, dtype=torch.bool), diagonal=1)[
        None, None
    ]
    output = model(tokens, positions, causal, labels=batch["labels"])

    def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = losses.sum()
        return total, torch.tensor(losses.numel()), {"loss": total.detach().double() / losses.numel()}

    return output, loss_function

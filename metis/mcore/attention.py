"""Core attention on `torch.nn.functional.scaled_dot_product_attention`.

megatron-core's own `DotProductAttention` forms the [b, heads, s, s] score matrix and refuses context
parallelism; the other one needs Transformer Engine. `SdpaCoreAttention` takes the same place in a layer spec,
forms no score matrix for causal attention, and runs on the CPU and on CUDA in fp32, bf16, fp16 and fp64.

Context parallelism: the engine deals the sequence in a zigzag, rank i of cp holds chunks i and 2cp-1-i of
2cp. Keys and values are gathered over the CP group (backward: reduce-scatter) and put into natural order;
each local chunk then attends to exactly the keys up to its own end. Work is balanced, and no rank computes
scores that are masked later.

Traps: megatron's boolean masks say True for *masked out*, SDPA's for *kept*. `is_causal` aligns the diagonal
at the top left, chunk n > 0 needs it at the bottom right. cuDNN has no bottom-right form.

Letters: s local sequence, t all keys, b batch, H query heads, G key/value heads (both of this TP rank), d
head size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from metis.errors import ConfigError, ShapeError

CAUSAL_MASK_TYPES = (AttnMaskType.causal, AttnMaskType.padding_causal)
MASKED_TYPES = (AttnMaskType.padding, AttnMaskType.arbitrary)

# What each `--attention-backend` allows, in order of preference. cuDNN comes first under `auto`: on an H200
# it is 1.4 to 1.9 times as fast as flash for bf16 causal attention. None: no restriction (the CPU picks flash
# or math itself).
CUDA_KERNELS: dict[AttnBackend, list[SDPBackend] | None] = {
    AttnBackend.auto: [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    AttnBackend.flash: [SDPBackend.FLASH_ATTENTION],
    AttnBackend.fused: [SDPBackend.CUDNN_ATTENTION],
    AttnBackend.unfused: [SDPBackend.MATH],
    AttnBackend.local: [SDPBackend.MATH],
}
CPU_KERNELS: dict[AttnBackend, list[SDPBackend] | None] = {
    AttnBackend.auto: None,
    AttnBackend.flash: [SDPBackend.FLASH_ATTENTION],
    AttnBackend.unfused: [SDPBackend.MATH],
    AttnBackend.local: [SDPBackend.MATH],
}


class SdpaCoreAttention(MegatronModule):
    """softmax(scale * q k^T + mask) v per head, in the place of megatron's `DotProductAttention`.

    Constructor and `forward` take what `megatron.core.transformer.dot_product_attention.DotProductAttention`
    (0.16.1) takes. `softmax_scale` None means 1/sqrt(kv_channels). `apply_query_key_layer_scaling` divides
    the scores by the layer number and multiplies them back inside the softmax; kernels that accumulate in
    FP32 need no such protection, so it changes nothing here. `cp_comm_type` may be None, `p2p` or
    `all_gather`; keys and values are all-gathered for each of them.

    Raises `ConfigError` for what SDPA cannot do: window attention, another softmax than the plain one, the
    head-wise `a2a` forms of context parallelism, `fused` (cuDNN) under context parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.dropout_p = config.attention_dropout if attention_dropout is None else attention_dropout
        _refuse_unsupported(config, self.layer_number, cp_comm_type, self.cp_group.size())
        self.kernels = {"cuda": CUDA_KERNELS[config.attention_backend]}
        if config.attention_backend in CPU_KERNELS:
            self.kernels["cpu"] = CPU_KERNELS[config.attention_backend]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Return the attention output [s, b, H*d] in the dtype of `query`.

        `query` [s, b, H, d], `key` and `value` [s, b, G, d] with G dividing H; under context parallelism all
        three hold this rank's zigzag part. `attention_mask`, True = masked out, broadcasts to [b, H, s, t]
        with t the keys of *all* CP ranks in natural order; a causal type masks the future in addition to it.
        Dropout draws from the tensor-parallel RNG tracker, except under sequence parallelism, where the block
        has already entered it.

        Raises `ShapeError` for a mask of another size, and where causal attention has not one key per query.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ConfigError("core_attention", "attention bias and packed sequences are not supported")
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if self.cp_group.size() > 1:
            key, value = _gather_sequence(key, value, self.cp_group)
        q_bhsd, k_bgtd, v_bgtd = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with self._kernel_choice(query.device.type), self._dropout_stream():
            if mask_type in CAUSAL_MASK_TYPES and attention_mask is None:
                out_bhsd = self._causal(q_bhsd, k_bgtd, v_bgtd)
            elif mask_type is AttnMaskType.causal_bottom_right and attention_mask is None:
                if self.cp_group.size() > 1:
                    raise ShapeError("core_attention", "causal_bottom_right needs context parallel size 1")
                out_bhsd = self._bottom_right(q_bhsd, k_bgtd, v_bgtd)
            else:
                keep = self._kept(mask_type, attention_mask, q_bhsd.shape[2], k_bgtd.shape[2], query.device)
                out_bhsd = self._sdpa(q_bhsd, k_bgtd, v_bgtd, keep=keep)
        return out_bhsd.permute(2, 0, 1, 3).flatten(2)

    def _sdpa(
        self,
        q_bhsd: torch.Tensor,
        k_bgtd: torch.Tensor,
        v_bgtd: torch.Tensor,
        keep: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            q_bhsd,
            k_bgtd,
            v_bgtd,
            attn_mask=keep,
            dropout_p=self.dropout_p if self.training else 0.0,
            is_causal=is_causal,
            scale=self.softmax_scale,
            enable_gqa=q_bhsd.shape[1] != k_bgtd.shape[1],
        )

    def _causal(self, q_bhsd: torch.Tensor, k_bgtd: torch.Tensor, v_bgtd: torch.Tensor) -> torch.Tensor:
        """Causal attention by global position; one call, or one per local chunk under context parallelism."""
        cp = self.cp_group.size()
        if q_bhsd.shape[2] * cp != k_bgtd.shape[2]:
            raise ShapeError(
                "core_attention",
                f"causal attention needs as many queries as keys, got {q_bhsd.shape[2] * cp} and "
                f"{k_bgtd.shape[2]}; pass the mask type causal_bottom_right for a cache",
            )
        if cp == 1:
            return self._sdpa(q_bhsd, k_bgtd, v_bgtd, is_causal=True)
        chunk_length = q_bhsd.shape[2] // 2
        outs = []
        for local, chunk in enumerate(_zigzag_chunks(self.cp_group.rank(), cp)):
            q_chunk = q_bhsd[:, :, local * chunk_length : (local + 1) * chunk_length]
            num_keys = (chunk + 1) * chunk_length
            outs.append(self._bottom_right(q_chunk, k_bgtd[:, :, :num_keys], v_bgtd[:, :, :num_keys]))
        return torch.cat(outs, dim=2)

    def _bottom_right(self, q_bhsd: torch.Tensor, k_bgtd: torch.Tensor, v_bgtd: torch.Tensor) -> torch.Tensor:
        """Causal attention whose last query sees every key.

        On CUDA torch's `CausalBias` reaches flash, which aligns at the bottom right; on the CPU a boolean
        mask [s, t] is the only form.
        """
        num_queries, num_keys = q_bhsd.shape[2], k_bgtd.shape[2]
        if num_queries == num_keys:
            return self._sdpa(q_bhsd, k_bgtd, v_bgtd, is_causal=True)
        if q_bhsd.is_cuda:
            return self._sdpa(q_bhsd, k_bgtd, v_bgtd, keep=causal_lower_right(num_queries, num_keys))
        positions = torch.arange(num_keys - num_queries, num_keys, device=q_bhsd.device)
        return self._sdpa(q_bhsd, k_bgtd, v_bgtd, keep=_not_after(positions, num_keys))

    def _kept(
        self,
        mask_type: AttnMaskType,
        attention_mask: torch.Tensor | None,
        num_queries: int,
        num_keys: int,
        device: torch.device,
    ) -> torch.Tensor | None:
        """Return SDPA's boolean mask (True = kept) for an explicit mask, or None where everything is kept."""
        if mask_type is AttnMaskType.no_mask:
            return None
        if attention_mask is None:
            raise ShapeError("core_attention", f"{mask_type.name} needs an attention_mask, got None")
        rows, columns = attention_mask.shape[-2:]
        if rows not in (1, num_queries) or columns not in (1, num_keys):
            raise ShapeError(
                "core_attention",
                f"attention_mask must end in [{num_queries}, {num_keys}], got {list(attention_mask.shape)}",
            )
        keep = ~attention_mask.to(device=device, dtype=torch.bool)
        if mask_type in MASKED_TYPES:
            return keep
        return keep & _not_after(self._query_positions(num_queries, num_keys, device), num_keys)

    def _query_positions(self, num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
        """Return the global position of each local query, int64 [s]."""
        cp = self.cp_group.size()
        if cp == 1:
            return torch.arange(num_keys - num_queries, num_keys, device=device)
        length = num_queries // 2
        starts = (chunk * length for chunk in _zigzag_chunks(self.cp_group.rank(), cp))
        return torch.cat([torch.arange(start, start + length, device=device) for start in starts])

    def _kernel_choice(self, device_type: str) -> AbstractContextManager:
        """Return the context that restricts SDPA to the kernels of `--attention-backend`."""
        if device_type not in self.kernels:
            backend = self.config.attention_backend.name
            raise ConfigError("--attention-backend", f"{backend} has no kernel on {device_type}; use auto")
        allowed = self.kernels[device_type]
        return nullcontext() if allowed is None else sdpa_kernel(allowed, set_priority=True)

    def _dropout_stream(self) -> AbstractContextManager:
        if not self.training or self.dropout_p == 0.0 or self.config.sequence_parallel:
            return nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()


def _refuse_unsupported(
    config: TransformerConfig, layer_number: int, cp_comm_type: str | None, cp: int
) -> None:
    if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        raise ConfigError("--window-size", f"must be left out, got {config.window_size}")
    if config.softmax_type != "vanilla":
        raise ConfigError("--softmax-type", f"must be vanilla, got {config.softmax_type}")
    if cp_comm_type not in (None, "p2p", "all_gather"):
        raise ConfigError("--cp-comm-type", f"must be p2p or all_gather, got {cp_comm_type}")
    if cp > 1 and config.attention_backend is AttnBackend.fused:
        raise ConfigError(
            "--attention-backend",
            "fused (cuDNN) cannot align the causal diagonal under context parallelism; use auto or flash",
        )


def _zigzag_chunks(rank: int, cp: int) -> tuple[int, int]:
    """Return the two of 2*cp sequence chunks that CP rank `rank` holds, in local order."""
    return rank, 2 * cp - 1 - rank


def _not_after(query_positions: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Return the boolean [s, t] that is True where the key is not after the query."""
    return torch.arange(num_keys, device=query_positions.device) <= query_positions[:, None]


def _gather_sequence(
    key: torch.Tensor, value: torch.Tensor, cp_group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """All-gather zigzag key and value [s, b, G, d] into natural order [cp*s, b, G, d], in one message."""
    cp = cp_group.size()
    if key.shape[0] % 2:
        raise ShapeError("core_attention", f"a CP rank holds two equal chunks, got {key.shape[0]} tokens")
    both = torch.cat((key, value), dim=-1)
    both = tensor_parallel.gather_from_sequence_parallel_region(both, group=cp_group)
    pieces = both.chunk(2 * cp)
    held = [chunk for rank in range(cp) for chunk in _zigzag_chunks(rank, cp)]
    natural = torch.cat([pieces[held.index(chunk)] for chunk in range(2 * cp)])
    key_size = key.shape[-1]
    return natural[..., :key_size], natural[..., key_size:]

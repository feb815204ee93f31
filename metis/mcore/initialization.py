"""Initial weights that depend on the seed, the parameter's name and the element's index, and on nothing else.

megatron-core draws from one generator per tensor- and pipeline-parallel rank, so another layout is another
model. Here every row block of 64 rows of a parameter has its own Philox stream, keyed by (seed, global name)
and counted by the block; a rank generates the blocks that its rows touch and copies out its part. The same
values come out for every TP, PP, VPP and DP, and a larger padding of the vocabulary only appends rows.

Traps: run it before the optimizer is built, which copies the weights. The names are megatron's in the local
layer spec with the *global* layer index, without `module.` prefixes. Under SwiGLU a rank holds [its gate
rows; its up rows], the full matrix is [gate; up]. numpy promises streams of `Generator` per version only;
the test holds a golden value.

Letters: N rows (out_features, vocabulary), K columns (in_features).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from metis.errors import ConfigError

ROWS_PER_BLOCK = 64
EMBEDDING_NAME = "embedding.word_embeddings.weight"
OUTPUT_LAYER_NAME = "output_layer.weight"
SCALED_MODULES = ("linear_proj", "linear_fc2")
SHARDED_MODULES = (*SCALED_MODULES, "linear_qkv", "linear_fc1", "word_embeddings", "output_layer")

# Below this many elements a thread costs more than it saves (2^20 normals take about 10 ms).
THREADED_NUMEL = 1 << 20


def initialize_parameters(
    model_chunks: list[torch.nn.Module], *, seed: int, config: TransformerConfig
) -> None:
    """Overwrite every parameter of this rank's `model_chunks` (wrapped in DDP and Float16Module or not).

    Matrices are normal(0, std) in fp32, rounded once to the parameter's dtype; std is
    `config.init_method_std`, for embeddings `config.embedding_init_method_std`, for linear_proj and
    linear_fc2 init_method_std / sqrt(2*num_layers). Norm weights become 1, biases 0. A tied output layer on
    the last pipeline stage gets the embedding's values. Modules with `is_reparametrized = True` receive the
    whole matrix, fp32 [N, K], through `load_full_weight`.

    Needs the tensor-parallel group (or none initialised: one rank). Raises `ConfigError` for a parameter
    that it has no rule for.
    """
    names = global_parameter_names(model_chunks)
    with torch.no_grad(), ThreadPoolExecutor(_num_threads()) as pool:
        for chunk in model_chunks:
            for module in chunk.modules():
                if getattr(module, "is_reparametrized", False):
                    _load_reparametrized(module, names, seed, config)
                    continue
                for parameter in module.parameters(recurse=False):
                    _initialize_one(parameter, names[parameter], seed, config, pool)


def global_parameter_names(model_chunks: list[torch.nn.Module]) -> dict[torch.nn.Parameter, str]:
    """Return the layout-independent name of every parameter of this rank.

    Layers are numbered over the whole model from 0, e.g. `decoder.layers.5.mlp.linear_fc1.weight`, wherever
    pipeline and virtual stages put them. A tied output layer is named as the embedding it copies.
    """
    names = {}
    for chunk in model_chunks:
        model = _unwrap(chunk)
        renamed = {
            f"{path}.": f"{copy_global_name(path, module.layer_number)}."
            for path, module in model.named_modules()
            if isinstance(module, TransformerLayer)
        }
        is_tied = getattr(model, "share_embeddings_and_output_weights", False)
        for name, parameter in model.named_parameters():
            for local_prefix, global_prefix in renamed.items():
                if name.startswith(local_prefix):
                    name = global_prefix + name.removeprefix(local_prefix)
                    break
            names[parameter] = EMBEDDING_NAME if is_tied and name == OUTPUT_LAYER_NAME else name
    return names


def copy_global_name(module_path: str, layer_number: int) -> str:
    """Return the path of a transformer layer with its local index replaced by the global one.

    `module_path` ends in the local index (`decoder.layers.0`); `layer_number` is megatron's, counted from 1.
    """
    parent, _, local_index = module_path.rpartition(".")
    assert local_index.isdigit(), f"{module_path} does not end in a layer index"
    return f"{parent}.{layer_number - 1}"


def full_weight(name: str, shape: tuple[int, int], std: float, seed: int) -> torch.Tensor:
    """Return the whole matrix `name`, fp32 [N, K] on the CPU, of which `initialize_parameters` deals out
    shards.
    """
    weight = torch.empty(shape)
    for first in range(0, shape[0], ROWS_PER_BLOCK):
        rows = weight[first : first + ROWS_PER_BLOCK]
        values = _row_block(name, first // ROWS_PER_BLOCK, shape[1], std, seed)
        rows.copy_(torch.from_numpy(values[: len(rows)]))
    return weight


def init_std(name: str, config: TransformerConfig) -> float:
    """Return the standard deviation of the matrix with global name `name`, by megatron's rules for a GPT
    model.
    """
    module = name.split(".")[-2]
    if name.startswith("embedding."):
        std = config.embedding_init_method_std
        return config.init_method_std if std is None else std
    if module in SCALED_MODULES:
        return config.init_method_std / math.sqrt(2.0 * config.num_layers)
    return config.init_method_std


def _initialize_one(
    parameter: torch.nn.Parameter, name: str, seed: int, config: TransformerConfig, pool: ThreadPoolExecutor
) -> None:
    if name.endswith("bias"):
        parameter.zero_()
    elif parameter.dim() == 1 and "norm" in name:
        parameter.fill_(1.0)
    elif parameter.dim() == 2:
        _fill_shard(parameter, name, seed, config, pool)
    else:
        raise ConfigError(name, f"no initialisation rule for a parameter of shape {list(parameter.shape)}")


def _load_reparametrized(
    module: torch.nn.Module,
    names: dict[torch.nn.Parameter, str],
    seed: int,
    config: TransformerConfig,
) -> None:
    """Hand `module` the plain weight that it stands for; it factors and shards it itself."""
    for parameter in module.parameters(recurse=False):
        if names[parameter].endswith("bias"):
            parameter.zero_()
    path = names[next(module.parameters(recurse=False))].rpartition(".")[0]
    name = f"{path}.weight"
    shape = (module.output_size, module.input_size)
    module.load_full_weight(full_weight(name, shape, init_std(name, config), seed))


def _fill_shard(
    parameter: torch.nn.Parameter, name: str, seed: int, config: TransformerConfig, pool: ThreadPoolExecutor
) -> None:
    """Fill this rank's part of a matrix, one row block at a time."""
    rank, world_size = _tensor_parallel_place()
    is_sharded = getattr(parameter, "tensor_model_parallel", False)
    assert is_sharded or world_size == 1 or name.split(".")[-2] not in SHARDED_MODULES, (
        f"{name} does not say how tensor parallelism splits it"
    )
    partition_dim = parameter.partition_dim if is_sharded else None
    num_rows, num_columns = parameter.shape
    full_columns = num_columns * world_size if partition_dim == 1 else num_columns
    columns = slice(rank * num_columns, (rank + 1) * num_columns) if partition_dim == 1 else slice(None)
    is_gated = config.gated_linear_unit and name.split(".")[-2] == "linear_fc1"
    row_place = (rank, world_size) if partition_dim == 0 else (0, 1)
    std = init_std(name, config)

    def fill(piece: tuple[int, int, int, int]) -> None:
        local_row, block, first, count = piece
        values = _row_block(name, block, full_columns, std, seed)[first : first + count, columns]
        with torch.no_grad():  # grad mode is per thread
            parameter[local_row : local_row + count].copy_(torch.from_numpy(values))

    pieces = _pieces(num_rows, row_place, 2 if is_gated else 1)
    run = pool.map if parameter.numel() >= THREADED_NUMEL else map
    for _ in run(fill, pieces):
        pass


def _pieces(num_rows: int, place: tuple[int, int], num_parts: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (local row, block, first row in the block, number of rows): the pieces of a shard, in order.

    `place` is (rank, number of ranks). The full matrix is `num_parts` stacked matrices (gate and up), each
    split evenly over the ranks; the shard of `num_rows` rows stacks its share of each.
    """
    rank, world_size = place
    part_rows = num_rows // num_parts
    for part in range(num_parts):
        local_start = part * part_rows
        global_start = (part * world_size + rank) * part_rows
        row = 0
        while row < part_rows:
            block, first = divmod(global_start + row, ROWS_PER_BLOCK)
            count = min(ROWS_PER_BLOCK - first, part_rows - row)
            yield local_start + row, block, first, count
            row += count


def _row_block(name: str, block: int, num_columns: int, std: float, seed: int) -> np.ndarray:
    """Return rows 64*block to 64*block+63 of the matrix `name`, float32 [64, K].

    The block index is the second 64-bit word of the counter: a block uses far fewer than 2^64 draws, so that
    no two streams meet. Always all 64 rows, since a normal variate consumes a varying number of draws.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    generator = np.random.Generator(np.random.Philox(key=key, counter=block << 64))
    values = generator.standard_normal((ROWS_PER_BLOCK, num_columns), dtype=np.float32)
    values *= np.float32(std)
    return values


def _tensor_parallel_place() -> tuple[int, int]:
    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def _num_threads() -> int:
    """Return this rank's share of the usable cores, at least one."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks_here)


def _unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    while isinstance(getattr(chunk, "module", None), torch.nn.Module):
        chunk = chunk.module
    return chunk

"""Where the data comes from: Megatron's data options as one value, checked before anything is built.

One idea: whatever can be known from options and index headers is known here, in words, before megatron-core
is asked to build anything: which blends, how many samples, whether each split has documents and tokens for
them.

Traps:
- A split without tokens makes megatron-core count epochs for ever; documents and tokens are checked here.
- A blend without weights is one pass over each dataset, however many samples the run asks for.
- The order of samples depends on the number asked for (it is a shuffle over whole epochs), so the counting
  below is part of the data order: changing `--train-iters` or `--eval-interval` changes the index.
"""

from __future__ import annotations

import json
import os
import struct
from argparse import Namespace
from dataclasses import dataclass

import numpy as np

from metis.errors import ConfigError
from metis.training.validation_run import split_shares

SPLITS = ("train", "valid", "test")
LEGACY_SPLIT = "969, 30, 1"
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_BY_CODE = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32,
    5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
_ENTROPY_CHUNK_TOKENS = 1 << 24

Blend = tuple[list[str], "list[float] | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """What the data options name: one blend cut by `split`, one blend per split, or mock data (both None)."""

    blend: Blend | None = None
    blend_per_split: list[Blend | None] | None = None
    split: str | None = None

    @property
    def is_mock(self) -> bool:
        """Whether samples are synthetic."""
        return self.blend is None and self.blend_per_split is None

    def blend_of(self, split: int) -> Blend | None:
        """The blend that the split with this number reads."""
        return self.blend if self.blend_per_split is None else self.blend_per_split[split]


def sample_counts(args: Namespace) -> tuple[int, int | None, int]:
    """Samples to prepare for training, validation and test, as Megatron's trainer counts them.

    train = train_samples, or train_iters * global_batch_size; valid = (train_iters // eval_interval + 1) *
    eval_iters * global_batch_size, None (one whole pass) with `--full-validation`; test = eval_iters *
    global_batch_size.
    """
    gbs = args.global_batch_size
    num_train = args.train_samples or (args.train_iters or 0) * gbs
    num_test = args.eval_iters * gbs
    if getattr(args, "full_validation", False) and args.eval_iters:
        return num_train, None, num_test
    num_evaluations = num_iterations(args) // args.eval_interval + 1
    return num_train, num_evaluations * num_test, num_test


def num_iterations(args: Namespace, consumed: int = 0) -> int:
    """Training iterations of the run; from `--train-samples` those that are left after `consumed` samples,
    the ramp of the batch size included.
    """
    if args.train_iters:
        return args.train_iters
    total, gbs = args.train_samples or 0, args.global_batch_size
    if not getattr(args, "rampup_batch_size", None):
        return max(0, total - consumed) // gbs
    start, increment, ramp_samples = (int(value) for value in args.rampup_batch_size)
    samples_per_increment = ramp_samples / max(1, (gbs - start) // increment)
    iterations = 0
    while consumed <= ramp_samples and consumed < total:
        consumed += min(gbs, start + int(consumed / samples_per_increment) * increment)
        iterations += 1
    return iterations + max(0, total - consumed) // gbs


def data_source(args: Namespace) -> DataSource:
    """Turn the data options into a `DataSource`.

    Raises:
        ConfigError: none or several of the ways to name data, or a malformed blend.
    """
    per_split = [args.train_data_path, args.valid_data_path, args.test_data_path]
    ways = {
        "--data-path": args.data_path is not None,
        "--data-args-path": args.data_args_path is not None,
        "--train-data-path/--valid-data-path/--test-data-path": any(p is not None for p in per_split),
        "--per-split-data-args-path": args.per_split_data_args_path is not None,
        "--mock-data": bool(args.mock_data),
    }
    used = [name for name, given in ways.items() if given]
    if len(used) != 1:
        raise ConfigError(
            "--data-path",
            f"exactly one of {', '.join(ways)} must be given, got {' and '.join(used) or 'none'}",
        )
    if args.mock_data:
        return DataSource()
    if ways["--data-path"] or ways["--data-args-path"]:
        items = args.data_path or _read_text("--data-args-path", args.data_args_path).split()
        return DataSource(blend=_parse_blend(used[0], items), split=args.split or LEGACY_SPLIT)
    if args.split is not None:
        raise ConfigError(
            "--split", f"cuts one blend into parts and does not go with {used[0]}; drop one of them"
        )
    if ways["--per-split-data-args-path"]:
        per_split = _read_per_split(args.per_split_data_args_path)
    return DataSource(
        blend_per_split=[_parse_blend(used[0], items) if items else None for items in per_split]
    )


def _read_text(option: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            option, f"must name a readable text file, got {path} ({error}); correct the path"
        ) from error


def _read_per_split(path: str) -> list[list[str] | None]:
    option = "--per-split-data-args-path"
    try:
        blends = json.loads(_read_text(option, path))
    except json.JSONDecodeError as error:
        raise ConfigError(option, f"{path} must be JSON, got {error}; correct the file") from error
    if not isinstance(blends, dict) or not set(blends) <= set(SPLITS):
        raise ConfigError(
            option, f"{path} must be an object with lists under {', '.join(SPLITS)}; correct the file"
        )
    return [None if blends.get(name) is None else [str(item) for item in blends[name]] for name in SPLITS]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_blend(option: str, items: list[str]) -> Blend:
    """Parse `prefix ...` or `weight prefix ...` as megatron-core does, and check that the files exist."""
    from megatron.core.datasets.utils import get_blend_from_list

    if not items:
        raise ConfigError(option, "must name at least one dataset prefix, got none")
    weight_given = [_is_number(item) for item in items[0::2]]
    if len(items) % 2 == 0 and any(weight_given) and not all(weight_given):
        raise ConfigError(
            option,
            f"must be prefixes, or a weight before every prefix, got {' '.join(items)}; add the weights",
        )
    prefixes, weights = get_blend_from_list(items)
    for prefix in prefixes:
        missing = [prefix + suffix for suffix in (".idx", ".bin") if not os.path.isfile(prefix + suffix)]
        if missing:
            raise ConfigError(
                option,
                f"a dataset prefix needs PREFIX.idx and PREFIX.bin, {missing[0]} does not exist; correct it",
            )
    wrong = [weight for weight in weights or () if not 0 < weight < float("inf")]
    if wrong:
        raise ConfigError(
            option, f"weights must be positive and finite, got {wrong[0]}; correct it or drop that dataset"
        )
    return list(prefixes), weights


def checked_source(args: Namespace, counts: tuple[int, int | None, int]) -> DataSource:
    """The data source, after checking that every split that will be read has documents and enough tokens."""
    if args.reset_attention_mask and not getattr(args, "create_attention_mask_in_dataloader", True):
        raise ConfigError(
            "--reset-attention-mask",
            "needs the mask that --no-create-attention-mask-in-dataloader leaves out; drop one of them",
        )
    if getattr(args, "dataloader_type", None) not in (None, "single", "cyclic"):
        raise ConfigError("--dataloader-type", f"must be single or cyclic, got {args.dataloader_type}")
    source = data_source(args)
    if source.is_mock:
        return source
    bookends = [(0.0, 1.0)] * 3 if source.split is None else _split_bookends(source.split)
    for split, name in enumerate(SPLITS):
        count, blend = counts[split], source.blend_of(split)
        if count == 0 or blend is None:
            continue
        if bookends[split] is None:
            continue
        one_pass = count is None or (blend[1] is None and len(blend[0]) > 1)
        for prefix in blend[0]:
            _check_documents(prefix, name, bookends[split], args, one_pass)
    if (
        counts[0]
        and (source.blend_of(0) is None or bookends[0] is None)
        and not getattr(args, "skip_train", False)
    ):
        raise ConfigError(
            "--split" if source.split else "--train-data-path",
            "must give training at least one document, got none; name training data, or --skip-train",
        )
    return source


def _split_bookends(split: str) -> list[tuple[float, float] | None]:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    split_shares(split)
    return convert_split_vector_to_split_matrix(parse_and_normalize_split(split))


def _check_documents(
    prefix: str, name: str, bookend: tuple[float, float], args: Namespace, one_pass: bool
) -> None:
    lengths = _sequence_lengths(prefix)
    begin, end = (round(bound * float(len(lengths))) for bound in bookend)  # megatron-core's rounding
    if end <= begin:
        raise ConfigError(
            "--split",
            f"gives the {name} part none of the {len(lengths)} documents of {prefix}; use more documents, "
            f"another --split (now {args.split or LEGACY_SPLIT}), or --eval-iters 0",
        )
    num_tokens = int(lengths[begin:end].sum(dtype=np.int64))
    if num_tokens == 0:
        raise ConfigError(
            "--data-path",
            f"the {name} part of {prefix} must hold tokens, got {end - begin} documents without any; "
            "add data, cut the parts elsewhere with --split, or pass --eval-iters 0",
        )
    if one_pass and num_tokens <= args.seq_length:
        raise ConfigError(
            "--data-path",
            f"the {name} part of {prefix} holds fewer tokens than one sample needs "
            f"(--seq-length {args.seq_length} + 1); add data or shorten the sequence",
        )


def _sequence_lengths(prefix: str) -> np.ndarray:
    """int32 lengths, in tokens, of the sequences in `prefix.idx`."""
    _, num_sequences, _ = read_index_header(prefix)
    if num_sequences == 0:
        return np.empty(0, dtype=np.int32)
    return np.memmap(
        prefix + ".idx", dtype=np.int32, mode="r", offset=_INDEX_HEADER.size, shape=(num_sequences,)
    )


def read_index_header(prefix: str) -> tuple[type[np.generic], int, int]:
    """Read token dtype, number of sequences and number of document boundaries from `prefix.idx`.

    Raises:
        ConfigError: a file that is not a complete Megatron index.
    """
    path = prefix + ".idx"
    with open(path, "rb") as stream:
        header = stream.read(_INDEX_HEADER.size)
    if len(header) == _INDEX_HEADER.size:
        magic, version, code, num_sequences, num_boundaries = _INDEX_HEADER.unpack(header)
        expected = _INDEX_HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if (
            magic == _INDEX_MAGIC
            and version == 1
            and code in _DTYPE_BY_CODE
            and os.path.getsize(path) >= expected
        ):
            return _DTYPE_BY_CODE[code], num_sequences, num_boundaries
    raise ConfigError(
        "--data-path", f"{path} must be a complete Megatron index file; preprocess the data again"
    )


def token_entropy_nats(path_prefix: str, vocab_size: int) -> float:
    """Unigram entropy H = -sum_v p_v ln p_v, in nats per token, of the token ids in `path_prefix.bin`.

    The loss of a model that knows only token frequencies; one that learns anything falls below it.

    Raises:
        ConfigError: no tokens, or an id outside `vocab_size`.
    """
    dtype, _, _ = read_index_header(path_prefix)
    num_tokens = os.path.getsize(path_prefix + ".bin") // np.dtype(dtype).itemsize
    if num_tokens == 0:
        raise ConfigError("--data-path", f"{path_prefix}.bin must hold tokens, got an empty file")
    tokens = np.memmap(path_prefix + ".bin", dtype=dtype, mode="r", shape=(num_tokens,))
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, num_tokens, _ENTROPY_CHUNK_TOKENS):
        found = np.bincount(tokens[start : start + _ENTROPY_CHUNK_TOKENS], minlength=vocab_size)
        if len(found) > vocab_size:
            raise ConfigError(
                "--vocab-size",
                f"{path_prefix} has the token id {len(found) - 1}, the vocabulary {vocab_size} ids",
            )
        counts += found
    shares = counts[counts > 0] / num_tokens
    return float(-(shares * np.log(shares)).sum())

"""Files and directories of a run, checked before torch is imported: a job should fail while someone is
watching.

One idea: everything that can be read in milliseconds is read now, on every rank, with the standard library
alone: index headers against file sizes, the tokenizer's vocabulary against the data, the checkpoint's
description against the arguments, and whether each directory can be written. It also settles the one value
that needs a file: the padded vocabulary.

Traps: the token ids of data without our `.meta.json` sidecar are only sampled (the first million), so a clean
result is no proof. A Hugging Face tokenizer named by a hub id cannot be measured here; its size then stays
unknown until it is built. A checkpoint directory without a tracker is a fresh start, as in Megatron.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import struct
import sys
import tempfile
from argparse import Namespace
from array import array
from pathlib import Path
from typing import Any

from metis.errors import CheckpointError, ConfigError
from metis.training.validation import set_padded_vocab_size
from metis.training.validation_checks import require

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")
TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Bytes per token by dtype code: uint8, int8, int16, int32, int64, uint16 (6 and 7 are floats)."""

_ARRAY_CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}
_NUM_SAMPLED_TOKENS = 1_000_000
_BYTES_PER_SEQUENCE = 4 + 8  # int32 length, int64 byte offset
_BYTES_PER_BOUNDARY = 8


def preflight(args: Namespace) -> None:
    """Check every file and directory that validated `args` name; set args.padded_vocab_size if it can be
    known.

    Raises ConfigError, or CheckpointError for a checkpoint that is damaged or belongs to another model or
    recipe.
    """
    require(
        importlib.util.find_spec("psutil") is not None,
        "psutil",
        "must be installed, else saving a checkpoint hangs for ever; run pip install psutil",
    )
    vocab_size = resolve_vocabulary(args)
    for option, prefix in data_prefixes(args):
        code, num_tokens = check_indexed_dataset(option, prefix)
        check_tokens_fit(args, prefix, code, num_tokens, vocab_size)
    if not args.print_config:  # printing a configuration creates nothing
        _check_directories(args)
    _check_checkpoint(args)


def resolve_vocabulary(args: Namespace) -> int | None:
    """Return the tokenizer's number of ids and set args.padded_vocab_size from it; None if it cannot be known
    yet.

    Raises ConfigError for a missing or unreadable tokenizer and for a given vocabulary that is too small.
    """
    if args.tokenizer_type is None:
        return None
    size = tokenizer_vocab_size(args)
    if size is not None:
        set_padded_vocab_size(args, size)
    return size


def tokenizer_vocab_size(args: Namespace) -> int | None:
    """Return the number of token ids of the tokenizer of `args`, or None when only building it tells."""
    kind, model = args.tokenizer_type, args.tokenizer_model
    if kind == "NullTokenizer":
        return args.vocab_size + 1
    if not os.path.exists(model):
        require(
            kind == "HuggingFaceTokenizer" and not model.startswith((".", "/")),
            "--tokenizer-model",
            f"must be an existing file, received {model}; correct the path",
        )
        return None
    if kind == "HuggingFaceTokenizer":
        return _hugging_face_size(Path(model))
    require(
        os.path.isfile(model), "--tokenizer-model", f"must be a file for {kind}, received directory {model}"
    )
    if kind == "TikTokenizer":
        return _tiktoken_size(args)
    return _sentencepiece_size(model)


def _sentencepiece_size(model: str) -> int:
    try:
        import sentencepiece
    except ImportError:
        raise ConfigError(
            "--tokenizer-type", "needs the package sentencepiece; pip install sentencepiece"
        ) from None
    try:
        return sentencepiece.SentencePieceProcessor(model_file=model).get_piece_size()
    except (RuntimeError, OSError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(
            "--tokenizer-model", f"must be a SentencePiece model, received {model} ({detail})"
        ) from None


def _hugging_face_size(model: Path) -> int | None:
    """Count the ids of `tokenizer.json`: the model's vocabulary and the added tokens outside it."""
    path = model / "tokenizer.json" if model.is_dir() else model
    if path.name != "tokenizer.json" or not path.is_file():
        require(
            any(
                (model / name).is_file()
                for name in ("tokenizer.model", "tokenizer_config.json", "vocab.json")
            ),
            "--tokenizer-model",
            f"must be a directory with a Hugging Face tokenizer (tokenizer.json), received {model}",
        )
        return None
    content = _read_json(path, "--tokenizer-model")
    try:
        vocabulary = content["model"]["vocab"]
        ids = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
        ids |= {token["id"] for token in content.get("added_tokens", [])}
    except (KeyError, TypeError, AttributeError):
        raise ConfigError("--tokenizer-model", f"must hold model.vocab, received {path} without it") from None
    return max(len(ids), max(ids, default=-1) + 1)


def _tiktoken_size(args: Namespace) -> int:
    """LLaMA-3 rank file: ranks + special tokens. JSON vocabulary of megatron-core: 131072 or --vocab-size."""
    from metis.training import tokenizer

    if args.tokenizer_model.endswith(".json"):
        _read_json(Path(args.tokenizer_model), "--tokenizer-model")
        return args.vocab_size or 2**17
    special = args.tiktoken_num_special_tokens
    if "tiktoken_num_special_tokens" not in args.given:
        special = tokenizer.LLAMA3_NUM_SPECIAL_TOKENS
    return len(tokenizer.read_rank_file(args.tokenizer_model)) + special


def _read_json(path: Path, where: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(where, f"must be readable JSON, received {path} ({detail})") from None


def data_prefixes(args: Namespace) -> list[tuple[str, str]]:
    """Return (option, prefix) for every indexed dataset that `args` name, weights dropped.

    Blends read as in megatron-core: an even list whose every other item is a number is WEIGHT PREFIX pairs.
    Raises ConfigError for an unreadable list file.
    """
    lists: list[tuple[str, list[str]]] = [
        ("--data-path", args.data_path or []),
        ("--train-data-path", args.train_data_path or []),
        ("--valid-data-path", args.valid_data_path or []),
        ("--test-data-path", args.test_data_path or []),
    ]
    if args.data_args_path is not None:
        try:
            lists.append(("--data-args-path", Path(args.data_args_path).read_text(encoding="utf-8").split()))
        except (OSError, ValueError) as error:
            raise ConfigError(
                "--data-args-path", f"must be a readable text file, received {args.data_args_path} ({error})"
            ) from None
    if args.per_split_data_args_path is not None:
        option = "--per-split-data-args-path"
        content = _read_json(Path(args.per_split_data_args_path), option)
        require(
            isinstance(content, dict) and set(content) <= {"train", "valid", "test"},
            option,
            "must hold lists under train, valid and test",
        )
        lists += [(option, [str(item) for item in blend or []]) for blend in content.values()]
    found = [(option, prefix) for option, items in lists for prefix in _without_weights(items)]
    return list(dict.fromkeys(found))


def _without_weights(items: list[str]) -> list[str]:
    def is_number(text: str) -> bool:
        try:
            float(text)
        except ValueError:
            return False
        return True

    weighted = len(items) % 2 == 0 and all(is_number(item) for item in items[0::2])
    return items[1::2] if weighted else items


def check_indexed_dataset(option: str, prefix: str) -> tuple[int, int]:
    """Check `prefix.idx` and `prefix.bin` against each other; return (dtype code, number of tokens).

    Layout of .idx: 9 bytes magic, u64 version, u8 dtype code, u64 sequences S, u64 boundaries B, then int32
    lengths [S], int64 byte offsets [S], int64 boundaries [B].

    Raises ConfigError naming the file, the bytes it must have and the bytes it has.
    """
    index, binary = f"{prefix}.idx", f"{prefix}.bin"
    for path in (index, binary):
        hint = "; give the prefix without .bin or .idx" if prefix.endswith((".bin", ".idx")) else ""
        require(
            os.path.isfile(path),
            option,
            f"needs {path}, which does not exist; a prefix stands for PREFIX.idx and PREFIX.bin{hint}",
        )
    size = os.path.getsize(index)
    remedy = "preprocess the data again or copy the file again"
    try:
        with open(index, "rb") as stream:
            header = stream.read(INDEX_HEADER.size)
            require(
                len(header) == INDEX_HEADER.size,
                option,
                f"{index} is truncated: must have at least {INDEX_HEADER.size} bytes, received {size}; "
                f"{remedy}",
            )
            magic, version, code, num_sequences, num_boundaries = INDEX_HEADER.unpack(header)
            require(
                magic == INDEX_MAGIC and version == INDEX_VERSION,
                option,
                f"{index} must be a Megatron index of version {INDEX_VERSION}, received other content; "
                "make it with tools/preprocess_data.py",
            )
            require(
                code in TOKEN_BYTES, option, f"{index} must hold integer tokens, received dtype code {code}"
            )
            expected = INDEX_HEADER.size + num_sequences * _BYTES_PER_SEQUENCE
            expected += num_boundaries * _BYTES_PER_BOUNDARY
            require(
                size >= expected,
                option,
                f"{index} is truncated: must have {expected} bytes, received {size}; {remedy}",
            )
            require(num_sequences > 0, option, f"{index} must hold documents, received an empty dataset")
            stream.seek(INDEX_HEADER.size + 4 * (num_sequences - 1))
            last_length = struct.unpack("<i", stream.read(4))[0]
            stream.seek(INDEX_HEADER.size + 4 * num_sequences + 8 * (num_sequences - 1))
            last_offset = struct.unpack("<q", stream.read(8))[0]
    except OSError as error:
        raise ConfigError(option, f"{index} must be readable ({error.strerror})") from None
    expected, received = last_offset + last_length * TOKEN_BYTES[code], os.path.getsize(binary)
    if received != expected:
        state = "truncated" if received < expected else "not the file of its index"
        raise ConfigError(
            option, f"{binary} is {state}: must have {expected} bytes, received {received}; {remedy}"
        )
    return code, expected // TOKEN_BYTES[code]


def check_tokens_fit(
    args: Namespace, prefix: str, code: int, num_tokens: int, vocab_size: int | None
) -> None:
    """Check that the dataset was made with this tokenizer, and that its ids lie below `vocab_size`.

    The sidecar `prefix.meta.json` of our preprocessing decides; without it the first million tokens are
    looked at. Raises ConfigError.
    """
    sidecar = Path(f"{prefix}.meta.json")
    if sidecar.is_file():
        meta = _read_json(sidecar, str(sidecar))
        _check_same_tokenizer(args, prefix, meta, vocab_size)
        largest = meta.get("max_token_id")
    else:
        largest = largest_sampled_token(prefix, code, min(num_tokens, _NUM_SAMPLED_TOKENS))
    if vocab_size is not None and largest is not None:
        require(
            largest < vocab_size,
            "--vocab-size" if args.tokenizer_type == "NullTokenizer" else "--tokenizer-model",
            f"is a vocabulary too small for {prefix}: must have more than {largest} ids, received "
            f"{vocab_size}; use "
            "the tokenizer that the data were made with",
        )


def _check_same_tokenizer(args: Namespace, prefix: str, meta: Any, vocab_size: int | None) -> None:
    from metis.training.tokenizer import tokenizer_sha256

    require(isinstance(meta, dict), f"{prefix}.meta.json", "must hold a JSON object")
    if args.tokenizer_type == "NullTokenizer":
        return  # ids as they are: only their size matters
    asked = {
        "tokenizer_type": args.tokenizer_type,
        "tokenizer_sha256": tokenizer_sha256(args.tokenizer_model),
        "vocab_size": vocab_size,
    }
    differences = [
        f"{name} {_short(meta[name])} in the data, {_short(value)} asked for"
        for name, value in asked.items()
        if meta.get(name) is not None and value is not None and not _same(name, meta[name], value)
    ]
    require(
        not differences,
        "--tokenizer-model",
        f"must be the tokenizer that {prefix} was made with, received another: {'; '.join(differences)}; "
        "use that "
        "tokenizer or preprocess the data again",
    )


def _same(name: str, stored: Any, asked: Any) -> bool:
    """Kinds of SentencePiece tokenizers are one kind: the model's checksum tells them apart."""
    from metis.training.tokenizer import SENTENCEPIECE_TYPES

    if name == "tokenizer_type" and stored in SENTENCEPIECE_TYPES:
        return asked in SENTENCEPIECE_TYPES
    return stored == asked


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


def largest_sampled_token(prefix: str, code: int, num_tokens: int) -> int | None:
    """Return the largest of the first `num_tokens` ids in `prefix.bin` (little-endian); None without any."""
    tokens = array(_ARRAY_CODES[code])
    try:
        with open(f"{prefix}.bin", "rb") as stream:
            tokens.frombytes(stream.read(num_tokens * TOKEN_BYTES[code]))
    except OSError as error:
        raise ConfigError("--data-path", f"{prefix}.bin must be readable ({error.strerror})") from None
    if sys.byteorder == "big":
        tokens.byteswap()
    return max(tokens, default=None)


def _check_directories(args: Namespace) -> None:
    targets = [
        ("--save", args.save),
        ("--tensorboard-dir", args.tensorboard_dir),
        ("--data-cache-path", args.data_cache_path),
        ("--wandb-save-dir", args.wandb_save_dir),
    ]
    if args.metrics_file is not None:
        require(
            not os.path.isdir(args.metrics_file),
            "--metrics-file",
            f"must be a file, received the directory {args.metrics_file}; add a file name",
        )
        targets.append(("--metrics-file", os.path.dirname(args.metrics_file) or "."))
    if args.record_memory_history:
        targets.append(("--memory-snapshot-path", os.path.dirname(args.memory_snapshot_path) or "."))
    for option, directory in targets:
        if directory is not None:
            check_writable(option, directory)


def check_writable(option: str, directory: str) -> None:
    """Create `directory` if needed and write a temporary file in it; raises ConfigError with the system's
    reason.

    Permission bits are not asked: they do not speak for read-only mounts, quotas or root.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as stream:
            stream.write(b"x")
            stream.flush()
    except OSError as error:
        raise ConfigError(
            option, f"must be a directory that can be written, received {directory} ({error.strerror})"
        ) from None


def _check_checkpoint(args: Namespace) -> None:
    """Find what the run will load and compare its description with the arguments, as loading does later."""
    from metis.training.retention import find_checkpoint, recover_interrupted_swap
    from metis.training.run_config import check_compatible, read_run_config

    for option, root, finetune in (
        ("--load", args.load, args.finetune),
        ("--pretrained-checkpoint", args.pretrained_checkpoint, True),
    ):
        if root is None:
            continue
        with contextlib.suppress(
            OSError
        ):  # every rank may try; one rename wins and the others see its result
            recover_interrupted_swap(root)
        found = find_checkpoint(root, args.ckpt_step if option == "--load" else None)
        if found is not None:
            stored = read_run_config(found[0])
            if stored is not None:
                check_compatible(str(found[0]), stored, args, finetune=finetune or found[2])
            return
        if option == "--pretrained-checkpoint":
            raise CheckpointError(option, f"must hold a checkpoint, received none in {root}")
    if args.exit_on_missing_checkpoint:
        raise CheckpointError(
            "--load",
            f"must hold a checkpoint under --exit-on-missing-checkpoint, received none in {args.load}",
        )

"""Text to Megatron's indexed datasets: `<prefix>_<key>_document.{bin,idx}` and a `.meta.json` that says how.

One idea: one process reads, `--workers` processes parse and tokenize batches of documents, one process writes
what comes back in the order of the input. The files are byte for byte those of a single process, and those of
Megatron's own tool. They are written under temporary names and renamed when everything is complete, the index
last: whoever sees an `.idx` sees a whole dataset.

Traps:
- Without `--append-eod` nothing marks where a document ends; the tool warns.
- A document without tokens leaves a boundary without a sequence, as in Megatron's tool.
- Workers are forked: they inherit the tokenizer and must not be started after threads that hold its locks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NoReturn

from metis import __version__
from metis.errors import ConfigError
from metis.training.documents import (
    FORMATS,
    SEPARATORS,
    DocumentReader,
    RawDocument,
    document_texts,
    expand_inputs,
    input_format,
)
from metis.training.options import OPTIONS
from metis.training.tokenizer import build_tokenizer, tokenizer_sha256

PARTIAL_SUFFIX = ".partial"
_BATCH_DOCUMENTS = 64
_BATCH_BYTES = 1 << 20
_BATCHES_IN_FLIGHT_PER_WORKER = 4

# Per document and key: token ids and the lengths of its sequences.
Encoded = tuple[list[int], list[int]]


@dataclass(slots=True)
class DatasetSummary:
    """What one output holds. Units: documents, token ids, bytes of UTF-8 text, bytes on disk."""

    prefix: str
    num_documents: int = 0
    num_empty_documents: int = 0
    num_tokens: int = 0
    num_text_bytes: int = 0
    max_token_id: int = -1
    num_file_bytes: int = 0


@dataclass(slots=True)
class _Job:
    """What a worker needs; inherited by fork, never pickled."""

    tokenizer: Any
    keys: list[str]
    asked_format: str
    append_eod: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("arguments", f"{message}; see --help")


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the tool's command line; the tokenizer's options are those of the trainer.

    Raises:
        ConfigError: unknown, missing or malformed options.
    """
    parser = _Parser(prog="preprocess_data.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, help="files or quoted globs, read in this order")
    parser.add_argument("--input-format", choices=("auto", *FORMATS), default="auto", help="auto: by suffix")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], help="one complete dataset per key or column"
    )
    parser.add_argument(
        "--text-document-separator",
        choices=SEPARATORS,
        default="file",
        help="what ends a plain-text document",
    )
    parser.add_argument("--output-prefix", required=True, help="files are <prefix>_<key>_document.{bin,idx}")
    parser.add_argument(
        "--append-eod", action="store_true", help="end every document with the end-of-document id"
    )
    parser.add_argument("--workers", type=int, default=_num_cpus(), help="tokenizing processes")
    parser.add_argument("--log-interval", type=int, default=1000, help="documents between progress lines")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    add_tokenizer_options(parser)
    args = parser.parse_args(argv)
    for name in ("workers", "log_interval"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", f"must be at least 1, got {getattr(args, name)}")
    return args


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    """Add the trainer's tokenizer options, with its names and defaults."""
    for option in OPTIONS:
        if "tokenizer" not in option.by.split(", "):
            continue
        settings: dict[str, Any] = {"dest": option.dest, "default": option.default, "help": option.help}
        if option.value is None:
            settings["action"] = "store_false" if option.default else "store_true"
        else:
            settings.update(type=option.value, choices=option.choices, nargs=option.nargs)
        parser.add_argument(*option.flags, **settings)


def preprocess(args: Namespace) -> list[DatasetSummary]:
    """Tokenize `args.input` into one indexed dataset per key.

    Returns:
        One summary per key, in the order of `args.json_keys`.

    Raises:
        ConfigError: bad input (naming file and line), bad tokenizer, existing or unwritable output. Nothing
        is left
            under the final names then, nor after a kill; a kill with SIGKILL leaves `*.partial` files.
    """
    keys = list(dict.fromkeys(args.json_keys))
    reader = DocumentReader(expand_inputs(args.input), args.input_format, keys, args.text_document_separator)
    prefixes = [f"{args.output_prefix}_{key}_document" for key in keys]
    _check_output(prefixes, args.overwrite)
    _check_first_documents(reader, keys)
    tokenizer = build_tokenizer(args)
    if not args.append_eod:
        _log("warning: without --append-eod nothing marks the end of a document in the data")
    job = _Job(tokenizer=tokenizer, keys=keys, asked_format=args.input_format, append_eod=args.append_eod)
    summaries = [DatasetSummary(prefix=prefix) for prefix in prefixes]
    started = time.monotonic()
    try:
        _write(args, job, reader, summaries)
        _publish(args, tokenizer, summaries)
    except OSError as error:
        raise ConfigError(
            str(error.filename or "--output-prefix"),
            f"must stay readable or writable and have room, got {error.strerror}; mend that and start again",
        ) from error
    finally:
        for prefix in prefixes:
            for suffix in (".bin", ".idx", ".meta.json"):
                if os.path.exists(prefix + suffix + PARTIAL_SUFFIX):
                    os.remove(prefix + suffix + PARTIAL_SUFFIX)
    for summary in summaries:
        _log(_describe(summary, time.monotonic() - started))
    return summaries


# --- checks before work ------------------------------------------------------------------------------------


def _check_output(prefixes: list[str], overwrite: bool) -> None:
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            if os.path.exists(prefix + suffix) and not overwrite:
                raise ConfigError(
                    "--output-prefix", f"{prefix}{suffix} exists; choose another prefix or pass --overwrite"
                )
        directory = os.path.dirname(os.path.abspath(prefix))
        try:
            os.makedirs(directory, exist_ok=True)
            with open(prefix + ".bin" + PARTIAL_SUFFIX, "wb"):
                pass
        except OSError as error:
            raise ConfigError(
                "--output-prefix", f"must be in a writable directory, got {directory} ({error.strerror})"
            ) from error
        os.remove(prefix + ".bin" + PARTIAL_SUFFIX)


def _check_first_documents(reader: DocumentReader, keys: list[str]) -> None:
    """Parse the first document of every jsonl file, so that a wrong key costs no hours."""
    for path, kind in zip(reader.paths, reader.formats, strict=True):
        if kind == "jsonl":
            for raw in DocumentReader([path], kind, keys):
                document_texts(raw, kind, keys)
                break


# --- tokenizing --------------------------------------------------------------------------------------------


def _encode_document(job: _Job, raw: RawDocument) -> tuple[list[Encoded], list[int]]:
    """Token ids with sequence lengths, and bytes of text, per key of one document."""
    encoded, num_text_bytes = [], []
    for texts in document_texts(raw, input_format(raw[0], job.asked_format), job.keys):
        ids: list[int] = []
        lengths: list[int] = []
        for text in texts:
            try:
                sequence = job.tokenizer.tokenize(text)
            except ValueError as error:  # NullTokenizer on letters
                raise ConfigError(
                    f"{raw[0]}:{raw[1]}", f"must be text the tokenizer takes, got {error}"
                ) from error
            if sequence:
                ids += sequence
                lengths.append(len(sequence))
        if ids and job.append_eod:
            ids.append(job.tokenizer.eod)
            lengths[-1] += 1
        if ids and not 0 <= min(ids) <= max(ids) < job.tokenizer.vocab_size:
            raise ConfigError(
                f"{raw[0]}:{raw[1]}",
                f"token ids must be below the vocabulary size {job.tokenizer.vocab_size}, got {min(ids)} to "
                f"{max(ids)}",
            )
        encoded.append((ids, lengths))
        num_text_bytes.append(sum(len(text.encode()) for text in texts))
    return encoded, num_text_bytes


_worker_job: _Job | None = None  # set once, in worker processes only


def _start_worker(job: _Job, parent: int) -> None:
    global _worker_job
    _worker_job = job
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit_with_parent(parent: int) -> None:
    # A parent killed by SIGKILL cannot stop its workers, and siblings keep each other's queue open.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _encode_batch(batch: list[RawDocument]) -> list[Any] | tuple[str, str]:
    """Encode a batch in a worker; a user's error comes back as (where, message): that can be pickled."""
    assert _worker_job is not None
    try:
        return [_encode_document(_worker_job, raw) for raw in batch]
    except ConfigError as error:
        return error.where, error.message


def _batches(reader: DocumentReader) -> Iterator[tuple[list[RawDocument], int]]:
    """(documents, bytes of input read so far), cut by number and size so that no worker gets a mountain."""
    batch: list[RawDocument] = []
    size = 0
    for raw in reader:
        batch.append(raw)
        size += len(raw[2]) if isinstance(raw[2], bytes) else sum(len(str(v)) for v in raw[2].values())
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch, reader.bytes_read
            batch, size = [], 0
    if batch:
        yield batch, reader.bytes_read


def _encoded_batches(workers: int, job: _Job, reader: DocumentReader) -> Iterator[tuple[list[Any], int]]:
    """Encoded documents in input order, with a bounded number of batches in memory."""
    if workers == 1:
        for batch, bytes_read in _batches(reader):
            yield [_encode_document(job, raw) for raw in batch], bytes_read
        return
    context = multiprocessing.get_context("fork")
    waiting: deque[tuple[Future[Any], int]] = deque()
    executor = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(job, os.getpid())
    )
    try:
        for batch, bytes_read in _batches(reader):
            waiting.append((executor.submit(_encode_batch, batch), bytes_read))
            if len(waiting) >= workers * _BATCHES_IN_FLIGHT_PER_WORKER:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Any], bytes_read: int) -> tuple[list[Any], int]:
    try:
        encoded = future.result()
    except BrokenProcessPool as error:
        raise ConfigError(
            "--workers", "a worker process died (out of memory?); use fewer workers or shorter documents"
        ) from error
    if isinstance(encoded, tuple):
        raise ConfigError(*encoded)
    return encoded, bytes_read


# --- writing -----------------------------------------------------------------------------------------------


def _write(args: Namespace, job: _Job, reader: DocumentReader, summaries: list[DatasetSummary]) -> None:
    """Write `.bin` and `.idx` under temporary names and fill in the summaries."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(job.tokenizer.vocab_size)
    builders = [IndexedDatasetBuilder(s.prefix + ".bin" + PARTIAL_SUFFIX, dtype=dtype) for s in summaries]
    started, num_documents, num_logged = time.monotonic(), 0, 0
    try:
        for documents, bytes_read in _encoded_batches(args.workers, job, reader):
            for encoded, num_text_bytes in documents:
                for builder, summary, (ids, lengths), size in zip(
                    builders, summaries, encoded, num_text_bytes, strict=True
                ):
                    builder.add_document(ids, lengths)
                    _count(summary, ids, size)
            num_documents += len(documents)
            if num_documents // args.log_interval > num_logged:
                num_logged = num_documents // args.log_interval
                _log(_progress(num_documents, bytes_read, reader.total_bytes, time.monotonic() - started))
    finally:
        for builder in builders:
            builder.data_file.close()
    for builder, summary in zip(builders, summaries, strict=True):
        if summary.num_tokens == 0:
            raise ConfigError("--input", f"must hold text, got no token in {summary.num_documents} documents")
        builder.finalize(summary.prefix + ".idx" + PARTIAL_SUFFIX)


def _count(summary: DatasetSummary, ids: list[int], num_text_bytes: int) -> None:
    summary.num_documents += 1
    summary.num_tokens += len(ids)
    summary.num_text_bytes += num_text_bytes
    summary.num_empty_documents += not ids
    if ids:
        summary.max_token_id = max(summary.max_token_id, max(ids))


def _publish(args: Namespace, tokenizer: Any, summaries: list[DatasetSummary]) -> None:
    """Write the sidecars and rename everything: old indices go first, new ones come last."""
    for summary in summaries:
        model = args.tokenizer_model
        meta = {
            "tokenizer_type": args.tokenizer_type,
            "tokenizer_model": model and os.path.abspath(model) if model and os.path.exists(model) else model,
            "tokenizer_sha256": tokenizer_sha256(model),
            "vocab_size": int(tokenizer.vocab_size),
            "max_token_id": summary.max_token_id,
            "num_documents": summary.num_documents,
            "num_tokens": summary.num_tokens,
            "append_eod": args.append_eod,
            "adds_bos": bool(args.legacy_tokenizer),
            "created_by": f"metis {__version__} preprocess_data",
        }
        with open(summary.prefix + ".meta.json" + PARTIAL_SUFFIX, "w", encoding="utf-8") as stream:
            json.dump(meta, stream, indent=2)
            stream.write("\n")
        summary.num_file_bytes = sum(
            os.path.getsize(summary.prefix + suffix + PARTIAL_SUFFIX) for suffix in (".bin", ".idx")
        )
    for summary in summaries:
        if os.path.exists(summary.prefix + ".idx"):
            os.remove(summary.prefix + ".idx")
    for suffix in (".bin", ".meta.json", ".idx"):
        for summary in summaries:
            os.replace(summary.prefix + suffix + PARTIAL_SUFFIX, summary.prefix + suffix)


def _progress(num_documents: int, bytes_read: int, total_bytes: int, seconds: float) -> str:
    share = bytes_read / max(total_bytes, 1)
    remaining = seconds * (1 - share) / share if share else float("nan")
    return (
        f" > {num_documents} documents ({100 * share:.1f} %) | {num_documents / seconds:.1f} docs/s | "
        f"{bytes_read / seconds / 2**20:.2f} MB/s | {remaining:.0f} s left"
    )


def _describe(summary: DatasetSummary, seconds: float) -> str:
    return (
        f" > {summary.prefix}: {summary.num_documents} documents ({summary.num_empty_documents} empty), "
        f"{summary.num_tokens} tokens, {summary.num_text_bytes / summary.num_tokens:.3f} bytes/token, "
        f"largest id {summary.max_token_id}, {summary.num_file_bytes / 2**20:.2f} MiB, {seconds:.1f} s"
    )


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def exit_on_sigterm() -> None:
    """Let SIGTERM unwind the program, so that partial files are removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

"""Documents out of files: jsonl, gzipped jsonl, parquet and plain text as one ordered sequence.

One idea: reading is split in two so that it can run in parallel and stay in order. `DocumentReader` cuts
files into raw documents, cheaply and in one process; `document_texts` parses one raw document, in any
process. A raw document knows its file and line, so every complaint does too.

Traps: gzip reports a truncated file only when the end is reached. A JSON value may be a list of strings: one
document of several sequences, as in Megatron's tool.
"""

from __future__ import annotations

import glob
import gzip
import importlib.util
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from metis.errors import ConfigError

FORMATS = ("jsonl", "parquet", "text")
SEPARATORS = ("file", "blank-line", "line")
_SUFFIX_FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet",
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text", ".py": "text",
}  # fmt: skip
_PARQUET_ROWS_PER_BATCH = 256

# (file, line or document number counted from 1, bytes of the document or a dict of columns)
RawDocument = tuple[str, int, "bytes | dict[str, Any]"]


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files that paths and globs (`**` included) name: in the order given, each glob's matches sorted.

    Raises:
        ConfigError: a pattern that matches no file.
    """
    files: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            raise ConfigError(
                "--input", f"must name files, {pattern} is a directory; write '{pattern}/*.jsonl'"
            )
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if os.path.isfile(path)]
        if not found:
            raise ConfigError(
                "--input", f"must name existing files, {pattern} matches none; correct the path"
            )
        files += found
    return files


def input_format(path: str, asked: str = "auto") -> str:
    """`jsonl`, `parquet` or `text`: `asked`, or what the suffix (before `.gz`) says.

    Raises:
        ConfigError: `auto` and a suffix that says nothing.
    """
    if asked != "auto":
        return asked
    suffix = os.path.splitext(path.removesuffix(".gz"))[1].lower()
    if suffix not in _SUFFIX_FORMATS:
        raise ConfigError(
            "--input-format",
            f"cannot tell the format of {path} from its suffix; pass --input-format {'|'.join(FORMATS)}",
        )
    return _SUFFIX_FORMATS[suffix]


class DocumentReader:
    """The raw documents of `paths`, in order.

    Args:
        paths: files, from `expand_inputs`.
        asked_format: `auto` or one of `FORMATS`.
        keys: JSON keys or parquet columns to read; plain text is the first and only one.
        separator: what ends a document in plain text: the file, blank lines, or each line.

    Raises:
        ConfigError: at once for a format or column that cannot be; while reading for damaged gzip or parquet.
    """

    def __init__(
        self, paths: Sequence[str], asked_format: str, keys: Sequence[str], separator: str = "file"
    ) -> None:
        self.paths = list(paths)
        self.keys = list(keys)
        self.separator = separator
        self.formats = [input_format(path, asked_format) for path in self.paths]
        self.total_bytes = sum(os.path.getsize(path) for path in self.paths)
        self._finished_bytes = 0
        self._open_file: BinaryIO | None = None
        if "text" in self.formats and len(self.keys) != 1:
            raise ConfigError("--json-keys", f"plain text has one field, got {len(self.keys)} keys; name one")
        for path, kind in zip(self.paths, self.formats, strict=True):
            if kind == "parquet":
                self._check_parquet(path)

    @property
    def bytes_read(self) -> int:
        """Bytes of input (compressed, as on disk) that have been read."""
        return self._finished_bytes + (self._open_file.tell() if self._open_file is not None else 0)

    def __iter__(self) -> Iterator[RawDocument]:
        for path, kind in zip(self.paths, self.formats, strict=True):
            yield from self._parquet_rows(path) if kind == "parquet" else self._text_documents(path, kind)
            self._finished_bytes += os.path.getsize(path)

    def _text_documents(self, path: str, kind: str) -> Iterator[RawDocument]:
        number = 0
        with open(path, "rb") as self._open_file:
            stream: Any = gzip.GzipFile(fileobj=self._open_file) if path.endswith(".gz") else self._open_file
            separator = "line" if kind == "jsonl" else self.separator
            try:
                for number, document in _cut(stream, separator):
                    yield path, number, document
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ConfigError(
                    path,
                    f"must be complete gzip data, got damage after document {number} ({error}); "
                    "fetch it again",
                ) from error
        self._open_file = None

    def _check_parquet(self, path: str) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise ConfigError("--input-format", "parquet needs the package pyarrow; run pip install pyarrow")
        import pyarrow
        import pyarrow.parquet

        try:
            columns = pyarrow.parquet.read_schema(path).names
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(
                path, f"must be a complete parquet file, got {error}; fetch it again"
            ) from error
        missing = [key for key in self.keys if key not in columns]
        if missing:
            raise ConfigError(
                path, f"must have the column {missing[0]!r}, has {', '.join(columns)}; set --json-keys"
            )

    def _parquet_rows(self, path: str) -> Iterator[RawDocument]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with open(path, "rb") as self._open_file:
                table = pyarrow.parquet.ParquetFile(self._open_file)
                for batch in table.iter_batches(batch_size=_PARQUET_ROWS_PER_BATCH, columns=self.keys):
                    for row in batch.to_pylist():
                        number += 1
                        yield path, number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(path, f"must be readable parquet, got {error} after row {number}") from error
        self._open_file = None


def _cut(stream: Any, separator: str) -> Iterator[tuple[int, bytes]]:
    """Cut a binary stream into (line or document number, bytes); blank lines are no documents."""
    if separator == "file":
        yield 1, stream.read()
        return
    if separator == "line":
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line.rstrip(b"\r\n")
        return
    first, lines = 0, []
    for number, line in enumerate(stream, start=1):
        if line.strip():
            first = first if lines else number
            lines.append(line)
        elif lines:
            yield first, b"".join(lines).rstrip(b"\r\n")
            lines = []
    if lines:
        yield first, b"".join(lines).rstrip(b"\r\n")


def document_texts(raw: RawDocument, kind: str, keys: Sequence[str]) -> list[list[str]]:
    """Parse one raw document into its sequences of text, one list per key.

    Raises:
        ConfigError: naming file and line, for bad JSON, bad UTF-8, a missing key, a value that is no text, or
            half a surrogate pair in it.
    """
    path, number, payload = raw
    where = f"{path}:{number}"
    if kind == "text":
        try:
            return [[payload.decode("utf-8-sig")]]
        except UnicodeDecodeError as error:
            raise ConfigError(where, f"must be UTF-8 text, got {error}; convert the file") from error
    if kind == "jsonl":
        try:
            payload = json.loads(payload)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise ConfigError(
                where, f"must be one JSON object per line, got {error}; correct the line"
            ) from error
        if not isinstance(payload, dict):
            raise ConfigError(where, f"must be a JSON object, got {type(payload).__name__}; correct the line")
    return [_text_of(where, payload, key) for key in keys]


def _text_of(where: str, values: dict[str, Any], key: str) -> list[str]:
    if key not in values:
        raise ConfigError(
            where, f"must have the key {key!r}, has {', '.join(values) or 'none'}; set --json-keys"
        )
    value = values[key]
    sequences = value if isinstance(value, list) else [value]
    if not all(isinstance(sequence, str) for sequence in sequences):
        raise ConfigError(where, f"{key!r} must be text or a list of texts, got {type(value).__name__}")
    for sequence in sequences:
        try:
            sequence.encode()
        except UnicodeEncodeError as error:  # JSON can escape what UTF-8 cannot hold
            raise ConfigError(
                where,
                f"{key!r} must be text that UTF-8 can hold, got half a surrogate pair "
                f"{sequence[error.start]!a} at character {error.start}; correct or drop the line",
            ) from error
    return sequences

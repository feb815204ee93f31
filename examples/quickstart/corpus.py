"""Real text that every machine has, tokenized: the data of the quickstart.

One idea: the same interpreter gives the same corpus. Documents are ordered by a hash of their name, so that
the validation split at the end is of the same kind as the rest, and everything made from them is kept under
one fingerprint (text, vocabulary size, tokenizer library): equal fingerprint, no work.

Traps: pieces of one long file stay together, or the validation split would hold the other half of what was
trained on. Python versions differ in their standard libraries, so losses compare within one version.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from progress import StatusLine, run_logged

from metis.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]

# Not text worth learning: tests and their data, code tables, other people's packages.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
)
MAX_CORPUS_BYTES = 20_000_000
MAX_TOKENIZER_BYTES = 4_000_000
MAX_PIECE_CHARACTERS = 32_768
MIN_CORPUS_BYTES = 100_000
MIN_DOCUMENTS = 40  # 5 % of them for validation: at least two

Document = tuple[str, str]
"""(source, text)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """What training needs. `prefix`: of the indexed dataset; `description`: for the summary."""

    prefix: str
    tokenizer_model: str
    unigram_entropy_nats: float
    description: dict[str, Any]


# --- text --------------------------------------------------------------------------------------------------


def standard_library() -> Iterator[Document]:
    """Sources of this interpreter's standard library, and the docstrings of its modules without a source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in text_files(root, suffix=".py"):
        text = read_text(path)
        if text:
            yield path.relative_to(root).as_posix(), text
    for name in sorted(sys.builtin_module_names):
        text = "\n\n".join(_docstrings(importlib.import_module(name)))
        if text:
            yield f"built-in module {name}", text


def _docstrings(module: Any) -> Iterator[str]:
    """Signature-like headings with docstrings of a module, its members and their methods."""
    seen = set()

    def entry(name: str, value: Any) -> Iterator[str]:
        text = getattr(value, "__doc__", None)
        if isinstance(text, str) and text.strip() and text not in seen:
            seen.add(text)
            yield f"{name}\n{text.strip()}"

    yield from entry(module.__name__, module)
    for name, value in sorted(vars(module).items()):
        if callable(value):
            yield from entry(f"{module.__name__}.{name}", value)
        if isinstance(value, type):
            for method, function in sorted(vars(value).items()):
                if callable(function):
                    yield from entry(f"{module.__name__}.{name}.{method}", function)


def text_files(root: Path, suffix: str = "") -> Iterator[Path]:
    """Files below `root` whose name ends in `suffix`, hidden ones and `SKIPPED_FOLDERS` left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith("."))
        for name in sorted(names):
            if name.endswith(suffix) and not name.startswith("."):
                yield Path(folder, name)


def read_text(path: Path) -> str | None:
    """Return a file's text, None when it is not UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return None if "\0" in text else text


def files_given(paths: Sequence[str]) -> Iterator[Document]:
    """Text of the files and folders of `--corpus`.

    Raises:
        ConfigError: a path that does not exist.
    """
    for given in paths:
        root = Path(given)
        if not root.exists():
            raise ConfigError("--corpus", f"must name existing files or folders, got {given}; correct it")
        for path in text_files(root) if root.is_dir() else [root]:
            text = read_text(path)
            if text and text.strip():
                yield str(path), text


def pieces(text: str, limit: int) -> list[str]:
    """Cut a long text at line ends into pieces of about `limit` characters; together they are the text."""
    cut: list[str] = []
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if lines and size + len(line) > limit:
            cut.append("".join(lines))
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    return [*cut, "".join(lines)]


def collect(paths: Sequence[str] | None) -> list[Document]:
    """Return the documents of the corpus in training order, at most `MAX_CORPUS_BYTES` of them.

    Raises:
        ConfigError: a missing path, or too little text.
    """
    found = list(files_given(paths) if paths else standard_library())
    found.sort(key=lambda document: hashlib.sha256(document[0].encode("utf-8", "replace")).digest())
    # A small corpus is cut finer, so that there are documents to validate on.
    limit = min(MAX_PIECE_CHARACTERS, 1 + sum(len(text) for _, text in found) // 100)
    documents: list[Document] = []
    size = 0
    for source, text in found:
        for piece in pieces(text, limit):
            if size < MAX_CORPUS_BYTES:
                documents.append((source, piece))
                size += len(piece.encode())
    if size < MIN_CORPUS_BYTES or len(documents) < MIN_DOCUMENTS:
        raise ConfigError(
            "--corpus",
            f"must hold at least {MIN_CORPUS_BYTES} bytes of UTF-8 text that can be cut at line ends into "
            f"{MIN_DOCUMENTS} pieces, got {size} bytes in {len(found)} files, {len(documents)} pieces; "
            "name more files",
        )
    return documents


# --- tokens ------------------------------------------------------------------------------------------------


def unigram_entropy_nats(token_counts: np.ndarray) -> float:
    """Return -sum_i p_i ln p_i of the token frequencies: the loss of a model that knows only these."""
    p = token_counts[token_counts > 0] / token_counts.sum()
    return float(-(p * np.log(p)).sum())


def prepare(folder: Path, corpus: Sequence[str] | None, vocab_size: int, status: StatusLine) -> PreparedData:
    """Make corpus, tokenizer and indexed dataset in `folder`, or reuse them when nothing changed.

    Raises:
        ConfigError: bad corpus, or a folder with something else in it.
        RunFailed: one of the tools failed.
    """
    documents = collect(corpus)
    fingerprint = _fingerprint(documents, vocab_size)
    record = folder / "data.json"
    prefix, model = folder / "corpus_text_document", folder / "tokenizer.model"
    if record.exists():
        known = json.loads(record.read_text())
        if known["fingerprint"] == fingerprint and model.exists() and Path(f"{prefix}.idx").exists():
            status.say(f"data: {folder} is up to date")
            return _prepared(prefix, model, known)
    elif folder.exists() and any(folder.iterdir()):
        if not (folder / "corpus.jsonl").exists():
            raise ConfigError(
                "--output", f"{folder} must be empty or hold data of the quickstart; choose another folder"
            )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    size = sum(len(text.encode()) for _, text in documents)
    name = " ".join(corpus) if corpus else f"standard library of Python {sys.version.split()[0]}"
    status.say(f"corpus: {name}, {len(documents)} documents, {size / 1e6:.1f} MB")
    _write_jsonl(folder, documents)
    _run_tools(folder, model, vocab_size, status)
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    known = {
        "fingerprint": fingerprint,
        "unigram_entropy_nats": unigram_entropy_nats(np.bincount(tokens)),
        "description": {
            "source": name,
            "documents": len(documents),
            "bytes": size,
            "tokens": len(tokens),
            "vocabulary": vocab_size,
            "sha256": fingerprint,
        },
    }
    record.write_text(json.dumps(known, indent=2) + "\n")
    return _prepared(prefix, model, known)


def _prepared(prefix: Path, model: Path, known: dict[str, Any]) -> PreparedData:
    return PreparedData(
        prefix=str(prefix),
        tokenizer_model=str(model),
        unigram_entropy_nats=known["unigram_entropy_nats"],
        description=known["description"],
    )


def _fingerprint(documents: list[Document], vocab_size: int) -> str:
    digest = hashlib.sha256(f"{vocab_size} {importlib.metadata.version('sentencepiece')}".encode())
    for tool in ("metis/training/tokenizer.py", "metis/training/preprocess.py"):
        digest.update((REPOSITORY / tool).read_bytes())
    for source, text in documents:
        digest.update(f"\0{source}\0{text}".encode("utf-8", "replace"))
    return digest.hexdigest()


def _write_jsonl(folder: Path, documents: list[Document]) -> None:
    """Write `corpus.jsonl`, and its first `MAX_TOKENIZER_BYTES` as `tokenizer.jsonl`: enough for pieces."""
    size = 0
    with (
        open(folder / "corpus.jsonl", "w", encoding="utf-8") as corpus,
        open(folder / "tokenizer.jsonl", "w", encoding="utf-8") as sample,
    ):
        for source, text in documents:
            line = json.dumps({"text": text, "source": source}) + "\n"
            corpus.write(line)
            if size < MAX_TOKENIZER_BYTES:
                sample.write(line)
            size += len(line)


def _run_tools(folder: Path, model: Path, vocab_size: int, status: StatusLine) -> None:
    """Train the tokenizer and write the indexed dataset, as a user would on the command line."""
    log = folder / "log.txt"
    steps = {
        f"tokenizer: {vocab_size} SentencePiece pieces": [
            "tools/train_tokenizer.py", "--input", str(folder / "tokenizer.jsonl"),
            "--output-prefix", str(model.with_suffix("")), "--vocab-size", str(vocab_size),
        ],
        "data: Megatron's indexed format": [
            "tools/preprocess_data.py", "--input", str(folder / "corpus.jsonl"),
            "--output-prefix", str(folder / "corpus"), "--tokenizer-type", "GPTSentencePieceTokenizer",
            "--tokenizer-model", str(model), "--append-eod", "--workers", str(min(2, os.cpu_count() or 1)),
        ],
    }  # fmt: skip
    for label, command in steps.items():
        seconds = run_logged(
            [sys.executable, *command],
            log=log,
            cwd=REPOSITORY,
            tick=lambda elapsed, label=label: status.update(f"{label}, {elapsed:.0f} s"),
        )
        status.say(f"{label}, done in {math.ceil(seconds)} s")

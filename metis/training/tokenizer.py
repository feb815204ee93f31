"""Tokenizers by Megatron's option names: text to token ids, and the facts about ids that data and model
share.

One idea: megatron-core's tokenizers do the work; this module turns options into one of them, checks that it
has what pretraining needs (an end-of-document id inside the vocabulary), and adds the one format that
megatron-core cannot read, LLaMA-3's tiktoken rank file.

Traps:
- `Llama2Tokenizer` of megatron-core adds no BOS. Megatron's older trainer prepended one to every document, so
  datasets made with it differ. `--legacy-tokenizer` gives the old behaviour; the preprocess tool records
  which was used.
- `NullTokenizer --vocab-size N` has N + 1 ids: the last one is the end of document.
- No vocabulary is padded here. The model's size is `padded_vocab_size`, which depends on the tensor-parallel
  size.
- `TikTokenizer` reads two formats, told apart by the suffix: `.json` (megatron-core's, special tokens first,
  131072 ids unless `--vocab-size` says otherwise) and a rank file (LLaMA-3's, special tokens last).
- Importing this file imports neither torch nor megatron; building a tokenizer does.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.util
import os
import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from metis.errors import ConfigError, nearest_name

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer", "TikTokenizer", "NullTokenizer")

# megatron-core's builder reads all of these from its argument object; ours may come from a tool with fewer
# options.
_OPTION_DEFAULTS: dict[str, Any] = {
    "tokenizer_model": None,
    "tokenizer_metadata": None,
    "tokenizer_special_tokens": None,
    "tokenizer_sentencepiece_legacy": False,
    "tokenizer_hf_use_fast": False,
    "tokenizer_hf_include_special_tokens": False,
    "trust_remote_code": False,
    "vocab_file": None,
    "merge_file": None,
    "vocab_size": None,
    "tiktoken_pattern": None,
    "tiktoken_num_special_tokens": 1000,
    "tiktoken_special_tokens": None,
    "legacy_tokenizer": False,
}

# The published split patterns: LLaMA-3's, and the two that megatron-core names v1 and v2.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_NUM_SPECIAL_TOKENS = 256
_MEGATRON_DEFAULT_NUM_SPECIAL_TOKENS = 1000
_MIN_RANK_FILE_SPECIAL_TOKENS = 10

# tiktoken's regular expression engine overflows its stack on very long runs without a boundary.
_MAX_ENCODE_CHARS = 400_000
_MAX_RUN_CHARS = 25_000
_LONG_RUN = re.compile(rf"\s{{{_MAX_RUN_CHARS + 1},}}|\S{{{_MAX_RUN_CHARS + 1},}}")

# Files that decide what a Hugging Face tokenizer directory does with text.
_HF_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Round the vocabulary up to a multiple of `divisible_by * tensor_model_parallel_size`.

    Every tensor-parallel rank then holds the same number of embedding rows. Units: token ids.

    Raises:
        ConfigError: a size that is not positive.
    """
    if min(vocab_size, divisible_by, tensor_model_parallel_size) < 1:
        raise ConfigError(
            "--make-vocab-size-divisible-by",
            "vocabulary size, divisor and tensor-parallel size must be at least 1, got "
            f"{vocab_size}, {divisible_by} and {tensor_model_parallel_size}; correct the one that is not",
        )
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def tokenizer_sha256(tokenizer_model: str | None) -> str | None:
    """Return the SHA-256 (hex) of what defines a tokenizer, or None when nothing on disk does.

    A file hashes as its bytes. A directory hashes as name, NUL, bytes of each Hugging Face tokenizer file in
    it, in a fixed order.
    """
    if tokenizer_model is None or not os.path.exists(tokenizer_model):
        return None
    digest = hashlib.sha256()
    if os.path.isfile(tokenizer_model):
        _hash_file(digest, tokenizer_model)
        return digest.hexdigest()
    for name in _HF_FILES:
        path = os.path.join(tokenizer_model, name)
        if os.path.isfile(path):
            digest.update(name.encode() + b"\0")
            _hash_file(digest, path)
    return digest.hexdigest()


def _hash_file(digest: Any, path: str) -> None:
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)


def build_tokenizer(args: Namespace) -> Any:
    """Build the tokenizer that `--tokenizer-type`, `--tokenizer-model` and their companions ask for.

    Returns:
        An object with `vocab_size`, `eod`, `tokenize(text) -> list[int]`, `detokenize(ids) -> str` and
        `unique_identifiers` (what megatron-core writes into the description of an index cache).

    Raises:
        ConfigError: unknown type; model missing, damaged or without an end-of-document token; package not
            installed.
    """
    options = Namespace(
        tokenizer_type=getattr(args, "tokenizer_type", None),
        **{name: getattr(args, name, default) for name, default in _OPTION_DEFAULTS.items()},
    )
    _check_options(options)
    if options.tokenizer_type == "TikTokenizer" and not options.tokenizer_model.endswith(".json"):
        tokenizer = _build_rank_file_tokenizer(options)
    else:
        tokenizer = _build_megatron_tokenizer(options)
    _check_end_of_document(tokenizer, options)
    return tokenizer


def _check_options(options: Namespace) -> None:
    kind, model = options.tokenizer_type, options.tokenizer_model
    if kind not in TOKENIZER_TYPES:
        raise ConfigError(
            "--tokenizer-type",
            f"must be one of {', '.join(TOKENIZER_TYPES)}, got {kind}"
            f"{nearest_name(str(kind), TOKENIZER_TYPES)}",
        )
    if kind == "NullTokenizer":
        if not options.vocab_size or options.vocab_size < 1:
            raise ConfigError("--vocab-size", "NullTokenizer needs a positive --vocab-size; pass one")
        return
    if not model:
        raise ConfigError("--tokenizer-model", f"{kind} needs a model file or directory, got none; pass one")
    # A Hugging Face model may be the name of a repository in the local hub cache.
    if not os.path.exists(model) and kind != "HuggingFaceTokenizer":
        raise ConfigError("--tokenizer-model", f"must be an existing file, got {model}; correct the path")
    if options.legacy_tokenizer and kind != "Llama2Tokenizer":
        raise ConfigError("--legacy-tokenizer", f"only changes Llama2Tokenizer, got {kind}; drop the option")
    package = {"HuggingFaceTokenizer": "transformers", "TikTokenizer": "tiktoken"}.get(kind, "sentencepiece")
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            "--tokenizer-type", f"{kind} needs the package {package}; run pip install {package}"
        )


def _check_end_of_document(tokenizer: Any, options: Namespace) -> None:
    try:
        eod = tokenizer.eod
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        eod = None
    if eod is None or not 0 <= eod < tokenizer.vocab_size:
        raise ConfigError(
            f"--tokenizer-model {options.tokenizer_model}",
            f"must define an end-of-document (eos) token inside its {tokenizer.vocab_size} ids, got {eod}; "
            "train or choose a tokenizer with an eos token",
        )


def _build_megatron_tokenizer(options: Namespace) -> Any:
    from megatron.core.tokenizers.text.utils.build_tokenizer import build_tokenizer as build_megatron

    try:
        if options.tokenizer_type == "Llama2Tokenizer" and options.legacy_tokenizer:
            return _build_llama2_with_bos(options)
        return build_megatron(options)
    except Exception as error:  # the libraries below raise everything from AssertionError to RuntimeError
        raise ConfigError(
            f"--tokenizer-model {options.tokenizer_model}",
            f"must be a readable {options.tokenizer_type} model, got {type(error).__name__}: {error}; "
            "check the file and the type",
        ) from error


def _build_llama2_with_bos(options: Namespace) -> Any:
    from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText

    class Llama2TokenizerWithBos(MegatronTokenizerText):
        """Llama2Tokenizer as Megatron's older trainer had it: every document starts with BOS."""

        def tokenize(self, text: str) -> list[int]:
            """Token ids of `text` after the BOS id."""
            return [self.bos, *super().tokenize(text)]

    config = {
        "library": "sentencepiece",
        "class_name": Llama2TokenizerWithBos.__name__,
        "class_path": __name__,
    }
    return Llama2TokenizerWithBos(
        options.tokenizer_model,
        config,
        legacy=options.tokenizer_sentencepiece_legacy,
        special_tokens=options.tokenizer_special_tokens,
    )


def _build_rank_file_tokenizer(options: Namespace) -> RankFileTokenizer:
    pattern = options.tiktoken_pattern or "llama3"
    if pattern not in ("llama3", "v1", "v2"):
        raise ConfigError(
            "--tiktoken-pattern", f"must be llama3, v1 or v2, got {pattern}; choose one of them"
        )
    if options.tiktoken_special_tokens or options.tokenizer_special_tokens:
        raise ConfigError(
            "--tiktoken-special-tokens",
            "a rank file has LLaMA-3's special tokens; named ones need megatron-core's .json format, "
            "drop the option",
        )
    num_special = options.tiktoken_num_special_tokens
    if (
        num_special == _MEGATRON_DEFAULT_NUM_SPECIAL_TOKENS
    ):  # Megatron's default speaks of its own .json format
        num_special = LLAMA3_NUM_SPECIAL_TOKENS
    return RankFileTokenizer(options.tokenizer_model, pattern=pattern, num_special_tokens=num_special)


class RankFileTokenizer:
    """LLaMA-3's tokenizer: a tiktoken rank file (`base64 rank` per line) followed by reserved special tokens.

    Ids 0..R-1 are the R ranks, R is `<|begin_of_text|>`, R + 1 `<|end_of_text|>` (the end of document), R + 9
    `<|eot_id|>`. The public file has R = 128000 ranks, hence 128256 ids. Text is encoded as ordinary text: a
    document that contains the letters `<|end_of_text|>` does not produce that token.

    Raises:
        ConfigError: a line that is not `base64 rank`, ranks that are not 0..R-1, too few special tokens.
    """

    def __init__(
        self, path: str, *, pattern: str = "llama3", num_special_tokens: int = LLAMA3_NUM_SPECIAL_TOKENS
    ):
        import tiktoken

        if num_special_tokens < _MIN_RANK_FILE_SPECIAL_TOKENS:
            raise ConfigError(
                "--tiktoken-num-special-tokens",
                f"a rank file needs at least {_MIN_RANK_FILE_SPECIAL_TOKENS}, got {num_special_tokens}; "
                "raise it",
            )
        self.path = path
        self.pattern = pattern
        ranks = read_rank_file(path)
        self.special_tokens = {
            name: len(ranks) + i for i, name in enumerate(llama3_special_token_names(num_special_tokens))
        }
        self.vocab_size = len(ranks) + num_special_tokens
        self._encoding = tiktoken.Encoding(
            name=os.path.basename(path),
            pat_str=_split_pattern(pattern),
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end tokens."""
        ids: list[int] = []
        for piece in split_long_text(text):
            ids.extend(self._encoding.encode_ordinary(piece))
        return ids

    def detokenize(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 become the replacement character."""
        return self._encoding.decode([int(i) for i in ids])

    @property
    def bos(self) -> int:
        """Id of `<|begin_of_text|>`."""
        return self.special_tokens["<|begin_of_text|>"]

    @property
    def eos(self) -> int:
        """Id of `<|end_of_text|>`."""
        return self.special_tokens["<|end_of_text|>"]

    @property
    def eod(self) -> int:
        """Id that ends a document: `<|end_of_text|>`."""
        return self.eos

    @property
    def pad(self) -> int:
        """-1: LLaMA-3 has no padding token, and megatron-core masks the loss where a label equals this id."""
        return -1

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """What distinguishes this tokenizer in the description of an index cache."""
        return OrderedDict(
            [
                ("class", f"{type(self).__module__}.{type(self).__qualname__}"),
                ("tokenizer_path", self.path),
                ("pattern", self.pattern),
                ("vocab_size", str(self.vocab_size)),
            ]
        )


def llama3_special_token_names(count: int) -> list[str]:
    """Names of LLaMA-3's `count` special tokens in id order (Llama 3 tokenizer, `meta-llama/llama3`)."""
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(count))
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(next(reserved) for _ in range(4))]
    names += ["<|start_header_id|>", "<|end_header_id|>", next(reserved), "<|eot_id|>"]
    return names + [next(reserved) for _ in range(count - len(names))]


def read_rank_file(path: str) -> dict[bytes, int]:
    """Read a tiktoken rank file: token bytes to rank, ranks 0..R-1.

    Raises:
        ConfigError: naming the line that is not `base64 rank`, or ranks with a gap.
    """
    where = f"--tokenizer-model {path}"
    ranks: dict[bytes, int] = {}
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ConfigError(
                    where,
                    f"line {number} must be 'base64 rank', got {line[:40]!r}; give a tiktoken rank file, "
                    "or a .json vocabulary in megatron-core's format",
                ) from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ConfigError(
            where,
            f"ranks must be 0..R-1 without a gap, got {len(ranks)} distinct tokens; the file is damaged",
        )
    return ranks


def _split_pattern(name: str) -> str:
    if name == "llama3":
        return LLAMA3_PATTERN
    from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer

    return {"v1": tiktoken_tokenizer._PATTERN_TIKTOKEN_V1, "v2": tiktoken_tokenizer._PATTERN_TIKTOKEN_V2}[
        name
    ]


def split_long_text(text: str) -> Iterator[str]:
    """Cut `text` where LLaMA-3's own tokenizer cuts it: every 400000 characters, and every 25000 of one run.

    A run is a stretch of only whitespace or only other characters. Shorter texts come back whole.
    """
    for start in range(0, len(text), _MAX_ENCODE_CHARS):
        piece = text[start : start + _MAX_ENCODE_CHARS]
        begin = 0
        for run in _LONG_RUN.finditer(piece):
            for cut in range(run.start() + _MAX_RUN_CHARS, run.end(), _MAX_RUN_CHARS):
                yield piece[begin:cut]
                begin = cut
        yield piece[begin:]

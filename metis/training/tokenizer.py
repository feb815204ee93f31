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

import hashlib
import importlib.util
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import Any

from metis.errors import ConfigError, nearest_name
from metis.training.rank_file import LLAMA3_NUM_SPECIAL_TOKENS, RankFileTokenizer, read_rank_file

__all__ = [
    "LLAMA3_NUM_SPECIAL_TOKENS",
    "SENTENCEPIECE_TYPES",
    "TOKENIZER_TYPES",
    "RankFileTokenizer",
    "build_tokenizer",
    "padded_vocab_size",
    "read_rank_file",
    "tokenizer_sha256",
    "train_sentencepiece",
]

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

_MEGATRON_DEFAULT_NUM_SPECIAL_TOKENS = 1000

# SentencePiece skips longer lines when it learns; its own limit of 4192 would skip much of a corpus of prose.
_MAX_TRAINING_LINE_BYTES = 1 << 16

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
    if options.tiktoken_special_tokens and kind != "TikTokenizer":
        raise ConfigError(
            "--tiktoken-special-tokens", f"only changes TikTokenizer, got {kind}; drop the option"
        )
    options.tokenizer_special_tokens = options.tokenizer_special_tokens or options.tiktoken_special_tokens
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
    if options.tokenizer_special_tokens:
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


def train_sentencepiece(texts: Iterable[str], output_prefix: str, vocab_size: int) -> str:
    """Train a BPE SentencePiece model of LLaMA-2's kind on `texts` and return its path,
    `output_prefix.model`.

    Ids: 0 unknown, 1 BOS, 2 EOS (the end of document), 3 to 258 the bytes, then learned pieces. Text is not
    normalized: every text without U+2581 decodes to itself, line breaks (as byte pieces) and indentation
    included.

    Raises:
        ConfigError: a vocabulary that the corpus cannot fill, no text, or what `texts` raises.
    """
    import sentencepiece

    raised: list[ConfigError] = []  # SentencePiece makes a RuntimeError of what its iterator raises

    def lines() -> Iterator[str]:
        try:
            yield from (line for text in texts for line in text.split("\n") if line)
        except ConfigError as error:
            raised.append(error)
            raise

    try:
        os.makedirs(os.path.dirname(os.path.abspath(output_prefix)), exist_ok=True)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_prefix=output_prefix,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=_MAX_TRAINING_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if raised:
            raise raised[0] from None
        raise ConfigError(
            "--vocab-size",
            f"must fit the corpus and --output-prefix be writable, got {vocab_size} and {output_prefix}: "
            f"{error}",
        ) from error
    return output_prefix + ".model"

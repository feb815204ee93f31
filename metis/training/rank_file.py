"""LLaMA-3's tokenizer: a tiktoken rank file followed by reserved special tokens.

One idea: megatron-core's tiktoken tokenizer reads a JSON vocabulary with the special tokens first; the public
LLaMA-3 files are `base64 rank` lines with the special tokens last. Same library, other ids, so it needs a
class of its own.

Traps: ids of special tokens start at the number of ranks, not at 128000; tiktoken overflows its stack on very
long runs without a boundary, so long texts are cut where LLaMA-3's own code cuts them, which decides token
ids. Importing this file imports no tiktoken.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from metis.errors import ConfigError

# The published split patterns: LLaMA-3's, and the two that megatron-core names v1 and v2.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_NUM_SPECIAL_TOKENS = 256
_MIN_RANK_FILE_SPECIAL_TOKENS = 10

# tiktoken's regular expression engine overflows its stack on very long runs without a boundary.
_MAX_ENCODE_CHARS = 400_000
_MAX_RUN_CHARS = 25_000
_LONG_RUN = re.compile(rf"\s{{{_MAX_RUN_CHARS + 1},}}|\S{{{_MAX_RUN_CHARS + 1},}}")


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

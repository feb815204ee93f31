"""Tokenizers against the libraries they wrap, and LLaMA-3's rank file against tiktoken on the same ranks."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import sentencepiece
import tiktoken

from metis.errors import ConfigError
from metis.training.rank_file import LLAMA3_PATTERN, llama3_special_token_names, split_long_text
from metis.training.tokenizer import (
    SENTENCEPIECE_TYPES,
    build_tokenizer,
    padded_vocab_size,
    tokenizer_sha256,
    train_sentencepiece,
)

TIK, LLAMA2, HF = "TikTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer"
TEXT = "def read(path):\n    # 12345 naïve 東京 🙂\n\treturn open(path).read()  \n\n"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> str:
    lines = [Path(json.__file__).read_text(), Path(random.__file__).read_text()]
    return train_sentencepiece(lines, str(tmp_path_factory.mktemp("sp") / "tokenizer"), 500)


def write_rank_file(path: Path, tokens: list[bytes]) -> str:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return str(path)


def byte_tokens(count: int) -> list[bytes]:
    """256 single bytes, then pairs of letters: a valid BPE vocabulary."""
    letters = [bytes([a, b]) for a in range(97, 123) for b in range(97, 123)]
    return [bytes([i]) for i in range(256)] + letters[: count - 256]


@pytest.mark.parametrize("kind", SENTENCEPIECE_TYPES)
def test_sentencepiece_ids_are_the_librarys(kind, sentencepiece_model):
    tokenizer = build_tokenizer(Namespace(tokenizer_type=kind, tokenizer_model=sentencepiece_model))
    library = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_model)
    assert tokenizer.tokenize(TEXT) == library.encode(TEXT)
    assert tokenizer.vocab_size == 500 == library.get_piece_size()
    assert tokenizer.eod == library.eos_id() == 2
    assert tokenizer.unique_identifiers["tokenizer_path"] == sentencepiece_model


def test_trained_sentencepiece_keeps_text_and_is_deterministic(sentencepiece_model, tmp_path):
    tokenizer = build_tokenizer(
        Namespace(tokenizer_type="Llama2Tokenizer", tokenizer_model=sentencepiece_model)
    )
    for text in (TEXT, " leading", "a\r\n\tb", "\n\n\n", "x" * 1000):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    lines = [Path(json.__file__).read_text(), Path(random.__file__).read_text()]
    again = train_sentencepiece(lines, str(tmp_path / "again"), 500)
    assert Path(again).with_suffix(".vocab").read_bytes() == (
        Path(sentencepiece_model).with_suffix(".vocab").read_bytes()
    )
    with pytest.raises(ConfigError, match="must fit the corpus"):
        train_sentencepiece(["a b c"], str(tmp_path / "small"), 5000)


def test_legacy_llama2_tokenizer_puts_bos_first_and_says_so(sentencepiece_model):
    args = Namespace(tokenizer_type="Llama2Tokenizer", tokenizer_model=sentencepiece_model)
    plain = build_tokenizer(args)
    legacy = build_tokenizer(Namespace(**vars(args), legacy_tokenizer=True))
    assert legacy.tokenize(TEXT) == [1, *plain.tokenize(TEXT)]
    assert legacy.unique_identifiers != plain.unique_identifiers


def test_null_tokenizer_has_one_more_id_than_asked():
    tokenizer = build_tokenizer(Namespace(tokenizer_type="NullTokenizer", vocab_size=100))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.tokenize("7 8")) == (101, 100, [7, 8])


def test_hugging_face_directory(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path)
    tokenizer = build_tokenizer(
        Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    )
    assert tokenizer.tokenize("hello there world") == [2, 0, 3]
    assert (tokenizer.vocab_size, tokenizer.eod) == (4, 1)


def test_llama3_public_sizes_and_ids(tmp_path):
    tokens = byte_tokens(256 + 26 * 26)
    tokens += [b"zz" + i.to_bytes(3, "big") for i in range(128_000 - len(tokens))]
    model = write_rank_file(tmp_path / "tokenizer.model", tokens)
    tokenizer = build_tokenizer(
        Namespace(tokenizer_type="TikTokenizer", tokenizer_model=model, tiktoken_num_special_tokens=1000)
    )
    assert tokenizer.vocab_size == 128_256
    assert (tokenizer.bos, tokenizer.eod) == (128_000, 128_001)
    published = {
        "<|reserved_special_token_3|>": 128_005, "<|start_header_id|>": 128_006,
        "<|end_header_id|>": 128_007, "<|reserved_special_token_4|>": 128_008, "<|eot_id|>": 128_009,
        "<|reserved_special_token_250|>": 128_255,
    }  # fmt: skip
    assert {name: tokenizer.special_tokens[name] for name in published} == published
    assert len(set(llama3_special_token_names(256))) == 256


def test_rank_file_ids_are_tiktokens_and_specials_stay_text(tmp_path):
    tokens = byte_tokens(600)
    model = write_rank_file(tmp_path / "tokenizer.model", tokens)
    tokenizer = build_tokenizer(Namespace(tokenizer_type="TikTokenizer", tokenizer_model=model))
    oracle = tiktoken.Encoding(
        name="oracle",
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={},
    )
    for text in (TEXT, "<|end_of_text|> I'll 1234567", ""):
        assert tokenizer.tokenize(text) == oracle.encode_ordinary(text)
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.detokenize([tokenizer.eod]) == "<|end_of_text|>"
    by_pattern = {
        pattern: build_tokenizer(
            Namespace(tokenizer_type="TikTokenizer", tokenizer_model=model, tiktoken_pattern=pattern)
        )
        for pattern in ("llama3", "v1", "v2")
    }
    assert len({str(t.unique_identifiers) for t in by_pattern.values()}) == 3


def test_megatron_cores_json_format_still_works(tmp_path):
    tokens = byte_tokens(600)
    rows = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": ""}
        for i, t in enumerate(tokens)
    ]
    (tmp_path / "vocab.json").write_text(json.dumps(rows))
    args = Namespace(
        tokenizer_type="TikTokenizer",
        tokenizer_model=str(tmp_path / "vocab.json"),
        vocab_size=700,
        tiktoken_num_special_tokens=100,
    )
    tokenizer = build_tokenizer(args)
    assert (tokenizer.vocab_size, tokenizer.eod) == (700, 2)
    assert tokenizer.tokenize("a") == [100 + 97]


def test_long_text_is_cut_where_the_reference_cuts_it():
    def cut_by_definition(text: str) -> list[str]:
        pieces = []
        for start in range(0, len(text), 400_000):
            piece, begin, length = text[start : start + 400_000], 0, 0
            space = piece[0].isspace()
            for i, character in enumerate(piece):
                if character.isspace() != space:
                    length, space = 1, character.isspace()
                else:
                    length += 1
                    if length > 25_000:
                        pieces.append(piece[begin:i])
                        begin, length = i, 1
            pieces.append(piece[begin:])
        return pieces

    for text in (
        "a" * 60_000,
        "a b " * 110_000,
        " " * 25_000,
        " " * 25_001 + "x" * 50_001 + " y",
        "ab" * 300_000,
    ):
        assert list(split_long_text(text)) == cut_by_definition(text)


def test_padded_vocab_size():
    assert padded_vocab_size(32_000, 128, 1) == 32_000
    assert padded_vocab_size(128_256, 128, 8) == 129_024
    assert padded_vocab_size(1, 128, 2) == 256
    with pytest.raises(ConfigError):
        padded_vocab_size(100, 0, 1)


def test_sha256_of_file_and_directory(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "README.md").write_bytes(b"not part of it")
    assert tokenizer_sha256(str(tmp_path / "tokenizer.json")) == hashlib.sha256(b"{}").hexdigest()
    assert tokenizer_sha256(str(tmp_path)) == hashlib.sha256(b"tokenizer.json\0{}").hexdigest()
    assert tokenizer_sha256(None) is None and tokenizer_sha256("hub/name") is None


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        (dict(tokenizer_type="LLama2Tokenizer"), "--tokenizer-type", "did you mean 'Llama2Tokenizer'"),
        (dict(tokenizer_type=None), "--tokenizer-type", "must be one of"),
        (dict(tokenizer_type="NullTokenizer"), "--vocab-size", "positive"),
        (dict(tokenizer_type=TIK), "--tokenizer-model", "needs a model"),
        (dict(tokenizer_type=LLAMA2, tokenizer_model="nowhere"), "--tokenizer-model", "existing file"),
        (dict(tokenizer_type=LLAMA2, tokenizer_model="BAD"), "--tokenizer-model BAD", "readable"),
        (dict(tokenizer_type=HF, tokenizer_model="DIR"), "--tokenizer-model DIR", "readable"),
        (dict(tokenizer_type=TIK, tokenizer_model="BAD"), "--tokenizer-model BAD", "line 1 must be"),
        (dict(tokenizer_type=TIK, tokenizer_model="GAP"), "--tokenizer-model GAP", "without a gap"),
        (dict(tokenizer_type=TIK, tokenizer_model="OK", tiktoken_pattern="v3"), "--tiktoken-pattern", "v1"),
        (
            dict(tokenizer_type=TIK, tokenizer_model="OK", tiktoken_num_special_tokens=9),
            "--tiktoken-num-special-tokens",
            "at least 10",
        ),
        (
            dict(tokenizer_type=TIK, tokenizer_model="OK", tiktoken_special_tokens=["<s>"]),
            "--tiktoken-special-tokens",
            "drop the option",
        ),
        (
            dict(tokenizer_type="SentencePieceTokenizer", tokenizer_model="OK", legacy_tokenizer=True),
            "--legacy-tokenizer",
            "only changes Llama2Tokenizer",
        ),
    ],
)  # fmt: skip
def test_wrong_tokenizer_options_end_in_one_error(tmp_path, options, where, words):
    (tmp_path / "BAD").write_bytes(b"this is no model\n")
    (tmp_path / "GAP").write_bytes(b"YQ== 0\nYg== 2\n")
    (tmp_path / "DIR").mkdir()
    write_rank_file(tmp_path / "OK", byte_tokens(256))
    model = options.get("tokenizer_model")
    if model in ("BAD", "GAP", "OK", "DIR"):
        options = {**options, "tokenizer_model": str(tmp_path / model)}
        where = where.replace(f" {model}", f" {tmp_path / model}")
    with pytest.raises(ConfigError) as error:
        build_tokenizer(Namespace(**options))
    assert error.value.where == where and words in error.value.message


def test_import_needs_neither_torch_nor_megatron():
    code = (
        "import sys, metis.training.tokenizer; print([m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"

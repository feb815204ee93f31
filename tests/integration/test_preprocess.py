"""The preprocess tool against a single-process twin: tokenize, then `IndexedDatasetBuilder`, no more."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from metis.errors import ConfigError
from metis.training.preprocess import exit_on_sigterm, parse_arguments, preprocess
from metis.training.tokenizer import build_tokenizer, train_sentencepiece

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
TRAIN_TOOL = TOOL.with_name("train_tokenizer.py")
KILL_AFTER_SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    text = Path(json.__file__).read_text() + Path(random.__file__).read_text()
    return train_sentencepiece([text], str(tmp_path_factory.mktemp("sp") / "tokenizer"), 600)


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    lines = [line for line in Path(random.__file__).read_text().split("\n") if line.strip()]
    rng = random.Random(0)
    rows = [
        {"text": "\n".join(rng.sample(lines, rng.randrange(1, 9))), "title": rng.choice(lines), "n": i}
        for i in range(300)
    ]
    rows[7]["text"] = ""
    rows[11]["text"] = ["first sentence", "", "second 東京"]
    return rows


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(model: str, *options: object) -> list:
    tokenizer = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", model]
    return preprocess(parse_arguments([*map(str, options), *tokenizer]))


def twin(model: str, prefix: Path, values: list, append_eod: bool) -> str:
    """Megatron's tool for one key, by its definition and in one process."""
    args = parse_arguments(["--input", "x", "--output-prefix", "x", "--tokenizer-type", "Llama2Tokenizer",
                            "--tokenizer-model", model])  # fmt: skip
    tokenizer = build_tokenizer(args)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for value in values:
        sequences = [tokenizer.tokenize(text) for text in (value if isinstance(value, list) else [value])]
        sequences = [ids for ids in sequences if ids]
        if sequences and append_eod:
            sequences[-1].append(tokenizer.eod)
        builder.add_document([i for ids in sequences for i in ids], [len(ids) for ids in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def assert_same_files(prefix: Path | str, expected: str) -> None:
    for suffix in (".bin", ".idx"):
        assert Path(f"{prefix}{suffix}").read_bytes() == Path(expected + suffix).read_bytes()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_files_equal_the_single_process_twins_for_any_number_of_workers(tmp_path, model, documents, workers):
    source = jsonl(tmp_path / "a.jsonl", documents)
    run(model, "--input", source, "--output-prefix", tmp_path / "out", "--append-eod", "--workers", workers)
    expected = twin(model, tmp_path / "twin", [row["text"] for row in documents], append_eod=True)
    assert_same_files(tmp_path / "out_text_document", expected)


def test_round_trip_through_indexed_dataset_and_summary(tmp_path, model, documents):
    source = jsonl(tmp_path / "a.jsonl", documents)
    (summary,) = run(model, "--input", source, "--output-prefix", tmp_path / "out", "--workers", 1)
    library = build_tokenizer(
        parse_arguments(["--input", "x", "--output-prefix", "x", "--tokenizer-type", "Llama2Tokenizer",
                         "--tokenizer-model", model])
    )  # fmt: skip
    dataset = IndexedDataset(summary.prefix)
    assert library.detokenize(dataset[0].tolist()) == documents[0]["text"]
    assert len(dataset.document_indices) - 1 == len(documents) == summary.num_documents
    assert summary.num_empty_documents == 1
    assert summary.num_tokens == int(dataset.sequence_lengths.sum())
    tokens = np.fromfile(summary.prefix + ".bin", dtype=np.uint16)
    assert summary.max_token_id == int(tokens.max())


def test_several_keys_give_several_complete_datasets(tmp_path, model, documents):
    source = jsonl(tmp_path / "a.jsonl", documents)
    run(
        model,
        "--input",
        source,
        "--json-keys",
        "title",
        "text",
        "--output-prefix",
        tmp_path / "out",
        "--workers",
        2,
    )
    for key in ("title", "text"):
        expected = twin(model, tmp_path / f"twin_{key}", [row[key] for row in documents], append_eod=False)
        assert_same_files(tmp_path / f"out_{key}_document", expected)


def test_every_input_format_gives_the_same_files(tmp_path, model, documents):
    rows = [row for row in documents if isinstance(row["text"], str)]
    half = len(rows) // 2
    jsonl(tmp_path / "a1.jsonl", rows[:half])
    with gzip.open(tmp_path / "a2.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(row) + "\n\n" for row in rows[half:])
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=100)
    expected = twin(model, tmp_path / "twin", [row["text"] for row in rows], append_eod=True)
    run(model, "--input", tmp_path / "a*", "--output-prefix", tmp_path / "j", "--append-eod", "--workers", 2)
    assert_same_files(tmp_path / "j_text_document", expected)
    run(
        model,
        "--input",
        tmp_path / "b.parquet",
        "--output-prefix",
        tmp_path / "p",
        "--append-eod",
        "--workers",
        2,
    )
    assert_same_files(tmp_path / "p_text_document", expected)


@pytest.mark.parametrize(
    ("separator", "values"),
    [
        ("file", ["one\ntwo\n\n\nthree\r\n", "four"]),
        ("blank-line", ["one\ntwo", "three", "four"]),
        ("line", ["one", "two", "three", "four"]),
    ],
)
def test_plain_text_documents(tmp_path, model, separator, values):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\n\nthree\r\n")
    (tmp_path / "b.md").write_bytes(b"four")
    run(model, "--input", tmp_path / "a.txt", tmp_path / "b.md", "--text-document-separator", separator,
        "--output-prefix", tmp_path / "out", "--workers", 1)  # fmt: skip
    assert_same_files(
        tmp_path / "out_text_document", twin(model, tmp_path / "twin", values, append_eod=False)
    )


def test_sidecar_says_how_the_data_were_made(tmp_path, model, documents):
    source = jsonl(tmp_path / "a.jsonl", documents)
    (summary,) = run(
        model, "--input", source, "--output-prefix", tmp_path / "o", "--append-eod", "--workers", 1
    )
    meta = json.loads(Path(summary.prefix + ".meta.json").read_text())
    assert meta.pop("created_by").startswith("metis ")
    assert meta == {
        "tokenizer_type": "Llama2Tokenizer",
        "tokenizer_model": model,
        "tokenizer_sha256": hashlib.sha256(Path(model).read_bytes()).hexdigest(),
        "vocab_size": 600,
        "max_token_id": summary.max_token_id,
        "num_documents": 300,
        "num_tokens": summary.num_tokens,
        "append_eod": True,
        "adds_bos": False,
    }


def test_existing_output_is_kept_unless_overwrite(tmp_path, model, documents, capsys):
    source = jsonl(tmp_path / "a.jsonl", documents[:5])
    options = ("--input", source, "--output-prefix", tmp_path / "out", "--workers", 1)
    run(model, *options)
    before = (tmp_path / "out_text_document.bin").read_bytes()
    assert "warning: without --append-eod" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="exists; choose another prefix"):
        run(model, *options, "--append-eod")
    assert (tmp_path / "out_text_document.bin").read_bytes() == before
    run(model, *options, "--append-eod", "--overwrite")
    expected = twin(model, tmp_path / "twin", [row["text"] for row in documents[:5]], append_eod=True)
    assert_same_files(tmp_path / "out_text_document", expected)


def bad_inputs(folder: Path, rows: list[dict]) -> dict[str, tuple[str, str]]:
    """File name -> (expected place, words of the message); a fault comes after good documents if it can."""
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "json.jsonl").write_text("".join(lines[:250]) + '{"text": "half\n' + lines[251])
    (folder / "key.jsonl").write_text("".join(lines[:250]) + '{"body": "x"}\n')
    (folder / "type.jsonl").write_text("".join(lines[:250]) + '{"text": 5}\n')
    (folder / "list.jsonl").write_text("".join(lines[:250]) + '["text"]\n')
    (folder / "utf8.jsonl").write_bytes("".join(lines[:250]).encode() + b'{"text": "\xff"}\n')
    (folder / "half.jsonl").write_text("".join(lines[:250]) + '{"text": "abc \\ud83d def"}\n')
    packed = gzip.compress("".join(lines).encode())
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "no.jsonl.gz").write_bytes(b"plain text\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "cut.parquet").write_bytes(b"PAR1 and nothing else")
    (folder / "empty.jsonl").write_text("")
    (folder / "data.bin2").write_text("x")
    return {
        "json.jsonl": ("json.jsonl:251", "one JSON object per line"),
        "key.jsonl": ("key.jsonl:251", "must have the key 'text', has body"),
        "type.jsonl": ("type.jsonl:251", "must be text"),
        "list.jsonl": ("list.jsonl:251", "must be a JSON object, got list"),
        "utf8.jsonl": ("utf8.jsonl:251", "one JSON object per line"),
        "half.jsonl": ("half.jsonl:251", r"got half a surrogate pair '\ud83d' at character 4"),
        "cut.jsonl.gz": ("cut.jsonl.gz", "must be complete gzip data, got damage after document"),
        "no.jsonl.gz": ("no.jsonl.gz", "must be complete gzip data"),
        "latin.txt": ("latin.txt:1", "must be UTF-8"),
        "cut.parquet": ("cut.parquet", "must be a complete parquet file"),
        "empty.jsonl": ("--input", "no token in 0 documents"),
        "data.bin2": ("--input-format", "cannot tell the format"),
        "nowhere.jsonl": ("--input", "matches none"),
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_one_error_with_its_place_and_leaves_nothing(tmp_path, model, documents, workers):
    out = tmp_path / "out"
    for name, (where, words) in bad_inputs(tmp_path, documents).items():
        with pytest.raises(ConfigError) as error:
            run(
                model,
                "--input",
                tmp_path / name,
                "--output-prefix",
                out / "x",
                "--append-eod",
                "--workers",
                workers,
            )
        assert error.value.where in (where, str(tmp_path / where)), name
        assert words in error.value.message, name
        assert not out.exists() or list(out.iterdir()) == [], name


def test_wrong_options_are_one_error(tmp_path, model, documents):
    source = jsonl(tmp_path / "a.jsonl", documents[:3])
    (tmp_path / "a.txt").write_text("text")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "x"}]), tmp_path / "a.parquet")
    for options, where in [
        (("--input", tmp_path), "--input"),
        (("--input", tmp_path / "a.txt", "--json-keys", "a", "b"), "--json-keys"),
        (("--input", tmp_path / "a.parquet"), str(tmp_path / "a.parquet")),
        (("--input", source, "--output-prefix", "/proc/nowhere/x"), "--output-prefix"),
        (("--input", source, "--workers", "0"), "--workers"),
        (("--input", source, "--inputs", "x"), "arguments"),
        (("--input", source, "--tiktoken-special-tokens", "a", "--"), "--tiktoken-special-tokens"),
    ]:
        with pytest.raises(ConfigError) as error:
            run(model, "--output-prefix", tmp_path / "out", *[o for o in options if o != "--"])
        assert error.value.where == where, options
    assert not list(tmp_path.glob("out*"))


def test_null_tokenizer_refuses_ids_outside_the_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text("1 2 3")
    options = ["--input", str(tmp_path / "a.txt"), "--output-prefix", str(tmp_path / "o"), "--workers", "1"]
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size"]
    with pytest.raises(ConfigError, match=r"below the vocabulary size 3, got 1 to 3"):
        preprocess(parse_arguments([*options, *null, "2"]))
    (summary,) = preprocess(parse_arguments([*options, *null, "3"]))
    assert summary.num_tokens == 3 and summary.max_token_id == 3


def run_as_the_tool_does(model: str, options: tuple) -> None:
    exit_on_sigterm()
    run(model, *options)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_killed_tool_leaves_no_dataset_and_a_rerun_succeeds(tmp_path, model, documents, sign):
    line = json.dumps({"text": " ".join(str(row["text"]) for row in documents)}) + "\n"
    (tmp_path / "big.jsonl").write_text(line * 2000)
    options = ("--output-prefix", tmp_path / "out" / "x", "--workers", 2, "--append-eod", "--input")
    tool = multiprocessing.get_context("fork").Process(
        target=run_as_the_tool_does, args=(model, (*options, tmp_path / "big.jsonl"))
    )
    tool.start()
    partial = tmp_path / "out" / "x_text_document.bin.partial"
    deadline = time.monotonic() + KILL_AFTER_SECONDS
    while not (partial.exists() and partial.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tool.is_alive() and partial.stat().st_size > 0, "the tool must be killed while it writes"
    os.kill(tool.pid, sign)
    tool.join(timeout=KILL_AFTER_SECONDS)
    assert tool.exitcode not in (0, None)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == (set() if sign == signal.SIGTERM else {partial.name})
    run(model, *options, jsonl(tmp_path / "small.jsonl", documents))
    names = {"x_text_document.bin", "x_text_document.idx", "x_text_document.meta.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_tools_print_one_error_line_and_fail(tmp_path, model, documents):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    command = [sys.executable, str(TOOL), "--input", str(tmp_path / "bad.jsonl"), "--output-prefix",
               str(tmp_path / "o"), "--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model"]  # fmt: skip
    environment = {**os.environ, "LOCAL_RANK": "0"}
    done = subprocess.run([*command, model], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert done.stderr.strip() == (
        f"error: {tmp_path / 'bad.jsonl'}:1: must have the key 'text', has none; set --json-keys"
    )
    source = jsonl(tmp_path / "good.jsonl", documents)
    train = [sys.executable, str(TRAIN_TOOL), "--input", source, "--output-prefix", str(tmp_path / "tok")]
    assert subprocess.run([*train, "--vocab-size", "400"]).returncode == 0
    half = jsonl(tmp_path / "half.jsonl", [*documents, {"text": "\ud83d"}])
    done = subprocess.run([*train, "--vocab-size", "400", "--input", half], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: {half}:301: 'text' must be text that UTF-8 can hold, got half a surrogate pair '\\ud83d' at "
        "character 0; correct or drop the line"
    )
    again = train_sentencepiece(
        [t for row in documents for t in (row["text"] if isinstance(row["text"], list) else [row["text"]])],
        str(tmp_path / "twin"),
        400,
    )
    assert (tmp_path / "tok.vocab").read_bytes() == Path(again).with_suffix(".vocab").read_bytes()

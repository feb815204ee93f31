"""Files of a run, checked without torch: damaged data, foreign tokenizers, unwritable directories, other
checkpoints.

Oracle: index files written here byte by byte from the published layout, then damaged in known ways.
"""

import base64
import io
import json
import struct

import pytest

from metis.errors import CheckpointError, ConfigError, MetisError
from metis.training import preflight as module
from metis.training.arguments import parse_args, validate_args
from metis.training.preflight import check_indexed_dataset, data_prefixes, preflight
from metis.training.retention import METADATA_NAME, TRACKER_NAME
from metis.training.run_config import build_run_config, to_json
from metis.training.tokenizer import tokenizer_sha256

TINY = "--preset tiny --micro-batch-size 2 --lr 1e-3 --train-iters 10 --split 90,10,0"
NULL = "--tokenizer-type NullTokenizer --vocab-size 1000"
DOCUMENTS = [[1, 2, 3, 999], [4, 5], [1000]]
INDEX_BYTES = 34 + 3 * 12 + 4 * 8
BIN_BYTES = 7 * 2


def resolve(options: str, *, base: str = TINY):
    args = parse_args([*base.split(), *options.split()])
    validate_args(args, 1)
    return args


def check(options: str, *, base: str = TINY):
    args = resolve(options, base=base)
    preflight(args)
    return args


def refusal(options: str, error: type[MetisError] = ConfigError) -> MetisError:
    with pytest.raises(error) as caught:
        check(options)
    assert "\n" not in str(caught.value)
    return caught.value


def write_dataset(prefix, documents=DOCUMENTS, *, code=8, kind="H"):
    """Write PREFIX.bin and PREFIX.idx: magic, version, dtype code, counts, lengths, offsets, boundaries."""
    lengths = [len(document) for document in documents]
    width = struct.calcsize(kind)
    offsets = [width * sum(lengths[:i]) for i in range(len(lengths))]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    body = struct.pack(f"<{len(lengths)}i{len(lengths)}q", *lengths, *offsets)
    body += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    (prefix.parent / f"{prefix.name}.idx").write_bytes(header + body)
    tokens = [token for document in documents for token in document]
    (prefix.parent / f"{prefix.name}.bin").write_bytes(struct.pack(f"<{len(tokens)}{kind}", *tokens))
    return prefix


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "text_document")


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    import sentencepiece

    writer = io.BytesIO()
    sentences = iter([f"the quick brown fox number {i} jumps over lazy dog" for i in range(200)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=writer, vocab_size=50, minloglevel=2
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(writer.getvalue())
    return path


# --- data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "kind"), [(8, "H"), (4, "i"), (5, "q")])
def test_sound_dataset_passes_and_its_tokens_are_counted(tmp_path, code, kind):
    prefix = write_dataset(tmp_path / "text_document", code=code, kind=kind)
    assert check_indexed_dataset("--data-path", str(prefix)) == (code, 7)
    args = check(f"--data-path {prefix} {NULL}")
    assert args.padded_vocab_size == 1024


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_missing_file_is_named(data, suffix):
    (data.parent / f"{data.name}.{suffix}").unlink()
    error = refusal(f"--data-path {data} {NULL}")
    assert error.where == "--data-path" and f"{data.name}.{suffix}, which does not exist" in error.message


def test_prefix_with_suffix_is_explained(data):
    assert "prefix without .bin" in refusal(f"--data-path {data}.bin {NULL}").message


@pytest.mark.parametrize(
    ("suffix", "size", "expected"),
    [("idx", 20, 34), ("idx", INDEX_BYTES - 1, INDEX_BYTES), ("bin", BIN_BYTES - 2, BIN_BYTES)],
)
def test_truncated_file_is_named_with_expected_and_actual_bytes(data, suffix, size, expected):
    path = data.parent / f"{data.name}.{suffix}"
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(f"--data-path {data} {NULL}").message
    assert f"{path} is truncated" in message
    assert f"{expected} bytes, received {size}" in message


def test_bin_of_another_index_is_refused(data):
    path = data.parent / f"{data.name}.bin"
    path.write_bytes(path.read_bytes() + b"\0\0")
    assert "not the file of its index" in refusal(f"--data-path {data} {NULL}").message


@pytest.mark.parametrize(("position", "words"), [(0, "must be a Megatron index"), (17, "dtype code")])
def test_wrong_header_is_refused(data, position, words):
    path = data.parent / f"{data.name}.idx"
    content = bytearray(path.read_bytes())
    content[position] = 7
    path.write_bytes(content)
    assert words in refusal(f"--data-path {data} {NULL}").message


def test_empty_dataset_is_refused(tmp_path):
    prefix = write_dataset(tmp_path / "empty", [])
    assert "empty dataset" in refusal(f"--data-path {prefix} {NULL}").message


def test_blends_and_list_files_name_their_prefixes(tmp_path):
    listed, per_split = tmp_path / "blend.txt", tmp_path / "split.json"
    listed.write_text("0.5 c\n0.5 d\n")
    per_split.write_text(json.dumps({"train": ["1", "e", "2", "f"], "valid": ["g"]}))
    base = TINY.replace("--split 90,10,0", "")
    cases = {
        "--data-path 0.3 a 0.7 b": ["a", "b"],
        "--data-path a b": ["a", "b"],
        "--data-path a b 3": ["a", "b", "3"],
        f"--data-args-path {listed}": ["c", "d"],
        f"--per-split-data-args-path {per_split}": ["e", "f", "g"],
        "--train-data-path a --valid-data-path b": ["a", "b"],
    }
    for options, prefixes in cases.items():
        args = resolve(f"{options} {NULL}", base=base)
        assert [prefix for _, prefix in data_prefixes(args)] == prefixes, options


def test_second_dataset_of_a_blend_is_checked_too(data):
    assert "missing.idx" in refusal(f"--data-path 1 {data} 1 {data.parent}/missing {NULL}").message


# --- tokenizers -------------------------------------------------------------------------------------------


def test_token_outside_the_vocabulary_is_found_by_sampling(data):
    """The largest id is 1000: `--vocab-size 999` has ids 0..999, `--vocab-size 1000` one more."""
    check(f"--data-path {data} --tokenizer-type NullTokenizer --vocab-size 1000")
    error = refusal(f"--data-path {data} --tokenizer-type NullTokenizer --vocab-size 999")
    assert error.where == "--vocab-size"
    assert "vocabulary too small" in error.message and "more than 1000 ids, received 1000" in error.message


def test_token_outside_the_vocabulary_is_found_by_the_sidecar_beyond_the_sample(data, monkeypatch):
    monkeypatch.setattr(module, "_NUM_SAMPLED_TOKENS", 3)
    options = f"--data-path {data} --tokenizer-type NullTokenizer --vocab-size 500"
    check(options)
    (data.parent / f"{data.name}.meta.json").write_text(json.dumps({"max_token_id": 1000}))
    assert "more than 1000 ids" in refusal(options).message


def test_sentencepiece_vocabulary_decides_the_padded_size(tmp_path, sentencepiece_model):
    data = write_dataset(tmp_path / "text", [[1, 2], [49]])
    options = (
        f"--data-path {data} --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model "
        f"{sentencepiece_model}"
    )
    assert check(options).padded_vocab_size == 128
    assert check(f"{options} --vocab-size 200").padded_vocab_size == 256
    assert check(f"{options} --make-vocab-size-divisible-by 10").padded_vocab_size == 50
    assert "received 40" in refusal(f"{options} --vocab-size 40").message
    assert "received 48" in refusal(f"{options} --padded-vocab-size 48").message


def test_data_of_another_tokenizer_are_refused(tmp_path, sentencepiece_model):
    data = write_dataset(tmp_path / "text", [[1, 2]])
    sidecar = tmp_path / "text.meta.json"
    options = (
        f"--data-path {data} --tokenizer-type SentencePieceTokenizer --tokenizer-model {sentencepiece_model}"
    )
    same = {
        "tokenizer_type": "GPTSentencePieceTokenizer",
        "tokenizer_sha256": tokenizer_sha256(str(sentencepiece_model)),
        "vocab_size": 50,
        "max_token_id": 2,
    }
    sidecar.write_text(json.dumps(same))
    check(options)
    for name, value in (
        ("tokenizer_sha256", "0" * 64),
        ("vocab_size", 51),
        ("tokenizer_type", "TikTokenizer"),
    ):
        sidecar.write_text(json.dumps(same | {name: value}))
        error = refusal(options)
        assert error.where == "--tokenizer-model" and name in error.message
    sidecar.write_text("{")
    assert str(sidecar) in refusal(options).where


def test_damaged_or_missing_tokenizer_is_named(tmp_path, data):
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"not a model")
    options = f"--data-path {data} --tokenizer-type SentencePieceTokenizer --tokenizer-model"
    assert "must be a SentencePiece model" in refusal(f"{options} {broken}").message
    assert "existing file" in refusal(f"{options} {tmp_path}/none.model").message
    assert "must be a file" in refusal(f"{options} {tmp_path}").message


def test_hugging_face_and_tiktoken_vocabularies_are_counted(tmp_path):
    data = write_dataset(tmp_path / "text", [[1, 2]])
    folder = tmp_path / "hf"
    folder.mkdir()
    content = {"model": {"vocab": {"a": 0, "b": 1, "c": 2}}, "added_tokens": [{"id": 2}, {"id": 3}]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    ranks = tmp_path / "tokenizer.model"
    ranks.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    for kind, model, size in (("HuggingFaceTokenizer", folder, 4), ("TikTokenizer", ranks, 512)):
        options = f"--data-path {data} --tokenizer-type {kind} --tokenizer-model {model}"
        assert check(f"{options} --make-vocab-size-divisible-by 1").padded_vocab_size == size
    hub = f"--data-path {data} --tokenizer-type HuggingFaceTokenizer --tokenizer-model someone/some-model"
    assert check(hub).padded_vocab_size is None


# --- directories ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "tail"),
    [
        ("--save", " --save-interval 5"),
        ("--tensorboard-dir", ""),
        ("--data-cache-path", ""),
        ("--metrics-file", "/m.jsonl"),
    ],
)
def test_directory_is_created_or_refused(tmp_path, data, option, tail):
    check(f"--data-path {data} {NULL} {option} {tmp_path}/new/deep{tail}")
    assert (tmp_path / "new/deep").is_dir() and not list((tmp_path / "new/deep").iterdir())
    (tmp_path / "file").write_text("")
    error = refusal(f"--data-path {data} {NULL} {option} {tmp_path}/file/deep{tail}")
    assert error.where == option and "Not a directory" in error.message


def test_print_config_creates_nothing(tmp_path, data):
    check(f"--data-path {data} {NULL} --save {tmp_path}/new --save-interval 5 --print-config")
    assert not (tmp_path / "new").exists()


def test_metrics_file_must_not_be_a_directory(tmp_path, data):
    assert "add a file name" in refusal(f"--data-path {data} {NULL} --metrics-file {tmp_path}").message


def test_missing_psutil_is_named(data, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    error = refusal(f"--data-path {data} {NULL}")
    assert error.where == "psutil" and "pip install psutil" in error.message


# --- checkpoints ------------------------------------------------------------------------------------------


def write_checkpoint(root, options: str):
    directory = root / "iter_0000010"
    directory.mkdir(parents=True)
    for name in (METADATA_NAME, ".metadata", "common.pt"):
        (directory / name).write_text("{}")
    args = resolve(options)
    (directory / "run_config.json").write_text(to_json(build_run_config(args, 10, "none", versions={})))
    (root / TRACKER_NAME).write_text("10")


def test_checkpoint_of_the_same_run_passes_and_its_absence_is_a_fresh_start(tmp_path, data):
    base = f"--data-path {data} {NULL} --recipe nvfp4"
    check(f"{base} --load {tmp_path}/ckpt")
    write_checkpoint(tmp_path / "ckpt", base)
    check(f"{base} --load {tmp_path}/ckpt --ckpt-step 10")


def test_checkpoint_of_another_model_or_recipe_is_refused_by_field(tmp_path, data):
    base = f"--data-path {data} {NULL} --load {tmp_path}"
    write_checkpoint(tmp_path, f"--data-path {data} {NULL} --recipe nvfp4")
    model = refusal(f"{base} --recipe nvfp4 --num-layers 3 --rotary-base 10000", CheckpointError)
    assert "num_layers stored 4, requested 3" in model.message and "rotary_base" in model.message
    recipe = refusal(f"{base} --recipe metis", CheckpointError)
    assert "another recipe" in recipe.message and "--finetune" in recipe.message
    check(f"{base} --recipe metis --finetune")


def test_damaged_or_required_checkpoint_is_named(tmp_path, data):
    base = f"--data-path {data} {NULL} --load {tmp_path}/ckpt"
    missing = refusal(f"{base} --exit-on-missing-checkpoint", CheckpointError)
    assert "--exit-on-missing-checkpoint" in missing.message
    write_checkpoint(tmp_path / "ckpt", f"--data-path {data} {NULL}")
    assert "missing" in refusal(f"{base} --ckpt-step 20", CheckpointError).message
    (tmp_path / "ckpt" / TRACKER_NAME).write_text("ten")
    assert "decimal iteration" in refusal(base, CheckpointError).message


def test_pretrained_checkpoint_must_exist_and_fit(tmp_path, data):
    base = f"--data-path {data} {NULL} --pretrained-checkpoint {tmp_path}/ckpt"
    assert refusal(base, CheckpointError).where == "--pretrained-checkpoint"
    write_checkpoint(tmp_path / "ckpt", f"--data-path {data} {NULL} --recipe nvfp4")
    check(f"{base} --recipe metis")
    assert "hidden_size" in refusal(f"{base} --hidden-size 512", CheckpointError).message


def test_use_checkpoint_args_takes_the_shape_and_explicit_options_win(tmp_path, data):
    write_checkpoint(
        tmp_path, f"--data-path {data} {NULL} --num-layers 6 --ffn-hidden-size 512 --recipe nvfp4"
    )
    base = (
        f"--data-path {data} --micro-batch-size 2 --lr 1 --train-iters 1 --load {tmp_path} "
        f"--use-checkpoint-args"
    )
    args = check(f"{NULL} --seq-length 128", base=base)
    assert (args.num_layers, args.ffn_hidden_size, args.recipe, args.seq_length) == (6, 512, "nvfp4", 128)

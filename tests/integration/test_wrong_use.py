"""Each wrong use that a user can make, through the real entry script on two ranks.

Oracle: rank 0 writes exactly one line `error: <where>: <message>` that names what is wrong, rank 1 writes
nothing, both leave with status 2, and neither has imported torch or megatron (modules of these names that
refuse to be imported stand first on the path). Under torchrun the line must survive torchrun killing the
other rank.
"""

from __future__ import annotations

import base64
import re
import resource
import subprocess
from pathlib import Path

import pytest

from metis.errors import USER_ERROR_EXIT_STATUS
from metis.training.arguments import parse_args, validate_args
from metis.training.preflight import preflight
from metis.training.retention import METADATA_NAME, TRACKER_NAME
from metis.training.run_config import build_run_config, to_json
from tests.integration._trainer import (
    REPOSITORY,
    SHAPE,
    TOKENIZER,
    VOCAB_SIZE,
    data_options,
    environment,
    run_by_hand,
    trainer_command,
    write_data,
)

NUM_RANKS = 2
# Processor time, so that a busy machine does not count; measured 0.45 s a rank, 5 s are promised.
SECONDS_TO_FAIL = 5.0
RUN = "--train-iters 4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data (also truncated), tokenizers, recipes, policies and a checkpoint to make mistakes with."""
    root = tmp_path_factory.mktemp("wrong_use")
    write_data(root / "text")
    for name in ("short_idx", "short_bin", "labelled"):
        write_data(root / name)
    for name, suffix in (("short_idx", "idx"), ("short_bin", "bin")):
        path = root / f"{name}.{suffix}"
        path.write_bytes(path.read_bytes()[:-10])
    ranks = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (root / "bytes.tiktoken").write_text("\n".join(ranks))
    (root / "damaged.tiktoken").write_text("\n".join(ranks[:100] + ranks[101:]))
    (root / "labelled.meta.json").write_text(
        '{"tokenizer_type": "TikTokenizer", "tokenizer_sha256": "' + "0" * 64 + '", "max_token_id": 255}'
    )
    (root / "recipe.yaml").write_text("base: nvfp4\nfprop_inptu: null\n")
    (root / "policy.yaml").write_text(
        "rules:\n  - {match: 'decoder.layers.9.*', recipe: bf16}\n  - {match: '*'}\n"
    )
    (root / "file").write_text("")
    _write_checkpoint(root / "checkpoint", f"{data_options(str(root / 'text'))} {RUN} --recipe nvfp4")
    (root / "poison").mkdir()
    for name in ("torch", "megatron"):
        (root / "poison" / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    return root


def _write_checkpoint(root: Path, options: str) -> None:
    """Write what can be asked of a checkpoint before it is loaded."""
    directory = root / "iter_0000010"
    directory.mkdir(parents=True)
    for name in (METADATA_NAME, ".metadata", "common.pt"):
        (directory / name).write_text("{}")
    args = parse_args([*SHAPE.split(), *options.split()])
    validate_args(args, 1)
    preflight(args)
    (directory / "run_config.json").write_text(to_json(build_run_config(args, 10, "none", versions={})))
    (root / TRACKER_NAME).write_text("10")


# name -> (options after SHAPE, `where` of the error, words of the message in order). {f} is the folder.
DATA = "--data-path {f}/text --split 80,20,0 " + TOKENIZER + " " + RUN
TIKTOKEN = "--tokenizer-type TikTokenizer --tokenizer-model"
CASES = {
    "heads": (DATA + " --tensor-model-parallel-size 2 --num-attention-heads 5 --num-query-groups 5",
              "--num-attention-heads", "divisible by --tensor-model-parallel-size 2, received 5"),
    "groups": (DATA + " --tensor-model-parallel-size 2 --num-query-groups 1",
               "--num-query-groups", "divisible by --tensor-model-parallel-size 2, received 1"),
    "stages": (DATA + " --pipeline-model-parallel-size 2 --num-layers 3",
               "--num-layers", "2 pipeline stages received 3"),
    "sequence": (DATA + " --tensor-model-parallel-size 2 --sequence-parallel --seq-length 31",
                 "--sequence-parallel", "size 2, received 31"),
    "context": (DATA + " --context-parallel-size 2 --seq-length 30",
                "--seq-length", "multiple of 4, received 30"),
    "batch": (DATA + " --global-batch-size 6", "--global-batch-size", "multiple of = 4, received 6"),
    "world": (DATA + " --tensor-model-parallel-size 4", "--tensor-model-parallel-size",
              "4 for a world size of 2; start 4 ranks"),
    "k_of_16": (DATA + " --recipe nvfp4 --hidden-size 72",
                r"decoder\.layers\.0\.self_attention\.linear_qkv .*",
                "input features K divisible by 16, received 72 --hidden-size"),
    "k_of_16_by_tp": (DATA + " --recipe metis --tensor-model-parallel-size 2 --ffn-hidden-size 144",
                      r"decoder\.layers\.0\.mlp\.linear_fc1 .*", "divisible by 16, received 72 at TP=2"),
    "no_data": ("--data-path {f}/absent --split 1,0,0 " + TOKENIZER + " " + RUN,
                "--data-path", "absent.idx, which does not exist"),
    "short_idx": ("--data-path {f}/short_idx --split 1,0,0 " + TOKENIZER + " " + RUN,
                  "--data-path", "short_idx.idx is truncated: must have bytes, received"),
    "short_bin": ("--data-path {f}/short_bin --split 1,0,0 " + TOKENIZER + " " + RUN,
                  "--data-path", "short_bin.bin is truncated: must have bytes, received"),
    "tokenizer": ("--data-path {f}/labelled --split 1,0,0 " + TIKTOKEN + " {f}/bytes.tiktoken " + RUN,
                  "--tokenizer-model", "must be the tokenizer that labelled was made with tokenizer_sha256"),
    "damaged_tokenizer": ("--data-path {f}/text --split 1,0,0 " + TIKTOKEN + " {f}/damaged.tiktoken " + RUN,
                          "--tokenizer-model .*", "ranks must be 0..R-1"),
    "no_tokenizer": ("--data-path {f}/text --split 1,0,0 " + TIKTOKEN + " {f}/absent.model " + RUN,
                     "--tokenizer-model", "existing file, received absent.model"),
    "small_vocabulary": (DATA + " --vocab-size 100", "--vocab-size",
                         f"too small more than {VOCAB_SIZE} ids, received 101"),
    "recipe": (DATA + " --recipe nvpf4", "--recipe", "nvpf4 did you mean 'nvfp4'"),
    "recipe_key": (DATA + " --recipe {f}/recipe.yaml", r"--recipe .*recipe\.yaml\.fprop_inptu",
                   "not a known setting; did you mean 'fprop_input'"),
    "policy": (DATA + " --recipe nvfp4 --policy {f}/policy.yaml", "--policy.*",
               "decoder.layers.9.* matches none"),
    "other_model": (DATA + " --recipe nvfp4 --load {f}/checkpoint --ffn-hidden-size 256", ".*iter_0000010",
                    "another model: ffn_hidden_size stored 128, requested 256"),
    "other_recipe": (DATA + " --recipe metis --load {f}/checkpoint", ".*iter_0000010",
                     "another recipe: stored requested --finetune"),
    "other_policy": (DATA + " --recipe nvfp4 --policy all --load {f}/checkpoint", ".*iter_0000010",
                     "another policy: stored requested --finetune"),
    "no_checkpoint": (DATA + " --load {f}/absent --exit-on-missing-checkpoint", "--load", "received none in"),
    "save": (DATA + " --save {f}/file/below --save-interval 2",
             "--save", "can be written, received file/below"),
    "tensorboard": (DATA + " --tensorboard-dir /proc/events",
                    "--tensorboard-dir", "can be written, received"),
    "metrics": (DATA + " --metrics-file {f}/file/m.jsonl", "--metrics-file", "can be written, received"),
    "cache": (DATA + " --data-cache-path {f}/file/cache", "--data-cache-path", "can be written, received"),
    "option": (DATA + " --recipee metis", "--recipee", "known option; did you mean '--recipe'"),
    "abbreviation": (DATA + " --num-lay 4", "--num-lay", "known option; did you mean '--num-layers'"),
    "foreign": (DATA + " --fp8-format hybrid", "--fp8-format", "does not honour: --recipe NAME"),
    "value": (DATA + " --micro-batch-size two", "--micro-batch-size", "invalid int value: 'two'"),
    "choice": (DATA + " --lr-decay-style cosin",
               "--lr-decay-style", "received 'cosin'; did you mean 'cosine'"),
    "no_source": (TOKENIZER + " " + RUN, "--data-path", "must be given"),
}  # fmt: skip


def _check_line(line: str, where: str, words: str) -> None:
    match = re.fullmatch(rf"error: ({where}): (.+)", line)
    assert match, line
    position = 0
    for word in words.split():
        found = match.group(2).find(word, position)
        assert found >= 0, f"{word!r} after position {position} in {line!r}"
        position = found + len(word)


@pytest.mark.parametrize("case", CASES)
def test_wrong_use_is_one_line_and_status_2_on_every_rank(case: str, folder: Path) -> None:
    options, where, words = CASES[case]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    first, second = run_by_hand(
        [*SHAPE.split(), *options.replace("{f}", str(folder)).split()],
        NUM_RANKS,
        PYTHONPATH=str(folder / "poison"),
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (first.status, second.status) == (USER_ERROR_EXIT_STATUS,) * NUM_RANKS, first.stderr
    lines = [line for line in first.stderr.splitlines() if not line.startswith("WARNING: ")]
    assert len(lines) == 1 and first.stdout == "", first
    _check_line(lines[0], where, words)
    assert (second.stdout, second.stderr) == ("", "")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < SECONDS_TO_FAIL * NUM_RANKS


def test_a_correct_command_gets_as_far_as_importing_torch(folder: Path) -> None:
    """The cases above fail for their own reason: without a mistake, the poisoned torch stops the run."""
    options = [*SHAPE.split(), *DATA.replace("{f}", str(folder)).split()]
    for outcome in run_by_hand(options, NUM_RANKS, PYTHONPATH=str(folder / "poison")):
        assert outcome.status == 1 and outcome.stderr == "torch was imported\n"


def test_launcher_variables_must_be_numbers(folder: Path) -> None:
    options = [*SHAPE.split(), *DATA.replace("{f}", str(folder)).split()]
    (outcome,) = run_by_hand(options, 1, WORLD_SIZE="two", PYTHONPATH=str(folder / "poison"))
    assert outcome.status == USER_ERROR_EXIT_STATUS
    _check_line(outcome.stderr.strip(), r"\$WORLD_SIZE", "whole number, received 'two'")


def test_wrong_use_under_torchrun_prints_the_line_once(folder: Path) -> None:
    options = CASES["world"][0].replace("{f}", str(folder))
    result = subprocess.run(
        trainer_command(f"{SHAPE} {options}", NUM_RANKS),
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    _check_line(errors[0], *CASES["world"][1:])
    # torchrun ends with a traceback of its own; none may come from the trainer.
    assert 'pretrain_llama.py", line' not in result.stderr

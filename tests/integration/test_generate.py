"""Text from a checkpoint: what the model's own logits say, from any layout, by the checkpoint's recipe.

Oracles: argmax over the logits of a model built by the trainer itself (initial weights depend on names alone,
so it needs no checkpoint); softmax for the frequencies of draws. Nothing is trained here.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metis.errors import CheckpointError, ConfigError
from metis.training.generation import Sampling, Source, TextModel, checkpoint_arguments, choose_token
from tests._distributed import run_ranks, use_fast_checkpoint_queue

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = (
    "--preset tiny --num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 "
    "--num-query-groups 2 --kv-channels 16 --seq-length 32 --max-position-embeddings 32 --mock-data "
    "--micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 1e-3 --device cpu --seed 5 "
    "--norm-epsilon 1e-3"
)
PROMPT = "def main("
NUM_TOKENS = 8
NUM_DRAWS = 1500
MAX_SIGMA = 5.0  # worst measured 1.5
RECIPE_NOISE = 0.02  # of logits with standard deviation 0.08; measured 0.0054


# --- Drawing a token ----------------------------------------------------------------------


def _draws(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = [choose_token(logits, sampling, generator) for _ in range(NUM_DRAWS)]
    return torch.bincount(torch.tensor(drawn), minlength=logits.numel()).double()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=0.5, top_k=None), [0, 1, 2, 3, 4]),
        (Sampling(temperature=2.0, top_k=3), [0, 1, 2]),
        (Sampling(temperature=1.0, top_k=None, top_p=0.6), [0, 1]),
        (Sampling(temperature=1.0, top_k=None, top_p=0.3), [0]),
        (Sampling(temperature=1.0, top_k=2, top_p=1.0), [0, 1]),
    ],
)
def test_draws_follow_the_tempered_softmax_over_what_is_kept(sampling: Sampling, kept: list[int]):
    """Probabilities at temperature 1: 0.38, 0.28, 0.21, 0.10, 0.03."""
    logits = torch.tensor([1.0, 0.7, 0.4, -0.3, -1.5])
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = (logits[kept].double() / sampling.temperature).softmax(0)
    sigma = (NUM_DRAWS * expected * (1 - expected)).sqrt()
    assert bool(((_draws(logits, sampling) - NUM_DRAWS * expected).abs() <= MAX_SIGMA * sigma).all())


def test_greedy_takes_the_largest_and_the_lowest_of_equals():
    logits = torch.tensor([0.0, 2.0, 2.0, 1.0])
    assert choose_token(logits, Sampling(temperature=0.0), torch.Generator()) == 1


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_k": -1}, "--top-k"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.5}, "--top-p"),
    ],
)
def test_wrong_sampling_is_refused(values: dict[str, Any], option: str):
    with pytest.raises(ConfigError, match=f"{option}: must"):
        Sampling(**values)


class _ByteTokenizer:
    """One id per byte, as byte pieces of SentencePiece are."""

    vocab_size, eod = 257, 256

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_text_streams_whole_characters():
    model = TextModel(args=None, model=None, tokenizer=_ByteTokenizer())
    added = " naïve 日本"
    pieces = list(model.text(model.tokenizer.tokenize("é:"), added.encode()))
    assert "".join(pieces) == added and pieces[:2] == [" ", "n"]
    assert not any("\ufffd" in piece for piece in pieces)
    cut = list(model.text([], "日".encode()[:2]))
    assert "".join(cut) == "\ufffd", "an unfinished character shows at the end"


def test_a_prompt_that_is_no_utf8_is_one_error():
    class Refuses(_ByteTokenizer):
        def tokenize(self, text: str) -> list[int]:
            raise RuntimeError("as SentencePiece does")

    model = TextModel(args=None, model=None, tokenizer=Refuses())
    with pytest.raises(ConfigError, match=r"--prompt: must be text that the tokenizer takes .*surrogates"):
        model.encode(os.fsdecode(b"caf\xe9"))


# --- A checkpoint -----------------------------------------------------------------------------


def _parse(world_size: int, line: str) -> Any:
    from metis.training.arguments import parse_args, validate_args
    from metis.training.preflight import preflight

    args = parse_args([*SHAPE.split(), *line.split()])
    validate_args(args, world_size)
    preflight(args)
    return args


def _with_model(world_size: int, line: str, use: Callable[[Any, Any, list], Any]) -> Any:
    """Build the model of a command line in the process group that exists and return `use(args, tokenizer,
    model)`.
    """
    from metis.training.initialize import initialize, shut_down

    args = _parse(world_size, line)
    with contextlib.redirect_stdout(io.StringIO()):
        initialize(args)
        from metis.clock import TrainingClock
        from metis.training.loop import set_vocabulary
        from metis.training.model import build_model
        from metis.training.tokenizer import build_tokenizer

        try:
            tokenizer = build_tokenizer(args)
            set_vocabulary(args, tokenizer.vocab_size)
            return use(args, tokenizer, build_model(args, TrainingClock(seed=args.seed), wrap=False))
        finally:
            shut_down(keep_process_group=True)


def _save(_rank: int, world_size: int, cases: dict[str, str]) -> None:
    from metis.training.checkpointing import save_checkpoint
    from metis.training.state import TrainState

    use_fast_checkpoint_queue()
    for folder, line in cases.items():

        def save(args: Any, _tokenizer: Any, model: list) -> None:
            save_checkpoint(args, TrainState(iteration=3), model, None, None)

        _with_model(world_size, f"{line} --save {folder} --save-interval 100", save)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints saved at TP=2 with sequence parallelism; returns folders and command lines by recipe."""
    from metis.training.tokenizer import train_sentencepiece

    folder = tmp_path_factory.mktemp("generate")
    text = [path.read_text() for path in sorted((REPOSITORY / "metis").glob("*.py"))]
    tokenizer = train_sentencepiece(text, str(folder / "tokenizer"), 400)
    recipe = folder / "mine.json"
    recipe.write_text(json.dumps({"base": "metis", "name": "mine"}))
    lines = {
        name: f"--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model {tokenizer} {options}"
        for name, options in (
            ("metis", f"--recipe {recipe} --num-layers-at-end-in-bf16 0 --num-layers-at-start-in-bf16 1"),
            ("paper", "--recipe metis_paper --bf16"),
        )
    }
    layout = "--tensor-model-parallel-size 2 --sequence-parallel"
    cases = {str(folder / name): f"{line} {layout}" for name, line in lines.items()}
    run_ranks(_save, 2, cases, timeout=300.0)
    recipe.unlink()  # the checkpoint must not need it any more
    recipe.write_text(json.dumps({"base": "nvfp4_direct", "name": "mine"}))
    return {"folder": str(folder), "tokenizer": tokenizer, **lines}


def _by_hand(args: Any, tokenizer: Any, model: list) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens from the model itself, without any code of the generation module."""
    ids = list(tokenizer.tokenize(PROMPT))
    model[0].eval()
    first = None
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            logits = model[0](torch.tensor([ids]), torch.arange(len(ids))[None], None)[0, -1]
        first = logits.float() if first is None else first
        ids.append(int(logits.float()[: tokenizer.vocab_size].argmax()))
    return ids[-NUM_TOKENS:], first[: tokenizer.vocab_size]


def _generate(_rank: int, _world_size: int, run: dict[str, str]) -> dict[str, Any]:
    from metis.training.generation import loaded_model

    results: dict[str, Any] = {}
    greedy = Sampling(temperature=0.0)
    for name in ("metis", "paper"):
        # The file that the run was started with has changed since, so the oracle names the recipe.
        line = run[name].replace(f"{run['folder']}/mine.json", "metis")
        results[f"{name} by hand"] = _with_model(1, line, _by_hand)
        printed = io.StringIO()
        with (
            contextlib.redirect_stdout(printed),
            loaded_model(Source(load=f"{run['folder']}/{name}")) as model,
        ):
            ids = model.encode(PROMPT)
            tokens = list(model.tokens(ids, NUM_TOKENS, greedy, 0))
            results[name] = (tokens, model.logits(ids))
            results[f"{name} printed"] = printed.getvalue()
            results[f"{name} text"] = "".join(model.text(ids, tokens))
            if name == "metis":
                hot = Sampling(temperature=1.5)
                results["draws"] = [list(model.tokens(ids, NUM_TOKENS, hot, seed)) for seed in (1, 1, 2)]
                results["long"] = len(list(model.tokens(ids, 1000, hot, 4)))
                results["prompt length"] = len(ids)
                results["empty prompt"] = model.encode("") == [model.tokenizer.eod]
                with pytest.raises(
                    ConfigError, match=r"--prompt: must be shorter than the model's 32 positions"
                ):
                    model.encode("x " * 100)
    with loaded_model(Source(load=f"{run['folder']}/metis", recipe="bf16")) as model:
        results["as bf16"] = model.logits(model.encode(PROMPT))
    return results


@pytest.fixture(scope="module")
def generated(run: dict[str, str]) -> dict[str, Any]:
    return run_ranks(_generate, 1, run, timeout=300.0)[0]


@pytest.mark.parametrize("name", ["metis", "paper"])
def test_greedy_text_is_the_argmax_of_the_model_whatever_layout_saved_it(
    generated: dict[str, Any], name: str
):
    """Bitwise logits: the same weights, norm epsilon, recipe and policy reached the model."""
    (tokens, logits), (expected_tokens, expected_logits) = generated[name], generated[f"{name} by hand"]
    assert tokens == expected_tokens and len(tokens) == NUM_TOKENS
    assert torch.equal(logits, expected_logits)


def test_a_seed_decides_the_text(generated: dict[str, Any]):
    first, again, other = generated["draws"]
    assert first == again and first != other


def test_text_ends_at_the_last_position(generated: dict[str, Any]):
    assert 0 < generated["long"] <= 32 - generated["prompt length"]
    assert generated["empty prompt"]


def test_the_checkpoints_recipe_computes_unless_another_is_asked_for(generated: dict[str, Any]):
    with_fp4, without = generated["metis"][1], generated["as bf16"]
    assert not torch.equal(with_fp4, without)
    assert float((with_fp4 - without).abs().max()) < RECIPE_NOISE


def test_standard_output_belongs_to_the_text(generated: dict[str, Any]):
    assert generated["metis printed"] == generated["paper printed"] == ""


def test_the_command_writes_prompt_and_text(run: dict[str, str], generated: dict[str, Any]):
    command = [sys.executable, str(REPOSITORY / "tools" / "generate.py"), "--load", f"{run['folder']}/metis"]
    command += [
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        str(NUM_TOKENS),
        "--temperature",
        "0",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{PROMPT}{generated['metis text']}\n"
    assert f"{NUM_TOKENS} tokens in" in done.stderr


# --- Mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load": "{folder}/nothing"}, "--load: must hold a checkpoint"),
        ({"ckpt_step": 9}, "complete checkpoints are 3"),
        ({"recipe": "metsi"}, "did you mean 'metis'"),
        ({"recipe": "metis_paper"}, "must keep the weights as recipe 'mine' of the checkpoint does"),
        ({"tokenizer_model": "{folder}/none.model"}, "--tokenizer-model: must be an existing file"),
    ],
)
def test_a_wrong_source_is_refused_before_torch_is_needed(
    run: dict[str, str], tmp_path: Path, changes: dict[str, Any], message: str
):
    values = {"load": f"{run['folder']}/metis", **changes}
    values = {k: v.format(**run) if isinstance(v, str) else v for k, v in values.items()}
    with pytest.raises((CheckpointError, ConfigError), match=message):
        checkpoint_arguments(Source(**values), tmp_path)


def test_several_processes_are_refused(run: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="world size: must be 1"):
        checkpoint_arguments(Source(load=f"{run['folder']}/metis"), tmp_path)


def test_a_batch_job_without_srun_is_one_process(
    run: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")):
        monkeypatch.setenv(name, value)
    assert checkpoint_arguments(Source(load=f"{run['folder']}/metis"), tmp_path).world_size == 1


def test_a_mistake_ends_in_one_line(tmp_path: Path):
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "generate.py"),
        "--load",
        str(tmp_path),
        "--prompt",
        "x",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: --load: must hold a checkpoint, received none in {tmp_path}\n"

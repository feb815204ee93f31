"""The quickstart: its pure parts against small oracles, and two recipes trained for a few real steps."""

from __future__ import annotations

import io
import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import corpus  # noqa: E402
import progress  # noqa: E402
import quickstart  # noqa: E402
import report  # noqa: E402

from metis.errors import ConfigError  # noqa: E402
from metis.policy import recipes_by_path, resolve_policy  # noqa: E402
from metis.recipes import resolve_recipe  # noqa: E402

ENTROPY_TOLERANCE = 1e-12  # float64 sums of some hundred terms; measured 2e-15
STEPS = 3
VOCAB_SIZE = 400
LAYERS = 3


# --- corpus ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 7, 100, 10**6])
def test_pieces_join_to_the_text_and_end_at_line_ends(limit):
    rng = random.Random(limit)
    text = "".join("x" * rng.randrange(0, 30) + "\n" for _ in range(200)) + "no newline at the end"
    cut = corpus.pieces(text, limit)
    assert "".join(cut) == text
    assert all(piece.endswith("\n") for piece in cut[:-1])
    longest = max(len(line) + 1 for line in text.split("\n"))
    assert all(len(piece) <= max(limit, longest) for piece in cut)


def test_unigram_entropy_equals_the_mean_surprise_of_each_token():
    rng = random.Random(0)
    tokens = [min(rng.randrange(50), rng.randrange(50)) for _ in range(3000)] + [99]
    counts = Counter(tokens)
    surprise = [-math.log(counts[token] / len(tokens)) for token in tokens]
    found = corpus.unigram_entropy_nats(np.bincount(tokens))
    assert found == pytest.approx(math.fsum(surprise) / len(tokens), abs=ENTROPY_TOLERANCE)


def test_standard_library_corpus_is_the_same_each_time_and_holds_no_tests():
    documents = corpus.collect(None)
    assert documents == corpus.collect(None)
    sources = {source for source, _ in documents}
    assert {"json/decoder.py", "random.py", "built-in module sys"} <= sources
    assert not any(part in ("test", "tests") for source in sources for part in source.split("/"))
    joined = "".join(text for source, text in documents if source == "random.py")
    assert joined == Path(random.__file__).read_text()


def test_given_files_skip_what_is_no_text(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("line\n" * 30_000)
    (tmp_path / "b.bin").write_bytes(b"\0\1\2" * 50_000)
    (tmp_path / "c.latin1").write_bytes("é".encode("latin-1") * 100_000)
    documents = corpus.collect([str(tmp_path)])
    assert {source for source, _ in documents} == {str(tmp_path / "deep" / "a.txt")}
    assert "".join(text for _, text in documents) == "line\n" * 30_000


def test_corpus_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="must name existing files or folders, got /nowhere"):
        corpus.collect(["/nowhere"])
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ConfigError, match=r"must hold at least 100000 bytes .* got 5 bytes in 1 files"):
        corpus.collect([str(tmp_path)])
    (tmp_path / "one_line.txt").write_text("word " * 50_000)
    with pytest.raises(ConfigError, match="got 250005 bytes in 2 files, 2 pieces"):
        corpus.collect([str(tmp_path)])


# --- options and progress ----------------------------------------------------------------------------------


def test_evaluation_interval_never_divides_the_steps_and_gives_few_evaluations():
    for steps in range(1, 1001):
        interval = quickstart.evaluation_interval(steps)
        assert steps % interval != 0
        assert steps // interval <= quickstart.EVALUATIONS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipes", "bf16,nvpf4"], "did you mean 'nvfp4'"),
        (["--recipes", "bf16,bf16"], "must name each recipe once"),
        (["--recipes", ","], "must name each recipe once, got none"),
        (["--steps", "0"], "--steps: must lie between 1 and"),
        (["--sed", "7"], "unrecognized arguments: --sed 7"),
        (["--seed", "x"], "invalid int value"),
    ],
)
def test_wrong_options_are_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        quickstart.parse_arguments(argv)


def test_a_recipe_is_passed_on_by_name_or_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("metis").mkdir()  # a folder called like a recipe, as in this repository
    Path("mine.yaml").write_text("base: nvfp4\n")
    args = quickstart.parse_arguments(["--recipes", "metis,mine.yaml", "--", "--bf16"])
    data = corpus.PreparedData(prefix="p", tokenizer_model="t", unigram_entropy_nats=1.0, description={})
    found = {}
    for name, spec in args.recipes.items():
        command = quickstart.training_command(args, spec, tmp_path, data)
        found[name] = command[command.index("--recipe") + 1]
        assert command[-1] == "--bf16"
    assert found == {"metis": "metis", "mine": str(tmp_path / "mine.yaml")}


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="must be empty or a run of the quickstart"):
        quickstart.fresh_folder(tmp_path)
    with pytest.raises(ConfigError, match="must be empty or hold data of the quickstart"):
        corpus.prepare(tmp_path, None, VOCAB_SIZE, progress.StatusLine(io.StringIO()))
    assert (tmp_path / "mine.txt").read_text() == "keep"
    (tmp_path / quickstart.MARKER).write_text("{}")
    quickstart.fresh_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_read_in_whole_lines_and_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = quickstart.MetricsTail(path)
    tail.read()
    assert tail.describe(10, 4.0) == "starting, 4 s"
    train = json.dumps(
        {"kind": "train", "iteration": 1, "lm_loss": 2.5, "tokens_per_second": 100.0, "step_seconds": 7.0}
    )
    validation = json.dumps({"kind": "validation", "iteration": 1, "validation_loss": 3.25})
    path.write_text(train + "\n" + validation[:20])
    tail.read()
    assert (len(tail.train), len(tail.validation)) == (1, 0)
    path.write_text(train + "\n" + validation + "\n")
    tail.read()
    tail.read()
    assert (len(tail.train), len(tail.validation)) == (1, 1)
    assert tail.describe(10, 9.0) == "step 1/10  loss 2.500  100 tokens/s  validation 3.250  1:03 left"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_a_line_every_ten_seconds_elsewhere():
    now = 0.0
    terminal, pipe = _Terminal(), io.StringIO()
    lines = [progress.StatusLine(stream, clock=lambda: now) for stream in (terminal, pipe)]
    for second in range(1, 26):
        now = float(second)
        for line in lines:
            line.update(f"second {second}")
    for line in lines:
        line.say("done")
    assert pipe.getvalue() == "second 10\nsecond 20\ndone\n"
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().split("\r\x1b[K")[-2:] == ["second 25", "done\n"]


def test_a_failed_command_shows_the_end_of_its_log(tmp_path):
    script = "print('error: early'); [print('line', i) for i in range(100)]; raise SystemExit('the reason')"
    with pytest.raises(progress.RunFailed, match="status 1") as failure:
        progress.run_logged(
            [sys.executable, "-c", script], log=tmp_path / "log.txt", cwd=tmp_path, tick=lambda elapsed: None
        )
    assert "the reason" in str(failure.value) and "error: early" in str(failure.value)
    assert "line 99" in str(failure.value) and "line 10\n" not in str(failure.value)


# --- report ------------------------------------------------------------------------------------------------


def _entry(recipe: str, loss: float | None) -> dict:
    return {
        "recipe": recipe, "validation_loss": loss, "tokens_per_second": 10.0, "parameters": 5, "tokens": 6,
        "seed": 1, "steps": 2, "train_loss_last": 3.0, "seconds": 4.0, "checkpoint": None,
        "quantized_linears": 7,
    }  # fmt: skip


def test_gaps_are_against_bf16_and_null_without_it():
    runs = [_entry("nvfp4", 4.5), _entry("bf16", 4.0), _entry("x", None)]
    entries = report.summarise(runs, 6.0, {})["recipes"]
    assert [entry["gap_nats"] for entry in entries] == [0.5, 0.0, None]
    assert [entry["gap_percent"] for entry in entries] == [12.5, 0.0, None]
    assert report.summarise([_entry("nvfp4", 4.5)], 6.0, {})["recipes"][0]["gap_nats"] is None


def test_only_finite_losses_well_below_the_entropy_pass():
    summary = report.summarise([_entry("a", 5.7), _entry("b", 5.8), _entry("c", None)], 6.0, {})
    found = report.problems(summary, 0.25)
    assert len(found) == 2
    assert found[0].startswith("b: validation loss must be below the unigram entropy 6.000")
    assert found[1].startswith("c: validation loss must be there and finite")


def test_smoothing_is_the_mean_of_the_last_values():
    values = [float(i * i % 7) for i in range(20)]
    expected = [sum(values[max(0, i - 3) : i + 1]) / min(4, i + 1) for i in range(len(values))]
    assert report.smoothed(values, 4) == pytest.approx(expected, rel=1e-12)


# --- the real thing ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    folder = tmp_path_factory.mktemp("quickstart")
    sources = [str(Path(json.__file__).parent), random.__file__, subprocess.__file__]
    small = ["--num-layers", LAYERS, "--hidden-size", 32, "--ffn-hidden-size", 64, "--kv-channels", 16]
    small += ["--num-attention-heads", 2, "--num-query-groups", 1, "--seq-length", 64, "--eval-iters", 1]
    command = [sys.executable, QUICKSTART / "quickstart.py", "--steps", STEPS, "--recipes", "bf16,nvfp4"]
    command += ["--vocab-size", VOCAB_SIZE, "--output", folder, "--corpus", *sources, "--", *small]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    return done, folder


def test_a_run_too_short_to_learn_says_so_and_reports_everything(finished):
    done, folder = finished
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("must be below the unigram entropy") == 2
    assert report.NOTE in done.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["recipes", "unigram_entropy_nats", "corpus", "note", "versions"]
    quantized = recipes_by_path(resolve_policy(None, LAYERS, None, None), resolve_recipe("nvfp4"), LAYERS)
    expected_quantized = [0, sum(recipe.is_quantized for recipe in quantized.values())]
    assert [run["recipe"] for run in summary["recipes"]] == ["bf16", "nvfp4"]
    assert [run["quantized_linears"] for run in summary["recipes"]] == expected_quantized
    for run in summary["recipes"]:
        records = [json.loads(line) for line in (folder / run["recipe"] / "metrics.jsonl").open()]
        validation = [record["validation_loss"] for record in records if record["kind"] == "validation"]
        assert run["validation_loss"] == validation[-1]
        assert run["tokens"] == STEPS * quickstart.GLOBAL_BATCH_SIZE * 64
        assert Path(run["checkpoint"]).name == f"iter_{STEPS:07d}"
        assert list((folder / run["recipe"] / "tensorboard").glob("events*"))
    base, other = summary["recipes"]
    assert other["gap_nats"] == other["validation_loss"] - base["validation_loss"] != 0.0
    assert base["parameters"] == other["parameters"] > VOCAB_SIZE * 32
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_data_is_made_again_only_when_something_changed(finished):
    folder = finished[1] / "data"
    sources = [str(Path(json.__file__).parent), random.__file__, subprocess.__file__]
    index = folder / "corpus_text_document.idx"
    made = index.stat().st_mtime_ns
    shown = io.StringIO()
    data = corpus.prepare(folder, sources, VOCAB_SIZE, progress.StatusLine(shown))
    assert "is up to date" in shown.getvalue()
    assert index.stat().st_mtime_ns == made
    tokens = np.fromfile(f"{data.prefix}.bin", dtype=np.uint16)
    assert len(tokens) == data.description["tokens"] and tokens.max() < VOCAB_SIZE
    corpus.prepare(folder, sources, VOCAB_SIZE + 8, progress.StatusLine(shown))
    assert index.stat().st_mtime_ns != made

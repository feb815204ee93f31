"""From text to three trained LLaMAs and a comparison, on the CPU: what `run.sh` runs after its set-up.

    python examples/quickstart/quickstart.py --steps 100 --recipes bf16,metis -- --hidden-size 256

One idea: it only does what a user would do on the command line (`tools/train_tokenizer.py`,
`tools/preprocess_data.py`, `pretrain_llama.py`), once per recipe with the same seed and the same data order,
and reads back what those wrote. Options after `--` go to the trainer as they are and win over the ones here.

Traps: two data-parallel ranks with a thread each are faster on two cores than one process with two threads,
so that is the layout whatever the machine; the evaluation interval never divides the number of steps, because
the trainer then evaluates once more at the end for nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from metis.errors import ConfigError, MetisError, report_and_exit  # noqa: E402
from metis.recipes import RECIPES, resolve_recipe  # noqa: E402

DEFAULT_STEPS = 150
DEFAULT_SEED = 1234
DEFAULT_RECIPES = "bf16,nvfp4,metis"
DEFAULT_VOCAB_SIZE = 4096
NUM_RANKS = 2
EVALUATIONS = 5
GLOBAL_BATCH_SIZE = 8
SEQ_LENGTH = 256
MARKER = "quickstart.json"
LEARNING_MARGIN_NATS = 0.25
"""A run passes when its validation loss is below the unigram entropy by more than this."""

MODEL_OPTIONS = {
    "--preset": "tiny",
    "--hidden-size": 128,
    "--ffn-hidden-size": 352,
    "--kv-channels": 16,
    "--seq-length": SEQ_LENGTH,
    "--max-position-embeddings": SEQ_LENGTH,
}
# At 4e-3 the gradient norm of one recipe reached 76 in one step, its GEMMs accurate to 23 dB and more:
# the model itself was on a cliff, and the losses compared that.
SCHEDULE_OPTIONS = {
    "--global-batch-size": GLOBAL_BATCH_SIZE,
    "--micro-batch-size": GLOBAL_BATCH_SIZE // NUM_RANKS,
    "--lr": 2e-3,
    "--min-lr": 2e-4,
    "--lr-decay-style": "cosine",
    "--eval-iters": 8,
    "--log-interval": 10,
    "--num-workers": 0,
    "--device": "cpu",
    "--tokenizer-type": "GPTSentencePieceTokenizer",
    "--split": "95,5,0",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("arguments", f"{message}; see --help")


def parse_arguments(argv: Sequence[str]) -> Namespace:
    """Return the options; `recipes` maps each recipe's name to what `--recipe` takes.

    Raises:
        ConfigError: an unknown option or recipe, or a number out of range.
    """
    parser = _Parser(
        prog="run.sh",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        epilog="Options after -- go to pretrain_llama.py.",
    )
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="training steps per recipe")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of weights, data order and rounding")
    parser.add_argument("--recipes", default=DEFAULT_RECIPES, help="names or files, separated by commas")
    parser.add_argument("--corpus", nargs="+", help="files or folders of text (default: standard library)")
    parser.add_argument("--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE, help="pieces of the tokenizer")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "quickstart", help="folder")
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.trainer_options = argv[cut + 1 :]
    for option, value, least, most in (
        ("--steps", args.steps, 1, 10**6),
        ("--seed", args.seed, 1, 2**31 - 1),
        ("--vocab-size", args.vocab_size, 300, 65_000),
    ):
        if not least <= value <= most:
            raise ConfigError(option, f"must lie between {least} and {most}, got {value}")
    specs = [spec for spec in args.recipes.split(",") if spec]
    args.recipes = {resolve_recipe(spec).name: spec for spec in specs}
    if not specs or len(args.recipes) != len(specs):
        raise ConfigError("--recipes", f"must name each recipe once, got {', '.join(specs) or 'none'}")
    args.output = args.output.resolve()
    return args


def evaluation_interval(steps: int) -> int:
    """Return an interval for about `EVALUATIONS` evaluations that does not divide `steps`."""
    interval = max(2, math.ceil(steps / EVALUATIONS))
    while steps % interval == 0:
        interval += 1
    return interval


@dataclass(slots=True)
class MetricsTail:
    """Reads what has been added to a metrics file, whole lines only."""

    path: Path
    train: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0

    def read(self) -> None:
        """Take in complete new lines."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as stream:
            stream.seek(self._offset)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            record = json.loads(line)
            (self.train if record["kind"] == "train" else self.validation).append(record)

    def describe(self, steps: int, elapsed: float) -> str:
        """Return progress in words: step, loss, tokens/s, validation, time left."""
        from progress import clock_time

        if not self.train:
            return f"starting, {elapsed:.0f} s"
        last, recent = self.train[-1], self.train[-10:]
        seconds = statistics.median(record["step_seconds"] for record in recent)
        loss = "not finite" if last["lm_loss"] is None else f"{last['lm_loss']:.3f}"
        text = (
            f"step {last['iteration']}/{steps}  loss {loss}  "
            f"{statistics.median(record['tokens_per_second'] for record in recent):.0f} tokens/s"
        )
        if self.validation and self.validation[-1]["validation_loss"] is not None:
            text += f"  validation {self.validation[-1]['validation_loss']:.3f}"
        return f"{text}  {clock_time(seconds * (steps - last['iteration']))} left"


def training_command(args: Namespace, spec: str, folder: Path, data: Any) -> list[str]:
    """Return the command that trains one recipe in `folder`; torchrun is a module of this Python."""
    options = {
        **MODEL_OPTIONS,
        **SCHEDULE_OPTIONS,
        "--train-iters": args.steps,
        "--lr-warmup-iters": min(20, args.steps // 10),
        "--eval-interval": evaluation_interval(args.steps),
        "--seed": args.seed,
        "--data-path": data.prefix,
        "--tokenizer-model": data.tokenizer_model,
        "--recipe": spec if spec in RECIPES else Path(spec).resolve(),
        "--metrics-file": folder / "metrics.jsonl",
        "--tensorboard-dir": folder / "tensorboard",
        "--save": folder / "checkpoint",
        "--save-interval": args.steps,
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS)]
    flags = [text for option, value in options.items() for text in (option, str(value))]
    return [sys.executable, *launcher, "pretrain_llama.py", *flags, *args.trainer_options]


def fresh_folder(folder: Path) -> None:
    """Make an empty run folder; one that the quickstart made before is replaced.

    Raises:
        ConfigError: it holds something else, or cannot be written.
    """
    try:
        if folder.exists():
            if any(folder.iterdir()) and not (folder / MARKER).exists():
                raise ConfigError(
                    "--output", f"{folder} must be empty or a run of the quickstart; choose another folder"
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError("--output", f"{folder} must be writable, got {error.strerror}") from error


def train(args: Namespace, name: str, label: str, data: Any, status: Any) -> dict[str, Any]:
    """Train one recipe and return its entry of the summary, without the comparison."""
    from progress import run_logged
    from report import describe_run

    folder = args.output / name
    fresh_folder(folder)
    command = training_command(args, args.recipes[name], folder, data)
    (folder / MARKER).write_text(json.dumps({"command": command}, indent=2) + "\n")
    tail = MetricsTail(folder / "metrics.jsonl")

    def tick(elapsed: float) -> None:
        tail.read()
        status.update(f"{label} {tail.describe(args.steps, elapsed)}")

    seconds = run_logged(
        command, log=folder / "log.txt", cwd=REPOSITORY, tick=tick, environment={"OMP_NUM_THREADS": "1"}
    )
    tail.read()
    run = describe_run(name, folder, tail, seed=args.seed, seconds=seconds)
    loss = run["validation_loss"]
    status.say(
        f"{label} {run['steps']} steps in {seconds:.0f} s, "
        + ("validation loss not finite" if loss is None else f"validation loss {loss:.4f}")
    )
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart; 0 only if every recipe learned more than the frequencies of the tokens."""
    import report
    from corpus import prepare
    from progress import RunFailed, StatusLine

    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        report.require_matplotlib()
        status = StatusLine()
        data = prepare(args.output / "data", args.corpus, args.vocab_size, status)
        runs = []
        for number, name in enumerate(args.recipes, start=1):
            runs.append(train(args, name, f"{name} ({number}/{len(args.recipes)})", data, status))
    except MetisError as error:
        report_and_exit(error)
    except RunFailed as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    summary = report.summarise(runs, data.unigram_entropy_nats, data.description)
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    report.plot(args.output, summary)
    print(report.table(summary))
    print(
        f"\n{args.output}: summary.json, loss.png; per recipe log.txt, metrics.jsonl, tensorboard, checkpoint"
    )
    problems = report.problems(summary, LEARNING_MARGIN_NATS)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the trainer is stopped too
    sys.exit(main())

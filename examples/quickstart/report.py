"""What came out of the quickstart's runs: a summary for programs, a table for people, a picture.

One idea: every number is read from a file that the trainer wrote (metrics, log, checkpoint); all that is made
here are differences and medians.

Trap: the recipes share the seed and the data order, so their losses move together from batch to batch; the
difference to bf16 is far less noisy than either curve, and is still one seed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

from metis import __version__
from metis.errors import ConfigError

BASELINE = "bf16"
NOTE = "one seed of a tiny model ranks nothing; compare recipes at scale and over several seeds"
REPOSITORY = Path(__file__).resolve().parents[2]
_PARAMETERS = re.compile(r"number of parameters on .* rank \(\d+, \d+\): (\d+)")
_QUANTIZED = re.compile(r"quantised linears: (\d+) of (\d+)")


def require_matplotlib() -> None:
    """Raise ConfigError when the picture could not be drawn, before hours of training."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "quickstart", "needs matplotlib, which is not installed; run pip install -e '.[plots]'"
        )


def describe_run(name: str, folder: Path, metrics: Any, *, seed: int, seconds: float) -> dict[str, Any]:
    """Return one entry of `summary["recipes"]` without the gaps.

    `metrics` has the records `train` and `validation`. The loss is in nats per token (None when not finite),
    `tokens_per_second` the median over the steps after the first, `seconds` includes starting and saving.
    """
    log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    quantized = _QUANTIZED.search(log)
    steady = metrics.train[1:] or metrics.train
    last = metrics.train[-1]
    return {
        "recipe": name,
        "validation_loss": metrics.validation[-1]["validation_loss"] if metrics.validation else None,
        "gap_nats": None,
        "gap_percent": None,
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in steady),
        "parameters": sum(int(count) for count in _PARAMETERS.findall(log)),
        "tokens": last["consumed_tokens"],
        "seed": seed,
        "steps": last["iteration"],
        "train_loss_last": last["lm_loss"],
        "seconds": seconds,
        "checkpoint": _latest_checkpoint(folder / "checkpoint"),
        "quantized_linears": int(quantized.group(1)) if quantized else None,
    }


def _latest_checkpoint(folder: Path) -> str | None:
    saved = sorted(folder.glob("iter_*"))
    return str(saved[-1]) if saved else None


def summarise(runs: list[dict[str, Any]], entropy: float, corpus: dict[str, Any]) -> dict[str, Any]:
    """Return `summary.json`: the runs with their gaps to bf16 (None without it), the data, the versions."""
    losses = {run["recipe"]: run["validation_loss"] for run in runs}
    base = losses.get(BASELINE)
    recipes = []
    for run in runs:
        gap = None if base is None or run["validation_loss"] is None else run["validation_loss"] - base
        recipes.append(run | {"gap_nats": gap, "gap_percent": None if gap is None else 100 * gap / base})
    return {
        "recipes": recipes,
        "unigram_entropy_nats": entropy,
        "corpus": corpus,
        "note": NOTE,
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers; `commit` is None outside a git checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit and _git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    packages = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "numpy")}
    return {
        "python": platform.python_version(),
        **packages,
        "metis": __version__,
        "platform": platform.platform(),
        "commit": commit,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def problems(summary: dict[str, Any], margin: float) -> list[str]:
    """Return one sentence per recipe that did not learn: loss not finite, or not below entropy - margin."""
    entropy = summary["unigram_entropy_nats"]
    found = []
    for run in summary["recipes"]:
        loss = run["validation_loss"]
        if loss is None:
            found.append(f"{run['recipe']}: validation loss must be there and finite; see its log.txt")
        elif not loss < entropy - margin:
            found.append(
                f"{run['recipe']}: validation loss must be below the unigram entropy {entropy:.3f} by more "
                f"than {margin} nats, got {loss:.3f} after {run['steps']} steps; train longer (--steps)"
            )
    return found


def table(summary: dict[str, Any]) -> str:
    """Return the table for the terminal, with the note below it."""

    def show(value: float | None, pattern: str) -> str:
        return "-" if value is None else format(value, pattern)

    rows = [
        ["recipe", "validation loss", "gap (nats)", "gap (%)", "tokens/s", "quantised linears", "seconds"]
    ]
    for run in summary["recipes"]:
        rows.append(
            [
                run["recipe"],
                show(run["validation_loss"], ".4f"),
                show(run["gap_nats"], "+.4f"),
                show(run["gap_percent"], "+.2f"),
                show(run["tokens_per_second"], ".0f"),
                show(run["quantized_linears"], "d"),
                show(run["seconds"], ".0f"),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    first = summary["recipes"][0]
    facts = (
        f"{first['parameters'] / 1e6:.2f} M parameters, {first['tokens']} tokens in {first['steps']} steps, "
        f"seed {first['seed']}; unigram entropy of the data {summary['unigram_entropy_nats']:.4f} nats"
    )
    return "\n".join(["", *lines, "", facts, f"Note: {summary['note']}."])


# --- picture -----------------------------------------------------------------------------------------------


def smoothed(values: list[float], window: int) -> list[float]:
    """Return means over the last `window` values (fewer at the start)."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def _curves(folder: Path, name: str) -> tuple[dict[int, float], dict[int, float]]:
    """Train and validation losses by step; steps without a finite loss are left out."""
    train: dict[int, float] = {}
    validation: dict[int, float] = {}
    for line in (folder / name / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        curve, key = (train, "lm_loss") if record["kind"] == "train" else (validation, "validation_loss")
        if record[key] is not None:
            curve[record["iteration"]] = record[key]
    return train, validation


def plot(folder: Path, summary: dict[str, Any]) -> None:
    """Draw `loss.png`: losses of every recipe, and their difference to bf16 when it was run with others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [run["recipe"] for run in summary["recipes"]]
    curves = {name: _curves(folder, name) for name in names}
    others = [name for name in names if name != BASELINE] if BASELINE in names else []
    figure, panels = pyplot.subplots(
        1, 2 if others else 1, figsize=(12 if others else 6.5, 4.5), squeeze=False
    )
    window = max(1, summary["recipes"][0]["steps"] // 30)
    losses = panels[0][0]
    for index, name in enumerate(names):
        train, validation = curves[name]
        losses.plot(list(train), smoothed(list(train.values()), window), color=f"C{index}", label=name)
        losses.plot(list(validation), list(validation.values()), "o", color=f"C{index}", markersize=5)
    losses.axhline(summary["unigram_entropy_nats"], color="gray", linestyle=":", label="unigram entropy")
    losses.set(
        xlabel="step", ylabel="loss (nats per token)", title=f"train (mean of {window}), validation (dots)"
    )
    losses.legend()
    if others:
        gap = panels[0][1]
        base_train, base_validation = curves[BASELINE]
        gap.axhline(0, color="C" + str(names.index(BASELINE)), linewidth=1, label=BASELINE)
        for name in others:
            color, (train, validation) = f"C{names.index(name)}", curves[name]
            steps = [step for step in train if step in base_train]
            differences = [train[step] - base_train[step] for step in steps]
            gap.plot(steps, smoothed(differences, window), color=color, label=name)
            steps = [step for step in validation if step in base_validation]
            gap.plot(
                steps, [validation[s] - base_validation[s] for s in steps], "o", color=color, markersize=5
            )
        gap.set(xlabel="step", ylabel="loss - bf16 loss (nats)", title="difference to bf16, same batches")
        gap.legend()
    figure.text(0.5, 0.01, "one seed of a tiny model ranks nothing", ha="center", fontsize=9, color="gray")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(folder / "loss.png", dpi=130)
    pyplot.close(figure)

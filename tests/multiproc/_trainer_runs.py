"""Runs the real trainer several times inside one process group, for tests that compare whole runs.

A case is a name and a command line; `run_cases` makes all cases of one world size in one `run_ranks` call and
returns what the metrics files say. Data and tokenizer are made once per session from a few files of the
standard library.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests._distributed import run_ranks, use_fast_checkpoint_queue

RECIPES = ("bf16", "nvfp4", "nvfp4_direct", "metis", "metis_paper", "bf16_reparametrised")
SHAPE = (
    "--preset tiny --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--num-query-groups 2 --kv-channels 16 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine "
    "--eval-iters 0 --num-workers 0 --device cpu --log-interval 100 --seed 7"
)
DEEP = "--num-layers 4"  # two virtual stages on two ranks need four blocks
ONE_RANK = {"one": "", "one_deep": DEEP}
TWO_RANKS = {
    "tp2": "--tensor-model-parallel-size 2",
    "tp2_sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "vpp2": f"--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 {DEEP}",
    "dp2_zero": "--use-distributed-optimizer",
}
FOUR_RANKS = {"tp2_pp2": "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"}


def make_data(folder: Path) -> str:
    """Write a tokenizer (512 pieces) and indexed data under `folder`; return the arguments that name them."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from metis.training.tokenizer import train_sentencepiece

    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [
        path.read_text(encoding="utf-8", errors="ignore") for path in sorted(library.glob("[a-d]*.py"))[:20]
    ]
    model = train_sentencepiece(texts, str(folder / "tokenizer"), 512)
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=model)
    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=np.uint16)
    for text in texts:
        ids = [*pieces.encode(text), pieces.eos_id()]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(folder / "text.idx"))
    return (
        f"--data-path {folder}/text --split 100,0,0 --data-cache-path {folder}/cache "
        f"--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model {model}"
    )


def run_cases(
    world_size: int, data: str, cases: Mapping[str, str], folder: Path, timeout: float = 300.0
) -> dict[str, Any]:
    """Run every case (name -> further arguments) on `world_size` ranks; return name -> outcome of the last
    rank.

    An outcome is {"loss": [...], "grad_norm": [...]} over the iterations in the metrics file. Every case has
    processes of its own: megatron-core makes dozens of gloo groups, whose threads would pile up in one
    process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = {name: (f"{data} {line}", f"{folder}/{name}") for name, line in cases.items()}
    return dict(zip(lines, run_several(world_size, list(lines.values()), timeout), strict=True))


def run_several(world_size: int, runs: list[tuple[str, str]], timeout: float = 300.0) -> list[Any]:
    """Run (arguments, path) pairs that do not depend on each other; two single-rank runs go side by side."""

    def run(item: tuple[str, str]) -> Any:
        return run_ranks(run_one, world_size, *item, timeout=timeout)[world_size - 1]

    with ThreadPoolExecutor(2 if world_size == 1 else 1) as pool:
        return list(pool.map(run, runs))


def run_one(rank: int, world_size: int, line: str, path: str) -> dict[str, Any] | None:
    """Run the trainer once in the process group that exists; the metrics file is `path`.jsonl."""
    import contextlib
    import io

    from metis.training.initialize import initialize, shut_down

    if "--save " in line:
        use_fast_checkpoint_queue()
    args = parse(world_size, f"{line} --metrics-file {path}.jsonl")
    with contextlib.redirect_stdout(io.StringIO()):
        initialize(args)
        from metis.training.loop import pretrain

        try:
            pretrain(args)
        finally:
            shut_down(keep_process_group=True)
    return read_metrics(f"{path}.jsonl") if rank == world_size - 1 else None


def parse(world_size: int, line: str) -> Any:
    """Return validated arguments of a command line on top of the shape that all cases share."""
    from metis.training.arguments import parse_args, validate_args
    from metis.training.preflight import preflight

    args = parse_args([*SHAPE.split(), *line.split()])
    validate_args(args, world_size)
    preflight(args)
    return args


def read_metrics(path: str) -> dict[str, list[float]]:
    """Return the losses and gradient norms of a metrics file, in order."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["iteration"] for line in train] == list(range(1, len(train) + 1))
    return {"loss": [line["lm_loss"] for line in train], "grad_norm": [line["grad_norm"] for line in train]}

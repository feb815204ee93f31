"""Iterators against their definition: which dataset sample appears in which microbatch of which rank.

Oracle: megatron-core's own dataset, built apart from ours and indexed by the stream position; for context
parallelism, megatron-core's split of the same batch.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from metis.errors import ConfigError, ShapeError
from metis.training.batches import MicrobatchSampler, SequentialOrder, ShuffledOrder
from metis.training.data import build_data_iterators, build_datasets, ensure_process_group, token_entropy_nats
from metis.training.data_source import checked_source, num_iterations, sample_counts
from metis.training.loop import _final_evaluation
from metis.training.tokenizer import build_tokenizer
from tests._distributed import run_ranks

VOCAB = 60
SEQ = 16
# Entropies are sums of at most VOCAB float64 terms; measured worst case 2e-16.
ENTROPY_TOLERANCE = 1e-12
NO_MASK = {"reset_attention_mask": True, "create_attention_mask_in_dataloader": False}


@dataclass
class Progress:
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    data_order: str = ""


def write_dataset(prefix: Path, num_documents: int, seed: int = 0, mean_length: int = 40) -> str:
    rng = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(VOCAB + 1))
    for _ in range(num_documents):
        ids = rng.integers(0, VOCAB, size=int(rng.integers(2, 2 * mean_length))).tolist()
        ids.append(VOCAB)
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def make_args(data_path: list[str] | None = None, **changes: object) -> Namespace:
    values = dict(
        data_path=data_path, split="80,10,10", train_data_path=None, valid_data_path=None,
        test_data_path=None,
        data_args_path=None, per_split_data_args_path=None, mock_data=False, data_cache_path=None,
        num_workers=0, dataloader_type=None, reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask_in_dataloader=True, mmap_bin_files=True,
        num_dataset_builder_threads=1, full_validation=False, skip_train=False, seed=1234, seq_length=SEQ,
        micro_batch_size=2, global_batch_size=4, train_iters=10, train_samples=None, rampup_batch_size=None,
        eval_iters=2, eval_interval=5, virtual_pipeline_model_parallel_size=None, device="cpu",
        tokenizer_type="NullTokenizer", vocab_size=VOCAB, rank=0,
    )  # fmt: skip
    assert set(changes) <= set(values)
    return Namespace(**{**values, **changes})


def build(args: Namespace, progress: Progress | None = None):
    return build_data_iterators(args, progress or Progress(), build_tokenizer(args))


def take(stream, count: int) -> list[dict]:
    return [next(stream) for _ in range(count)]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "corpus_text_document", 60)


def test_train_microbatches_are_the_datasets_samples_in_order(prefix):
    args = make_args([prefix])
    train, valid, test = build(args)
    dataset = build_datasets(args, build_tokenizer(args), sample_counts(args)).datasets[0]
    assert isinstance(dataset, GPTDataset)
    for number, batch in enumerate(take(train, 20)):
        assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids", "first_sample"}
        assert batch["first_sample"] == 2 * number
        for row in range(2):
            sample = dataset[2 * number + row]
            for name in ("tokens", "labels", "loss_mask", "position_ids"):
                assert torch.equal(batch[name][row], sample[name])
    assert batch["tokens"].shape == (2, SEQ) and batch["tokens"].dtype == torch.int64
    assert next(valid)["first_sample"] == 0 and next(test)["first_sample"] == 0


def test_resume_at_any_consumed_count_continues_the_stream(prefix):
    whole = take(build(make_args([prefix]))[0], 20)
    for consumed in (4, 18, 36):
        rest = take(build(make_args([prefix]), Progress(consumed))[0], 20 - consumed // 2)
        for expected, got in zip(whole[consumed // 2 :], rest, strict=True):
            assert got["first_sample"] == expected["first_sample"]
            assert torch.equal(got["tokens"], expected["tokens"])


def test_a_resume_in_another_order_is_told(prefix, tmp_path, capsys):
    """More iterations keep the order until they need another pass over the data."""
    other = write_dataset(tmp_path / "other", 60, seed=5)
    progress = Progress()
    build(make_args([prefix], train_iters=10), progress)
    first, progress.consumed_train_samples = progress.data_order, 8
    assert len(first) == 16
    build(make_args([prefix], train_iters=11), progress)
    assert progress.data_order == first and "WARNING" not in capsys.readouterr().err
    for path, iterations in ((prefix, 200), (other, 10)):
        progress.data_order = first
        build(make_args([path], train_iters=iterations), progress)
        assert progress.data_order != first
        assert "WARNING: the training samples lie in another order than before" in capsys.readouterr().err
    progress.data_order = ""  # of a checkpoint that does not know it
    build(make_args([prefix]), progress)
    assert "WARNING" not in capsys.readouterr().err


def test_validation_restarts_at_its_own_count_and_wraps_around(prefix):
    _, valid, _ = build(make_args([prefix]))
    whole = take(valid, 30)
    _, resumed, _ = build(make_args([prefix]), Progress(0, 8))
    for expected, got in zip(whole[4:], take(resumed, 26), strict=True):
        assert torch.equal(got["tokens"], expected["tokens"])


def test_worker_processes_change_nothing_even_under_a_torch_function_mode(prefix):
    class Rewrite(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    expected = take(build(make_args([prefix]))[0], 20)
    state = torch.random.get_rng_state()
    with Rewrite():
        got = take(build(make_args([prefix], num_workers=2))[0], 20)
    assert torch.equal(torch.random.get_rng_state(), state), "the loader drew from the global generator"
    for a, b in zip(expected, got, strict=True):
        assert a["first_sample"] == b["first_sample"] and torch.equal(a["tokens"], b["tokens"])


@pytest.mark.parametrize(("mbs", "dp", "consumed"), [(1, 1, 0), (2, 3, 0), (3, 2, 6), (2, 4, 8)])
def test_sampler_gives_microbatch_j_of_rank_d_its_positions(mbs, dp, consumed):
    end = consumed + 5 * mbs * dp + mbs * dp - 1  # one block is incomplete and must be dropped
    for rank in range(dp):
        sampler = MicrobatchSampler(
            SequentialOrder(), consumed=consumed, end=end, micro_batch_size=mbs, dp_rank=rank, dp_size=dp
        )
        got = [[position for position, _ in batch] for batch in sampler]
        first = [consumed + (j * dp + rank) * mbs for j in range(5)]
        assert got == [list(range(start, start + mbs)) for start in first]
        assert list(sampler.first_samples()) == first


def test_cyclic_order_is_a_new_permutation_per_pass_and_layout_free():
    order = ShuffledOrder(7, seed=3)
    passes = [[order(p) for p in range(7 * n, 7 * n + 7)] for n in range(3)]
    assert all(sorted(p) == list(range(7)) for p in passes)
    assert len({tuple(p) for p in passes}) == 3
    assert [ShuffledOrder(7, seed=3)(p) for p in range(10, 14)] == (passes[1] + passes[2])[3:7]
    assert [ShuffledOrder(7, seed=4)(p) for p in range(7)] != passes[0]


def test_cyclic_iterator_reads_the_permutation(prefix):
    args = make_args([prefix], dataloader_type="cyclic")
    dataset = build_datasets(args, build_tokenizer(args), sample_counts(args)).datasets[0]
    batch = take(build(args)[0], 3)[2]
    order = ShuffledOrder(len(dataset), seed=1234)
    assert batch["first_sample"] == 4
    assert torch.equal(batch["tokens"][1], dataset[order(5)]["tokens"])


def test_full_validation_reads_every_sample_once_per_pass(prefix):
    args = make_args([prefix], full_validation=True, eval_iters=1)
    _, valid, _ = build(args)
    dataset = build_datasets(args, build_tokenizer(args), (40, None, 4)).datasets[1]
    assert args.eval_iters == math.ceil(len(dataset) / args.global_batch_size)
    for _ in range(2):
        rows = [
            row
            for b in take(valid, 2 * args.eval_iters)
            for row in zip(b["tokens"], b["loss_mask"], strict=True)
        ]
        for index, (tokens, loss_mask) in enumerate(rows):
            if index < len(dataset):
                assert torch.equal(tokens, dataset[index]["tokens"]) and bool(loss_mask.all())
            else:
                assert not loss_mask.any(), "padding must not count"


@pytest.mark.parametrize("per_split", [False, True])
def test_full_validation_of_a_weighted_blend_reads_each_dataset_once(tmp_path, per_split):
    ensure_process_group()
    a, b = (write_dataset(tmp_path / name, 40, seed) for seed, name in enumerate("ab"))
    weighted, changes = ["0.9", a, "0.1", b], {}
    if per_split:
        changes = dict(split=None, train_data_path=weighted, valid_data_path=weighted)
    args = make_args(None if per_split else weighted, full_validation=True, eval_iters=1, **changes)
    args.train_iters = 100  # 0.9 of 400 samples repeat dataset a
    train, valid, test = build(args)
    counts = sample_counts(make_args(train_iters=100, full_validation=True, eval_iters=1))
    got = build_datasets(args, build_tokenizer(args), counts).datasets[1]
    config = [dict(valid_data_path=[p], split=None) if per_split else dict(data_path=[p]) for p in (a, b)]
    parts = [
        build_datasets(c, build_tokenizer(c), (0, None, 0)).datasets[1]
        for c in (make_args(full_validation=True, skip_train=True, train_iters=0, **c) for c in config)
    ]
    expected = sorted(part[i]["tokens"].tolist() for part in parts for i in range(len(part)))
    assert sorted(got[i]["tokens"].tolist() for i in range(len(got))) == expected
    assert args.eval_iters == math.ceil(len(expected) / args.global_batch_size)
    assert next(valid)["tokens"].shape == (2, SEQ) and len(take(train, 200)) == 200
    assert (test is None) == per_split


def test_full_validation_leaves_the_test_set_its_number_of_iterations(prefix):
    class FakeRun:
        def evaluate(self, data, *, where, to_metrics):
            evaluated.append((data is self.test_data, args.eval_iters))

    evaluated: list[tuple[bool, int]] = []
    args, run = make_args([prefix], split="50,40,10", full_validation=True, eval_iters=1), FakeRun()
    run.args, run.state = args, Namespace(iteration=3)
    _, run.valid_data, run.test_data = build(args)
    one_pass = args.eval_iters
    _final_evaluation(run)
    assert one_pass > 1 and evaluated == [(False, one_pass), (True, 1)]


def test_an_empty_list_of_a_split_is_no_data(tmp_path, prefix):
    (tmp_path / "blend.json").write_text(json.dumps({"train": [prefix], "valid": [prefix], "test": []}))
    args = make_args(split=None, per_split_data_args_path=str(tmp_path / "blend.json"))
    train, valid, test = build(args)
    assert next(train) and next(valid) and test is None


def test_a_split_without_tokens_is_an_error(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.uint16)
    for length in (20, 20, 20, 20, 0):
        builder.add_document([1] * length, [length])
    builder.finalize(str(tmp_path / "d.idx"))
    args = make_args([str(tmp_path / "d")], split="80,20,0")
    with pytest.raises(ConfigError, match=r"valid part of .* must hold tokens, got 1 documents without any"):
        checked_source(args, (4, 4, 0))
    short = write_dataset(tmp_path / "short", 3, mean_length=4)
    train, _, _ = build(make_args([short], split="1", eval_iters=0, train_iters=2, seq_length=64))
    assert len(take(train, 4)) == 4, "documents shorter than a sample repeat"


def test_shares_may_be_separated_by_slashes(prefix):
    slashes, commas = (build(make_args([prefix], split=split))[1] for split in ("80/10/10", "80,10,10"))
    assert torch.equal(next(slashes)["tokens"], next(commas)["tokens"])


def test_blend_with_weights_repeats_and_without_weights_runs_out(tmp_path):
    a, b = (write_dataset(tmp_path / name, 12, seed) for seed, name in enumerate("ab"))
    ensure_process_group()
    train, _, _ = build(make_args(["0.75", a, "0.25", b], split="100,0,0", eval_iters=0, train_iters=100))
    assert len(take(train, 200)) == 200
    args = make_args([a, b], split="100,0,0", eval_iters=0, train_iters=1000)
    with pytest.raises(ConfigError, match=r"holds \d+ samples of 16 tokens, the run asks for 4000"):
        build(args)
    tokens = [np.fromfile(p + ".bin", dtype=np.uint16).size for p in (a, b)]
    one_pass = sum((t - 1) // SEQ for t in tokens)
    train, _, _ = build(make_args([a, b], split="100,0,0", eval_iters=0, train_iters=1))
    assert len(take(train, 2)) == 2  # the size is capped at what is asked for
    args.train_iters = one_pass // 4
    assert len(take(build(args)[0], args.train_iters * 2)) == args.train_iters * 2


def test_exhausted_training_stream_says_so(prefix):
    train, valid, _ = build(make_args([prefix], train_iters=2, eval_iters=0))
    assert valid is None
    with pytest.raises(ConfigError, match="training samples are consumed"):
        take(train, 10_000)


def test_per_split_paths_and_files_name_the_same_data(tmp_path):
    a, b = (write_dataset(tmp_path / name, 12, seed) for seed, name in enumerate("ab"))
    direct = build(make_args(split=None, train_data_path=[a], valid_data_path=[b]))
    (tmp_path / "blend.json").write_text(json.dumps({"train": [a], "valid": [b]}))
    by_file = build(make_args(split=None, per_split_data_args_path=str(tmp_path / "blend.json")))
    assert direct[2] is None and by_file[2] is None
    for x, y in zip(direct[:2], by_file[:2], strict=True):
        assert torch.equal(next(x)["tokens"], next(y)["tokens"])
    (tmp_path / "blend.txt").write_text(f"1.0 {a}\n")
    ensure_process_group()
    train = build(make_args(split="100,0,0", eval_iters=0, data_args_path=str(tmp_path / "blend.txt")))[0]
    assert next(train)["tokens"].shape == (2, SEQ)


def test_reset_attention_mask_separates_documents(prefix):
    args = make_args([prefix], reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
    for batch in take(build(args)[0], 10):
        assert (
            batch["attention_mask"].shape == (2, 1, SEQ, SEQ) and batch["attention_mask"].dtype == torch.bool
        )
        for tokens, mask, positions, loss in zip(
            batch["tokens"],
            batch["attention_mask"][:, 0],
            batch["position_ids"],
            batch["loss_mask"],
            strict=True,
        ):
            ends = tokens == VOCAB
            document = ends.cumsum(0) - ends.long()
            index = torch.arange(SEQ)
            allowed = (document[:, None] == document[None, :]) & (index[None, :] <= index[:, None])
            assert torch.equal(mask, ~allowed)
            assert torch.equal(loss == 0, ends)
            starts = torch.stack([index[document == d].min() for d in document])
            assert torch.equal(positions, index - starts)


def test_mock_data_needs_no_files():
    train, valid, test = build(make_args(mock_data=True, split=None))
    assert int(next(train)["tokens"].max()) <= VOCAB
    assert valid is not None and test is not None


def test_sample_counts_are_the_reference_trainers():
    assert sample_counts(make_args(train_iters=10, eval_interval=4, eval_iters=3)) == (40, 36, 12)
    assert sample_counts(make_args(train_samples=100, train_iters=None)) == (100, 48, 8)
    ramp = make_args(
        train_iters=None,
        train_samples=100,
        global_batch_size=16,
        micro_batch_size=4,
        rampup_batch_size=["4", "4", "48"],
    )
    # 4 batches of 4, 2 of 8 and 2 of 12 up to sample 56, where the ramp has ended; then 44 // 16.
    sizes, consumed = [], 0
    while consumed <= 48:
        sizes.append(min(16, 4 + consumed // 16 * 4))
        consumed += sizes[-1]
    assert num_iterations(ramp) == len(sizes) + (100 - consumed) // 16


def test_token_entropy_equals_the_definition(tmp_path):
    prefix = write_dataset(tmp_path / "d", 20)
    ids = np.fromfile(prefix + ".bin", dtype=np.uint16).tolist()
    expected = -sum(ids.count(v) / len(ids) * math.log(ids.count(v) / len(ids)) for v in set(ids))
    assert abs(token_entropy_nats(prefix, VOCAB + 1) - expected) < ENTROPY_TOLERANCE
    with pytest.raises(ConfigError, match="token id 60"):
        token_entropy_nats(prefix, VOCAB)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_context_parallel_part_equals_megatron_cores(cp_size):
    from megatron.core.utils import get_batch_on_this_cp_rank

    from metis.training.data import batch_on_this_cp_rank

    class Group:
        def __init__(self, rank: int) -> None:
            self.number = rank

        def rank(self) -> int:
            return self.number

        def size(self) -> int:
            return cp_size

    ensure_process_group()
    tokens = torch.arange(2 * SEQ).view(2, SEQ)
    mask = torch.rand(2, 1, SEQ, SEQ, generator=torch.Generator().manual_seed(0)) < 0.5
    for rank in range(cp_size):
        got = batch_on_this_cp_rank(
            {"tokens": tokens, "attention_mask": mask, "first_sample": 6}, rank, cp_size
        )
        expected = get_batch_on_this_cp_rank({"tokens": tokens, "attention_mask": mask}, Group(rank))
        assert got["first_sample"] == 6
        assert torch.equal(got["tokens"], expected["tokens"])
        assert torch.equal(got["attention_mask"], expected["attention_mask"])
        if cp_size > 1:
            assert torch.equal(got["position_index"], got["tokens"][0])
    with pytest.raises(ShapeError, match="divisible"):
        batch_on_this_cp_rank({"tokens": tokens[:, :15]}, 0, 2)


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        (dict(data_path=None), "--data-path", "exactly one of"),
        (dict(mock_data=True), "--data-path", "--data-path and --mock-data"),
        (dict(data_path=["nowhere"]), "--data-path", "nowhere.idx does not exist"),
        (dict(data_path=["0.5", "A", "B", "C"]), "--data-path", "a weight before every prefix"),
        (dict(data_path=["-1", "PREFIX"]), "--data-path", "must be positive"),
        (dict(data_path=["nan", "PREFIX"]), "--data-path", "positive and finite, got nan"),
        (dict(data_path=["0.5", "PREFIX", "inf", "PREFIX"]), "--data-path", "positive and finite, got inf"),
        (dict(split="99,1,x"), "--split", "99,1,x"),
        (dict(split="998,1,1"), "--split", "valid part none of the 60 documents"),
        (dict(split="0,50,50"), "--split", "at least one document"),
        (dict(data_path=None, train_data_path=["PREFIX"]), "--split", "drop one"),
        (dict(data_path=None, data_args_path="nowhere"), "--data-args-path", "readable text file"),
        (dict(dataloader_type="external"), "--dataloader-type", "single or cyclic"),
        (NO_MASK, "--reset-attention-mask", "drop one of them"),
        (dict(data_cache_path="/proc/nowhere"), "--data-cache-path", "writable directory"),
        (dict(full_validation=True, seq_length=100_000), "--data-path", "fewer tokens than one sample"),
    ],
)  # fmt: skip
def test_wrong_data_options_end_in_one_error(prefix, changes, where, words):
    changes = {
        k: [prefix if i == "PREFIX" else i for i in v] if isinstance(v, list) else v
        for k, v in changes.items()
    }
    args = make_args(**{"data_path": [prefix], **changes})
    with pytest.raises(ConfigError) as error:
        build(args)
    assert error.value.where == where and words in error.value.message


def test_truncated_index_is_an_error(tmp_path):
    prefix = write_dataset(tmp_path / "d", 12)
    data = Path(prefix + ".idx").read_bytes()
    Path(prefix + ".idx").write_bytes(data[:-9])
    with pytest.raises(ConfigError, match="complete Megatron index"):
        build(make_args([prefix]))


def read_under_two_layouts(rank: int, world_size: int, prefix: str) -> dict[str, list]:
    from megatron.core import parallel_state

    result = {}
    for name, stages in (("dp", 1), ("pp", world_size)):
        parallel_state.initialize_model_parallel(1, stages)
        train, _, _ = build(make_args([prefix], global_batch_size=6))
        result[name] = [
            (b["first_sample"], b["tokens"].tolist() if "tokens" in b else None) for b in take(train, 6)
        ]
        virtual = build(make_args([prefix], virtual_pipeline_model_parallel_size=2))[0]
        result[name + " chunks"] = ["tokens" in next(stream) for stream in virtual]
        parallel_state.destroy_model_parallel()
    try:
        build(make_args([prefix], data_cache_path="/proc/nowhere"))
    except ConfigError as error:
        result["error"] = str(error)
    return result


def test_ranks_read_their_part_and_agree_on_errors(prefix):
    world = 3
    results = run_ranks(read_under_two_layouts, world, prefix)
    args = make_args([prefix], global_batch_size=6)
    whole = [(b["first_sample"], b["tokens"].tolist()) for b in take(build(args)[0], 6 * world)]
    for rank, result in enumerate(results):
        assert result["dp"] == whole[rank::world], "rank d reads microbatches d, d + dp, ..."
        middle = 0 < rank < world - 1
        assert result["pp"] == [(first, None if middle else tokens) for first, tokens in whole[:6]]
        assert result["pp chunks"] == [rank == 0, rank == world - 1]
        assert "--data-cache-path: must be a writable directory" in result["error"]

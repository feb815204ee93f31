"""Messages beside products: exchanges deliver what collectives do, and linears that use them compute what
megatron-core's own do.

Oracles: rows that every rank can make by itself; the engine's linears on the same ranks, bitwise, with whole
numbers whose sums are exact in any order. Memory that GPUs share is files here, and streams are order;
between GPUs: `tests/gpu/check_gpu.py two --parts tp2-overlap`.
"""

from __future__ import annotations

import copy
import io
import os
from argparse import Namespace
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from metis import exchange as exchanges
from metis.errors import ConfigError
from metis.exchange import (
    MessageExchange,
    PeerExchange,
    gathered_product,
    others_of,
    scattered_product,
    total_of,
)
from tests._distributed import run_ranks
from tests.multiproc._trainer_runs import make_data, read_metrics, run_one

ROWS, COLUMNS = 3, 5
SEQUENCE, BATCH, HIDDEN, FFN = 16, 2, 32, 64


def _rows_of(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS).add(100 * rank).to(dtype)


class _NoStream:
    """Stands for a CUDA stream where everything runs in the order in which it is called."""

    def __init__(self, priority: int = 0) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        assert event == "event"

    def record_event(self) -> str:
        return "event"


class _Meeting:
    def barrier(self, channel: int, timeout_ms: int) -> None:
        assert channel in (0, 1) and timeout_ms == 600_000
        dist.barrier()


def _use_shared_files(folder: str, rank: int, world_size: int) -> None:
    """Let `PeerExchange` find memory of every rank in files that all of them map, full of ones."""
    numbers = iter(range(100))

    def shared(num_bytes: int, group: Any) -> Any:
        name = f"{folder}/inbox{next(numbers)}"
        Path(f"{name}.{rank}").write_bytes(b"\xff" * num_bytes)
        dist.barrier()
        files = [f"{name}.{other}" for other in range(world_size)]
        memory = [torch.from_file(file, True, num_bytes, dtype=torch.uint8) for file in files]
        return exchanges._Inbox(num_bytes, memory, _Meeting())

    exchanges._Inbox.shared = shared  # in this process only, as all that follows
    torch.cuda.Stream = _NoStream
    torch.cuda.stream = nullcontext
    torch.cuda.current_stream = _NoStream
    torch.cuda.is_current_stream_capturing = lambda: False


def _exchange_of(kind: str, group: Any, folder: str) -> Any:
    if kind == "messages":
        return MessageExchange(group)
    _use_shared_files(folder, dist.get_rank(), dist.get_world_size())
    return PeerExchange(group)


def _exchanged(rank: int, world_size: int, kind: str, folder: str) -> dict[str, torch.Tensor]:
    found = {}
    exchange = _exchange_of(kind, dist.group.WORLD, folder)
    assert (exchange.rank, exchange.size) == (rank, world_size)
    assert copy.deepcopy(exchange) is exchange
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        gathering = exchange.gather(_rows_of(rank, dtype))
        found[f"gathered {dtype}"] = gathering.wait().clone()
        scattering = exchange.scatter((ROWS, COLUMNS), dtype)
        for other in others_of(exchange):
            scattering.send(other, _rows_of(10 * rank + other, dtype))
        found[f"scattered {dtype}"] = scattering.finish(_rows_of(10 * rank + rank, dtype))
        rest = exchange.gather(_rows_of(rank, dtype) + 1, whole=False).wait().unflatten(0, (world_size, -1))
        found[f"others {dtype}"] = torch.stack([rest[other] for other in sorted(others_of(exchange))])
        place = exchange.own_place(_rows_of(rank, dtype).nbytes, torch.device("cpu"))
        place.copy_(_rows_of(rank, dtype).view(-1).view(torch.uint8))
        found[f"placed {dtype}"] = exchange.gather(place).wait().clone().view(dtype).view(-1, COLUMNS)
    large = torch.full((2**20, 3), float(rank))
    found["large"] = exchange.gather(large).wait()[:: 2**20].clone()
    return found


@pytest.mark.parametrize("kind", ["messages", "peers"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_exchange_delivers_rows_in_rank_order_and_sums_for_each_rank(
    world_size: int, kind: str, tmp_path: Path
) -> None:
    for rank, found in enumerate(run_ranks(_exchanged, world_size, kind, str(tmp_path))):
        assert torch.equal(found["large"], torch.arange(world_size)[:, None].expand(-1, 3).float())
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            expected = torch.cat([_rows_of(sender, dtype) for sender in range(world_size)])
            assert torch.equal(found[f"gathered {dtype}"], expected)
            assert torch.equal(found[f"placed {dtype}"], expected)
            others = [_rows_of(sender, dtype) + 1 for sender in range(world_size) if sender != rank]
            assert torch.equal(found[f"others {dtype}"], torch.stack(others))
            pieces = [_rows_of(10 * sender + rank, dtype) for sender in range(world_size)]
            wide = torch.stack([piece.double() for piece in pieces]).sum(dim=0)
            assert torch.equal(found[f"scattered {dtype}"], wide.to(dtype))


def test_every_other_rank_is_sent_to_once_and_no_two_send_to_the_same() -> None:
    class Place:
        def __init__(self, rank: int, size: int) -> None:
            self.rank, self.size = rank, size

    for size in (2, 3, 8):
        orders = [others_of(Place(rank, size)) for rank in range(size)]  # type: ignore[arg-type]
        for rank, order in enumerate(orders):
            assert sorted([*order, rank]) == list(range(size))
        assert all(len(set(turn)) == size for turn in zip(*orders, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_are_rounded_once(dtype: torch.dtype) -> None:
    pieces = [torch.tensor([value], dtype=dtype) for value in (1024.0, 3.0, 3.0, 3.0)]
    by_steps = ((pieces[0] + pieces[1]) + pieces[2]) + pieces[3]
    assert total_of(pieces) == torch.tensor([1033.0]).to(dtype)
    assert dtype != torch.bfloat16 or by_steps != total_of(pieces)
    assert pieces[0] == 1024  # not added to in place


class _Recorder:
    """Stands for the exchange of one rank among several, and writes down in which order it is used."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.log: list[Any] = []

    def gather(self, rows: torch.Tensor, *, whole: bool = True) -> Any:
        self.log.append("gather")
        self.every = torch.cat([rows if whole or r != self.rank else rows * 0 for r in range(self.size)])
        return self

    def wait(self) -> torch.Tensor:
        self.log.append("wait")
        return self.every

    def scatter(self, shape: Any, dtype: torch.dtype) -> Any:
        self.log.append("scatter")
        return self

    def send(self, rank: int, rows: torch.Tensor) -> None:
        self.log.append(("send", rank, rows.clone()))

    def finish(self, own: torch.Tensor) -> torch.Tensor:
        self.log.append("finish")
        return own


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_gathered_product_begins_with_the_own_rows(rank: int) -> None:
    exchange, rows = _Recorder(rank, 4), torch.arange(6.0).view(2, 3) + 1
    out, seen = torch.zeros(8, 3), []

    def multiply(some: torch.Tensor, place: torch.Tensor) -> None:
        exchange.log.append(some.shape[0])
        seen.append(some.data_ptr() == rows.data_ptr())
        place.copy_(2 * some)

    every = gathered_product(exchange, rows, out, multiply)  # type: ignore[arg-type]
    assert exchange.log[:3] == ["gather", 2, "wait"] and seen == [True, *[False] * (len(seen) - 1)]
    assert torch.equal(out, 2 * every)


@pytest.mark.parametrize(("least", "sizes"), [(1, [2, 2, 2, 2]), (4, [4, 2, 2]), (100, [4, 2, 2])])
def test_a_scattered_product_ends_with_the_own_rows(
    least: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of 4: those of ranks 2 and 3, together where few rows are multiplied together, then of 0, then
    its own.
    """
    monkeypatch.setattr(exchanges, "MIN_ROWS", least)
    exchange, left = _Recorder(1, 4), torch.arange(24.0).view(8, 3)
    multiplied = []

    def multiply(rows: slice, place: torch.Tensor) -> None:
        multiplied.append(rows.stop - rows.start)
        exchange.log.append(rows)
        place.copy_(left[rows])

    own = scattered_product(exchange, torch.zeros(8, 3), multiply)  # type: ignore[arg-type]
    assert torch.equal(own, left[2:4]) and multiplied == sizes
    assert exchange.log[0] == "scatter" and exchange.log[-2:] == [slice(2, 4), "finish"]
    sent = [entry for entry in exchange.log if isinstance(entry, tuple)]
    assert [rank for _, rank, _ in sent] == [2, 3, 0]
    assert all(torch.equal(rows, left[2 * rank : 2 * rank + 2]) for _, rank, rows in sent)


def _linears(rank: int, world_size: int, kind: str, folder: str) -> dict[str, list[torch.Tensor]]:
    """Return (y, dx, dw, db) of the engine's linears and of ours, by kind and case."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_patches import patch_weight_gradients
    from metis.mcore.overlapped_linear import OverlappedColumnParallelLinear, OverlappedRowParallelLinear

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1)

    def accumulate(x: torch.Tensor, g: torch.Tensor, main_grad: torch.Tensor) -> None:
        assert x.is_contiguous() and g.is_contiguous()  # as Apex reads them
        main_grad.add_(g.t() @ x)

    patch_weight_gradients(accumulate)
    exchange = _exchange_of(kind, parallel_state.get_tensor_model_parallel_group(), folder)
    found = {}
    for fused in (False, True):
        config = TransformerConfig(
            num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, tensor_model_parallel_size=world_size,
            sequence_parallel=True, gradient_accumulation_fusion=fused,
        )  # fmt: skip
        for kind, engine, ours in (
            ("column", layers.ColumnParallelLinear, OverlappedColumnParallelLinear),
            ("row", layers.RowParallelLinear, OverlappedRowParallelLinear),
        ):
            for who, cls in (("engine", engine), ("ours", ours)):
                sizes = (HIDDEN, FFN) if kind == "column" else (FFN, HIDDEN)
                sides = {"gather_output": False} if kind == "column" else {"input_is_parallel": True}
                linear = cls(
                    *sizes, config=config, init_method=torch.nn.init.zeros_, bias=True, skip_bias_add=False,
                    **sides, **({"exchange": exchange} if who == "ours" else {}),
                )  # fmt: skip
                found[f"{kind} {fused} {who}"] = _pass(linear, kind, rank, world_size, fused)
    return found


def _pass(linear: Any, kind: str, rank: int, world_size: int, fused: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3 + rank)

    def whole_numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float()

    with torch.no_grad():
        linear.weight.copy_(whole_numbers(*linear.weight.shape))
        linear.bias.copy_(whole_numbers(*linear.bias.shape))
    if fused:
        linear.weight.main_grad = torch.ones_like(linear.weight)
        linear.weight.grad_added_to_main_grad = False
    is_column = kind == "column"
    tokens = SEQUENCE // world_size if is_column else SEQUENCE
    x = whole_numbers(tokens, BATCH, HIDDEN if is_column else FFN // world_size).requires_grad_()
    y, _ = linear(x)
    y.backward(whole_numbers(*reversed(y.shape)).permute(2, 1, 0))  # a gradient that is not contiguous
    if fused:
        assert linear.weight.grad_added_to_main_grad
    dw = linear.weight.main_grad if fused else linear.weight.grad
    with torch.no_grad():
        assert torch.equal(linear(x)[0], y)
    assert kind != "column" or not _column_output(linear, x)._is_view()  # the loss overwrites logits
    return [y.detach(), x.grad, dw, linear.bias.grad]


def _column_output(linear: Any, x: torch.Tensor) -> torch.Tensor:
    bias, linear.bias = linear.bias, None
    y = linear(x)[0]
    linear.bias = bias
    return y


@pytest.mark.parametrize(("world_size", "kind"), [(2, "messages"), (4, "messages"), (4, "peers")])
def test_overlapped_linears_compute_what_the_engine_does(world_size: int, kind: str, tmp_path: Path) -> None:
    for found in run_ranks(_linears, world_size, kind, str(tmp_path)):
        for case in ("column False", "column True", "row False", "row True"):
            for name, a, b in zip(
                ("y", "dx", "dw", "db"), found[f"{case} engine"], found[f"{case} ours"], strict=True
            ):
                assert a.abs().max() > 0 and torch.equal(a, b), f"{case}: {name}"


def _frozen(rank: int, world_size: int) -> list[bool]:
    """Return which gradients a frozen weight, or an input that wants none, leaves out."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from metis.mcore.overlapped_linear import OverlappedColumnParallelLinear, OverlappedRowParallelLinear

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1)
    exchange = MessageExchange(parallel_state.get_tensor_model_parallel_group())
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, tensor_model_parallel_size=world_size,
        sequence_parallel=True, gradient_accumulation_fusion=False,
    )  # fmt: skip
    found = []
    for cls, sides, width in (
        (OverlappedColumnParallelLinear, {"gather_output": False}, HIDDEN),
        (OverlappedRowParallelLinear, {"input_is_parallel": True}, HIDDEN // world_size),
    ):
        for wants_dx, wants_dw in ((True, False), (False, True)):
            linear = cls(
                HIDDEN, HIDDEN, config=config, init_method=torch.nn.init.ones_, bias=False,
                skip_bias_add=False, exchange=exchange, **sides,
            )  # fmt: skip
            linear.weight.requires_grad_(wants_dw)
            x = torch.ones(SEQUENCE, BATCH, width, requires_grad=wants_dx)
            linear(x)[0].sum().backward()
            found.append((x.grad is not None) == wants_dx and (linear.weight.grad is not None) == wants_dw)
    return found


def test_only_the_gradients_that_are_wanted_are_made() -> None:
    for found in run_ranks(_frozen, 2):
        assert found == [True] * 4


def _counted(rank: int, world_size: int, line: str, path: str) -> tuple[dict[str, int], list[float]]:
    """Return how many messages of each kind one training step sends, and its loss and gradient norm."""
    count = {"gather": 0, "scatter": 0}
    for kind in count:
        original = getattr(MessageExchange, kind)

        def counting(*args: Any, _kind: str = kind, _original: Any = original, **options: Any) -> Any:
            count[_kind] += 1
            return _original(*args, **options)

        setattr(MessageExchange, kind, counting)
    run_one(rank, world_size, line, path)
    metrics = read_metrics(f"{path}.jsonl")
    return count, [*metrics["loss"], *metrics["grad_norm"]]


NUM_MICROBATCHES, NUM_BLOCKS = 2, 2
STEP_TOLERANCE = 1e-5
"""Of loss and gradient norm in fp32 after one step, with and without; sums over tokens are cut otherwise."""


def test_option_sends_the_messages_of_a_training_step(tmp_path: Path) -> None:
    """Forward of a block gathers twice and scatters twice, backward the other way round and again for wgrad;
    the output layer is one more column-parallel linear. A recipe's linears scatter what bf16 ones do.
    """
    data = make_data(tmp_path)
    shape = "--tensor-model-parallel-size 2 --sequence-parallel --train-iters 1"
    for recipe in ("bf16", "metis"):
        line = f"{data} {shape} --recipe {recipe}"
        (without, expected), _ = run_ranks(_counted, 2, line, str(tmp_path / f"{recipe}0"))
        (count, found), _ = run_ranks(_counted, 2, f"{line} --tp-comm-overlap", str(tmp_path / f"{recipe}1"))
        assert without == {"gather": 0, "scatter": 0}
        assert count["scatter"] == NUM_MICROBATCHES * (4 * NUM_BLOCKS + 1)
        if recipe == "bf16":
            assert count["gather"] == NUM_MICROBATCHES * (6 * NUM_BLOCKS + 2)
        assert max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True)) < STEP_TOLERANCE


def _refusal(rank: int, world_size: int) -> str:
    from metis.training.overlap import resolve_exchange

    try:
        resolve_exchange(Namespace(tp_comm_overlap=True), use_transformer_engine=True)
    except ConfigError as error:
        return str(error)
    return "built"


def test_transformer_engines_linears_are_refused() -> None:
    assert "needs --transformer-impl local" in run_ranks(_refusal, 1)[0]


def _choice(rank: int, world_size: int) -> list[str]:
    """Return what is printed for a group on two hosts, one whose GPUs do not share memory, and one whose do;
    the last is what a launcher that sets one queue of launches is told.
    """
    from megatron.core import parallel_state

    from metis.training import overlap

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    printed: list[str] = []
    overlap.print_rank_0 = printed.append
    args = Namespace(
        tp_comm_overlap=True, device="cuda", distributed_timeout_minutes=1, distributed_backend="nccl",
        rank=rank,
    )  # fmt: skip
    overlap.socket.gethostname = lambda: f"host{rank}"
    exchange = overlap.resolve_exchange(args, False)
    assert isinstance(exchange, MessageExchange)
    overlap.socket.gethostname = lambda: "host"

    def refuse(group: Any, timeout_seconds: float) -> Any:
        if rank == 1:
            raise RuntimeError("no access between devices\nfurther lines")
        return "exchange"

    overlap.PeerExchange = refuse
    torch.cuda.synchronize = lambda: None
    assert isinstance(overlap.resolve_exchange(args, False), MessageExchange)
    overlap.PeerExchange = lambda group, timeout_seconds: f"exchange within {timeout_seconds:.0f} s"
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    with redirect_stderr(io.StringIO()) as told:
        assert overlap.resolve_exchange(args, False) == "exchange within 60 s"
    return [*printed, told.getvalue()]


def test_ranks_that_cannot_share_memory_send_messages_and_say_why() -> None:
    (first, second, third, told), (*_, untold) = run_ranks(_choice, 2)
    assert "by nccl (its ranks are on 2 hosts)" in first
    assert "by nccl (no peer memory: no access between devices)" in second
    assert "by copies into the other GPUs' memory" in third
    assert "WARNING: --tp-comm-overlap: with CUDA_DEVICE_MAX_CONNECTIONS=1" in told and not untold

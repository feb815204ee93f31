"""`--tp-comm-overlap`: how the messages of sequence parallelism travel beside products.

One idea: GPUs of one host that can map each other's memory use it (copies by their copy engines, which take
nothing from a product); whoever cannot sends asynchronous messages by the process group, and says why.
Transformer Engine has an overlap of its own, which is not driven from here.
"""

from __future__ import annotations

import os
import socket
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from metis.errors import ConfigError
from metis.exchange import Exchange, MessageExchange, PeerExchange
from metis.training.outputs import print_rank_0
from metis.training.validation_checks import warn


def resolve_exchange(args: Namespace, use_transformer_engine: bool) -> Exchange | None:
    """Return what carries rows between the ranks of this rank's tensor-parallel group, None where nothing is
    overlapped; call it on every rank. Prints the choice.

    Raises `ConfigError` where `--transformer-impl auto` has chosen Transformer Engine.
    """
    if not args.tp_comm_overlap:
        return None
    if use_transformer_engine:
        raise ConfigError(
            "--tp-comm-overlap",
            "needs --transformer-impl local, received auto, which has chosen Transformer Engine; add it",
        )
    group = parallel_state.get_tensor_model_parallel_group()
    exchange: Exchange | None = None
    reason = "not on GPUs"
    if args.device == "cuda":
        exchange, reason = _by_peer_memory(group, 60.0 * args.distributed_timeout_minutes)
    if exchange is None:
        print_rank_0(f" > tensor-parallel messages: overlapped, by {args.distributed_backend} ({reason})")
        return MessageExchange(group)
    print_rank_0(" > tensor-parallel messages: overlapped, by copies into the other GPUs' memory")
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        warn(args, "--tp-comm-overlap: with CUDA_DEVICE_MAX_CONNECTIONS=1 copies wait for products; unset it")
    return exchange


def _by_peer_memory(group: Any, timeout_seconds: float) -> tuple[PeerExchange | None, str]:
    """Return an exchange by peer memory, or None and why there is none; the same on all ranks of the
    group.
    """
    hosts = _from_all(socket.gethostname(), group)
    if len(set(hosts)) > 1:
        return None, f"its ranks are on {len(set(hosts))} hosts"
    exchange, failure = None, ""
    try:
        exchange = PeerExchange(group, timeout_seconds)
        torch.cuda.synchronize()
    except (RuntimeError, ImportError, AttributeError) as error:  # what torch says where memory is not shared
        failure = f"no peer memory: {str(error).splitlines()[0]}"
    failures = [text for text in _from_all(failure, group) if text]
    return (None, failures[0]) if failures else (exchange, "")


def _from_all(value: str, group: Any) -> list[str]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found

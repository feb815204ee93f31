"""Text from a checkpoint: the model as it was trained, on one process, one token after another.

One idea: the checkpoint says what it is (`run_config.json`), so a command line is made from it and goes
through the trainer's own parsing, checks, model building and loading. Whatever layout saved the weights, they
are loaded here at TP = PP = 1. Every new token is a forward pass over the whole text so far: no cache of keys
and values, hence no second attention path that could differ from training, at a cost that grows with the
square of the length.

Traps:
* An FP4 recipe takes its tensor scales from the whole text so far, so that earlier positions may change in
  their last bits when a token is added. Nothing of an earlier pass is reused.
* Recipe and policy are those *stored* in the checkpoint, written to temporary files: the file that a run was
  started with may have changed since.
* The engine and the loader report on standard output, which belongs to the text here: while a model is set
  up, reports go to standard error.
* Importing this file imports neither torch nor megatron, so that a wrong argument is refused at once.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis.errors import CheckpointError, ConfigError
from metis.recipes import recipe_to_dict, resolve_recipe
from metis.training.arguments import parse_args, validate_args
from metis.training.preflight import preflight
from metis.training.retention import find_checkpoint
from metis.training.run_config import RUN_CONFIG_NAME, read_run_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

UNDECODED = "\ufffd"
"""What decoders write for bytes that are not (yet) a character."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the logits: temperature, then top-k, then top-p.

    temperature: divides the logits; 0 takes the largest (greedy). top_k: keep the k largest, None for all.
    top_p: keep the smallest set of largest probabilities that reaches p, None for all.
    """

    temperature: float = 0.8
    top_k: int | None = 40
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(
                "--temperature", f"must be a number from 0 (greedy) upwards, received {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("--top-k", f"must be at least 1, or 0 for all tokens, received {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError("--top-p", f"must lie in (0, 1], received {self.top_p}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Which model generates.

    load: checkpoint directory (`--save` of the run). ckpt_step: iteration, None for the latest. recipe: name
    or file, None for the checkpoint's own. device: auto, cpu or cuda. tokenizer_model: where the tokenizer
    lies now, None for where the run had it.
    """

    load: str
    ckpt_step: int | None = None
    recipe: str | None = None
    device: str = "auto"
    tokenizer_model: str | None = None


def checkpoint_arguments(source: Source, folder: Path) -> Namespace:
    """Return the checked arguments under which the trainer builds and loads the model of `source`.

    folder: an existing directory for the stored recipe and policy; it must outlive the building of the model.

    Raises CheckpointError for a missing or foreign checkpoint, ConfigError for a recipe that cannot compute
    with its weights, and whatever the trainer's own checks raise.
    """
    found = find_checkpoint(source.load, source.ckpt_step)
    if found is None:
        raise CheckpointError("--load", f"must hold a checkpoint, received none in {source.load}")
    config = read_run_config(found[0])
    if config is None:
        raise CheckpointError(
            str(found[0] / RUN_CONFIG_NAME),
            "is missing: must be a checkpoint of this trainer, which describes its model; convert it first",
        )
    training = config["training"]
    argv = ["--load", source.load, "--use-checkpoint-args", "--exit-on-missing-checkpoint"]
    argv += ["--no-load-optim", "--no-load-rng", "--skip-train", "--mock-data", "--device", source.device]
    argv += ["--micro-batch-size", str(training.get("micro_batch_size", 1))]
    if source.ckpt_step is not None:
        argv += ["--ckpt-step", str(source.ckpt_step)]
    if source.tokenizer_model is not None:
        argv += ["--tokenizer-model", source.tokenizer_model]
    if training.get("params_dtype_name") in ("bf16", "fp16"):
        argv.append(f"--{training['params_dtype_name']}")
    argv += _recipe_and_policy(source, config, folder)
    args = parse_args(argv, single_process=True)
    if args.world_size != 1:
        raise ConfigError(
            "world size", f"must be 1: text is generated by one process, received {args.world_size}"
        )
    validate_args(args, args.world_size)
    preflight(args)
    return args


def _recipe_and_policy(source: Source, config: dict[str, Any], folder: Path) -> list[str]:
    """Return the options for the stored recipe and policy, or for another recipe in the same places."""
    argv: list[str] = []
    for option, content in (("recipe", config["recipe"]), ("policy", config["policy"])):
        if content is not None:
            path = folder / f"{option}.json"
            path.write_text(json.dumps(content))
            argv += [f"--{option}", str(path)]
    if source.recipe is None:
        return argv
    wanted, stored = recipe_to_dict(resolve_recipe(source.recipe)), config["recipe"]
    if stored is not None and wanted["reparametrisation"] != stored["reparametrisation"]:
        raise ConfigError(
            "--recipe",
            f"must keep the weights as recipe {stored['name']!r} of the checkpoint does, received "
            f"{source.recipe!r}: one of them splits a weight into trained factors and the other does not",
        )
    argv += ["--recipe", source.recipe]
    same = stored is not None and json.loads(json.dumps(wanted)) == stored
    # With another recipe the weights are a start, not a continuation: bases may be absent.
    return argv if same else [*argv, "--finetune"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """A loaded model with its tokenizer; `vocab_size` counts the tokenizer's ids, padding left out."""

    args: Namespace
    model: Any
    tokenizer: Any
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_size", int(self.tokenizer.vocab_size))

    @property
    def max_tokens(self) -> int:
        """Longest text, prompt included, in tokens."""
        return self.args.max_position_embeddings

    def logits(self, token_ids: list[int]) -> Tensor:
        """Return the logits of what follows `token_ids`: fp32 [vocab_size], on the CPU."""
        import torch

        with torch.inference_mode():
            tokens_bs = torch.tensor([token_ids], dtype=torch.int64, device=self.args.device)
            positions_bs = torch.arange(len(token_ids), device=self.args.device)[None]
            logits_bsV = self.model(tokens_bs, positions_bs, None)
        return logits_bsV[0, -1, : self.vocab_size].to("cpu", torch.float32)

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of `prompt`; an empty one is the end of the document before.

        Raises ConfigError when it leaves no room for a new token.
        """
        try:
            prompt.encode()  # half a surrogate pair, which stands for a byte that is no UTF-8
            ids = list(self.tokenizer.tokenize(prompt)) if prompt else [self.tokenizer.eod]
        except ValueError as error:
            raise ConfigError("--prompt", f"must be text that the tokenizer takes ({error})") from None
        if len(ids) >= self.max_tokens:
            raise ConfigError(
                "--prompt",
                f"must be shorter than the model's {self.max_tokens} positions, received {len(ids)} tokens",
            )
        return ids

    def tokens(
        self, prompt_ids: list[int], max_new_tokens: int, sampling: Sampling, seed: int
    ) -> Iterator[int]:
        """Yield new token ids until the end of the document, `max_new_tokens`, or the last position.

        Draws come from a generator of this call alone: the same seed gives the same text.
        """
        import torch

        generator = torch.Generator().manual_seed(seed)
        ids = list(prompt_ids)
        for _ in range(min(max_new_tokens, self.max_tokens - len(ids))):
            token = choose_token(self.logits(ids), sampling, generator)
            if token == self.tokenizer.eod:
                return
            ids.append(token)
            yield token

    def text(self, prompt_ids: list[int], new_tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text that `new_tokens` add to the prompt, as soon as its characters are complete."""
        ids, written = list(prompt_ids), len(self.tokenizer.detokenize(list(prompt_ids)))
        whole = ""
        for token in new_tokens:
            ids.append(token)
            whole = self.tokenizer.detokenize(ids)
            complete = len(whole.rstrip(UNDECODED))
            if complete > written:
                yield whole[written:complete]
                written = complete
        if len(whole) > written:
            yield whole[written:]


def choose_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the id drawn from fp32 `logits_V` [V]; ties of the largest go to the lowest id when greedy."""
    import torch

    if sampling.temperature == 0.0:
        return int(logits_V.argmax())
    scaled = logits_V.to(torch.float64) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.numel():
        smallest_kept = scaled.topk(sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < smallest_kept, -torch.inf)
    probabilities = scaled.softmax(dim=0)
    if sampling.top_p is not None:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(dim=0) - ordered  # the mass of more likely tokens; zero for the first
        probabilities = probabilities.index_fill(0, order[before >= sampling.top_p], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


@contextlib.contextmanager
def loaded_model(source: Source) -> Iterator[TextModel]:
    """Build and load the model of `source`; inside the block it can generate, afterwards the engine is shut
    down.

    Raises CheckpointError or ConfigError in one line for everything that does not fit.
    """
    with tempfile.TemporaryDirectory(prefix="metis_generate_") as folder:
        args = checkpoint_arguments(source, Path(folder))
        import torch.distributed as dist

        from metis.training.initialize import initialize, shut_down

        had_process_group = dist.is_initialized()
        with contextlib.redirect_stdout(sys.stderr):
            initialize(args)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                built = _build(args)
            yield built
        finally:
            shut_down(keep_process_group=had_process_group)


def _build(args: Namespace) -> TextModel:
    from metis.clock import TrainingClock
    from metis.training.checkpoint_load import load_checkpoint
    from metis.training.loop import set_vocabulary
    from metis.training.model import build_model
    from metis.training.state import TrainState
    from metis.training.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(args)
    set_vocabulary(args, tokenizer.vocab_size)
    model = build_model(args, TrainingClock(seed=args.seed), wrap=False)
    load_checkpoint(args, TrainState(), model, None, None)
    for chunk in model:
        chunk.eval()
    assert len(model) == 1, "one process holds the whole model"
    return TextModel(args=args, model=model[0], tokenizer=tokenizer)

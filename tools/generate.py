"""Write text with a trained checkpoint.

    python tools/generate.py --load runs/my_run --prompt "def main(" --max-new-tokens 64
    python tools/generate.py --load runs/my_run --prompt-file question.txt --temperature 0

The text (prompt included) goes to standard output as it is made, everything else to standard error. The model
runs on one process, whatever layout saved it, with the recipe it was trained with unless `--recipe` names
another. The work is in `metis/training/generation.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from metis.errors import ArgumentParser, ConfigError, MetisError, report_and_exit
from metis.training.generation import Sampling, Source, loaded_model


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--load", required=True, help="checkpoint directory: the --save of a run")
    parser.add_argument("--ckpt-step", type=int, help="iteration to load [default: the latest]")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue; empty starts a document")
    prompt.add_argument("--prompt-file", help="UTF-8 file that holds it")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="[default: 64]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy [default: 0.8]")
    parser.add_argument("--top-k", type=int, default=40, help="0: all tokens [default: 40]")
    parser.add_argument("--top-p", type=float, help="in (0, 1] [default: all tokens]")
    parser.add_argument("--seed", type=int, default=1234, help="of the draws [default: 1234]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[default: auto]")
    parser.add_argument("--recipe", help="name or file [default: the checkpoint's]")
    parser.add_argument("--tokenizer-model", help="where the tokenizer lies now [default: as in the run]")
    return parser.parse_args(argv)


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt, from the command line or from its file."""
    if args.prompt is not None:
        return args.prompt
    try:
        return Path(args.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "--prompt-file", f"must be a readable UTF-8 file, received {args.prompt_file} ({error})"
        ) from None


def main() -> int:
    """Parse, load, write; exit status 2 and one `error:` line on bad input."""
    try:
        args = parse_arguments()
        prompt = read_prompt(args)
        sampling = Sampling(temperature=args.temperature, top_k=args.top_k or None, top_p=args.top_p)
        if args.max_new_tokens < 1:
            raise ConfigError("--max-new-tokens", f"must be at least 1, received {args.max_new_tokens}")
        source = Source(
            load=args.load,
            ckpt_step=args.ckpt_step,
            recipe=args.recipe,
            device=args.device,
            tokenizer_model=args.tokenizer_model,
        )
        with loaded_model(source) as model:
            prompt_ids = model.encode(prompt)
            started, new_ids = time.monotonic(), []

            def counted() -> object:
                for token in model.tokens(prompt_ids, args.max_new_tokens, sampling, args.seed):
                    new_ids.append(token)
                    yield token

            print(prompt, end="", flush=True)
            for piece in model.text(prompt_ids, counted()):
                print(piece, end="", flush=True)
            print(flush=True)
            seconds = time.monotonic() - started
        print(f"{len(new_ids)} tokens in {seconds:.1f} s", file=sys.stderr)
    except MetisError as error:
        report_and_exit(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

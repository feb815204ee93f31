"""Pretrain a LLaMA-type model: parse, check, set up, train.

    torchrun --nproc-per-node 8 pretrain_llama.py --preset llama3-8b --recipe metis --bf16 ...

Arguments are Megatron-LM's (see `--help` and the README); everything that can be checked without torch is
checked before torch is imported. The work is in `metis/training/loop.py`. The guard at the end matters: the
first checkpoint save starts a helper process that imports this file again.
"""

from __future__ import annotations

import sys

from metis.errors import MetisError, report_and_exit


def main() -> int:
    """Run the trainer and return the exit status."""
    from metis.training.accounting import print_config
    from metis.training.arguments import parse_args, print_args, validate_args
    from metis.training.preflight import preflight

    try:
        args = parse_args()
        validate_args(args, args.world_size)
        preflight(args)
    except MetisError as error:
        report_and_exit(error)
    if args.print_config:
        if args.rank == 0:
            print_config(args)
        return 0
    if args.rank == 0:
        print_args(args)

    from metis.training.initialize import initialize, shut_down

    try:
        initialize(args)
        from metis.training.loop import pretrain

        return pretrain(args)
    except MetisError as error:
        report_and_exit(error)
    finally:
        shut_down()


if __name__ == "__main__":
    sys.exit(main())

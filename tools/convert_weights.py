"""Convert a checkpoint's weights between plain matrices and trained factors, W = U diag(S) V^T + W_R.

    python tools/convert_weights.py --load runs/plain --save runs/factored --recipe metis_paper
    python tools/convert_weights.py --load runs/factored --save runs/merged --recipe metis

The recipe says which form each linear has in the result; `--policy` says where it applies, by default where
the stored one does. Any layout can be read. The result holds weights and counters, no optimizer state: train
it with `--load DIR --finetune` (a new run) or `--load DIR --no-load-optim` (counters go on). The work is in
`metis/training/weight_conversion.py`.
"""

from __future__ import annotations

import sys

from metis.errors import ArgumentParser, MetisError, report_and_exit
from metis.training.weight_conversion import Conversion, convert


def parse_arguments(argv: list[str] | None = None) -> Conversion:
    """Return the conversion that the command line asks for."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--load", required=True, help="checkpoint directory: the --save of a run")
    parser.add_argument("--save", required=True, help="new directory for the result")
    parser.add_argument("--recipe", required=True, help="name or file; its linears' form is the result's")
    parser.add_argument("--policy", help="'all' or a file [default: the checkpoint's]")
    parser.add_argument("--ckpt-step", type=int, help="iteration to load [default: the latest]")
    return Conversion(**vars(parser.parse_args(argv)))


def main() -> int:
    """Parse, convert, report; exit status 2 and one `error:` line on bad input."""
    try:
        request = parse_arguments()
        report = convert(request)
    except MetisError as error:
        report_and_exit(error)
    print(
        f"iteration {report.iteration}: {report.num_split} linears split, {report.num_merged} merged, "
        f"{report.num_split_again} split again, largest relative change of a weight "
        f"{report.largest_weight_error:.1e}; saved to {request.save}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Text files to Megatron's indexed datasets.

    python tools/preprocess_data.py --input 'corpus/*.jsonl.gz' --output-prefix data/corpus \
        --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model --append-eod --workers 16

The work is in `metis/training/preprocess.py`. The guard at the end matters: worker processes may import this
file.
"""

from __future__ import annotations

from metis.errors import MetisError, report_and_exit
from metis.training.preprocess import exit_on_sigterm, parse_arguments, preprocess


def main() -> None:
    """Parse, tokenize, report; exit status 2 and one `error:` line on bad input."""
    exit_on_sigterm()
    try:
        preprocess(parse_arguments())
    except MetisError as error:
        report_and_exit(error)


if __name__ == "__main__":
    main()

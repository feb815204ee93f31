"""Train a SentencePiece tokenizer of LLaMA-2's kind (BPE, byte fallback, text kept as it is) on a corpus.

    python tools/train_tokenizer.py --input 'corpus/*.txt' --output-prefix data/tokenizer --vocab-size 8192

Writes `<prefix>.model` and `<prefix>.vocab`. Same input, options and SentencePiece version: same files.
The reading is in `metis/training/documents.py`, the training in `metis/training/tokenizer.py`.
"""

from __future__ import annotations

from metis.errors import ArgumentParser, MetisError, report_and_exit
from metis.training.documents import (
    FORMATS,
    SEPARATORS,
    DocumentReader,
    document_texts,
    expand_inputs,
    input_format,
)
from metis.training.tokenizer import train_sentencepiece


def main() -> None:
    """Parse, read, train; exit status 2 and one `error:` line on bad input."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, help="files or quoted globs")
    parser.add_argument("--input-format", choices=("auto", *FORMATS), default="auto", help="auto: by suffix")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys or columns to read")
    parser.add_argument("--text-document-separator", choices=SEPARATORS, default="file")
    parser.add_argument("--output-prefix", required=True, help="writes <prefix>.model and <prefix>.vocab")
    parser.add_argument("--vocab-size", type=int, required=True, help="token ids, special ones included")
    try:
        args = parser.parse_args()
        reader = DocumentReader(
            expand_inputs(args.input), args.input_format, args.json_keys, args.text_document_separator
        )
        texts = (
            text
            for raw in reader
            for sequences in document_texts(raw, input_format(raw[0], args.input_format), args.json_keys)
            for text in sequences
        )
        train_sentencepiece(texts, args.output_prefix, args.vocab_size)
    except MetisError as error:
        report_and_exit(error)


if __name__ == "__main__":
    main()

"""What libraries say at a terminal that nobody there can act on. All else that they say is shown.

Each is named by its words, with the reason beside it; what is not known here is never hidden. Imports nothing heavy: it
has to be done before the libraries are imported.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings

from ..log import logger
from . import ranks

# ---- logs

_BESIDE_THE_POINT = {
    # On processors with AVX512-BF16 bitsandbytes says this whenever it is imported, of a CPU kernel for matrices in 4
    # bits. Nothing here multiplies such.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # TRL advises to train the output head too, and in the next line does so itself.
    "trl.trainer.sft_trainer": "Cloning chat template added new tokens to the tokenizer, but 'lm_head' is not in",
    # Two checkpoints within a second. Which is older, transformers then reads from their names.
    "transformers.trainer_utils": "mtime may not be reliable on this filesystem, falling back to numerical ordering",
}


class _Saying(logging.Filter):
    """Drops the records of a logger that have some words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words

    def __eq__(self, other: object) -> bool:  # a logger adds none twice
        return isinstance(other, _Saying) and other._words == self._words

    def __hash__(self) -> int:
        return hash(self._words)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._words not in str(record.msg)


_REPORT = re.compile(r"ForSequenceClassification LOAD REPORT from: ")
_ROW = re.compile(r"^(\S+) *\| (\w+) *\|", re.MULTILINE)
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
# By their status: heads of classifiers and of what models were pretrained for, and what is computed and not trained.
_EXPECTED = {
    "MISSING": re.compile(r"score\.|classifier\.|pre_classifier\.|(\w+\.)?pooler\."),
    "UNEXPECTED": re.compile(r"lm_head\.|cls\.|vocab_\w+\.|(\w+\.)?pooler\.|.*\.position_ids$"),
}


def _tells_of_a_new_head_only(record: logging.LogRecord) -> bool:
    """Whether a record is transformers' table of what is new in a classifier, with no more in it than its head."""
    text = _STYLE.sub("", str(record.msg))
    if not _REPORT.search(text):
        return False
    rows = [(key, status) for key, status in _ROW.findall(text) if key != "Key"]
    return bool(rows) and all(status in _EXPECTED and _EXPECTED[status].match(key) for key, status in rows)


def _has_more_than_a_new_head(record: logging.LogRecord) -> bool:
    return not _tells_of_a_new_head_only(record)


# ---- warnings

_FOR_DEVELOPERS = (
    # PEFT and TRL ask a model by the older of transformers' two names. Keys of recipes have other warnings.
    ("`is_gradient_checkpointing` is deprecated and will be removed in v6", FutureWarning),
    # The same kernel of bitsandbytes', where the package that would load it is installed and the Hub is out of reach.
    ("Skipping publisher trust check for 'kernels-community/quantization-bitsandbytes'", UserWarning),
    # Where the model of a plan, whose tensors are fakes, is copied: torch asks each of them for its place in memory.
    ("Accessing the data pointer of FakeTensor is deprecated", UserWarning),
    # TRL turns checkpointing off for each pass of DPO's reference, and on again.
    ("`gradient_checkpointing_disable` is deprecated and will be removed in v6", FutureWarning),
    ("`gradient_checkpointing_enable` is deprecated and will be removed in v6", FutureWarning),
)


def quieten() -> None:
    """Hide what is named here, in this process and in those that it starts, and let progress bars be rare.

    Of several processes that train together the first one shows bars, and says what all would say of the same recipe.

    A bar of a library shows once it takes seconds: loading a model of 7B, and not one of 2M. Where there is no
    terminal, it says so every ten. What the environment says of tqdm already stays.
    """
    os.environ.setdefault("TQDM_DELAY", "3")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    if not ranks.speaks():
        os.environ["TQDM_DISABLE"] = "1"
        logger.setLevel(logging.ERROR)
    for name, words in _BESIDE_THE_POINT.items():
        logging.getLogger(name).addFilter(_Saying(words))
    logging.getLogger("transformers.modeling_utils").addFilter(_has_more_than_a_new_head)
    for text, category in _FOR_DEVELOPERS:
        warnings.filterwarnings("ignore", re.escape(text), category)

"""What other people measured on a card: to see a figure of one's own beside, and never told as ours."""

from __future__ import annotations

from typing import NamedTuple


class Anchor(NamedTuple):
    """A figure of somebody else's."""

    what: str
    card: str
    tokens_per_second: float
    peak_gib: float | None
    source: str


ANCHORS = (
    Anchor(
        "torchtune, Llama-3.1-8B, all weights: 2 × 2,048 tokens, compiled, paged 8-bit AdamW, updates in the backward "
        "pass, neither clipping nor accumulation",
        "RTX 4090",
        1650,
        18.9,
        "README of github.com/pytorch/torchtune",
    ),
    Anchor(
        "GaLore's own code, Llama 7B, layerwise, 8-bit",
        "RTX 4090",
        2070,
        None,
        "told in this project's notes, about; where it was published is not known",
    ),
)

"""Which memory a card's name, its label and a size are, and what this machine's card has free."""

from __future__ import annotations

import re

import pytest
import torch

from hf_galore.plan.cards import CARDS, labelled_bytes, parse_size, present_card

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("4090", 23.52),
        ("rtx 4090", 23.52),
        ("NVIDIA GeForce RTX 4090", 23.52),
        ("RTX_3090", 23.59),
        ("a4000", 15.61),
        ("RTX A4000", 15.61),
        ("4060ti-16gb", 15.55),
        ("RTX 4060 Ti 16GB", 15.55),
        ("Titan RTX", 23.5),  # for which there is no figure
        ("RTX 6000 Ada", 44.43),
        ("Tesla T4", 14.56),
        # A label is what such a card has: half a GiB less, or a fiftieth.
        ("24GB", 23.5),
        ("24 gb", 23.5),
        ("24G", 23.5),
        ("24", 23.5),
        ("16GB", 15.5),
        ("12GB", 11.5),
        ("80GB", 78.4),
        ("288", 282.24),
        ("409GB", 400.82),
        # Exact.
        ("24GiB", 24),
        ("23.6GiB", 23.6),
        ("22528MiB", 22),
        ("2097152KiB", 2),
        ("0.5TiB", 512),
        (str(24 * GIB), 24),
        (f"{GIB}B", 1),
    ],
)
def test_a_card_in_words(text: str, gib: float) -> None:
    assert parse_size(text) == pytest.approx(gib * GIB, abs=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4091", "but was given '4091'. Did you mean '4090'? Names: 2080ti, "),
        ("RTX 4909", "Did you mean '4090'?"),
        ("409", "but was given '409'. Did you mean '4090'?"),  # and not 409 GB
        ("309", "Did you mean '3090'?"),
        ("4060ti", "'4060ti' is sold with several sizes: say 4060ti-8gb or 4060ti-16gb."),
        ("a100", "say a100-40gb or a100-80gb"),
        ("much", "its label (24GB) or its exact memory (23.5GiB, 22528MiB), but was given 'much'. Names: "),
        ("0", "but was given '0'"),
        ("0GiB", "but was given '0GiB'"),
        ("-24GB", "but was given '-24GB'"),
        ("24564", "but was given '24564'"),  # MiB, as nvidia-smi says it without a unit
        ("24564MB", "but was given '24564MB'"),
        ("24 lightyears", "but was given '24 lightyears'"),
        ("", "but was given ''"),
        ("GiB", "but was given 'GiB'"),
    ],
)
def test_what_is_no_card_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_size(text)


def test_every_card_is_found_by_its_name_and_has_less_than_it_says() -> None:
    for name, card in CARDS.items():
        found = parse_size(name)
        assert found == parse_size(name.upper().replace("-", " "))
        assert 0.9 * card.sold * 0.99 * GIB <= found < card.sold * GIB, name
        if card.seen is not None:
            assert found == int(card.seen * GIB)


def test_a_label_promises_no_more_than_a_card_with_a_figure_has() -> None:
    """But for those with ECC, which takes a sixteenth, and are given by their names."""
    less = {
        name for name, card in CARDS.items() if card.seen is not None and card.seen * GIB < labelled_bytes(card.sold)
    }
    assert less == {"6000ada", "t4"}


def test_no_name_is_hidden_by_a_label_or_another_name() -> None:
    names = [name.replace("-", "") for name in CARDS]
    assert len(set(names)) == len(names)


def test_the_card_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert present_card(0) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * GIB, 24 * GIB))
    assert present_card(GIB) == (24 * GIB, 21 * GIB)  # our own context makes way for that of the run
    assert present_card(8 * GIB) == (24 * GIB, 24 * GIB)

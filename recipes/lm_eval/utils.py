"""What conversations.yaml needs: the quickstart's conversations, what to ask about them, and the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from hf_galore.recipes import embedded

DISTRACTORS = 3


def embedded_conversations(**_: Any) -> datasets.DatasetDict:
    """The quickstart's conversations, those it holds out as `test`. lm-eval gives it the model's arguments too."""
    return datasets.load_dataset(str(embedded().data))


def questions(conversations: datasets.Dataset) -> datasets.Dataset:
    """Each conversation's opening question, its answer and three others to tell it from.

    The others answer other questions and are the nearest to it in length: a liking for short answers gains nothing. The
    right one's place changes from question to question: a model that finds all alike scores a quarter.

    Args:
        conversations: with a column `messages`, of which the first two are the user's and the assistant's.

    Returns:
        Rows of `question`; `scored`, the texts whose likelihood after the question is wanted: the four answers, and
        the first word of the right one; and `right`, the index of that.

    Raises:
        ValueError: a conversation begins otherwise, or there are too few different answers, or only one-word ones.
    """
    pairs = _openings(conversations)
    if all(_first_word(answer) == answer for _, answer in pairs):
        raise ValueError("None of the answers has two words or more. Give conversations with longer ones.")
    rows = []
    for number, (question, answer) in enumerate(pairs):
        own = {_folded(text) for asked, text in pairs if _folded(asked) == _folded(question)}
        others = {_folded(text): text for _, text in pairs if _folded(text) not in own}
        if len(others) < DISTRACTORS:
            raise ValueError(
                f"Conversation {number + 1} ({question!r}) needs {DISTRACTORS} answers to other questions, and there "
                f"are {len(others)}. Give more conversations."
            )
        choices = sorted(others.values(), key=lambda text: abs(len(text) - len(answer)))[:DISTRACTORS]
        right = number % (DISTRACTORS + 1)
        choices.insert(right, answer)
        rows.append({"question": question, "scored": [*choices, _first_word(answer)], "right": right})
    return datasets.Dataset.from_list(rows)


def score(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """The metrics of one question.

    `bits_per_byte` leaves out the answer's first word. lm-eval moves white space from the prompt's end to the answer,
    and most chat templates end in a newline; a model that learnt from answers only (`assistant_only_loss`) was never
    taught that newline, which would count 11 nats an answer. It is in the likelihood of the first word too, and so
    the difference is without it. Choosing one of four is not affected: the newline is in all of them.

    Args:
        doc: a row of `questions`.
        results: for each of `scored`, its log-likelihood in nats and whether it is the likeliest text.

    Returns:
        `acc` and `acc_norm`, 0 or 1; `bits_per_byte`, what lm-eval adds up for it: a log-likelihood and bytes.
    """
    *choices, first_word = doc["scored"]
    *likelihoods, of_first_word = (log_likelihood for log_likelihood, _ in results)
    right = doc["right"]
    per_character = np.divide(likelihoods, [len(choice) for choice in choices])
    rest = choices[right].removeprefix(first_word)
    return {
        "acc": float(np.argmax(likelihoods) == right),
        "acc_norm": float(np.argmax(per_character) == right),
        "bits_per_byte": (likelihoods[right] - of_first_word, len(rest.encode())),
    }


def _openings(conversations: datasets.Dataset) -> list[tuple[str, str]]:
    if "messages" not in conversations.column_names:
        raise ValueError(
            f"The conversations have the columns {', '.join(conversations.column_names)}. They need 'messages' (lists "
            "of role and content)."
        )
    pairs = []
    for number, messages in enumerate(conversations["messages"], start=1):
        if [message["role"] for message in messages[:2]] != ["user", "assistant"]:
            raise ValueError(f"Conversation {number} has to begin with a message of user and one of assistant.")
        question, answer = (message["content"].strip() for message in messages[:2])
        if not question or not answer:
            raise ValueError(f"Conversation {number} begins with an empty message.")
        pairs.append((question, answer))
    return pairs


def _first_word(text: str) -> str:
    return text.split(maxsplit=1)[0]


def _folded(text: str) -> str:
    """Without case and spacing: what counts as one text."""
    return " ".join(text.casefold().split())

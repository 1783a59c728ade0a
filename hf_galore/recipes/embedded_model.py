"""A small chat model and real conversations, made on this machine: for the quickstart, notebooks and tests.

Made on first use, in a second or two, and kept in the user's cache directory. The text is the English part of
`chatterbot-corpus` (BSD licence): questions and statements with answers that people wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..extras import require
from .errors import UserError
from .folders import recipes_folder

CACHE_VARIABLE = "HF_GALORE_CACHE"

Conversation = list[dict[str, str]]

# In these files a list is one question and several answers to it; elsewhere the two sides take turns.
_SEVERAL_ANSWERS = ("computers", "emotion")
# Source code: indented listings of hundreds of tokens, which a model of this size learns nothing readable from.
_LEFT_OUT = ("coding",)
_HOLD_OUT_EVERY = 10

_VOCABULARY = 1024
# Two layers learn the conversations in half the time that four take.
_MODEL = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    # 1/√256, what keeps a signal's size through a layer; with Llama's 0.02 learning starts hundreds of steps later.
    "initializer_range": 0.0625,
}
_SEED = 0


class Embedded(NamedTuple):
    """The folders of the embedded model and of its data."""

    model: Path
    """To use as `model_name_or_path`: weights and tokenizer."""
    data: Path
    """To use as `dataset_name`: the splits `train` and `test`."""


def embedded() -> Embedded:
    """Return the folders of the embedded model and data, which are made if they are not there yet.

    They are kept in the user's cache directory, or below the folder that the environment variable HF_GALORE_CACHE
    names. What they are made from decides the folder's name, so that a change makes new ones.

    Raises:
        MissingExtraError: the text that they are made from is not there.
        UserError: the cache directory cannot be written to.
    """
    require("quickstart", "The embedded model")
    import platformdirs

    cache = Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("hf_galore", appauthor=False))
    folder = cache / f"quickstart-{_fingerprint()}"
    if not folder.is_dir():
        try:
            _make(folder)
        except OSError as error:
            raise UserError(
                f"The quickstart's model and data cannot be kept in {cache} ({error}). Set {CACHE_VARIABLE} to a "
                "folder that can be written to."
            ) from error
    return Embedded(folder / "model", folder / "data")


def _make(folder: Path) -> None:
    """Make everything in a temporary folder and rename it: whoever finds `folder` finds all of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        train, test = split(conversations())
        data = temporary / "data"
        data.mkdir()
        for name, part in (("train", train), ("test", test)):
            lines = (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in part)
            (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        tokenizer = _tokenizer(message["content"] for messages in train for message in messages)
        tokenizer.save_pretrained(temporary / "model")
        _model(tokenizer).save_pretrained(temporary / "model")
        with contextlib.suppress(FileExistsError):  # another process was faster: its folder holds the same
            _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if target.is_dir():  # systems differ in the error that they give for this
            raise FileExistsError(str(target)) from error
        raise


def _fingerprint() -> str:
    """A hash of the code, the template and the text that model and data are made from."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(_template().encode())
    for name, text in _corpus():
        digest.update(f"{name}\n{text}".encode())
    return digest.hexdigest()[:12]


# ---- conversations


def _corpus() -> list[tuple[str, str]]:
    folder = importlib.resources.files("chatterbot_corpus") / "data" / "english"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yml")), key=lambda file: file.name)
    return [(file.name.removesuffix(".yml"), file.read_text(encoding="utf-8")) for file in files]


def conversations() -> list[Conversation]:
    """Return the corpus as lists of messages, user and assistant by turns, each conversation once."""
    unique: dict[str, Conversation] = {}
    for name, text in _corpus():
        if name in _LEFT_OUT:
            continue
        for turns in yaml.load(text, Loader=_Loader)["conversations"]:
            for conversation in _messages(turns, several_answers=name in _SEVERAL_ANSWERS):
                unique.setdefault(json.dumps(conversation).casefold(), conversation)
    return list(unique.values())


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has it


def _messages(turns: Any, *, several_answers: bool) -> list[Conversation]:
    # Some entries are malformed: YAML reads them as mappings or bare strings.
    if not isinstance(turns, list) or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        return []
    said = [" ".join(turn.split()) for turn in turns]
    if several_answers:
        pairs = [[said[0], answer] for answer in said[1:]]
    else:
        pairs = [said[: len(said) // 2 * 2]]  # the last word is the assistant's
    roles = ("user", "assistant")
    return [
        [{"role": roles[index % 2], "content": content} for index, content in enumerate(pair)] for pair in pairs if pair
    ]


def split(every: Sequence[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """Split conversations into training and held-out ones, so that no question is asked in both.

    Every tenth opening question is held out, with all answers to it; so are, of what remains, the conversations in
    which a held-out question comes up later.
    """
    openings = list(dict.fromkeys(_asked(conversation)[0] for conversation in every))
    held_out = set(openings[_HOLD_OUT_EVERY - 1 :: _HOLD_OUT_EVERY])
    test = [conversation for conversation in every if _asked(conversation)[0] in held_out]
    held_out.update(question for conversation in test for question in _asked(conversation))
    train = [conversation for conversation in every if held_out.isdisjoint(_asked(conversation))]
    return train, test


def is_asked_in(question: str, every: Iterable[Conversation]) -> bool:
    """Whether the user asks `question` in one of these conversations."""
    return any(_normalized(question) in _asked(conversation) for conversation in every)


def _asked(conversation: Conversation) -> list[str]:
    return [_normalized(message["content"]) for message in conversation if message["role"] == "user"]


def _normalized(text: str) -> str:
    """The text without case and punctuation: "What is AI?" and "what is ai" are one question."""
    return " ".join("".join(c for c in text.casefold() if c.isalnum() or c.isspace()).split())


# ---- tokenizer and model


def _template() -> str:
    return (recipes_folder() / "chatml" / "chat_template.jinja").read_text(encoding="utf-8")


def _tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on `texts`, with ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=_template(),
    )


def _model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights, the same ones each time."""
    config = LlamaConfig(
        **_MODEL,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return LlamaForCausalLM(config)

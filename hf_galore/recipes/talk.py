"""A conversation with a model: what was said, how much of that the model can read, and its answers as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import TextStreamer

from ..errors import UserError

_UNLIMITED = 2**20  # tokens; some configs have none, or a number that stands for that


class Sampling(NamedTuple):
    """How answers are chosen."""

    max_new_tokens: int = 512
    temperature: float | None = None
    """0 for the likeliest words, above it for others too; `None` for what the model's `generation_config.json` says."""


class Answer(NamedTuple):
    """What came of a question."""

    text: str
    forgotten: int
    """The exchanges that had no room any more, and were forgotten for this one."""
    stopped: bool
    """Whether Ctrl-C ended it."""


class Talk:
    """A conversation with a model, by its chat template; without one, texts that it completes.

    Args:
        model: on its device.
        tokenizer: its own.
        system: what the conversation begins with, if anything.
        sampling: how answers are chosen.

    Raises:
        UserError: a system text is given, and there is no template, or one that takes none.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None, sampling: Sampling | None = None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._sampling = sampling or Sampling()
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.has_template = tokenizer.chat_template is not None
        if system is not None:
            self._check_system()
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but for the system text."""
        self.messages: list[dict[str, str]] = []

    def say(self, text: str, write: Callable[[str], None]) -> Answer:
        """Ask the model, and remember question and answer.

        Args:
            text: the question; without a template, the beginning of a text.
            write: takes the answer, part by part.

        Raises:
            UserError: the text is longer than what the model reads, or its template refuses it.
        """
        if not self.has_template:
            return self._generate(self._encoded(text), write, 0)
        question = {"role": "user", "content": text}
        kept = list(self.messages)
        forgotten = 0
        prompt = self._prompt([*kept, question])
        while kept and _length(prompt) > self._limit() - self._room():
            kept, forgotten = kept[2:], forgotten + 1
            prompt = self._prompt([*kept, question])
        answer = self._generate(prompt, write, forgotten)
        if answer.text:  # else roles would not take turns
            self.messages = [*kept, question, {"role": "assistant", "content": answer.text}]
        return answer

    def _limit(self) -> int:
        """The tokens that the model reads, prompt and answer together."""
        config = self._model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and 0 < limit < _UNLIMITED else _UNLIMITED

    def _room(self) -> int:
        """The tokens that are kept free for an answer: not more than half of all."""
        return min(self._sampling.max_new_tokens, self._limit() // 2)

    def _prompt(self, messages: list[dict[str, str]]) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [*self._start, *messages], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise UserError(f"the model's chat template refuses the conversation: {error}") from error

    def _encoded(self, text: str) -> Any:
        return self._tokenizer(text, return_tensors="pt")

    def _check_system(self) -> None:
        if not self.has_template:
            raise UserError("--system needs a chat template, and this model has none: it completes texts.")
        with_text, without = (
            self._tokenizer.apply_chat_template([*start, {"role": "user", "content": "a"}], tokenize=False)
            for start in (self._checked_start(), [])
        )
        if with_text == without:
            raise UserError("--system: the model's chat template leaves a system text out.")

    def _checked_start(self) -> list[dict[str, str]]:
        self._prompt([{"role": "user", "content": "a"}])  # raises where the template has no such role
        return self._start

    @torch.inference_mode()
    def _generate(self, prompt: Any, write: Callable[[str], None], forgotten: int) -> Answer:
        left = self._limit() - _length(prompt)
        if left <= 0:
            raise UserError(
                f"that is {_length(prompt)} tokens, and the model reads {self._limit()}, its answer included."
            )
        streamer = _Streamer(self._tokenizer, write)
        stopped = False
        inputs = {name: prompt[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        try:
            self._model.generate(
                **inputs,
                streamer=streamer,
                max_new_tokens=min(left, self._sampling.max_new_tokens),
                eos_token_id=self._ends(),
                pad_token_id=self._padding(),
                **self._how(),
            )
        except KeyboardInterrupt:
            stopped = True
        return Answer(streamer.said.strip(), forgotten, stopped)

    def _how(self) -> dict[str, Any]:
        temperature = self._sampling.temperature
        if temperature is None:
            return {}
        if temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": temperature}

    def _ends(self) -> list[int] | None:
        """Every token that ends an answer: a chat template may have brought one that the model's config has not."""
        own = self._model.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), self._tokenizer.eos_token_id} - {None}
        return sorted(ends) or None

    def _padding(self) -> int | None:
        """A token for places that nothing reads."""
        own: int | None = self._tokenizer.pad_token_id
        return own if own is not None else self._tokenizer.eos_token_id

    def describe_sampling(self) -> str:
        """How answers are chosen, in words."""
        given = self._sampling.temperature
        config = self._model.generation_config
        if given == 0 or (given is None and not config.do_sample):
            return "the likeliest words"
        temperature = config.temperature if given is None else given
        return f"sampled at temperature {1.0 if temperature is None else temperature:g}"


def _length(prompt: Any) -> int:
    return int(prompt["input_ids"].shape[1])


class _Streamer(TextStreamer):  # type: ignore[misc, unused-ignore]
    """Hands an answer on as soon as words are whole, and keeps it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.said = ""
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take the next words."""
        text = text if self.said else text.lstrip()
        self.said += text
        if text:
            self._write(text)

"""A conversation says to the model what was said, in its template, and its answers are those of `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_galore.errors import UserError
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.talk import Sampling, Talk

LIKELIEST = Sampling(max_new_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def parts(small: Embedded) -> tuple[Any, Any]:
    """A model with random weights, whose likeliest words are always the same, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(small.model).eval(), AutoTokenizer.from_pretrained(small.model)


def generated(model: Any, tokenizer: Any, tokens: torch.Tensor, count: int = 8) -> str:
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)).strip()


def rendered(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    found: torch.Tensor = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    return found


def test_answers_follow_from_all_that_was_said(parts: tuple[Any, Any]) -> None:
    talk = Talk(*parts, system="Be brief.", sampling=LIKELIEST)
    said = [{"role": "system", "content": "Be brief."}]
    for question in ("Hello", "Who are you?"):
        heard: list[str] = []
        answer = talk.say(question, heard.append)
        said.append({"role": "user", "content": question})
        assert answer.text == generated(*parts, rendered(parts[1], said)) == "".join(heard).strip()
        said.append({"role": "assistant", "content": answer.text})
        assert (answer.forgotten, answer.stopped) == (0, False)
    assert talk.messages == said[1:]
    talk.reset()
    assert talk.messages == []
    again = talk.say("Hello", lambda text: None)
    assert again.text == said[2]["content"]


def test_the_oldest_is_forgotten_where_there_is_no_room(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    talk = Talk(model, tokenizer, sampling=LIKELIEST)
    forgotten = []
    for _ in range(6):
        answer = talk.say("Hello there, " * 10, lambda text: None)
        forgotten.append(answer.forgotten)
        length = rendered(tokenizer, talk.messages[:-1]).shape[1]
        assert length + 8 <= model.config.max_position_embeddings
    assert forgotten[0] == 0
    assert 1 in forgotten
    assert len(talk.messages) == 2 * (6 - sum(forgotten))


def test_a_text_that_the_model_cannot_read(parts: tuple[Any, Any]) -> None:
    talk = Talk(*parts, sampling=LIKELIEST)
    talk.say("Hello", lambda text: None)
    before = list(talk.messages)
    with pytest.raises(UserError, match=r"that is \d+ tokens, and the model reads 256, its answer included"):
        talk.say("Hello there, " * 100, lambda text: None)
    assert talk.messages == before


def test_ctrl_c_stops_an_answer_and_what_was_said_stays(parts: tuple[Any, Any]) -> None:
    talk = Talk(*parts, sampling=Sampling(max_new_tokens=40, temperature=0))
    heard: list[str] = []

    def write(text: str) -> None:
        heard.append(text)
        if len(heard) == 2:
            raise KeyboardInterrupt

    answer = talk.say("Hello", write)
    assert answer.stopped
    assert answer.text == "".join(heard).strip()
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]

    def at_once(text: str) -> None:
        raise KeyboardInterrupt

    def nothing(**kwargs: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts[0], "generate", nothing)
        assert talk.say("And?", at_once).text == ""
    assert len(talk.messages) == 2  # roles go on taking turns


def test_without_a_template_a_text_is_completed(small: Embedded, parts: tuple[Any, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    tokenizer.chat_template = None
    talk = Talk(parts[0], tokenizer, sampling=LIKELIEST)
    assert not talk.has_template
    for _ in range(2):  # nothing is remembered
        answer = talk.say("Once upon a time", lambda text: None)
        assert answer.text == generated(
            parts[0], tokenizer, tokenizer("Once upon a time", return_tensors="pt").input_ids
        )
    with pytest.raises(UserError, match="--system needs a chat template"):
        Talk(parts[0], tokenizer, system="Be brief.")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves a system text out"),
        ("{{ raise_exception('no system role') }}", "refuses the conversation: no system role"),
    ],
)
def test_a_template_that_takes_no_system_text(
    template: str, said: str, small: Embedded, parts: tuple[Any, Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=said):
        Talk(parts[0], tokenizer, system="Be brief.")


def test_the_templates_own_end_ends_an_answer(small: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the model's config has another, as where a template was added to a base model."""
    model = AutoModelForCausalLM.from_pretrained(small.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    prompt = rendered(tokenizer, [{"role": "user", "content": "Hello"}])
    output = model.generate(prompt, max_new_tokens=1, do_sample=False)
    first = int(output[0, -1])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    model.generation_config.eos_token_id = 3
    generate, lengths = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **kwargs: lengths.append(generate(**kwargs).shape[1]))
    Talk(model, tokenizer, sampling=LIKELIEST).say("Hello", lambda text: None)
    assert lengths == [prompt.shape[1] + 1]


def test_how_answers_are_chosen(small: Embedded) -> None:
    model = AutoModelForCausalLM.from_pretrained(small.model)
    tokenizer = AutoTokenizer.from_pretrained(small.model)

    def described(temperature: float | None) -> str:
        return Talk(model, tokenizer, sampling=Sampling(4, temperature)).describe_sampling()

    assert described(None) == described(0) == "the likeliest words"
    assert described(0.7) == "sampled at temperature 0.7"
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.6
    assert described(None) == "sampled at temperature 0.6"
    assert described(0) == "the likeliest words"
    talk = Talk(model, tokenizer, sampling=Sampling(12, 1.5))
    answers = set()
    for _ in range(4):
        talk.reset()
        answers.add(talk.say("Hello", lambda text: None).text)
    assert len(answers) > 1

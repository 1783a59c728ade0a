"""What `trl sft` trains without complaint is refused by no check, and becomes the same tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from transformers import ProcessorMixin
from trl import SFTConfig, SFTTrainer

from hf_galore.errors import UserError
from hf_galore.recipes import sft
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.templates import check_conversations, load_processing_class
from hf_galore.recipes.training import run
from tests.support.commands import recipe_on_cpu

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or m.thinking or m.function_call | tojson }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NEEDS_TOOLS = "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}" + PLAIN
NEEDS_STYLE = "{% if style is not defined %}{{ raise_exception('no style') }}{% endif %}" + PLAIN
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def turns(**answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]


CONVERSATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "tools": (NEEDS_TOOLS, {"messages": turns(content="b"), "tools": TOOLS}),
    "tools as text": (NEEDS_TOOLS, {"messages": turns(content="b"), "tools": json.dumps(TOOLS)}),
    "words for the template": (
        NEEDS_STYLE,
        {"prompt": turns(content="b")[:1], "completion": turns(content="b")[1:], "chat_template_kwargs": {"style": 1}},
    ),
    "thoughts alone": (PLAIN, {"messages": turns(content=None, thinking="hm")}),
    "a call of a function": (PLAIN, {"messages": turns(content=None, function_call={"name": "f"})}),
    "text beside conversations that are text": (PLAIN, {"messages": "[]", "text": "hello"}),
    "text beside no conversations": (PLAIN, {"messages": None, "text": "hello"}),
}


def write_data(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / "data")


def settings(small: Embedded, **more: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(small.model),
        "max_steps": 1,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


@pytest.mark.parametrize(("template", "row"), CONVERSATIONS.values(), ids=list(CONVERSATIONS))
def test_rows_of_each_kind_are_tokenized_as_by_trl(
    template: str, row: dict[str, Any], small: Embedded, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(template)
    more = {"chat_template_path": str(tmp_path / "t.jinja"), "dataset_name": write_data(tmp_path, [row] * 2)}
    parsed = sft.parse(["--config", recipe_on_cpu(tmp_path, **settings(small, **more))], "", "")
    ours = parsed.make_trainer()
    args = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_length=64, chat_template_path=more["chat_template_path"]
    )
    control = SFTTrainer(str(small.model), args=args, train_dataset=load_dataset(more["dataset_name"])["train"])
    assert ours.train_dataset["input_ids"] == control.train_dataset["input_ids"]
    assert len(ours.train_dataset["input_ids"][0]) > 2


def test_a_template_that_takes_parts_alone_is_filled_with_parts(
    small: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of models that see: TRL makes parts of bare text for a processor."""
    tokenizer = load_processing_class(str(small.model))
    processor = object.__new__(ProcessorMixin)
    processor.tokenizer, processor.chat_template = tokenizer, None
    monkeypatch.setattr(
        ProcessorMixin,
        "apply_chat_template",
        lambda self, *args, **more: tokenizer.apply_chat_template(*args, chat_template=self.chat_template, **more),
    )
    template = "{% for m in messages %}{{ m.content[0].type.upper() }}{% endfor %}"
    row = {"messages": turns(content="b")}
    check_conversations(SFTConfig(str(tmp_path), use_cpu=True, bf16=False), processor, template, "m", row)
    with pytest.raises(UserError, match="refuses the first conversation"):
        check_conversations(SFTConfig(str(tmp_path), use_cpu=True, bf16=False), tokenizer, template, "m", row)


def test_a_template_that_fails_on_a_row_is_one_line(small: Embedded, tmp_path: Path) -> None:
    """`'x' + none` is a TypeError, in the first row or in another."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role + (m.content or none) }}{% endfor %}")
    rows = [{"messages": turns(content=text)} for text in ("b", "")]
    for number, order in enumerate((rows, rows[::-1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        more = {"chat_template_path": str(tmp_path / "t.jinja"), "dataset_name": write_data(folder, order)}
        parsed = sft.parse(["--config", recipe_on_cpu(folder, **settings(small, **more))], "", "")
        with pytest.raises(UserError, match=r"chat template.*can only concatenate str"):
            run(parsed)

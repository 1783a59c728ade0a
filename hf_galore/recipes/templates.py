"""The tokenizer of a model to fine-tune and its chat template, checked before the weights are loaded."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import trl
from jinja2 import TemplateError
from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin
from trl import SFTConfig

from ..errors import UserError

_FILES = (".jinja", ".j2")  # what TRL reads as the template itself
_OWN = "chat_template_path: recipes/chatml, which comes with hf_galore"
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# transformers would make a folder without a tokenizer one with hardly a token.
_TOKENIZERS = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges", "tekken", "preprocessor", "processor")


def load_processing_class(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer, or its processor, as TRL does.

    Raises:
        UserError: there is none.
    """
    check_tokenizer_files(name)
    try:
        return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"The tokenizer of model_name_or_path {name} cannot be loaded: {error}") from error


def check_tokenizer_files(name: str, key: str = "model_name_or_path") -> None:
    """Raise an error for a folder that has no tokenizer.

    Args:
        name: the folder, or a name on the Hub, which is not looked at.
        key: what gave it, for the error.

    Raises:
        UserError: it has none.
    """
    folder = Path(name)
    if folder.is_dir() and not any(path.name.startswith(_TOKENIZERS) for path in folder.iterdir()):
        raise UserError(
            f"{key} {name} is a folder without a tokenizer (tokenizer.json, ...). Copy the files of its "
            "tokenizer there, from the model that it was made of."
        )


def template_of(training: SFTConfig, processing_class: Any) -> str | None:
    """The chat template that TRL will train with; `None` where there is none.

    Raises:
        UserError: `chat_template_path` is no template, or `eos_token` or `pad_token` is no token.
    """
    vocabulary = _tokenizer_of(processing_class).get_vocab()
    _check_token("eos_token", training.eos_token, vocabulary)
    name = training.chat_template_path
    if name is None:
        _check_token("pad_token", training.pad_token, vocabulary)
        return _default(processing_class.chat_template)
    if name.endswith(_FILES):
        if not Path(name).is_file():
            raise UserError(
                f"chat_template_path {name}: there is no such file. Give one, or a folder or model with it."
            )
        return Path(name).read_text(encoding="utf-8")
    try:
        source = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"chat_template_path {name} is no file ({', '.join(_FILES)}), and has no tokenizer that can be loaded: "
            f"{error}"
        ) from error
    if source.chat_template is None:
        raise UserError(f"chat_template_path {name} has no chat template. Give another one, such as {_OWN}.")
    _check_token("pad_token", training.pad_token, {**vocabulary, **source.get_vocab()})
    return _default(source.chat_template)


def check_conversations(training: SFTConfig, processing_class: Any, template: str | None, name: str, row: Any) -> None:
    """Check that conversations can be put into a chat template, and that it tells the assistant's words, if it has to.

    Args:
        training: the arguments.
        processing_class: the tokenizer or processor.
        template: what `template_of` gave.
        name: the model's, for errors.
        row: one of the data.

    Raises:
        UserError: there is no template, or it cannot do that, or refuses the row.
    """
    messages = row.get("messages")
    if "prompt" in row and "completion" in row:
        messages = row["prompt"] + row["completion"] if isinstance(row["prompt"], list) else None
    if not isinstance(messages, list):
        return
    whose = f"model_name_or_path {name}" if training.chat_template_path is None else training.chat_template_path
    if template is None:
        raise UserError(
            f"model_name_or_path {name} has no chat template, as base models have none, and the data are "
            f"conversations. Set {_OWN}, or to another model or a .jinja file."
        )
    filled = copy.copy(processing_class)
    filled.chat_template = template
    if isinstance(filled, ProcessorMixin):  # as TRL does: templates of models that see take no bare text
        messages = list(map(_in_parts, messages))
    if training.assistant_only_loss and _MARK.search(template) is None:
        # TRL's puts the mark into templates that it knows.
        patch: Any = getattr(trl, "get_training_chat_template", None)
        try:
            known = patch is not None and patch(filled) is not None
        except ValueError:
            known = False
        if not known:
            raise UserError(
                f"assistant_only_loss needs a chat template that marks the assistant's words with {{% generation %}}, "
                f"and that of {whose} does not. Set {_OWN}, or leave out assistant_only_loss."
            )
    try:
        filled.apply_chat_template(
            messages, tokenize=False, tools=_tools_of(row), **(row.get("chat_template_kwargs") or {})
        )
    except (TemplateError, TypeError) as error:
        raise UserError(f"The chat template of {whose} refuses the first conversation: {error}") from error


def _tools_of(row: Any) -> Any:
    """The tools that a row of data has, which may be JSON; `None` where it has none.

    Raises:
        UserError: they are text that is no JSON.
    """
    tools = row.get("tools")
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools)
    except ValueError as error:
        raise UserError(f"The data's first row has text as tools that is no JSON: {error}.") from error


def _in_parts(message: Any) -> Any:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _check_token(key: str, token: str | None, vocabulary: Any) -> None:
    if token is not None and token not in vocabulary:
        raise UserError(f"{key} {token} is no token of the model's tokenizer. Give one that is, or leave it out.")


def _default(template: Any) -> str | None:
    """The template, of several that have names the one without."""
    return template.get("default") if isinstance(template, dict) else template


def _tokenizer_of(processing_class: Any) -> Any:
    return getattr(processing_class, "tokenizer", processing_class)

"""The snippets of README and the docs: taken out of the pages, and the small local things that stand in for names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from tests.support.pages import ROOT, all_pages

PAGES = [*all_pages(), ROOT / "CONTRIBUTING.md"]


class Snippet(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    kind: str
    text: str

    @property
    def name(self) -> str:
        """For the names of tests."""
        return f"{self.page}:{self.line}"


def snippets(kind: str) -> list[Snippet]:
    """All blocks of a kind, in the pages' order."""
    return [one for path in PAGES for one in snippets_of(path) if one.kind == kind]


def snippets_of(path: Path) -> list[Snippet]:
    """The blocks of a page."""
    text = path.read_text("utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Snippet(path.name, text[: one.start()].count("\n") + 1, one[1], one[2]) for one in found]


class Command(NamedTuple):
    """A line of a console block."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        """The words that a shell makes of it, without a remark."""
        return shlex.split(self.line, comments=True)


def commands() -> list[Command]:
    """All lines that a reader is to type, each once."""
    found: dict[str, Command] = {}
    for snippet in snippets("console"):
        for line in snippet.text.replace("\\\n", " ").splitlines():
            assert line.startswith("$ "), f"{snippet.name} has {line!r}, which is no line to type"
            found.setdefault(" ".join(line[2:].split()), Command(snippet.page, line[2:]))
    return list(found.values())


# ---- what stands in for names

DATASETS = ("trl-lib/Capybara", "stanfordnlp/imdb")
# Wider than the ranks that the pages give, so that something is projected; all else is as small as it gets.
MODELS: dict[str, Any] = {
    "Qwen/Qwen3-4B-Base": (Qwen3Config, Qwen3ForCausalLM, {"hidden_size": 544, "tie_word_embeddings": True}),
    "mistralai/Mistral-7B-v0.3": (MistralConfig, MistralForCausalLM, {"hidden_size": 1056}),
}
# Whose packaged recipe the tests copy, with these names in it.
RECIPE = "mistral_7b_oasst2.yaml"

CONVERSATION = [
    {"role": "user", "content": "What is GaLore?"},
    {"role": "assistant", "content": "A way to train all weights."},
]


def write_data(folder: Path) -> Path:
    """Conversations, for whatever dataset a page names."""
    folder.mkdir()
    lines = "".join(json.dumps({"messages": CONVERSATION}) + "\n" for _ in range(4))
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(lines, "utf-8")
    return folder


def write_model(name: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """A model of the architecture that a name stands for, with one narrow layer and random weights."""
    config_class, model_class, shape = MODELS[name]
    config = config_class(
        **shape,
        vocab_size=len(tokenizer),
        intermediate_size=32,
        num_hidden_layers=1,
        head_dim=32,
        num_attention_heads=shape["hidden_size"] // 32,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(source: Path, path: Path, names: dict[str, str]) -> Path:
    """A recipe with names replaced."""
    settings = yaml.safe_load(source.read_text("utf-8"))
    replaced = {"model_name_or_path": names["mistralai/Mistral-7B-v0.3"], "dataset_name": names[DATASETS[0]]}
    path.write_text(yaml.safe_dump({**settings, **replaced}), "utf-8")
    return path


def with_names(code: str, names: dict[str, str]) -> str:
    """Code with names in its strings replaced, and nothing else."""
    for name, local in names.items():
        code = code.replace(f'"{name}"', repr(local))
    return code

"""Texts to pretrain a model and to fine-tune it on, made of what is installed: no network, and no copy is kept here.

    python -m tests.benchmarks.texts --out /tmp/texts.pt         # 2 minutes on a core, 40 MB

- *pretraining*: the standard library and installed packages of permissive licences (`SOURCES`). Every other file gives
  its source; the rest give their docstrings, and packages what they say of themselves on the package index: English.
- *chat*: the conversations of `chatterbot-corpus`, which `hf-galore quickstart` learns too, split as there: no question
  is asked in both parts. Only the assistant's words are learnt.
- *origin*: which of eight libraries a docstring's first paragraph is from, with the libraries' names taken out. The
  answer is one token after the text. By the words alone, a logistic regression gets 56 % of the held-out ones right
  after 3,200 examples, and 62 % after all. Files whose docstrings are tested are not trained on, and these libraries
  are no part of the pretraining. Each has as many examples.
- *library*: the same of a docstring's first 250 characters (75 % and 78 %), and the answer is asked for after every
  eighth token too while it is learnt.

A byte-level BPE of 4,096 tokens is trained on the first. All of these become rows of tokens (int16), with the labels
that a loss goes by: −100 where nothing is learnt. A row of another length is padded at its right, which causal
attention never sees. Other versions of these packages, or others of them, make other texts: figures then differ a
little, and are only to be compared with those of the same file.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.metadata
import importlib.util
import random
import re
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import ByteLevelBPETokenizer

VOCABULARY, IGNORED = 4096, -100
PRETRAINING_LENGTH, CHAT_LENGTH, ORIGIN_LENGTH, LIBRARY_LENGTH = 128, 96, 64, 80
HELD_OUT_EVERY, ORIGINS_HELD_OUT_EVERY = 20, 5
"""Of pretraining's texts, and of the files whose origin is asked for, one in so many is held out."""

ASKED_EVERY = 8  # tokens of a docstring
MOST_ROWS, HELD_OUT_ROWS, ORIGINS_HELD_OUT = 140_000, 512, 1024

# BSD, MIT, Apache or the PSF's licence.
SOURCES = (
    "absl",
    "accelerate",
    "aiohttp",
    "babel",
    "bitsandbytes",
    "charset_normalizer",
    "click",
    "datasets",
    "diffusers",
    "docutils",
    "evaluate",
    "fontTools",
    "fsspec",
    "gradio_client",
    "httpx",
    "huggingface_hub",
    "hypothesis",
    "ipykernel",
    "IPython",
    "jedi",
    "jinja2",
    "joblib",
    "jsonschema",
    "lightning",
    "lm_eval",
    "markdown",
    "mkdocs",
    "mypy",
    "nbclient",
    "opentelemetry",
    "peft",
    "pip",
    "prompt_toolkit",
    "pyarrow",
    "pydantic",
    "pydantic_core",
    "pymdownx",
    "pyparsing",
    "rich",
    "sentence_transformers",
    "setuptools",
    "starlette",
    "tensorboard",
    "torch",
    "torchmetrics",
    "tornado",
    "traitlets",
    "transformers",
    "triton",
    "trl",
    "typer",
    "urllib3",
    "uvicorn",
    "virtualenv",
    "wandb",
    "werkzeug",
)

ORIGINS = ("matplotlib", "networkx", "nltk", "numpy", "pandas", "scipy", "sklearn", "sympy")
OWN_NAMES = re.compile(
    r"matplotlib|pyplot|mpl|networkx|nltk|numpy|pandas|scipy|scikit-learn|scikits?|sklearn|sympy|\b(?:nx|np|pd|plt)\b",
    re.IGNORECASE,
)
SHORTEST_PARAGRAPH, SHORTEST, LONGEST = 40, 100, 250  # characters, as one line
TESTS = frozenset(("test", "tests", "testing", "_vendor", "idlelib", "site-packages", "__pycache__"))


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows of tokens with the labels that the loss goes by, to train on and to be tested on.

    Args:
        rows: tokens, n × length, int16.
        labels: of the same shape; the token to be told, which is the row's own or an answer, and `IGNORED` where none
            is. Not moved: what is told at position i of the rows has position i here.
        held_out_rows: like rows.
        held_out_labels: like labels.
        answers: the tokens that an answer is one of; none where the loss is what counts.
    """

    rows: Tensor
    labels: Tensor
    held_out_rows: Tensor
    held_out_labels: Tensor
    answers: tuple[int, ...] = ()


def save(tasks: dict[str, Task], path: Path) -> None:
    # Not dataclasses.asdict, which copies: pretraining's rows are its labels too, and go into the file once.
    torch.save({name: dict(vars(task)) for name, task in tasks.items()}, path)


def load(path: Path) -> dict[str, Task]:
    """The tasks of a file that `python -m tests.benchmarks.texts` has made: `pretraining` and those to fine-tune on."""
    return {name: Task(**task) for name, task in torch.load(path, weights_only=True).items()}


# ---- what is installed


def files_of(package: str) -> list[Path]:
    """The sources of an installed package, without its tests; none where it is not installed."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return [path for folder in folders for path in _sources(Path(folder))]


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if TESTS.isdisjoint(path.relative_to(folder).parts))


def docstrings(source: str) -> list[str]:
    """The docstrings of a file; none where it is no Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def descriptions() -> list[str]:
    """What installed packages say of themselves on the package index, of `SOURCES` and nobody else."""
    provided = importlib.metadata.packages_distributions()
    names = sorted({name for package in SOURCES for name in provided.get(package, ())})
    texts = [importlib.metadata.metadata(name).get_payload() for name in names]  # type: ignore[attr-defined]
    return [text for text in texts if text]


def pretraining_texts() -> tuple[list[str], list[str]]:
    """Texts to train on and held-out ones, in an order of their own."""
    files = _sources(Path(sysconfig.get_paths()["stdlib"]))
    files += [path for package in SOURCES for path in files_of(package)]
    texts = []
    for position, path in enumerate(files):
        source = path.read_text(encoding="utf-8", errors="ignore")
        texts.append("\n\n".join(docstrings(source)) if position % 2 else source)
    texts = [text for text in dict.fromkeys([*texts, *descriptions()]) if len(text) > 200]
    random.Random(0).shuffle(texts)
    held_out = texts[::HELD_OUT_EVERY]
    return [text for position, text in enumerate(texts) if position % HELD_OUT_EVERY], held_out


def origin_texts(paragraphs: bool) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """How docstrings begin, with the number of their library, to train on and held-out ones.

    Every fifth file is held out, and what is said in a held-out file is not trained on.
    """
    train: dict[str, list[str]] = {package: [] for package in ORIGINS}
    held_out: dict[str, list[str]] = {package: [] for package in ORIGINS}
    for package in ORIGINS:
        for position, path in enumerate(files_of(package)):
            part = train if position % ORIGINS_HELD_OUT_EVERY else held_out
            for text in docstrings(path.read_text(encoding="utf-8", errors="ignore")):
                chosen = text.split("\n\n")[0] if paragraphs else text
                beginning = OWN_NAMES.sub("it", " ".join(chosen.split()))[: None if paragraphs else LONGEST]
                if len(beginning) >= (SHORTEST_PARAGRAPH if paragraphs else SHORTEST):
                    part[package].append(beginning)
    held_out = {package: list(dict.fromkeys(said)) for package, said in held_out.items()}
    seen = {text for said in held_out.values() for text in said}
    train = {package: [text for text in dict.fromkeys(said) if text not in seen] for package, said in train.items()}
    return _balanced(train), _balanced(held_out)[:ORIGINS_HELD_OUT]


def _balanced(of_package: dict[str, list[str]]) -> list[tuple[str, int]]:
    """As many of each, shuffled."""
    shuffle = random.Random(0)
    count = min(map(len, of_package.values()))
    chosen = [
        (text, ORIGINS.index(name)) for name, texts in of_package.items() for text in shuffle.sample(texts, count)
    ]
    shuffle.shuffle(chosen)
    return chosen


# ---- tokens

Piece = tuple[str, bool]
"""Some text, and whether it is learnt."""


def padded(examples: Iterable[Sequence[Piece]], tokenizer: ByteLevelBPETokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Rows and labels of examples, one a row; what is longer than `length` loses its beginning.

    The beginning, since an answer is at the end.
    """
    rows, labels = [], []
    for pieces in examples:
        encoded = [(token, learnt) for text, learnt in pieces for token in tokenizer.encode(text).ids][-length:]
        missing = length - len(encoded)
        rows.append([token for token, _ in encoded] + [0] * missing)
        labels.append([token if learnt else IGNORED for token, learnt in encoded] + [IGNORED] * missing)
    return torch.tensor(rows, dtype=torch.int16), torch.tensor(labels, dtype=torch.int16)


def asked_often(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows, whose one answer is asked for after every eighth token too."""
    places = (labels != IGNORED).int().argmax(1, keepdim=True)
    answers = labels.gather(1, places)
    position = torch.arange(rows.shape[1])
    return rows, torch.where((position % ASKED_EVERY == 0) & (position > 0) & (position < places), answers, labels)


def cut(texts: Iterable[str], tokenizer: ByteLevelBPETokenizer, length: int, most: int) -> Tensor:
    """At most `most` rows of texts one after the other, scattered over all of them."""
    encoded = tokenizer.encode_batch([f"{text}\n\n" for text in texts])
    tokens = torch.cat([torch.tensor(one.ids, dtype=torch.int16) for one in encoded])
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]].clone()


def chat_pieces() -> tuple[list[list[Piece]], list[list[Piece]]]:
    """The conversations to train on, and those held out."""
    from hf_galore.recipes.embedded_model import conversations, split

    def pieces(conversation: list[dict[str, str]]) -> Iterator[Piece]:
        for message in conversation:
            answer = message["role"] == "assistant"
            yield ("Assistant:" if answer else "User:"), False
            yield f" {message['content']}\n", answer

    train, held_out = split(conversations())
    return [list(pieces(c)) for c in train], [list(pieces(c)) for c in held_out]


def make() -> tuple[dict[str, Task], int]:
    """The tasks, and the number of characters that are there for pretraining."""
    from tokenizers import ByteLevelBPETokenizer

    train_texts, held_out_texts = pretraining_texts()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(train_texts[::4], vocab_size=VOCABULARY, show_progress=False)
    rows = cut(train_texts, tokenizer, PRETRAINING_LENGTH, MOST_ROWS)
    held_out = cut(held_out_texts, tokenizer, PRETRAINING_LENGTH, HELD_OUT_ROWS)
    chat_train, chat_held_out = chat_pieces()
    letters = [chr(ord("A") + number) for number in range(len(ORIGINS))]
    answers = tuple(token for letter in letters for token in tokenizer.encode(letter).ids)

    def told(paragraphs: bool, length: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        parts = [
            [[(f"{text}\nFrom:", False), (letters[n], True)] for text, n in part] for part in origin_texts(paragraphs)
        ]
        return padded(parts[0], tokenizer, length), padded(parts[1], tokenizer, length)

    origins, origins_held_out = told(paragraphs=True, length=ORIGIN_LENGTH)
    libraries, libraries_held_out = told(paragraphs=False, length=LIBRARY_LENGTH)
    tasks = {
        "pretraining": Task(rows, rows, held_out, held_out),
        "chat": Task(*padded(chat_train, tokenizer, CHAT_LENGTH), *padded(chat_held_out, tokenizer, CHAT_LENGTH)),
        "origin": Task(*origins, *origins_held_out, answers),
        "library": Task(*asked_often(*libraries), *libraries_held_out, answers),
    }
    return tasks, sum(map(len, train_texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args()
    start = time.perf_counter()
    tasks, characters = make()
    save(tasks, args.out)
    missing = [package for package in SOURCES if importlib.util.find_spec(package) is None]
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, in {time.perf_counter() - start:.0f} s")
    print(f"{characters / 1e6:.0f} M characters to pretrain on; not installed: {', '.join(missing) or 'none'}")
    for name, task in tasks.items():
        learnt = int((task.labels != IGNORED).sum())
        count, length = task.rows.shape
        print(f"{name}: {count} rows of {length}, {learnt:,} tokens learnt; {len(task.held_out_rows)} rows held out")


if __name__ == "__main__":
    main()

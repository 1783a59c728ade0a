"""What README and the docs have of the code and of each other: `python -m tests.support.pages` writes it into them.

Between the two marks of a page lies what is made; a test compares.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from hf_galore.config import GaLoreConfig, keys
from tests.support.measured import FULL_RANK, Best, best_of_ranks, best_of_tuning, int8_losses
from tests.support.zoo import ZOO, Architecture

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
RECIPES_PAGE = DOCS / "recipes.md"
ARGUMENTS_PAGE = DOCS / "arguments.md"
CHOOSING_PAGE = DOCS / "choosing.md"
MODELS_PAGE = DOCS / "models.md"
SMALL_RANKS_PAGE = DOCS / "small-ranks.md"
INT8_PAGE = DOCS / "int8.md"
LOSSES_BY_RANK = DOCS / "pictures" / "ranks.json"
QUALITY = ROOT / "notebooks" / "04_quality.ipynb"
BEGIN, END = "<!-- made by python -m tests.support.pages -->\n", "<!-- end -->\n"

PEAK, NEEDS = "peak, GiB", "needs, GiB"
"""Columns of the tables of docs/recipes.md."""
PEAK_OF_A_RANK, A_CARD_NEEDS = "peak of a rank, GiB", "a card needs, GiB"
"""Those of the table of recipes for several cards."""

AT_HOME = 24  # GB
# What a step was measured to take, and on what: docs/cards.md.
MEASURED = {"llama2_7b_oasst2.yaml": "0.54 s on an H200"}


def all_pages() -> list[Path]:
    """README and the pages of the docs."""
    return [README, *sorted(DOCS.glob("*.md"))]


# ---- the recipes and what they take


class Row(NamedTuple):
    """What the table of docs/recipes.md says of a recipe."""

    card: str
    model: str
    rank: str
    tokens: str
    peak: str
    needs: str


def recipe_rows() -> dict[str, Row]:
    """The rows of docs/recipes.md that are of a recipe for one card as it is, by its name."""
    return dict(_rows(RECIPES_PAGE.read_text("utf-8"), PEAK, NEEDS))


def rows_of_several_cards() -> dict[str, Row]:
    """The same of recipes for several cards; what they say of memory is of each."""
    return dict(_rows(RECIPES_PAGE.read_text("utf-8"), PEAK_OF_A_RANK, A_CARD_NEEDS))


def _rows(text: str, peak: str, needs: str) -> Iterator[tuple[str, Row]]:
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif not columns:
            columns = cells
        elif needs in columns and (name := re.match(r"\[`([\w./]+\.yaml)`\]", cells[0])):
            found = dict(zip(columns, cells, strict=True))
            yield (
                name[1],
                Row(
                    found.get("card") or found["cards"],
                    found.get("model", ""),
                    found.get("rank", ""),
                    found["tokens a step"],
                    found[peak],
                    found[needs],
                ),
            )


def readme_table() -> str:
    """README's rows: the fine-tunings of docs/recipes.md, the largest card at home first, and those in centres last."""
    chosen = {name: row for name, row in recipe_rows().items() if "/" not in name and row.rank}
    sizes = {name: int(row.card.split()[0]) for name, row in chosen.items()}
    rows = sorted(chosen.items(), key=lambda item: (sizes[item[0]] > AT_HOME, -sizes[item[0]]))
    head = "| card | model, all weights | recipe | a card needs | a step |\n|---|---|---|---|---|\n"
    for name, row in rows:
        time = MEASURED.get(name, "not measured")
        head += f"| {row.card} | {row.model} | [`{name}`](recipes/{name}) | {row.needs} GiB | {time} |\n"
    return head


# ---- GaLore's arguments


def arguments_table() -> str:
    """GaLore's arguments: what they may be, and what they mean by the docstring of `GaLoreConfig`."""
    meanings = _meanings(inspect.getdoc(GaLoreConfig) or "")
    lines = ["| key | values | default | meaning |\n", "|---|---|---|---|\n"]
    for key in keys():
        values = ", ".join(value if " " in value else f"`{value}`" for value in key.values)
        default = f"`{key.default}`" if key.is_set else key.default
        lines.append(f"| `{key.name}` | {values} | {default} | {meanings[key.name]} |\n")
    return "".join(lines)


def _meanings(docstring: str) -> dict[str, str]:
    """The texts of a docstring's arguments, each as one line."""
    section = docstring.split("Args:\n")[1].split("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE)
    return {name: _sentence(" ".join(text.split())) for name, text in entries}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].removesuffix(".")


# ---- figures of a notebook


def quality_table() -> str:
    """The table of optimizers that the notebook on quality ends with, without the rates."""
    cells = json.loads(QUALITY.read_text("utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    (table,) = (text for data in outputs if "held-out loss" in (text := "".join(data.get("text/html", []))))
    body = table.partition("<tbody>")[2]
    lines = ["| | held-out loss | optimizer state, MiB |\n", "|---|---|---|\n"]
    for row in body.split("<tr>")[1:]:
        name, *_, state, loss = (text.strip() for text in re.findall(r">([^<]*)</t[hd]>", row))
        lines.append(f"| {name} | {loss} | {state} |\n")
    return "".join(lines)


# ---- options at small ranks


def options_tables() -> str:
    """The held-out losses of all optimizers at the best of their rates, from random weights and in fine-tuning."""
    text = "\n**From random weights**, held-out loss (and the best rates: η of all else, and `scale`):\n\n"
    text += _by_rank(best_of_ranks(), lambda best: f"{best.cell()}<br>{best.rates[0]:g}, {best.rates[1]:.3g}")
    text += "\n**Conversations**, held-out loss of the answers (and the matrices' own rate, η × `scale`):\n\n"
    text += _by_rank(best_of_tuning("chat"), lambda best: f"{best.cell()}<br>{best.rates[1]:.3g}")
    text += (
        "\n**Which library a docstring is from**, of eight, held-out loss and accuracy (and the matrices' rate):\n\n"
    )
    text += _by_rank(
        best_of_tuning("origin"),
        lambda best: f"{best.cell()}<br>{best.cell('accuracy', 1, 100)} %<br>{best.rates[1]:.3g}",
    )
    return f"{text}\n"


def losses_by_rank() -> dict[str, dict[str, list[float]]]:
    """The mean and the deviation of the losses of some optimizers by rank, for a picture."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in (
        "Muon",
        "AdamW, two rates",
        "default",
        "residual=fira",
        "scaling=channel",
        "scaling=tensor",
        "rule=muon",
        "rule=muon, residual=muon",
        "rule=muon, residual=normuon, 8 bits, rotate",
    ):
        for (contender, rank), best in sorted(best_of_ranks().items()):
            if contender == name:
                spread = statistics.stdev(line["loss"] for line in best.lines) if len(best.lines) > 1 else 0.0
                found.setdefault(name, {})[str(rank)] = [round(best.mean(), 4), round(spread, 4)]
    return found


# What the rows are called, in their order.
_OPTIMIZERS = {
    "AdamW": "AdamW, one rate",
    "AdamW, two rates": "AdamW",
    "Muon": "Muon",
    "LoRA": "LoRA, as many elements",
    "galore_torch": "`galore_torch` 1.0",
    "default": "**GaLoreAdamW**",
    "residual=fira": "… `residual=fira`",
    "residual=sign, .1": "… `residual=sign, residual_scale=0.1`",
    "residual=sign, 1": "… `residual=sign`",
    "rule=muon": "… `rule=muon`",
    "rule=muon, residual=fira": "… `rule=muon, residual=fira`",
    "rule=muon, residual=muon": "… `rule=muon, residual=muon`",
    "rule=muon, residual=muon, 8 bits": "… `rule=muon, residual=muon, residual_bits=8`",
    "rule=muon, residual=normuon": "… `rule=muon, residual=normuon`",
    "rule=muon, residual=normuon, 8 bits": "… `rule=muon, residual=normuon, residual_bits=8`",
    "rule=muon, residual=normuon, 8 bits, rotate": "… `rule=muon, residual=normuon, residual_bits=8, moments=rotate`",
    "scaling=channel": "… `scaling=channel`",
    "scaling=tensor": "… `scaling=tensor`",
}


def _by_rank(found: Mapping[tuple[str, int], Best], cell: Callable[[Best], str]) -> str:
    """A table of optimizers by rank; what has no rank is in a column of its own."""
    ranks = sorted({rank for _, rank in found if rank != FULL_RANK}, reverse=True)
    lines = [f"| | full rank | {' | '.join(f'rank {rank}' for rank in ranks)} |\n", "|---" * (2 + len(ranks)) + "|\n"]
    for name, shown in _OPTIMIZERS.items():
        bests = [found.get((name, rank)) for rank in (FULL_RANK, *ranks)]
        if any(bests):
            lines.append(f"| {shown} | {' | '.join('' if best is None else cell(best) for best in bests)} |\n")
    return "".join(lines)


# ---- weights in 8 bits

# What the ways are called of which a table tells, and beside which.
_WAYS = {
    "bfloat16": ("bfloat16", "bfloat16"),
    "int8 in bfloat16": ("8 bits, products in bfloat16", "bfloat16"),
    "float": ("float32", "float"),
    "int8": ("8 bits, products in float32", "float"),
    "int8, nearest": ("8 bits, updates rounded to the nearest: not offered", "float"),
}
_TASKS = {"pretraining": "from random weights, 600 steps", "fine-tuning": "fine-tuning, 300 steps"}


def int8_table() -> str:
    """The held-out losses of weights in 8 bits beside those of others, and their ratio of the same seed."""
    found = int8_losses()
    tasks = [task for task in _TASKS if any(of == task for of, _ in found)]
    titles = [title for task in tasks for title in (_TASKS[task], "by seed")]
    lines = [f"| weights | {' | '.join(titles)} |\n", "|---" * (1 + len(titles)) + "|\n"]
    for way, (shown, beside) in _WAYS.items():
        cells = []
        for task in tasks:
            losses, base = found.get((task, way)), found.get((task, beside))
            cells += ["", ""] if losses is None or base is None else _losses_beside(losses, base)
        lines.append(f"| {shown} | {' | '.join(cells)} |\n")
    return "".join(lines)


def _losses_beside(losses: Mapping[int, float], base: Mapping[int, float]) -> list[str]:
    """`3.516, × 0.9998` and the ratios of each seed; of the base itself only its loss."""
    mean = f"{statistics.fmean(losses.values()):.3f}"
    if losses == base:
        return [mean, ""]
    ratios = [losses[seed] / base[seed] for seed in sorted(losses)]
    return [f"{mean}, × {statistics.fmean(ratios):.4f}", ", ".join(f"{ratio:.4f}" for ratio in ratios)]


# ---- models


def models_table() -> str:
    """What `all-linear` projects of each architecture that tests train, at the default rank, by groups."""
    text, group = "", None
    for architecture in ZOO.values():
        if architecture.group != group:
            group = architecture.group
            text += f"\n### {group[0].upper()}{group[1:]}\n\n"
            text += "| model | counted on | parameters | projected | full-rank |\n|---|---|---:|---|---|\n"
        text += models_row(architecture)
    return f"{text}\n"


def models_row(architecture: Architecture) -> str:
    """The row of one architecture, counted on a model of the real size that has no weights."""
    from hf_galore.integrations.target_modules import find_targets  # imports transformers, which takes seconds
    from hf_galore.integrations.weights import elements, unique, weights_of

    model = architecture.make_real()
    targets = find_targets(model, "all-linear", GaLoreConfig())
    projected, too_small = (
        {id(weight) for weight in found.values()} for found in (targets.projected, targets.too_small)
    )
    weights = unique(weights_of(model))
    total = elements(weights)
    shares: dict[str, float] = {}
    done: dict[str, float] = {}
    for weight in weights:
        kind = f"small {weight.kind}" if id(weight.param) in too_small else weight.kind
        counts = done if id(weight.param) in projected else shares
        counts[kind] = counts.get(kind, 0.0) + elements([weight]) / total
    size = f"{total / 1e9:.1f}B" if total > 0.9995e9 else f"{total / 1e6:.0f}M"
    return f"| `{architecture.name}` | {architecture.size} | {size} | {_kinds(done)} | {_kinds(shares)} |\n"


def _kinds(shares: Mapping[str, float]) -> str:
    """`experts 96.6 %, linear layers 2.8 %`, most first; what is less than a tenth of a percent is left out."""
    shown = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in shown if share >= 0.001) or "under 0.1 %"


# ---- writing


def with_part(text: str, part: str) -> str:
    """A page with what lies between its marks made anew.

    Raises:
        ValueError: it has not both marks, once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"A page needs {BEGIN.strip()} once, and {END.strip()} once.")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{part}{END}{rest.partition(END)[2]}"


PARTS: Mapping[Path, Callable[[], str]] = {
    README: readme_table,
    ARGUMENTS_PAGE: arguments_table,
    CHOOSING_PAGE: quality_table,
    MODELS_PAGE: models_table,
    SMALL_RANKS_PAGE: options_tables,
    INT8_PAGE: int8_table,
}
"""What makes the part of each page that is made."""


def written(path: Path) -> str:
    """What a page that has something made should be."""
    return with_part(path.read_text("utf-8"), PARTS[path]())


def drawn() -> dict[str, str]:
    """The pictures of docs/pictures, by the names of their files, as their script draws them."""
    spec = importlib.util.spec_from_file_location("docs_pictures_draw", DOCS / "pictures" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, str] = module.pictures()
    return found


if __name__ == "__main__":
    for page in PARTS:
        page.write_text(written(page), "utf-8")
    LOSSES_BY_RANK.write_text(f"{json.dumps(losses_by_rank(), indent=1)}\n", "utf-8")
    for name, text in drawn().items():
        (DOCS / "pictures" / name).write_text(text, "utf-8")

"""The rows of a bench for the table of docs/cards.md, which grows by pasting them."""

from __future__ import annotations

from .report import GIB, Report, Row

COLUMNS = (
    "card",
    "what",
    "layers",
    "tokens a step",
    "s / step",
    "× AdamW8bit",
    "tokens / s",
    "allocated GiB",
    "reserved GiB",
    "planned GiB",
    "first step, s",
    "a refresh, ms",
    "versions",
)
_VERSIONS = ("torch", "transformers", "bitsandbytes", "hf-galore")


def rows(report: Report) -> list[str]:
    """A line of Markdown for each row of a report, with as many cells as `COLUMNS`."""
    return [f"| {' | '.join(cell.replace('|', '/') for cell in _cells(report, row))} |" for row in report.rows]


def cells(report: Report, row: Row) -> list[str]:
    """Of a row what is the same in a terminal and in Markdown: from `layers` to `a refresh, ms`."""
    look = report.look
    planned = None if row.planned is None else row.planned.peak_bytes
    refresh = row.refresh_seconds
    return [
        str(row.layers),
        f"{look.rows * look.max_length * look.micro_batches:,}",
        figure(row.seconds) if row.failed is None else row.failed,
        figure(report.ratio(row), ".2f"),
        figure(row.tokens_per_second, ",.0f"),
        gib(row.most("allocated")),
        gib(row.most("reserved")),
        gib(planned),
        figure(row.first_seconds, ".2f"),
        figure(None if refresh is None else 1000 * refresh, ".1f"),
    ]


def figure(value: float | None, spec: str = ".3f") -> str:
    """A number, or nothing where there is none."""
    return "" if value is None else format(value, spec)


def gib(nbytes: int | None) -> str:
    """A size in GiB, or nothing where there is none."""
    return figure(None if nbytes is None else nbytes / GIB, ".2f")


def card(report: Report) -> str:
    """The card, or that it is none, and the one that was pretended."""
    look = report.look
    pretended = "" if report.vram_bytes is None else f" as one of {gib(report.vram_bytes)} GiB"
    if look.memory_bytes is None:
        return f"measured on CPU, {look.model}"
    return f"{look.card} ({gib(look.memory_bytes)} GiB){pretended}"


def _cells(report: Report, row: Row) -> list[str]:
    look = report.look
    versions = [f"{name} {look.versions[name]}" for name in _VERSIONS]
    if look.driver is not None:
        versions.append(f"driver {look.driver}")
    return [card(report), f"{report.recipe}: {row.name}", *cells(report, row), ", ".join(versions)]

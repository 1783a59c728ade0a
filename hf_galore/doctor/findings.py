"""What the doctor says: findings, each of which is fine, worth knowing, or would stop a training; and the report."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from typing import Any, Literal

Status = Literal["ok", "note", "problem"]

_WIDTH = 80
_STATUS, _TOPIC = 9, 17  # characters of the first two columns, with the space behind
_CLOSING = "Paste all of this into an issue. It holds no token and no file's content."


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    """A word or two."""
    status: Status
    """`problem`: something that would stop a training, or make it train other than asked."""
    text: str
    """What was found."""
    advice: str | None = None
    """What to do."""
    command: str | None = None
    """The command that mends it, for a shell."""

    @classmethod
    def of_error(cls, topic: str, error: Exception) -> Finding:
        """The problem that something cannot be looked at, for this reason."""
        return cls(topic, "problem", f"cannot be used: {type(error).__name__}: {' '.join(str(error).split())}")


@dataclasses.dataclass(frozen=True)
class Report:
    """All findings about this machine."""

    title: str
    """hf_galore's version, and where it is."""
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Those of the findings that would stop a training."""
        return tuple(finding for finding in self.findings if finding.status == "problem")

    @property
    def fine(self) -> bool:
        """Whether nothing was found that would stop a training."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The report for machines."""
        return {
            "title": self.title,
            "fine": self.fine,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    def json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        lines = [self.title, ""]
        for finding in self.findings:
            lines += _lines(finding)
        return "\n".join([*lines, "", *textwrap.wrap(f"{self._verdict()} {_CLOSING}", _WIDTH)])

    def short(self) -> str:
        """The report for a notebook: what the card is, what would stop a training, and the verdict."""
        shown = [
            finding
            for finding in self.findings
            if finding.status == "problem" or finding.topic.startswith(("card", "bfloat16", "model"))
        ]
        lines = [line for finding in shown for line in _lines(finding)]
        return "\n".join([*lines, "", *textwrap.wrap(self._verdict(), _WIDTH)])

    def _verdict(self) -> str:
        notes = sum(finding.status == "note" for finding in self.findings)
        if not self.fine:
            topics = list(dict.fromkeys(finding.topic for finding in self.problems))
            return f"{_count(len(self.problems), 'problem')}: {', '.join(topics)}."
        return f"Nothing stops a training here ({_count(notes, 'note')})."


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _lines(finding: Finding) -> list[str]:
    """A finding in lines of 80 characters; a command stays in one, to be copied."""
    head = f"{finding.status:<{_STATUS}}{finding.topic:<{_TOPIC}}"
    indent = " " * (_STATUS + _TOPIC)
    lines = textwrap.wrap(
        finding.text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    if finding.advice is not None:
        lines += textwrap.wrap(
            finding.advice,
            _WIDTH,
            initial_indent=f"{indent}-> ",
            subsequent_indent=f"{indent}   ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    if finding.command is not None:
        lines.append(f"{' ' * _STATUS}{finding.command}")
    return lines

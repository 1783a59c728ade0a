"""Folders of runs, written by hand; what `hf-galore compare` says of them; and its page, taken apart."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hf_galore.compare import reading
from hf_galore.compare.as_json import runs_as_dicts
from hf_galore.recipes.run_record import RUN_FILE, RunFacts
from tests.support.commands import printed_json

NAN = math.nan
FACTS = RunFacts(
    command="hf-galore sft",
    recipe="recipe.yaml",
    model="org/model",
    data="org/data",
    optim="galore_adamw_8bit_layerwise",
    optim_args="rank=64, scale=1",
    optim_target_modules=["attn", "mlp"],
    learning_rate=2e-3,
    lora_rank=None,
    parameters=1000,
    trainable_parameters=1000,
    device="cpu",
    versions={"torch": "2.13.0", "trl": "1.16.0"},
    started="2026-01-02T03:04:05+00:00",
    finished=True,
    optimizer_bytes=3 * 2**20,
)


def a_log(
    losses: Sequence[float],
    *,
    held_out: Sequence[float] = (),
    seconds: float | None = 0.5,
    runtime: float | None = 20.0,
    **more: float,
) -> list[dict[str, Any]]:
    """A log for each step; held-out losses at steps 1, 2, ...; and the entry of the end."""
    log: list[dict[str, Any]] = []
    for step, loss in enumerate(losses, start=1):
        entry = {"loss": loss, "learning_rate": 1e-3 / step, "epoch": step / 10, "step": step, **more}
        if seconds is not None:
            entry |= {"step_seconds": seconds, "tokens_per_second": 64 / seconds, "peak_memory_gib": step / 100}
        log.append(entry)
        if step <= len(held_out):
            log.append({"eval_loss": held_out[step - 1], "eval_runtime": 1.0, "step": step})
    if runtime is not None:
        log.append({"train_runtime": runtime, "train_loss": 1.0, "step": len(losses)})
    return log


def write_state(folder: Path, log: Sequence[dict[str, Any]], step: int, max_steps: int | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": step, "max_steps": max_steps or step, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def write_facts(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(json.dumps({**vars(FACTS), **changes}))


def write_run(
    folder: Path, losses: Sequence[float] = (4.0, 3.0, 2.0), facts: dict[str, Any] | None = None, **log: Any
) -> Path:
    write_state(folder, a_log(losses, **log), len(losses))
    write_facts(folder, **(facts or {}))
    return folder


def compared(folders: Sequence[Path], output: Path, *options: str) -> dict[str, Any]:
    """What `--json` prints, by the names of the runs."""
    found = printed_json(["compare", *map(str, folders), "--json", "--output", str(output), *options])
    assert found["page"] == str(output / "index.html")
    return {run["name"]: run for run in found["runs"]}


def numbers(*folders: Path) -> dict[str, Any]:
    """The numbers of the runs, by their names, without a page."""
    return {run["name"]: run for run in runs_as_dicts(reading.read_runs(folders))}


class Page(HTMLParser):
    """The tables of a page, its pictures, and everything that would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.best: list[str] = []
        self.pictures: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self._best = False
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        if tag not in ("meta", "input"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._best = "best" in (given.get("class") or "").split()
        elif given.get("role") == "img":
            self.pictures.append(str(given["aria-label"]))
        assert not {"src", "srcset", "action"} & given.keys()
        assert (given.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in given)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data
            if self._best:
                self.best.append(data)

    def rows(self) -> dict[str, list[str]]:
        """The cells of all tables, by the labels of their rows."""
        return {row[0]: row[1:] for table in self.tables for row in table[1:]}


def png_size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return int(width), int(height)

"""Where things stand: which rooms a room may import, no import circle, no long file, not too much on one class.

Imports in functions count, and those for type checkers do not.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hf_galore
from hf_galore.optim import GaLoreOptimizer

ROOT = Path(hf_galore.__file__).parent
LONGEST = 350  # lines
MOST_METHODS = 20

# Each room may import those before it. The kernels of bitsandbytes stand beside the arithmetic that calls them, and
# windows ask accelerate whether theirs is over. What engines do to parameters, the optimizers look for themselves.
ROOMS = (
    "config",
    "log",
    "lowrank",
    "kernels",
    "int8",
    "rules",
    "backward",
    "optim",
    "integrations",
    "plan",
    "recipes",
    "compare",
    "bench",
    "doctor",
    "cli",
)
BESIDE = {
    "hf_galore.integrations.bitsandbytes",
    "hf_galore.integrations.bitsandbytes_calls",
    "hf_galore.integrations.bitsandbytes_checks",
    "hf_galore.integrations.accelerate",
    "hf_galore.integrations.ddp",
    "hf_galore.integrations.engines",
    "hf_galore.integrations.fully_shard",
}
# Makes optimizers from a model and names of layers, as a Trainer does: above the integrations, though it is an
# optimizer's.
ABOVE_INTEGRATIONS = {"hf_galore.optim.build"}
# Hands what is not a function on to the planning of recipes.
DOOR = "hf_galore.plan"


@functools.cache
def files() -> dict[str, Path]:
    found = (path for path in ROOT.rglob("*.py") if "bootstrap" not in path.parts)
    return {
        ".".join(("hf_galore", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in found
    }


def imported(name: str) -> Iterator[str]:
    """The modules of the package that a module imports."""
    path = files()[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text("utf-8"))
    for_type_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_type_checkers:
            continue
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield full if full in files() else module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@functools.cache
def graph() -> dict[str, set[str]]:
    return {name: {other for other in imported(name) if other in files()} - {name, "hf_galore"} for name in files()}


def circle_from(start: str) -> list[str]:
    """A way along imports from a module back to it; empty where there is none."""
    ways = [[start]]
    seen = set()
    while ways:
        way = ways.pop()
        for other in sorted(graph()[way[-1]]):
            if other == start:
                return [*way, start]
            if other not in seen:
                seen.add(other)
                ways.append([*way, other])
    return []


def room_of(name: str) -> int | None:
    parts = name.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 1 and parts[1] in ROOMS else None


def test_all_files_are_seen() -> None:
    assert len(files()) > 60
    assert "hf_galore.optim.target" in graph()["hf_galore.optim.optimizer"]
    assert {name.split(".")[1] for name in files() if "." in name} >= set(ROOMS)


def test_there_is_no_import_circle() -> None:
    circles = [" → ".join(circle) for circle in map(circle_from, graph()) if circle]
    assert not circles


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_below_it(room: str) -> None:
    for name in files():
        own = room_of(name)
        if own != ROOMS.index(room) or name == DOOR:
            continue
        if name in ABOVE_INTEGRATIONS:
            own = ROOMS.index("integrations")
        for other in graph()[name]:
            below = room_of(other)
            assert below is None or below <= own or other in BESIDE or name in BESIDE, f"{name} imports {other}"


@pytest.mark.parametrize("name", ["lowrank", "rules", "optim", "backward"])
def test_the_arithmetic_and_the_optimizers_do_without_the_trainer_and_commands(name: str) -> None:
    reached = {module for module in files() if module.startswith(f"hf_galore.{name}.")} - ABOVE_INTEGRATIONS
    todo = list(reached)
    while todo:
        new = graph()[todo.pop()] - reached
        reached |= new
        todo += new
    assert not {
        module for module in reached if module.startswith(("hf_galore.plan", "hf_galore.recipes", "hf_galore.cli"))
    }
    assert "hf_galore.integrations.trainer" not in reached


def test_no_module_takes_a_room_from_the_package_itself() -> None:
    """`from .. import kernels` looks like a user's first use of hf_galore: it would register while it is imported."""
    found = [
        f"{name}: {ast.unparse(node)}"
        for name, path in files().items()
        if name.count(".") > 1 or path.name == "__init__.py"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom)
        and (
            (node.module is None and node.level == name.count(".") + (path.name == "__init__.py"))
            or (node.module == "hf_galore" and node.level == 0)
        )
    ]
    assert found == []


def test_no_file_is_too_long() -> None:
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in files().items()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_the_optimizer_has_few_public_methods() -> None:
    own = [
        name
        for name, value in inspect.getmembers_static(GaLoreOptimizer)
        if not name.startswith("_")
        and (callable(value) or isinstance(value, property))
        and value is not inspect.getattr_static(torch.optim.Optimizer, name, None)
    ]
    assert len(own) < MOST_METHODS, own


def test_what_has_private_names_of_other_libraries_is_an_integration() -> None:
    """Names with an underscore of transformers, TRL, accelerate, PEFT and bitsandbytes."""
    others = ("transformers", "trl", "accelerate", "peft", "bitsandbytes")
    found = []
    for name, path in files().items():
        if name.startswith("hf_galore.integrations"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in others:
                found += [f"{name}: {node.module}.{a.name}" for a in node.names if a.name.startswith("_")]
    assert not found

"""docs/loops.md shows what the examples have, from one place: no second copy that goes stale."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.examples import EXAMPLES
from tests.support.helpers import hooks_on, snapshot

PAGE = EXAMPLES.parent / "loops.md"
TEXT = PAGE.read_text("utf-8")
# Of the page itself: what comes before the examples.
OWN = TEXT.split("\n## accelerate\n")[0].count("```python")
BLOCKS = [match.group(1) for match in re.finditer(r"```python\n(.*?)```", TEXT, re.DOTALL)]


def occurs(block: str, program: str) -> bool:
    """Whether lines follow each other in a program, whatever they are indented by."""
    # Blank lines aside: the formatter puts other ones into pages.
    lines, found = ([line for line in text.splitlines() if line.strip()] for text in (program, block))
    parts = ("\n".join(lines[start : start + len(found)]) for start in range(len(lines)))
    return any(textwrap.dedent(part) == "\n".join(found) for part in parts)


def test_code_of_the_page_is_that_of_the_examples() -> None:
    programs = [path.read_text("utf-8") for path in sorted(EXAMPLES.glob("*.py"))]
    shown = BLOCKS[OWN:]
    assert len(shown) >= 6
    for block in shown:
        assert any(occurs(block, program) for program in programs), block


def test_a_line_that_differs_is_found() -> None:
    program = (EXAMPLES / "accelerate_loop.py").read_text("utf-8")
    block = next(block for block in BLOCKS if "accelerator.accumulate" in block)
    assert occurs(block, program)
    assert not occurs(block.replace("zero_grad", "zero_grads"), program)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_example_is_on_the_page_and_tested(path: Path) -> None:
    assert f"(examples/{path.name})" in TEXT
    tests = [other.read_text("utf-8") for other in Path(__file__).parent.glob("test_*.py")]
    assert any(f'example("{path.stem}")' in text for text in tests)


class Model(nn.Module):
    """What the page's own code calls `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(300, 300), nn.Linear(300, 300)

    def forward(self, batch: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.second(self.first(batch).tanh()).square().mean())


def test_the_pages_own_code_runs() -> None:
    """The last of it trains: its loop moves the weights, and leaves the model as it was."""
    model = Model()
    matrices = [param for param in model.parameters() if param.ndim == 2]
    others = [param for param in model.parameters() if param.ndim == 1]
    names = {"model": model, "matrices": matrices, "others": others, "batches": list(torch.randn(3, 8, 300))}
    start = snapshot(model)
    for block in BLOCKS[:OWN]:
        exec(block, names)
        optimizer: Any = names["optimizer"]
        assert len(optimizer.targets()) == 2
        if block is not BLOCKS[OWN - 1]:
            optimizer.close()
            assert torch.equal(model.first.weight, start["first.weight"])
    assert OWN == 3
    assert hooks_on(model) == 0
    assert all(not torch.equal(param, start[name]) for name, param in model.named_parameters())


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (PAGE.parent / target).exists(), target

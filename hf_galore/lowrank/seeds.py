"""The seeds of a run's random numbers: functions of the run's own seed, so that nothing has to be saved.

The same run, its repetition, its resumption and each of its processes have the same.
"""

from __future__ import annotations


def mixed_seed(seed: int, index: int, number: int) -> int:
    """Three numbers in one of 63 bits that no other three give in practice, for `torch.Generator.manual_seed`."""
    mixed = ((seed * 0x9E3779B97F4A7C15 + index) * 0xBF58476D1CE4E5B9 + number) * 0x94D049BB133111EB
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)


def basis_seed(seed: int, index: int, refreshes: int) -> int:
    """The seed of a target's next random bases.

    Args:
        seed: of the run.
        index: of the target in its optimizer, 0 or more.
        refreshes: that the target has behind it.
    """
    # Negative: an update that is rounded stochastically (`rounding.generator_for`) has other numbers, then.
    return mixed_seed(seed, -1 - index, refreshes)


def held_seed(seed: int, index: int, step: int) -> int:
    """The seed that sums of a target's low-rank gradients are rounded with, in one accumulation window.

    Args:
        seed: of the run.
        index: of the target in its optimizer, 0 or more.
        step: that the window belongs to.
    """
    # Twice: what rounds the update of the same weight at the same step has other numbers.
    return mixed_seed(mixed_seed(seed, index, step), index, step)


def probe_seed(index: int, refreshes: int) -> int:
    """The seed of a target's norm probes, from one refresh to the next.

    Not of the run: nothing that is trained comes of them, and a checkpoint has no more to keep.

    Args:
        index: of the target in its optimizer, 0 or more.
        refreshes: that the target has behind it.
    """
    return mixed_seed(mixed_seed(0, index, refreshes), -1 - index, refreshes)

"""When a target's basis is refreshed: pure functions on step counts.

Steps are counted as those that the target has behind it: its first refresh is due at 0.
"""

from __future__ import annotations

NEVER = -1  # `refreshed_at` before the first refresh

# A gap grows to at most this many times the configured one.
MAX_GAP_FACTOR = 8
# From which overlap on a subspace counts as stable, with 0 for what two random ones have and 1 for the same one.
# Q-GaLore's threshold for the cosine similarity of bases (arXiv:2407.08296, section 3.2; its code's default).
STABLE_OVERLAP = 0.4


def phase_of(index: int, count: int, gap: int) -> int:
    """The phase of target number `index` of `count`: ⌊index · gap / count⌋, which spreads them over the gap."""
    return index * gap // count


def step_of_next_refresh(refreshed_at: int, gap: int, phase: int, gap_factor: int) -> int:
    """The step at which a target refreshes next: the first after `refreshed_at` in its phase, lazily some gaps later.

    Args:
        refreshed_at: the step of the last refresh; `NEVER` before the first.
        gap: `update_proj_gap`.
        phase: the remainder of `step / gap` at which this target refreshes.
        gap_factor: how many gaps to wait, at least 1.
    """
    if refreshed_at == NEVER:
        return 0
    return refreshed_at + (phase - refreshed_at - 1) % gap + 1 + (gap_factor - 1) * gap


def refreshes_by(step: int, gap: int, phase: int) -> int:
    """How many refreshes a target that is not lazy has had after `step` steps."""
    if step == 0:
        return 0
    return (step - 1) // gap + 1 if phase == 0 else 1 + max(0, (step - 1 - phase) // gap + 1)


def next_gap_factor(gap_factor: int, overlap: float, chance: float) -> int:
    """The gap's factor after a refresh: doubled where the subspace has hardly moved, else back to 1.

    Args:
        gap_factor: the present one.
        overlap: of the new basis with the old, 0 to 1.
        chance: the overlap of two random subspaces of these dimensions.

    Source: Q-GaLore (arXiv:2407.08296), section 3.2, which never shortens a gap again. Here the overlap is that of the
    subspaces, whatever basis they are given in.
    """
    if chance >= 1 or (overlap - chance) / (1 - chance) < STABLE_OVERLAP:
        return 1
    return min(2 * gap_factor, MAX_GAP_FACTOR)

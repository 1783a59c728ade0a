"""Births, deaths, peaks and labels of storages: against sizes that are known, with real tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_galore.plan.tracking import ACTIVATIONS, BACKWARD, FORWARD, GRANULE, TEMPORARIES, Allocation, StorageTracker

CPU = torch.device("cpu")
KIB = 1024
FLOATS = 256  # of float32: one KiB


def kib(size: int = 1) -> Tensor:
    """A tensor of so many KiB, made now."""
    return torch.empty(size * FLOATS)


def rounded(nbytes: int) -> int:
    return -(-nbytes // GRANULE) * GRANULE


def in_allocations(allocations: list[Allocation], operation: str) -> Allocation:
    (found,) = (each for each in allocations if each.operation == operation)
    return found


# ---- births and deaths


@pytest.mark.parametrize(("nbytes", "counted"), [(0, 0), (1, 512), (511, 512), (512, 512), (513, 1024), (4096, 4096)])
def test_sizes_are_multiples_of_512(nbytes: int, counted: int) -> None:
    with StorageTracker(CPU) as tracker:
        tensor = torch.empty(nbytes, dtype=torch.uint8)
        assert tracker.live_bytes == counted
        del tensor
        assert tracker.live_bytes == 0


def test_nothing_made_before_counts_until_it_is_used() -> None:
    before = kib(3)
    with StorageTracker(CPU) as tracker:
        assert tracker.live_bytes == 0
        made = before + 1
        assert tracker.live_bytes == 3 * KIB  # the sum alone: an operation's inputs are no births
        before.add_(made)
        assert tracker.live_bytes == 6 * KIB


def test_views_and_operations_in_place_add_nothing() -> None:
    with StorageTracker(CPU) as tracker:
        tensor = kib(4)
        views = [tensor.view(2, -1), tensor[10:20], tensor.view(32, 32).mT, tensor.detach(), tensor.expand(3, -1)]
        tensor.fill_(1).mul_(2)
        torch.add(views[0], 1, out=views[0])
        assert tracker.live_bytes == 4 * KIB
        assert [peak.nbytes for peak in tracker.peaks()] == [4 * KIB]


def test_a_view_keeps_the_whole_storage() -> None:
    with StorageTracker(CPU) as tracker:
        tensor = kib(4)
        last = tensor[-1:]
        del tensor
        assert tracker.live_bytes == 4 * KIB
        del last
        assert tracker.live_bytes == 0


def test_a_tensor_that_dies_lowers_live_bytes() -> None:
    with StorageTracker(CPU) as tracker:
        first, second = kib(1), kib(2)
        del first
        assert tracker.live_bytes == 2 * KIB
        second = kib(8)  # the old one dies after the new one is born
        assert tracker.live_bytes == 8 * KIB
        assert tracker.peaks()[0].nbytes == 10 * KIB
        del second
        assert tracker.live_bytes == 0


def test_deaths_after_the_tracker_has_been_left_are_seen() -> None:
    with StorageTracker(CPU) as tracker:
        tensor = kib(2)
    kib(5)  # not seen
    assert tracker.live_bytes == 2 * KIB
    del tensor
    assert tracker.live_bytes == 0


def test_every_output_of_an_operation_counts() -> None:
    with StorageTracker(CPU) as tracker:
        values, indices = torch.sort(torch.zeros(FLOATS))
        # The zeros died. Float32 values, int64 indices.
        assert tracker.live_bytes == KIB + 2 * KIB == values.nbytes + indices.nbytes


def test_temporaries_within_an_operation_count() -> None:
    """`(x + 1) * 2` holds three at its peak and two in the end."""
    with StorageTracker(CPU) as tracker:
        x = kib()
        y = (x + 1) * 2
        assert tracker.live_bytes == 2 * KIB
        assert tracker.peaks()[0].nbytes == 3 * KIB
        del y


def test_a_resized_storage_is_counted_anew() -> None:
    with StorageTracker(CPU) as tracker:
        tensor = kib(2)
        tensor.untyped_storage().resize_(6 * KIB)
        tensor.detach()  # seen with its next operation
        assert tracker.live_bytes == 6 * KIB
        assert tracker.peaks()[0].nbytes == 6 * KIB
        tensor.untyped_storage().resize_(0)  # as FSDP frees a parameter that lives on
        tensor.detach()
        assert tracker.live_bytes == 0
        tensor.untyped_storage().resize_(2 * KIB)
        tensor.detach()
        assert tracker.live_bytes == 2 * KIB
        assert tracker.peaks()[0].nbytes == 6 * KIB
        del tensor
        assert tracker.live_bytes == 0


def test_other_devices_do_not_count() -> None:
    with StorageTracker(CPU) as on_cpu, StorageTracker(torch.device("meta")) as on_meta:
        here, elsewhere = kib(2), torch.empty(FLOATS * 3, device="meta")
        elsewhere = elsewhere + 1
        on_cpu.label([here, elsewhere], "ours")
        assert on_cpu.live_bytes == 2 * KIB
        assert on_cpu.breakdown() == {"ours": 2 * KIB}
        assert on_meta.live_bytes == 3 * KIB


# ---- peaks


def test_the_peak_in_the_middle() -> None:
    with StorageTracker(CPU) as tracker:
        kept = kib(1)
        kib(2)
        large, larger = kib(8), kib(16)
        tracker.label([kept], "kept")
        tracker.label([large, larger], "large")
        del large, larger
        last = kib(4)
        (peak,) = tracker.peaks()
        assert peak.nbytes == 25 * KIB
        assert tracker.breakdown(peak.event) == {"large": 24 * KIB, "kept": KIB}
        assert tracker.breakdown() == {TEMPORARIES: 4 * KIB, "kept": KIB}
        del last


def test_each_phase_has_its_peak_highest_first() -> None:
    phase = "one"
    with StorageTracker(CPU) as tracker:
        tracker.use_phases(lambda: phase)
        kept = kib(1)
        kib(2)
        phase = "two"
        kib(7)
        phase = "three"
        kib(4)
        phase = "one"
        kib(3)
        assert [(peak.phase, peak.nbytes) for peak in tracker.peaks()] == [
            ("two", 8 * KIB),
            ("three", 5 * KIB),
            ("one", 4 * KIB),
        ]
        for peak in tracker.peaks():
            assert sum(tracker.breakdown(peak.event).values()) == peak.nbytes
        del kept


def test_a_phase_without_births_has_no_peak() -> None:
    phase = "one"
    with StorageTracker(CPU) as tracker:
        tracker.use_phases(lambda: phase)
        tensor = kib()
        phase = "two"
        tensor.add_(1)
        del tensor
    assert [peak.phase for peak in tracker.peaks()] == ["one"]


# ---- labels


def test_labels_hold_for_the_whole_life() -> None:
    with StorageTracker(CPU) as tracker:
        tensor = kib(2)
        (peak,) = tracker.peaks()
        assert tracker.breakdown(peak.event) == {TEMPORARIES: 2 * KIB}
        kib(1)
        tracker.label([tensor], "ours")
        assert tracker.breakdown(peak.event) == {"ours": 2 * KIB}  # also before it was said
        tracker.label([tensor[:1]], "theirs")  # of the storage, by whatever tensor; the last word holds
        assert tracker.breakdown(peak.event) == {"theirs": 2 * KIB}
        del tensor
        assert tracker.breakdown(peak.event) == {"theirs": 2 * KIB}
        assert tracker.breakdown() == {}


def test_labelling_counts_what_was_made_before() -> None:
    before = kib(2)
    with StorageTracker(CPU) as tracker:
        tracker.label([before, before.view(2, -1)], "weights")
        assert tracker.live_bytes == 2 * KIB
        assert tracker.breakdown() == {"weights": 2 * KIB}


def test_a_new_tensor_does_not_inherit_a_dead_ones_label() -> None:
    """Addresses of storages are used again."""
    with StorageTracker(CPU) as tracker:
        for _ in range(50):
            tensor = kib()
            assert tracker.breakdown() == {TEMPORARIES: KIB}
            tracker.label([tensor], "ours")
            assert tracker.breakdown() == {"ours": KIB}
            del tensor


def test_allocations_group_by_origin() -> None:
    with StorageTracker(CPU) as tracker:
        wide = [torch.empty(2, FLOATS) for _ in range(3)]
        halves = [torch.empty(2, FLOATS, dtype=torch.bfloat16) for _ in range(2)]
        zeros = torch.zeros(2, FLOATS)
        tracker.label(wide[:1], "ours")
        empty = "aten.empty.memory_format"
        expected = [
            Allocation(TEMPORARIES, empty, (2, FLOATS), torch.float32, 2, 4 * KIB),
            Allocation(TEMPORARIES, empty, (2, FLOATS), torch.bfloat16, 2, 2 * KIB),
            Allocation("ours", empty, (2, FLOATS), torch.float32, 1, 2 * KIB),
            Allocation(TEMPORARIES, "aten.zeros.default", (2, FLOATS), torch.float32, 1, 2 * KIB),
        ]
        assert sorted(tracker.allocations(), key=str) == sorted(expected, key=str)
        sizes = [allocation.nbytes for allocation in tracker.allocations()]
        assert sizes == sorted(sizes, reverse=True)
        del wide, halves
        assert tracker.allocations() == expected[-1:]
        del zeros


# ---- activations


def test_what_a_backward_pass_finds_is_activations_and_what_it_makes_is_temporary() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(16, 16))
    x = torch.randn(64, 16)  # 4 KiB
    with StorageTracker(CPU) as tracker:
        tracker.label([weight], "weights")
        hidden = x @ weight
        saved = hidden.tanh()
        loss = saved.square().sum()
        del hidden, saved
        forward = tracker.live_bytes
        # tanh's output, which square saves too, and the loss; nothing saves the product.
        assert forward == KIB + 4 * KIB + GRANULE
        event = tracker.peaks()[0].event
        assert set(tracker.breakdown(event)) == {"weights", TEMPORARIES}
        loss.backward()
        peaks = {peak.phase: peak for peak in tracker.peaks()}
        # Known afterwards: not needed were the product and the squares.
        assert tracker.breakdown(event) == {"weights": KIB, ACTIVATIONS: 4 * KIB + GRANULE, TEMPORARIES: 8 * KIB}
        backward = tracker.allocations(peaks[BACKWARD].event)
        assert in_allocations(backward, "aten.tanh.default").label == ACTIVATIONS
        made = tracker.breakdown(peaks[BACKWARD].event)
        # And the gradient of the loss, with which it begins: 1.
        assert made[ACTIVATIONS] == 4 * KIB + 2 * GRANULE
        assert made[TEMPORARIES] == peaks[BACKWARD].nbytes - KIB - made[ACTIVATIONS] > 0
        # The gradient came about in the backward pass: temporary, unless it is said what it is.
        assert weight.grad is not None
        tracker.label([weight.grad], "gradients")
        assert tracker.breakdown()["gradients"] == KIB


def test_what_is_made_between_backward_passes_is_no_activation() -> None:
    weight = nn.Parameter(torch.randn(FLOATS))
    phase = FORWARD
    with StorageTracker(CPU) as tracker:
        tracker.use_phases(lambda: phase)
        weight.sin().sum().backward()
        phase = "update"
        of_update = torch.zeros(2 * FLOATS)
        phase = FORWARD
        weight.sin().sum().backward()
        assert tracker.breakdown()[TEMPORARIES] >= 2 * KIB
        assert in_allocations(tracker.allocations(), "aten.zeros.default").label == TEMPORARIES
        del of_update


def test_a_labelled_storage_is_not_taken_for_an_activation() -> None:
    weight = nn.Parameter(torch.randn(FLOATS))
    with StorageTracker(CPU) as tracker:
        batch = torch.ones(FLOATS)
        tracker.label([batch], "batches")
        (weight * batch).sum().backward()
        assert tracker.breakdown()["batches"] == KIB


class Exp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_parts_are_activations(use_reentrant: bool) -> None:
    block = nn.Sequential(nn.Tanh(), nn.Sigmoid(), Exp())  # each saves its output, and uses other operations backward

    def checkpointed(x: Tensor) -> Tensor:
        recomputed: Tensor = checkpoint(block, x, use_reentrant=use_reentrant)
        return recomputed

    def run(function: Callable[[Tensor], Tensor]) -> tuple[StorageTracker, int, Tensor]:
        weight = nn.Parameter(torch.linspace(0, 1, 4 * FLOATS))
        with StorageTracker(CPU) as tracker:
            tracker.label([weight], "weights")
            loss = function(weight * 2).sum()
            held = tracker.live_bytes
            loss.backward()
        assert weight.grad is not None
        return tracker, held, weight.grad

    tracker, held, gradient = run(checkpointed)
    _, all_held, expected = run(block)
    assert torch.equal(gradient, expected)
    # The weight, the block's input and the sum; without checkpointing what the block saves, for its input.
    assert held == 8 * KIB + GRANULE
    assert all_held == 16 * KIB + GRANULE
    peak = next(peak for peak in tracker.peaks() if peak.phase == BACKWARD)
    alive = tracker.allocations(peak.event)
    for operation in ("aten.tanh.default", "aten.sigmoid.default", "aten.exp.default"):  # of the recomputation alone
        found = in_allocations(alive, operation)
        assert (found.label, found.nbytes) == (ACTIVATIONS, 4 * KIB)
    # Recomputation is over, though without reentry it is left by an exception.
    # What is multiplied then is a gradient; in the forward pass it was the block's input.
    assert {each.label for each in alive if each.operation == "aten.mul.Tensor"} == {ACTIVATIONS, TEMPORARIES}
    assert sum(tracker.breakdown(peak.event).values()) == peak.nbytes


# ---- any program

OPERATIONS = ("allocate", "allocate", "copy", "view", "in place", "grow", "free", "free")
STEP = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 3000), st.integers(0, 10**6))


@given(st.lists(STEP, max_size=50))
def test_any_program_takes_what_its_sizes_say(program: list[tuple[str, int, int]]) -> None:
    tensors: list[Tensor] = []
    owners: list[int] = []  # the storage of each tensor
    sizes: list[int] = []  # of each storage, in bytes
    peak = 0

    def own(tensor: Tensor) -> None:
        tensors.append(tensor)
        owners.append(len(sizes))
        sizes.append(tensor.nbytes)

    with StorageTracker(CPU) as tracker:
        for operation, size, pick in program:
            if operation == "allocate":
                own(torch.empty(size, dtype=(torch.uint8, torch.float32, torch.float64)[pick % 3]))
            elif tensors:
                chosen = pick % len(tensors)
                if operation == "copy":
                    own(tensors[chosen].clone())
                elif operation == "view":
                    tensors.append(tensors[chosen][size % (len(tensors[chosen]) + 1) :])
                    owners.append(owners[chosen])
                elif operation == "in place":
                    tensors[chosen].zero_()
                elif operation == "grow":
                    sizes[owners[chosen]] += size
                    tensors[chosen].untyped_storage().resize_(sizes[owners[chosen]])
                    tensors[chosen].detach()
                else:
                    del tensors[chosen], owners[chosen]
            live = sum(rounded(sizes[owner]) for owner in set(owners))
            peak = max(peak, live)
            assert tracker.live_bytes == live
            assert sum(tracker.breakdown().values()) == live
            assert sum(each.nbytes for each in tracker.allocations()) == live
        assert max((each.nbytes for each in tracker.peaks()), default=0) == peak
        tensors.clear()
        assert tracker.live_bytes == 0

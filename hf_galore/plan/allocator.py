"""How much memory torch's caching allocator takes from a card for a sequence of allocations.

A model of torch's own for CUDA (`c10/cuda/CUDACachingAllocator.cpp` of 2.11 to 2.13), with the settings that it comes
with and one stream. Storages of up to 1 MiB are in one pool, larger ones in another. A storage gets the smallest free
block that it fits into; what it leaves over stays a free block beside it, and free neighbours of one segment merge.
Where no block is large enough:

- without expandable segments, a new segment comes from the card: of 2 MiB for small storages, of 20 MiB for those below
  10 MiB, else of a multiple of 2 MiB. What is free in two segments is never one block.
- with them, a pool is one segment that grows at its end, by pages of 2 MiB for small storages and of 20 MiB for others.

Free memory stays with the allocator. (Torch returns what it can once the card is full, and tries again: what is found
here is enough, and a little less may be.)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

_MIB = 2**20
_SMALL = _MIB
_SMALL_SEGMENT = 2 * _MIB
_LARGE_SEGMENT = 20 * _MIB
_OWN_SEGMENT_FROM = 10 * _MIB
_OWN_SEGMENT_GRANULE = 2 * _MIB


def reserved_bytes(events: Iterable[tuple[int, int]], *, expandable: bool) -> int:
    """The most that the allocator holds of a card at a time.

    Args:
        events: (storage, bytes) in their order: a storage that grows by so many bytes, or shrinks where they are below
            zero, by multiples of 512.
        expandable: whether segments are expandable.
    """
    small, large = _Pool(is_small=True, expandable=expandable), _Pool(is_small=False, expandable=expandable)
    held: dict[int, tuple[_Pool, _Block, int]] = {}
    for storage, change in events:
        pool, block, size = held.pop(storage, (None, None, 0))
        size += change
        if size:  # one that is resized is there twice for a moment
            now = small if size <= _SMALL else large
            held[storage] = (now, now.allocate(size), size)
        if pool is not None and block is not None:
            pool.free(block)
    return small.reserved + large.reserved


class _Block:
    """A piece of a segment, between two others."""

    __slots__ = ("after", "before", "is_free", "place", "size")

    def __init__(self, place: int, size: int, before: _Block | None, after: _Block | None) -> None:
        self.place, self.size, self.before, self.after = place, size, before, after
        self.is_free = False


class _Pool:
    """The blocks of storages that are alike in size. What is reserved never falls."""

    def __init__(self, *, is_small: bool, expandable: bool) -> None:
        self.reserved = 0
        self._is_small, self._expandable = is_small, expandable
        self._free: list[tuple[int, int]] = []  # size and place, the smallest first
        self._at: dict[int, _Block] = {}  # free blocks by their place
        self._last: _Block | None = None  # of the latest segment

    def allocate(self, size: int) -> _Block:
        """Give a storage its block."""
        block = self._taken(size)
        if block is None:
            block = self._grown(size) if self._expandable else self._new_segment(size)
        left = block.size - size
        if left:  # torch splits off no less than a storage of the pool may have, which makes no difference
            rest = _Block(block.place + size, left, block, block.after)
            if rest.after is None:
                self._last = rest
            else:
                rest.after.before = rest
            block.size, block.after = size, rest
            self._put(rest)
        return block

    def free(self, block: _Block) -> None:
        """Take the block of a storage that is no more."""
        before, after = block.before, block.after
        if before is not None and before.is_free:
            self._remove(before)
            block.place, block.size, block.before = before.place, before.size + block.size, before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.is_free:
            self._remove(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after is None:
                self._last = block
            else:
                block.after.before = block
        self._put(block)

    def _taken(self, size: int) -> _Block | None:
        """The free block that fits best."""
        index = bisect_left(self._free, (size, 0))
        if index == len(self._free):
            return None
        if self._expandable and self._at[self._free[index][1]] is self._last and index + 1 < len(self._free):
            index += 1  # the last block can grow, and so counts as the largest
        block = self._at[self._free[index][1]]
        self._remove(block)
        return block

    def _new_segment(self, size: int) -> _Block:
        if self._is_small:
            segment = _SMALL_SEGMENT
        elif size < _OWN_SEGMENT_FROM:
            segment = _LARGE_SEGMENT
        else:
            segment = _up(size, _OWN_SEGMENT_GRANULE)
        self._last = _Block(self.reserved, segment, None, None)
        self.reserved += segment
        return self._last

    def _grown(self, size: int) -> _Block:
        """The last block, if it is free, with new pages behind it; or else new pages."""
        last = self._last
        if last is not None and last.is_free:
            self._remove(last)
        else:
            last = _Block(self.reserved, 0, last, None)
            if last.before is not None:
                last.before.after = last
            self._last = last
        pages = _up(size - last.size, _SMALL_SEGMENT if self._is_small else _LARGE_SEGMENT)
        last.size += pages
        self.reserved += pages
        return last

    def _put(self, block: _Block) -> None:
        block.is_free = True
        insort(self._free, (block.size, block.place))
        self._at[block.place] = block

    def _remove(self, block: _Block) -> None:
        block.is_free = False
        del self._free[bisect_left(self._free, (block.size, block.place))]
        del self._at[block.place]


def _up(size: int, granule: int) -> int:
    return -(-size // granule) * granule

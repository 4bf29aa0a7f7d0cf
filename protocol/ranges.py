"""Sets of byte positions, as sorted disjoint half-open ranges."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class RangeSet:
    """Bytes that are here, wanted, or on the way.

    Adding and removing look at the neighbours only: a hostile order of pieces costs no quadratic time.

    Args:
        ranges: half-open (start, stop); empty and reversed ones count for nothing.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        # start of range i, stop of range i; ascending, with a gap between neighbours.
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(list(self._starts), list(self._stops), strict=True)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        """Number of ranges."""
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and (self._starts, self._stops) == (other._starts, other._stops)

    __hash__ = None  # type: ignore[assignment]

    @property
    def size(self) -> int:
        """Number of positions."""
        return sum(self._stops) - sum(self._starts)

    def add(self, start: int, stop: int) -> None:
        """Takes in [start, stop)."""
        if start >= stop:
            return
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last], self._stops[first:last] = [start], [stop]

    def remove(self, start: int, stop: int) -> None:
        """Takes out [start, stop)."""
        if start >= stop:
            return
        first, last = bisect_right(self._stops, start), bisect_left(self._starts, stop)
        if first >= last:
            return
        left, right = self._starts[first], self._stops[last - 1]
        kept = [(left, start)] * (left < start) + [(stop, right)] * (stop < right)
        self._starts[first:last] = [low for low, _ in kept]
        self._stops[first:last] = [high for _, high in kept]

    def gaps(self, size: int) -> list[tuple[int, int]]:
        """What is missing of [0, size), ascending."""
        edges = [0, *(edge for pair in self for edge in pair), size]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [(start, min(stop, size)) for start, stop in pairs if start < min(stop, size)]

    def without(self, other: RangeSet) -> RangeSet:
        """The positions that `other` does not have."""
        rest = RangeSet(self)
        for start, stop in other:
            rest.remove(start, stop)
        return rest

    def first(self, most: int) -> RangeSet:
        """The first `most` positions."""
        taken = RangeSet()
        for start, stop in self:
            if most <= 0:
                break
            taken.add(start, min(stop, start + most))
            most -= stop - start
        return taken

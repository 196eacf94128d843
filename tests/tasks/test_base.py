"""What tasks share."""

from __future__ import annotations

from spice_pl.tasks.base import size_lines


def test_of_many_clusters_the_largest_are_named_and_the_rest_is_counted() -> None:
    sizes = [*range(1, 31), 0]  # 30 clusters with images
    lines = size_lines([f"c{k}" for k in range(31)], sizes)
    assert len(lines) == 21
    assert lines[0].split() == ["11", "c10"]  # the ten smaller ones are counted
    assert lines[-1].split()[:4] == ["55", "in", "10", "smaller"]
    assert sum(int(line.split()[0]) for line in lines) == sum(sizes)

import io

import pytest
from rich.console import Console

from spice_pl.reports.choices import Compared
from spice_pl.reports.tables import (
    NO_LABELS,
    ORACLE,
    RECALL,
    ResultRow,
    compared_markdown,
    compared_rich,
    duration_text,
    mean_std,
    results_markdown,
    results_rich,
)

SCORED = ResultRow("fixmatch", 0.91249, 0.8, -0.01, "train+test", 3, 125.0)
UNSCORED = ResultRow("proto", None, None, None, "own folder", 0, 4.26)


def test_mean_std_is_the_sample_standard_deviation() -> None:
    assert mean_std([1.0, 3.0]) == "2.000 ± 1.414"  # sqrt(2), not 1
    assert mean_std([0.5, 0.5, 0.5]) == "0.500 ± 0.000"
    assert mean_std([0.25]) == "0.250"
    with pytest.raises(ValueError, match="at least one seed"):
        mean_std([])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.97, "1 min 00 s"), (3599.7, "1 h 00 min"), (90_000, "25 h 00 min")],
)
def test_duration_rounds_into_the_next_unit(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_markdown_by_hand() -> None:
    assert results_markdown([SCORED]) == (
        "| Name | ACC | NMI | ARI | Protocol | Seed | Time |\n"
        "|:--|--:|--:|--:|:--|--:|--:|\n"
        "| fixmatch | 0.912 | 0.800 | -0.010 | train+test | 3 | 2 min 05 s |\n"
    )


def test_without_labels_there_are_no_columns_of_scores_and_the_reason_is_below() -> None:
    text = results_markdown([UNSCORED])
    assert "| Name | Protocol | Seed | Time |\n|:--|:--|--:|--:|\n" in text
    assert "| proto | own folder | 0 | 4.3 s |" in text
    assert "| proto | – | – | – | own folder | 0 | 4.3 s |" in results_markdown([SCORED, UNSCORED])
    assert text.endswith(f"\n{NO_LABELS}\n")
    assert NO_LABELS not in results_markdown([SCORED])


def test_oracle_rows_are_marked_and_explained() -> None:
    text = results_markdown([SCORED, ResultRow("best", 1, 1, 1, "all", 0, 1, oracle=True)])
    assert "| best (oracle) | 1.000 |" in text
    assert text.endswith(f"\n{ORACLE}\n")


def test_markdown_cells_cannot_break_the_table() -> None:
    row = ResultRow("a|b\nc", None, None, None, "p", 0, 1)
    assert "| a\\|b c | p |" in results_markdown([row])


def test_rich_shows_the_same_and_takes_no_markup_from_names() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(results_rich([SCORED, ResultRow("[red]x[/red]", None, None, None, "p", 0, 1)]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in ("0.912", "2 min 05 s", "[red]x[/red]", "–", NO_LABELS):
        assert expected in text


def test_recall_is_a_column_where_the_classes_differ_in_size() -> None:
    uneven = ResultRow("proto", 0.95, 0.5, 0.3, "whole", 0, 1.0, recall=0.75)
    text = results_markdown([uneven, SCORED])
    assert text.startswith("| Name | ACC | Recall | NMI | ARI | Protocol |")
    assert "| proto | 0.950 | 0.750 | 0.500 | 0.300 | whole |" in text
    assert "| fixmatch | 0.912 | – | 0.800 |" in text
    assert text.endswith(f"\n{RECALL}\n")


def test_purity_is_noted_below_rows_with_more_clusters_than_classes() -> None:
    over = ResultRow("proto", 0.4, 0.5, 0.3, "whole", 0, 1.0, purity=0.912)
    assert "purity" not in results_markdown([SCORED])
    assert "proto: more clusters than classes." in results_markdown([SCORED, over])
    assert "0.912 of the images" in results_markdown([SCORED, over])


def test_without_labels_clusterings_are_compared_by_what_needs_none() -> None:
    rows = [
        Compared("vote", True, 0.9, 0.95, 1.0, 10, 30, sure=0.875, score=3.25),
        Compared("k-means", False, 0.8, 1.0, 0.7, 20, 20, sure=0.5, score=2.5),
    ]
    lines = compared_markdown(rows).splitlines()
    assert lines[2] == "| vote (kept) | 10 – 30 | 90.0% | 88% | 0.950 | 3.250 |"
    assert lines[3] == "| k-means | 20 | 80.0% | 50% | 1.000 | 2.500 |"
    assert "No labels were given" in lines[5]
    shown = Console(width=120, file=io.StringIO())
    shown.print(compared_rich(rows))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert all(cell in text for cell in ("vote (kept)", "10 – 30", "3.250", "k-means", "2.500"))

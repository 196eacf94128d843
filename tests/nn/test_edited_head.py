"""The head after edits: merged and split clusters of answers by hand."""

from __future__ import annotations

import torch

from spice_pl.nn.edited_head import EditedHead, edited
from spice_pl.nn.heads import ClusterHead, LinearHead

PROBS = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
FEATURES = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
NONE = (torch.empty(0, 2), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def test_merged_probabilities_are_added_and_numbers_stay() -> None:
    merge = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])  # 2 goes into 0
    after = edited(PROBS, FEATURES, merge, *NONE)
    torch.testing.assert_close(after, torch.tensor([[0.8, 0.2, 0], [0.4, 0.6, 0]]))


def test_split_cluster_goes_to_the_part_with_the_nearest_centre() -> None:
    merge = torch.cat([torch.eye(3), torch.zeros(3, 1)], dim=1)
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    parts = torch.tensor([1, 1]), torch.tensor([1, 3])
    after = edited(PROBS, FEATURES, merge, centres, *parts)
    expected = torch.tensor([[0.5, 0.2, 0.3, 0.0], [0.1, 0.0, 0.3, 0.6]])
    torch.testing.assert_close(after, expected)


def test_rounds_follow_each_other_and_the_state_describes_itself() -> None:
    torch.manual_seed(0)
    for base in (ClusterHead(2, 4, 3), LinearHead(2, 3)):
        before = base(FEATURES)
        merge = torch.cat([torch.eye(3), torch.zeros(3, 1)], dim=1)
        centres = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        first = EditedHead.after(base, merge, centres, torch.tensor([1, 1]), torch.tensor([1, 3]))
        back = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]])
        both = EditedHead.after(first, back, *NONE)
        # What the first round splits, the second merges again.
        torch.testing.assert_close(both(FEATURES)[:, :3], before)
        assert both(FEATURES)[:, 3].eq(0).all()
        assert both.base_clusters == [0, 1, 2, 1]
        again = EditedHead.of_state(both.state_dict())
        again.load_state_dict(both.state_dict())
        assert again.rounds == [[4, 2], [4, 0]]
        torch.testing.assert_close(again(FEATURES), both(FEATURES))

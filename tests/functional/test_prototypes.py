import itertools
import math

import pytest
import torch
from torch import Tensor

from spice_pl.functional import prototypes
from spice_pl.functional.neighbors import similarities, unit_rows
from spice_pl.functional.prototypes import (
    prototype_means,
    prototype_pseudo_labels,
    prototype_shares,
    select_confident,
)


def random_case(
    num_heads: int = 3, num_images: int = 47, num_clusters: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kinds = {"generator": generator, "dtype": torch.float64}
    embeddings = unit_rows(torch.randn(num_images, 6, **kinds))  # type: ignore[call-overload]
    logits = 2 * torch.randn(num_heads, num_images, num_clusters, **kinds)  # type: ignore[call-overload]
    return embeddings, logits.softmax(-1)


def ranked(scores: list[float], allowed: set[int]) -> list[int]:
    return sorted(allowed, key=lambda image: -scores[image])


def slow_pseudo_labels(
    embeddings: Tensor,
    probs: Tensor,
    confident: int | list[int],
    labels: int | list[int],
    overlap: bool,
) -> list[list[int]]:
    """One head, plain loops and full sorts, cluster by cluster."""
    confident, labels = (
        [each] * probs.shape[1] if isinstance(each, int) else each for each in (confident, labels)
    )
    everyone = set(range(len(embeddings)))
    vectors, columns = embeddings.tolist(), probs.T.tolist()
    free, prototypes = set(everyone), []
    for column, num in zip(columns, confident, strict=True):
        chosen = ranked(column, everyone if overlap else free)[:num]
        free -= set(chosen)
        prototypes.append([sum(vectors[i][d] for i in chosen) / num for d in range(6)])
    free, result = set(everyone), []
    for prototype, num in zip(prototypes, labels, strict=True):
        length = math.hypot(*prototype)
        cosines = [sum(a * b for a, b in zip(v, prototype, strict=True)) / length for v in vectors]
        chosen = ranked(cosines, everyone if overlap else free)[:num]
        free -= set(chosen)
        result.append(chosen)
    return result


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("confident_ratio", "select_ratio"), [(0.5, 1.0), (1.0, 1.0), (0.5, 0.7)])
def test_agrees_with_plain_loops(
    overlap: bool, seed: int, confident_ratio: float, select_ratio: float
) -> None:
    embeddings, probs = random_case(seed=seed)
    index, label = prototype_pseudo_labels(
        embeddings,
        probs,
        confident_ratio=confident_ratio,
        select_ratio=select_ratio,
        overlap=overlap,
    )
    confident = math.floor(confident_ratio * select_ratio * 11)
    num = math.floor(select_ratio * 11)
    assert index.shape == (3, 4 * num)
    assert label.tolist() == [k for k in range(4) for _ in range(num)]
    for head in range(3):
        expected = slow_pseudo_labels(embeddings, probs[head], confident, num, overlap)
        assert index[head].view(4, num).tolist() == expected


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("chunk", [1, 3 * 47, 300])
def test_memory_is_bounded_by_chunks_that_change_nothing(
    overlap: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings, probs = random_case()
    expected, _ = prototype_pseudo_labels(embeddings, probs, overlap=overlap)
    monkeypatch.setattr(prototypes, "SIMILARITIES_PER_CHUNK", chunk)
    largest = 0

    def watched(left: Tensor, right: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(left) * len(right))
        return similarities(left, right)

    monkeypatch.setattr(prototypes, "similarities", watched)
    found, _ = prototype_pseudo_labels(embeddings, probs, overlap=overlap)
    assert torch.equal(found, expected)
    assert largest <= max(chunk, 3 * 47)  # one cluster of three heads is the smallest chunk


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("chunk", [1, 2**26])
def test_unequal_clusters_agree_with_plain_loops(
    overlap: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prototypes, "SIMILARITIES_PER_CHUNK", chunk)
    embeddings, probs = random_case()
    shares = torch.tensor([[5.0, 2, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])  # one row per head
    budgets = [
        [22, 10, 6, 6],
        [2, 2, 2, 38],
        [11, 11, 11, 11],
    ]  # 2 and 36 by shares, by hand
    index, label = prototype_pseudo_labels(embeddings, probs, overlap=overlap, shares=shares)
    assert index.shape == label.shape == (3, 44)
    for head, labels in enumerate(budgets):
        confident = [max(1, each // 2) for each in labels]
        expected = slow_pseudo_labels(embeddings, probs[head], confident, labels, overlap)
        assert index[head].tolist() == list(itertools.chain(*expected))
        assert label[head].bincount().tolist() == labels
        alone = prototype_pseudo_labels(
            embeddings, probs[head], overlap=overlap, shares=shares[head]
        )
        assert torch.equal(torch.stack(alone), torch.stack([index[head], label[head]]))


@pytest.mark.parametrize("overlap", [True, False])
def test_equal_shares_change_no_bit(overlap: bool) -> None:
    embeddings, probs = random_case()
    index, label = prototype_pseudo_labels(embeddings, probs, overlap=overlap)
    same, names = prototype_pseudo_labels(
        embeddings, probs, overlap=overlap, shares=torch.ones(4) / 4
    )
    assert torch.equal(same, index)
    assert torch.equal(names, label.expand(3, -1))


def test_shares_are_those_of_the_images_nearest_to_each_prototype() -> None:
    """Three groups of 30, 10 and 5 images, which the head tells apart."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(3).repeat_interleave(torch.tensor([30, 10, 5]))
    embeddings = torch.eye(6)[group] + 0.05 * torch.randn(45, 6, generator=generator)
    probs = (torch.eye(3)[group] + 0.1).expand(2, -1, -1)
    shares = torch.full((3,), 1 / 3)  # too much for the last, whose prototype is mixed at first
    for _ in range(3):
        shares = prototype_shares(embeddings, probs[0], shares=shares)
    assert shares.tolist() == pytest.approx([30 / 45, 10 / 45, 5 / 45])
    both = prototype_shares(embeddings, probs, shares=shares)
    assert torch.equal(both, shares.expand(2, -1))


def test_refuses_shares_that_ask_for_more_images_than_there_are() -> None:
    embeddings, probs = random_case()
    with pytest.raises(ValueError, match="one cluster takes 82 of 47 images"):
        prototype_pseudo_labels(
            embeddings, probs, select_ratio=2.0, shares=torch.tensor([1.0, 0, 0, 0])
        )


def test_toy_on_a_circle_by_hand() -> None:
    """As in SPICE, Fig. 4: the head and the embeddings disagree on two images."""
    degrees = torch.tensor([0.0, 10, 20, 90, 100, 110])
    embeddings = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=-1)
    first = torch.tensor([0.9, 0.8, 0.3, 0.6, 0.2, 0.1])
    probs = torch.stack([first, 1 - first], dim=-1)
    assert select_confident(probs, 2).tolist() == [[0, 1], [5, 4]]
    # Prototypes at 5 and 105 degrees: image 2 gets label 0 and image 3 gets label 1, both against
    # the argmax of the head.
    index, label = prototype_pseudo_labels(embeddings, probs, confident_ratio=0.7)
    assert label.tolist() == [0, 0, 0, 1, 1, 1]
    assert index[:3].sort().values.tolist() == [0, 1, 2]
    assert index[3:].sort().values.tolist() == [3, 4, 5]


def test_an_image_can_carry_two_labels_or_none() -> None:
    degrees = torch.tensor([0.0, 1, 2, 3, 90, 180])
    embeddings = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=-1)
    probs = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    index, _ = prototype_pseudo_labels(embeddings, probs, confident_ratio=0.4)
    assert [sorted(index[:3].tolist()), sorted(index[3:].tolist())] == [[0, 1, 2], [0, 1, 2]]
    index, _ = prototype_pseudo_labels(embeddings, probs, confident_ratio=0.4, overlap=False)
    assert [sorted(index[:3].tolist()), sorted(index[3:].tolist())] == [[0, 1, 2], [3, 4, 5]]


def test_an_image_can_be_confident_for_a_cluster_that_is_not_its_argmax() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]])
    assert select_confident(probs, 1).tolist() == [[1], [0]]


@pytest.mark.parametrize("overlap", [True, False])
def test_one_head_alone_is_that_head_among_many(overlap: bool) -> None:
    embeddings, probs = random_case()
    index, label = prototype_pseudo_labels(embeddings, probs, overlap=overlap)
    for head in range(3):
        alone, same = prototype_pseudo_labels(embeddings, probs[head], overlap=overlap)
        assert torch.equal(alone, index[head])
        assert torch.equal(same, label)
    assert torch.equal(select_confident(probs, 5)[1], select_confident(probs[1], 5))


def test_renaming_clusters_renames_the_blocks() -> None:
    embeddings, probs = random_case()
    names = torch.tensor([2, 0, 3, 1])
    index = prototype_pseudo_labels(embeddings, probs)[0].view(3, 4, 11)
    renamed = prototype_pseudo_labels(embeddings, probs[..., names])[0].view(3, 4, 11)
    assert torch.equal(renamed, index[:, names])


@pytest.mark.parametrize("overlap", [True, False])
def test_shuffling_images_shuffles_the_index(overlap: bool) -> None:
    embeddings, probs = random_case()
    order = torch.randperm(47, generator=torch.Generator().manual_seed(3))
    index, _ = prototype_pseudo_labels(embeddings, probs, overlap=overlap)
    shuffled, _ = prototype_pseudo_labels(embeddings[order], probs[:, order], overlap=overlap)
    assert torch.equal(order[shuffled], index)


def test_lengths_of_features_do_not_matter() -> None:
    embeddings, probs = random_case()
    lengths = torch.linspace(1, 50, 47, dtype=torch.float64).unsqueeze(-1)
    assert torch.equal(
        prototype_pseudo_labels(lengths * embeddings, probs)[0],
        prototype_pseudo_labels(embeddings, probs)[0],
    )


def test_autocast_does_not_coarsen_the_ranking() -> None:
    embeddings, probs = (tensor.float() for tensor in random_case())
    close = unit_rows(embeddings[:1] + 0.01 * embeddings)
    expected, _ = prototype_pseudo_labels(close, probs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = prototype_pseudo_labels(close, probs)
    assert torch.equal(found, expected)


def test_one_cluster_takes_everything() -> None:
    embeddings, _ = random_case()
    index, label = prototype_pseudo_labels(embeddings, torch.ones(47, 1))
    assert index.sort().values.tolist() == list(range(47))
    assert label.tolist() == [0] * 47


def test_a_cluster_that_no_image_prefers_gets_its_share() -> None:
    embeddings, probs = random_case(num_heads=1)
    probs = torch.cat([probs, 1e-9 * probs[..., :1]], dim=-1)  # (1, M, 5)
    assert (probs.argmax(-1) < 4).all()
    index, label = prototype_pseudo_labels(embeddings, probs)
    assert label.bincount().tolist() == [9] * 5
    assert torch.equal(index[:, label == 4], index[:, label == 0])


def test_without_overlap_every_image_is_used_once() -> None:
    embeddings, probs = random_case(num_images=48)
    index, _ = prototype_pseudo_labels(embeddings, probs, overlap=False)
    assert index.sort().values.tolist() == [list(range(48))] * 3


def test_without_overlap_unused_slots_are_marked() -> None:
    embeddings, probs = random_case(num_images=48)
    index, _ = prototype_pseudo_labels(
        embeddings, probs, confident_ratio=0.2, select_ratio=1.5, overlap=False
    )
    clusters = index.view(3, 4, 18)
    assert [(c >= 0).sum().item() for c in clusters[0]] == [18, 18, 12, 0]
    for head in index:
        assert head[head >= 0].sort().values.tolist() == list(range(48))


def test_prototypes_are_means_and_carry_gradients() -> None:
    embeddings, probs = random_case()
    confident = select_confident(probs, 5)
    means = prototype_means(embeddings.requires_grad_(), confident)
    torch.testing.assert_close(means, embeddings[confident].mean(dim=-2))
    means.sum().backward()  # type: ignore[no-untyped-call]
    assert embeddings.grad is not None


@pytest.mark.parametrize(
    ("num_images", "settings", "message"),
    [
        (7, {}, "7 images are fewer than 2 for each of num_clusters 4; draw at least 8"),
        (8, {"confident_ratio": 0.4}, r"select_ratio 0.4 of 2 images per cluster takes 0 images"),
        (8, {"select_ratio": 0.4}, r"select_ratio 0.4 of 2 .* choose it between 1/2 and 8/2"),
        (8, {"select_ratio": 5.0}, "takes 10 images, and 1 to 8 are possible"),
        (8, {"confident_ratio": 1.5, "overlap": False}, "takes 3 images, and 1 to 2 are possible"),
    ],
)
def test_refuses_settings_that_leave_a_cluster_without_images(
    num_images: int, settings: dict[str, float], message: str
) -> None:
    embeddings, probs = random_case(num_images=num_images)
    with pytest.raises(ValueError, match=message):
        prototype_pseudo_labels(embeddings, probs, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_confident", [0, 48])
def test_refuses_more_confident_images_than_there_are(num_confident: int) -> None:
    with pytest.raises(ValueError, match=f"{num_confident} is not between 1 and the 47 images"):
        select_confident(random_case()[1], num_confident)


def test_refuses_shapes_that_disagree() -> None:
    embeddings, probs = random_case()
    with pytest.raises(ValueError, match=r"\(46, 6\) and probs .* \(3, 47, 4\) do not fit"):
        prototype_pseudo_labels(embeddings[:46], probs)
    with pytest.raises(ValueError, match=r"\(47,\) do not fit; both need the same M images"):
        prototype_pseudo_labels(embeddings, probs[0, :, 0])

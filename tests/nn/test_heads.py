import pytest
import torch
from torch import Tensor, nn

from spice_pl.nn import ClusterHead, ParallelHeads

H, B, D, E, K = 3, 5, 7, 6, 4


def separate(heads: ParallelHeads) -> list[nn.Sequential]:
    modules = []
    for h in range(heads.num_heads):
        module = nn.Sequential(
            nn.Linear(D, E), nn.ReLU(), nn.Linear(E, K), nn.Softmax(dim=1)
        ).double()
        with torch.no_grad():
            for parameter, stacked in zip(module.parameters(), heads.parameters(), strict=True):
                parameter.copy_(stacked[h])
        modules.append(module)
    return modules


@pytest.mark.parametrize("shape", [(B, D), (H, B, D)], ids=["shared images", "own images"])
def test_equals_separate_heads(shape: tuple[int, ...]) -> None:
    heads = ParallelHeads(D, E, K, H).double()
    modules = separate(heads)
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    copy = features.detach().clone().requires_grad_()

    probs = heads(features)
    expected = torch.stack(
        [m(own) for m, own in zip(modules, copy.expand(H, B, D), strict=True)]
    )  # (H, B, K)
    torch.testing.assert_close(probs, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(heads.logits(features).softmax(-1), probs, rtol=0, atol=1e-9)

    weight = torch.randn_like(probs)
    torch.autograd.backward([probs, expected], [weight, weight])
    torch.testing.assert_close(features.grad, copy.grad, rtol=0, atol=1e-9)
    for stacked, *parameters in zip(
        heads.parameters(), *(m.parameters() for m in modules), strict=True
    ):
        grads = torch.stack([p.grad for p in parameters if p.grad is not None])
        torch.testing.assert_close(stacked.grad, grads, rtol=0, atol=1e-9)


def test_as_many_images_as_heads_are_still_shared() -> None:
    heads = ParallelHeads(D, E, K, num_heads=D)
    features = torch.randn(D, D)
    torch.testing.assert_close(heads(features), heads(features.expand(D, D, D)))


@pytest.mark.parametrize("shape", [(0, D), (H, 0, D)])
def test_no_images_give_no_probabilities(shape: tuple[int, ...]) -> None:
    assert ParallelHeads(D, E, K, H)(torch.zeros(shape)).shape == (H, 0, K)


def test_one_cluster_has_probability_1() -> None:
    assert ParallelHeads(D, E, 1, H)(torch.randn(B, D)).eq(1).all()


def test_head_is_an_independent_copy() -> None:
    heads = ParallelHeads(D, E, K, H).double()
    features = torch.randn(B, D, dtype=torch.float64)
    state = torch.get_rng_state()
    head = heads.head(2)
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(head, ClusterHead)
    torch.testing.assert_close(head(features), heads(features)[2], rtol=0, atol=1e-9)
    torch.testing.assert_close(head.logits(features), heads.logits(features)[2], rtol=0, atol=1e-9)
    assert all(p.requires_grad and p.is_leaf for p in head.parameters())

    before = [p.detach().clone() for p in heads.parameters()]
    nn.init.zeros_(head.hidden.weight)
    assert all(torch.equal(a, b) for a, b in zip(before, heads.parameters(), strict=True))


@pytest.mark.parametrize("index", [-1, H])
def test_head_that_does_not_exist(index: int) -> None:
    with pytest.raises(IndexError, match=rf"head {index} does not exist; choose one of 0\.\.2"):
        ParallelHeads(D, E, K, H).head(index)


def parameters_of(heads: ParallelHeads, index: int) -> list[Tensor]:
    return [p.detach() for p in heads.head(index).parameters()]


def test_seeded_head_does_not_depend_on_the_number_of_heads() -> None:
    torch.manual_seed(0)
    many = ParallelHeads(D, E, K, num_heads=10, seed=5)
    torch.manual_seed(1)
    for h in range(10):
        alone = ParallelHeads(D, E, K, num_heads=1, seed=5 + h)
        for ours, theirs in zip(parameters_of(many, h), parameters_of(alone, 0), strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(many.hidden_weight[0], many.hidden_weight[1])


def test_unseeded_heads_follow_torchs_seed_like_separate_modules() -> None:
    torch.manual_seed(3)
    heads = ParallelHeads(D, E, K, H)
    torch.manual_seed(3)
    for h, module in enumerate([ClusterHead(D, E, K) for _ in range(H)]):
        for ours, theirs in zip(parameters_of(heads, h), module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach())


@pytest.mark.parametrize("shape", [(B, D + 1), (H + 1, B, D), (H, B, D + 1), (D,), (1, H, B, D)])
def test_rejects_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"is neither \(B, D\) nor \(H, B, D\) with D = 7 and H = 3"
    ):
        ParallelHeads(D, E, K, H)(torch.zeros(shape))


def test_rejects_no_heads() -> None:
    with pytest.raises(ValueError, match="num_heads 0 leaves nothing to train; use at least 1"):
        ParallelHeads(D, E, K, num_heads=0)

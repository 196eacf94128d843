import copy

import pytest
import torch
from torch import nn

from spice_pl.functional.momentum import EmaPairs, ema_update_


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def test_every_parameter_moves_by_the_formula() -> None:
    target, source = network(0), network(1)
    before = [parameter.clone() for parameter in target.parameters()]
    ema_update_(target, source, momentum=0.9)
    for now, old, new in zip(target.parameters(), before, source.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new, rtol=0, atol=1e-15)


def test_buffers_are_copied_integers_too() -> None:
    target, source = network(0), network(1)
    for _ in range(3):
        source(torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    ema_update_(target, source, momentum=0.9)
    buffers = dict(target.named_buffers())
    assert buffers["1.num_batches_tracked"] == 3
    for name, buffer in source.named_buffers():
        assert torch.equal(buffers[name], buffer)
        assert buffers[name] is not buffer


@pytest.mark.parametrize(("momentum", "like"), [(1.0, 0), (0.0, 1)])
def test_momentum_1_changes_nothing_and_0_copies(momentum: float, like: int) -> None:
    target, source = network(0), network(1)
    ema_update_(target, source, momentum)
    for now, expected in zip(target.parameters(), network(like).parameters(), strict=True):
        assert torch.equal(now, expected)


def test_parameters_keep_their_identity_and_get_no_gradient() -> None:
    target, source = network(0), network(1)
    target.requires_grad_(False)
    before = list(target.parameters())
    ema_update_(target, source, momentum=0.5)
    for now, old in zip(target.parameters(), before, strict=True):
        assert now is old
        assert now.grad_fn is None
        assert not now.requires_grad


def test_a_target_that_requires_grad_can_be_updated() -> None:
    source = network(0)
    target = copy.deepcopy(source)
    ema_update_(target, source, momentum=0.5)
    assert all(parameter.is_leaf for parameter in target.parameters())


def test_a_network_without_parameters_is_left_alone() -> None:
    ema_update_(nn.ReLU(), nn.ReLU(), momentum=0.9)


def test_refuses_other_architectures() -> None:
    with pytest.raises(ValueError, match=r"weight is \(4, 3\) in the target and \(5, 3\) in the"):
        ema_update_(nn.Linear(3, 4), nn.Linear(3, 5), momentum=0.9)
    with pytest.raises(ValueError, match=r"bias is None in the target and \(4,\) in the source"):
        ema_update_(nn.Linear(3, 4, bias=False), nn.Linear(3, 4), momentum=0.9)


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_refuses_a_momentum_out_of_range(momentum: float) -> None:
    with pytest.raises(ValueError, match=f"momentum {momentum} is not between 0 and 1"):
        ema_update_(nn.ReLU(), nn.ReLU(), momentum)


def test_pairs_do_at_every_step_what_a_single_update_does() -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    paired, single = (copy.deepcopy(source).requires_grad_(False) for _ in range(2))
    pairs = EmaPairs((paired[0], source[0]), (paired[1], source[1]))
    for _ in range(3):
        source(torch.randn(8, 3))  # changes the running statistics
        with torch.no_grad():
            for weight in source.parameters():
                weight.add_(torch.randn_like(weight))
        pairs.update_(0.9)
        ema_update_(single, source, 0.9)
        for name, value in single.state_dict().items():
            assert torch.equal(paired.state_dict()[name], value), name


def test_pairs_of_different_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"make the target with copy\.deepcopy\(source\)"):
        EmaPairs((nn.Linear(3, 4), nn.Linear(3, 5)))

import pytest
import torch

from spice_pl.nn import Queue


def numbered(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)[:, None].expand(-1, 2)


def test_starts_with_random_unit_vectors() -> None:
    torch.manual_seed(0)
    queue = Queue(feature_dim=16, size=32)
    torch.manual_seed(0)
    assert torch.equal(queue.keys, Queue(feature_dim=16, size=32).keys)
    torch.testing.assert_close(queue.keys.norm(dim=0), torch.ones(32))
    assert queue.pointer.dtype == torch.int64
    assert queue.pointer.shape == ()
    assert not list(queue.parameters())


def test_wraps_around_by_hand() -> None:
    queue = Queue(feature_dim=2, size=5)
    queue.enqueue(numbered(1, 2, 3))
    queue.enqueue(numbered(4, 5, 6))
    assert queue.keys.tolist() == [[6, 2, 3, 4, 5]] * 2
    assert int(queue.pointer) == 1


@pytest.mark.parametrize("batch_size", [0, 1, 3, 7])
def test_holds_the_latest_keys(batch_size: int) -> None:
    queue = Queue(feature_dim=2, size=7)
    stream = torch.arange(10.0 * batch_size)
    for batch in stream.view(10, batch_size):
        queue.enqueue(batch[:, None].expand(-1, 2))
    oldest_first = queue.keys[0].roll(-int(queue.pointer))
    latest = stream[-7:]
    assert torch.equal(oldest_first[7 - len(latest) :], latest)


def test_new_keys_are_written_in_place_without_a_gradient() -> None:
    queue = Queue(feature_dim=4, size=8)
    keys, pointer = queue.keys, queue.pointer
    queue.enqueue(torch.randn(2, 4, dtype=torch.float16, requires_grad=True))
    assert queue.keys is keys
    assert queue.pointer is pointer
    assert int(pointer) == 2
    assert not keys.requires_grad
    assert keys.dtype == torch.float32


def test_a_loss_whose_backward_pass_would_read_new_keys_is_refused() -> None:
    queue = Queue(feature_dim=4, size=8)
    query = torch.randn(2, 4, requires_grad=True)
    loss = (query @ queue.keys).sum()
    queue.enqueue(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_resumes_from_its_state() -> None:
    queue, resumed = Queue(feature_dim=2, size=5), Queue(feature_dim=2, size=5)
    queue.enqueue(numbered(1, 2, 3, 4))
    assert set(queue.state_dict()) == {"keys", "pointer"}
    resumed.load_state_dict(queue.state_dict())
    for each in (queue, resumed):
        each.enqueue(numbered(5, 6))
    assert torch.equal(queue.keys, resumed.keys)
    assert torch.equal(queue.pointer, resumed.pointer)


def test_rejects_more_keys_than_its_size() -> None:
    with pytest.raises(
        ValueError, match=r"6 keys do not fit into a queue of size 5; raise .* 6 or"
    ):
        Queue(feature_dim=2, size=5).enqueue(torch.zeros(6, 2))


@pytest.mark.parametrize("shape", [(2, 3), (2,), (1, 1, 2)])
def test_rejects_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"is not \(B, D\) with D = 2"):
        Queue(feature_dim=2, size=5).enqueue(torch.zeros(shape))

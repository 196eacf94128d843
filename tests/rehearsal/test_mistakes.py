"""The rehearsal fails where it should: mistakes of a kind that a GPU would punish, planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.rehearsal import machine
from tests.rehearsal.device import DEVICE, OnDevice, RefusedError, rehearsal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from spice_pl.functional.kmeans import cosine_kmeans
from spice_pl.functional.neighbors import similarities
from spice_pl.nn.queue import Queue


def on_device(*shape: int) -> Tensor:
    return torch.rand(shape).to(DEVICE, non_blocking=True)


def add_cpu() -> None:
    on_device(3) + torch.ones(3)


def cat_cpu() -> None:
    torch.cat([on_device(3), torch.ones(3)])


def stack_scalar_of_cpu() -> None:
    torch.stack([on_device(1)[0], torch.tensor(1.0)])


def matmul_cpu() -> None:
    on_device(2, 3) @ torch.ones(3, 2)


def layer_left_behind() -> None:
    nn.Linear(3, 2)(on_device(4, 3))


def images_left_behind() -> None:
    nn.Linear(3, 2).to(DEVICE)(torch.ones(4, 3))


def labels_left_behind() -> None:
    F.cross_entropy(on_device(4, 3), torch.zeros(4, dtype=torch.long))


def buffer_left_behind() -> None:
    Queue(3, 8).enqueue(on_device(2, 3))


def index_of_device_into_cpu() -> None:
    torch.ones(5)[on_device(2).long()]


def gather_cpu() -> None:
    on_device(3, 2).gather(1, torch.zeros(3, 1, dtype=torch.long))


def numpy_of_device() -> None:
    on_device(3).numpy()


def generator_of_cpu() -> None:
    torch.randperm(5, generator=torch.Generator(), device=DEVICE)


def result_into_cpu() -> None:
    torch.zeros(3).add_(on_device(3))


def lerp_of_two_devices() -> None:
    torch._foreach_lerp_([on_device(3)], [torch.ones(3)], 0.5)


def mask_of_cpu() -> None:
    torch.where(torch.ones(3, dtype=torch.bool), on_device(3), 0.0)


def embedding_of_cpu() -> None:
    F.embedding(on_device(3).long(), torch.ones(4, 2))


def nccl_with_cpu() -> None:
    machine._nccl(torch.ones(1))


def gloo_with_device() -> None:
    machine._all_reduce(on_device(1), group=machine.GLOO)


REFUSED = (
    *(add_cpu, cat_cpu, stack_scalar_of_cpu, matmul_cpu, layer_left_behind, images_left_behind),
    *(labels_left_behind, buffer_left_behind, index_of_device_into_cpu, gather_cpu),
    *(numpy_of_device, generator_of_cpu, result_into_cpu, lerp_of_two_devices, mask_of_cpu),
    *(embedding_of_cpu, nccl_with_cpu, gloo_with_device),
)
WAITING: dict[str, Callable[[], object]] = {
    "read a number": lambda: float(on_device(1)[0]),
    "if": lambda: bool(on_device(1)[0] > 0),
    "tolist": lambda: on_device(3).tolist(),
    "to the processor": lambda: on_device(3).cpu(),
    "from a list": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
    "to the device": lambda: torch.ones(3).to(DEVICE),
    "mask": lambda: on_device(3)[on_device(3) > 0.5],
    "nonzero": lambda: on_device(3).nonzero(),
    "bincount": lambda: torch.bincount(on_device(3).long()),
    "unique": lambda: torch.unique(on_device(3)),
    "equal": lambda: torch.equal(on_device(3), on_device(3)),
    "index of the processor": lambda: on_device(3)[torch.tensor([0, 2])],
    "copy into": lambda: on_device(3).copy_(torch.ones(3)),
}
FREE: dict[str, Callable[[], object]] = {
    "arithmetic": lambda: on_device(3) * 2 + torch.tensor(1.0),  # a scalar tensor is legal
    "where": lambda: torch.where(on_device(3) > 0.5, on_device(3), 0.0),
    "arange": lambda: torch.arange(3, device=DEVICE),
    "scatter": lambda: torch.zeros(3, device=DEVICE).scatter_add_(
        0, on_device(2).long(), on_device(2)
    ),
    "copy without waiting": lambda: on_device(3).copy_(torch.ones(3), non_blocking=True),
}


@pytest.mark.parametrize("mistake", REFUSED, ids=lambda each: each.__name__)
def test_a_mistake_is_refused(mistake: Callable[[], None]) -> None:
    with rehearsal(), pytest.raises(RefusedError):
        mistake()


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_counted(name: str) -> None:
    with rehearsal() as seen:
        WAITING[name]()
    assert seen.waits.total() == 1, seen.waits


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not_counted(name: str) -> None:
    with rehearsal() as seen:
        FREE[name]()
    assert not seen.waits
    assert seen.launches.total() > 0


def test_values_are_those_of_the_processor_and_gradients_flow() -> None:
    inputs, network = torch.rand(4, 3), nn.Linear(3, 2)
    expected = network(inputs).square().mean()
    expected.backward()
    gradient = network.weight.grad
    with rehearsal():
        moved = nn.Linear(3, 2)
        moved.load_state_dict(network.state_dict())
        moved = moved.to(DEVICE)
        loss = moved(inputs.to(DEVICE)).square().mean()
        loss.backward()
        assert isinstance(loss, OnDevice)
        torch.testing.assert_close(loss.cpu(), expected)
        assert moved.weight.grad is not None
        torch.testing.assert_close(moved.weight.grad.cpu(), gradient)


@pytest.mark.parametrize(("num_samples", "num_clusters"), [(60, 4), (12, 9)])
def test_kmeans_of_a_gpu_waits_few_times_and_finds_what_the_processor_finds(
    num_samples: int, num_clusters: int
) -> None:
    # Rounded, so that some samples are equal and clusters lose all of theirs.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_samples, 3, generator=generator).round() + 0.1
    wanted = cosine_kmeans(features, num_clusters, generator=torch.Generator().manual_seed(1))
    with rehearsal() as seen:
        moved = features.to(DEVICE, non_blocking=True)
        found = cosine_kmeans(moved, num_clusters, generator=torch.Generator().manual_seed(1))
        waits = seen.waits.total()
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs)
    assert waits <= 4  # one for the check of the features; more iterations than 28 are not needed


def test_similarities_of_a_gpu_are_not_computed_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """`trainer` allows TF32, which has 11 bits: many similarities near 1 would be equal."""
    asked: list[str] = []
    precision = ["high"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision[0])
    monkeypatch.setattr(
        torch, "set_float32_matmul_precision", lambda given: precision.__setitem__(0, given)
    )

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func._schema.name == "aten::mm":
                asked.append(precision[0])
            return func(*args, **(kwargs or {}))

    with rehearsal(), Watch():  # type: ignore[no-untyped-call]
        similarities(on_device(4, 3), on_device(5, 3))
    assert asked == ["highest"]
    assert precision == ["high"]


def test_views_and_allocations_launch_nothing() -> None:
    with rehearsal() as seen:
        images = torch.empty(2, 3, 4, 4, device=DEVICE)
        images.flatten(2).transpose(1, 2)[0].unsqueeze(0)
    assert not seen.launches

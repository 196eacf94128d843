"""Images on a GPU or streamed to it: the same batches. The meta device plays the GPU here."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from tests.data.test_datamodule import data_module, image_set
from torch import Tensor

from spice_pl.data import transfer
from spice_pl.data.datamodule import Pixels, ViewsDataModule
from spice_pl.errors import UsageError

META, CPU = torch.device("meta"), torch.device("cpu")


def test_batches_come_ahead_in_the_same_order() -> None:
    loader = data_module().train_dataloader()
    order: list[int] = []

    class Noting(transfer.Ahead):
        def _copy(self, batch: Pixels, stream: object) -> tuple[Pixels, object]:  # type: ignore[override]
            order.append(int(batch.index[0]))
            return super()._copy(batch, stream)

    plain = [pixels.index.tolist() for pixels in loader]
    ahead = Noting(loader, CPU)
    assert len(ahead) == len(loader)
    assert ahead.sampler is loader.sampler
    found = []
    for number, pixels in enumerate(ahead, start=1):
        found.append(pixels.index.tolist())
        assert len(order) == min(number + 1, len(plain))  # one ahead of what is used
    assert found == plain


def test_a_resident_store_holds_all_images_and_extra_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = image_set()
    copied = transfer._copied([images.images, images.images[:3]], CPU)
    assert np.array_equal(copied[: len(images)].numpy(), images.images)
    assert np.array_equal(copied[len(images) :].numpy(), images.images[:3])
    monkeypatch.setattr(transfer, "CHUNK", 1)  # one image at a time
    assert torch.equal(transfer._copied([images.images, images.images[:3]], CPU), copied)


def test_batches_from_a_store_are_those_of_the_files() -> None:
    images = image_set()
    streamed, resident = data_module(images), data_module(images)
    resident._pixels.store = transfer._copied([images.images], CPU)
    for one, other in zip(streamed.train_dataloader(), resident.train_dataloader(), strict=True):
        for name in ("index", "round", "images"):
            assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(
    ("mode", "free", "kept"),
    [
        ("auto", 4.1, True),
        ("auto", 3.9, False),  # more than a quarter
        ("resident", 1.1, True),
        ("resident", 0.9, False),
        ("stream", 100.0, False),
    ],
)
def test_images_are_resident_where_they_fit_and_the_log_says_so(
    mode: str,
    free: float,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = image_set()
    monkeypatch.setattr(transfer, "free_memory", lambda _: free * images.images.nbytes)
    with caplog.at_level(logging.INFO):
        store = transfer.resident_store(images, META, mode, extra=False)
    assert (store is not None) is kept
    if mode != "stream":
        assert ("on the GPU (" if kept else "streamed") in caplog.text


def test_a_gpu_that_is_full_after_all_is_streamed_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(transfer, "free_memory", lambda _: 1e12)
    monkeypatch.setattr(transfer, "_copied", full)
    assert transfer.resident_store(image_set(), META, "resident", extra=False) is None
    assert "did not fit on the GPU" in caplog.text


def test_on_a_processor_nothing_is_copied() -> None:
    assert transfer.resident_store(image_set(), CPU, "resident", extra=True) is None


def test_another_word_is_refused() -> None:
    with pytest.raises(UsageError, match=r"trainer\.data=always is none of auto, resident, stream"):
        ViewsDataModule(image_set(), {}, None, seed=0, mode="always")  # type: ignore[arg-type]

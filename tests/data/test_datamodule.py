from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spice_pl.data.augment import PlainView, StrongView, WeakView
from spice_pl.data.crop_views import MoCoView
from spice_pl.data.datamodule import Pixels, Stream, Views, ViewsDataModule
from spice_pl.data.images import ImageSet

N, S = 40, 8
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
PLAIN = PlainView(MEAN, STD)
VIEWS = {
    "moco": MoCoView(MEAN, STD),
    "weak": WeakView(MEAN, STD, padding=1),
    "strong": StrongView(MEAN, STD, max_cutout=4),
}


def image_set(**more: Any) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (N, 3, S, S)).astype(np.uint8)
    labels = np.arange(N, dtype=np.int64) % 4
    return ImageSet("random", pixels, [str(i) for i in range(N)], "f", labels=labels, **more)


def data_module(
    images: ImageSet | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    training: bool = True,
    streams: dict[str, Stream] | None = None,
    seed: int = 0,
    stage: str = "test",
    **settings: Any,
) -> ViewsDataModule:
    module = ViewsDataModule(
        image_set() if images is None else images,
        {"images": Stream(VIEWS, 8)} if streams is None else streams,
        PLAIN,
        seed=seed,
        stage=stage,
        **settings,
    )
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, training=training, strategy=strategy
    )
    module.trainer = trainer  # type: ignore[assignment]
    return module


def batches(module: ViewsDataModule, epoch: int = 0) -> list[Views]:
    loader = module.train_dataloader()
    assert isinstance(loader, DataLoader)
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    made = [module.on_after_batch_transfer(pixels, 0) for pixels in loader]
    assert all(isinstance(views, Views) for views in made)
    return made  # type: ignore[return-value]


def views_of_images(made: list[Views]) -> dict[tuple[int, str], Tensor]:
    return {
        (int(image), name): view
        for batch in made
        for name, views in batch.views.items()
        for image, view in zip(batch.index, views, strict=True)
    }


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (40, 1), (8, 2), (10, 5)])
def test_views_of_an_image_do_not_depend_on_batch_size_or_ranks(
    batch_size: int, world_size: int
) -> None:
    expected = views_of_images(batches(data_module()))
    assert len(expected) == N * len(VIEWS)
    streams = {"images": Stream(VIEWS, batch_size)}
    found: dict[tuple[int, str], Tensor] = {}
    for rank in range(world_size):
        module = data_module(streams=streams, rank=rank, world_size=world_size)
        found |= views_of_images(batches(module))
    assert found.keys() == expected.keys()
    for key, view in found.items():
        torch.testing.assert_close(view, expected[key], rtol=0, atol=1e-5)


def test_views_in_turn_have_equal_shares_of_the_epochs() -> None:
    module = data_module(streams={"images": Stream(VIEWS, 8, turns=["weak", "weak", "moco"])})
    shown = []
    for epoch in range(7):
        module.trainer.current_epoch, module.trainer.max_epochs = epoch, 7  # type: ignore[union-attr, misc]
        (name,) = batches(module, epoch)[0].views
        shown.append(name)
    assert shown == ["weak"] * 5 + ["moco"] * 2


def test_views_change_from_epoch_to_epoch_and_from_seed_to_seed() -> None:
    first = views_of_images(batches(data_module()))
    for other in (
        views_of_images(batches(data_module(), epoch=1)),
        views_of_images(batches(data_module(seed=1))),
        views_of_images(batches(data_module(stage="another"))),
    ):
        same = [torch.equal(first[key], other[key]) for key in first]
        assert sum(same) < len(same) / 4  # a few weak views repeat by chance


def test_two_views_of_one_kind_differ() -> None:
    view = MoCoView(MEAN, STD)
    made = batches(data_module(streams={"images": Stream({"query": view, "key": view}, 8)}))
    for batch in made:
        query, key = batch.views["query"], batch.views["key"]
        assert not any(torch.equal(q, k) for q, k in zip(query, key, strict=True))


def test_batches_have_no_labels() -> None:
    assert [field.name for field in fields(Views)] == ["index", "views"]
    assert [field.name for field in fields(Pixels)] == ["index", "round", "images"]
    pixels = next(iter(data_module().train_dataloader()))
    assert set(vars(pixels)) == {"index", "round", "images"}


def test_stored_pixels_are_never_written() -> None:
    images = image_set()
    before = images.images.copy()
    images.images.flags.writeable = False
    for batch in batches(data_module(images)):
        for view in batch.views.values():
            view.zero_()
    for pixels in data_module(images, training=False).predict_dataloader():
        pixels.images.zero_()
    assert np.array_equal(images.images, before)


def test_several_streams_come_side_by_side_from_their_own_subsets() -> None:
    subset = torch.tensor([1, 5, 7])
    streams = {
        "labelled": Stream({"weak": VIEWS["weak"]}, 2, num_samples=6, subset=subset),
        "unlabelled": Stream({"strong": VIEWS["strong"]}, 8, num_samples=24),
    }
    module = data_module(streams=streams)
    loader = module.train_dataloader()
    made = [module.on_after_batch_transfer(batch, 0) for batch, *_ in loader]
    assert len(made) == 3
    labelled: list[int] = []
    for batch in made:
        assert isinstance(batch, dict)
        assert set(batch["labelled"].views) == {"weak"}
        assert set(batch["unlabelled"].views) == {"strong"}
        labelled += batch["labelled"].index.tolist()
    assert sorted(labelled) == [1, 1, 5, 5, 7, 7]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_prediction_covers_every_image_once_in_order(world_size: int) -> None:
    images = image_set()
    ranks = []
    for rank in range(world_size):
        module = data_module(
            images, rank=rank, world_size=world_size, training=False, predict_batch_size=6
        )
        index: list[int] = []
        for pixels in module.predict_dataloader():
            batch = module.on_after_batch_transfer(pixels, 0)
            assert isinstance(batch, Views)
            assert len(batch.index) <= 6
            index += batch.index.tolist()
            expected = (images.images[batch.index.numpy()] / 255 - 0.5) / 0.25
            torch.testing.assert_close(
                batch.views["plain"], torch.from_numpy(expected).float(), rtol=0, atol=1e-5
            )
        ranks.append(index)
    assert ranks == [list(range(rank, N, world_size)) for rank in range(world_size)]


def test_split_protocol_trains_on_train_and_watches_test_images() -> None:
    images = image_set(protocol="split", is_test=np.arange(N) >= 30)
    drawn = torch.cat([batch.index for batch in batches(data_module(images))])
    assert int(drawn.max()) < 30
    module = data_module(images, training=False)
    watched = torch.cat([pixels.index for pixels in module.val_dataloader()])
    assert watched.tolist() == list(range(30, N))
    predicted = torch.cat([pixels.index for pixels in module.predict_dataloader()])
    assert predicted.tolist() == list(range(N))


def test_watched_images_are_evenly_spaced() -> None:
    module = data_module(training=False, num_watched=10)
    watched = torch.cat([pixels.index for pixels in module.val_dataloader()])
    assert watched.tolist() == list(range(0, N, 4))

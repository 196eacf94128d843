"""Extra images (STL10's unlabelled ones) are trained on where a stream asks, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.conftest import NUM_IMAGES, make_job, photographs

from spice_pl.data.datamodule import ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.job import run
from spice_pl.job.parts import open_images


def test_stages_draw_extra_images_where_they_ask_for_them(
    tiny: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, drawn = open_images, dict[tuple[str, str], set[int]]()
    original = ViewsDataModule._views

    def images(*args: Any, **more: Any) -> ImageSet:
        extra = np.ascontiguousarray(photographs(seed=1).transpose(0, 3, 1, 2))
        return replace(made(*args, **more), extra=extra)

    def views(self: ViewsDataModule, stream: str, pixels: Any, *more: Any) -> Any:
        drawn.setdefault((self.stage, stream), set()).update(pixels.index.tolist())
        return original(self, stream, pixels, *more)

    monkeypatch.setattr(run, "open_images", images)
    monkeypatch.setattr(ViewsDataModule, "_views", views)
    job = make_job(*tiny, "fixmatch.streams.unlabelled.batch_size=60")
    run.run_stages(job)
    proper, all_images = set(range(NUM_IMAGES)), set(range(2 * NUM_IMAGES))
    assert drawn["moco", "images"] == all_images
    assert drawn["fixmatch", "unlabelled"] == all_images
    assert drawn["proto", "images"] <= proper
    assert drawn["fixmatch", "labelled"] <= proper
    for stage in ("moco", "proto", "fixmatch"):
        folder = job.folder(stage)
        assert len(folder.features) == NUM_IMAGES  # neither predicted nor scored
        assert folder.metrics["num_images"] == NUM_IMAGES

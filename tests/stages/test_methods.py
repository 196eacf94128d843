"""The methods that SPICE is compared with, as whole runs: clusters, resume, one command."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Finished
from torch import Tensor

from spice_pl.data.datamodule import Views
from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.models import portable
from spice_pl.stages.base import Stage
from spice_pl.stages.cc import ContrastiveClusteringModule
from spice_pl.stages.cdc import CdcModule
from spice_pl.stages.dcboost import DCBoostModule
from spice_pl.stages.propos import ProPosModule

MODULES = {
    "cc": ContrastiveClusteringModule,
    "propos": ProPosModule,
    "cdc": CdcModule,
    "dcboost": DCBoostModule,
}
MORE = {
    "propos": ("module.warmup_epochs=1", "module.hidden_dim=16"),
    "cdc": ("module.hidden_dim=16",),
    "dcboost": ("upstream=proto", "module.warmup_epochs=1", "module.hidden_dim=16"),
}
SIZES = ("epochs=3", "streams.images.batch_size=30", "watch_epochs=1")
SHORT = {
    stage: tuple(f"{stage}.{each}" for each in (*SIZES, *MORE.get(stage, ()))) for stage in MODULES
}


@pytest.mark.parametrize("stage", SHORT)
def test_a_run_leaves_clusters_and_a_model(finished: Finished, stage: str) -> None:
    run_stages(finished.job(f"stage={stage}", *SHORT[stage], "embeddings=cosine"))
    folder = finished.folder(stage)
    for name in ("model.spice", "clusters.csv", "report.html", "metrics.json"):
        assert (folder.path / name).is_file(), name
    table = folder.read_clusters()
    assert np.array_equal(table.clusters, folder.probs.argmax(axis=1))
    head = portable.load(folder.path / "model.spice").network.head
    made = head(torch.from_numpy(np.array(folder.features)))
    np.testing.assert_allclose(made.detach().numpy(), folder.probs, atol=1e-5)


@pytest.mark.parametrize("stage", SHORT)
def test_resumed_equals_straight(finished: Finished, stage: str) -> None:
    more = (f"stage={stage}", *SHORT[stage])
    run_stages(finished.job(*more, "overwrite=true"))
    straight = finished.folder(stage)
    kept = {each: (straight.path / each).read_bytes() for each in ("probs.npy", "metrics.csv")}
    module: Any = MODULES[stage]
    step = module.training_step

    def stopping(self: Stage, batch: Views, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == (2, 0):
            raise UsageError("stopped")
        loss: Tensor = step(self, batch, batch_idx)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "training_step", stopping)
        with pytest.raises(UsageError, match="stopped"):
            run_stages(finished.job(*more, "overwrite=true"))
    assert not straight.finished
    run_stages(finished.job(*more, "resume=true"))
    for name, content in kept.items():
        assert (straight.path / name).read_bytes() == content, name


def test_clusmatch_continues_from_propos_by_one_command(finished: Finished) -> None:
    job = finished.job(
        *("chain=[propos,clusmatch]", *SHORT["propos"], "clusmatch.upstream=propos"),
        *("overwrite=true", "clusmatch.epochs=1", "clusmatch.module.steps_per_epoch=3"),
        *("clusmatch.module.kmeans_steps=2", "clusmatch.streams.labelled.batch_size=2"),
        *("clusmatch.streams.unlabelled.batch_size=10", "selectors.variance.fraction=0.2"),
    )
    assert job.stages == ["propos", "clusmatch"]
    run_stages(job)
    assert finished.folder("clusmatch").finished
    stamp = finished.folder("clusmatch")._stamp()
    assert stamp["upstream"] == finished.folder("propos").metrics["digest"]


@pytest.mark.parametrize("stage", ["cc", "propos"])
def test_another_number_of_clusters_is_another_run(finished: Finished, stage: str) -> None:
    run_stages(finished.job(f"stage={stage}", *SHORT[stage]))
    with pytest.raises(UsageError, match=r"num_clusters"):
        run_stages(finished.job(f"stage={stage}", *SHORT[stage], "dataset.num_clusters=4"))


def test_dcboost_follows_any_clustering_by_one_command(finished: Finished) -> None:
    chain = ("chain=[cdc,dcboost]", *SHORT["cdc"], *SHORT["dcboost"], "dcboost.upstream=cdc")
    run_stages(finished.job(*chain, "overwrite=true"))
    stamp = finished.folder("dcboost")._stamp()
    assert stamp["upstream"] == finished.folder("cdc").metrics["digest"]


@pytest.mark.parametrize("stage", ["cdc", "dcboost"])
def test_without_an_upstream_there_is_a_way_out(finished: Finished, stage: str) -> None:
    more = (f"stage={stage}", *SHORT[stage], f"{stage}.upstream=null", "overwrite=true")
    with pytest.raises(UsageError, match=rf"stage={stage} needs an upstream.*{stage}\.upstream="):
        run_stages(finished.job(*more))

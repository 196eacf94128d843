"""What a clustering hands on besides its arrays: kept numbers and names, and model.spice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf

from spice_pl.data.images import ImageSet
from spice_pl.job.job import Job
from spice_pl.job.settings import build
from spice_pl.models import portable
from spice_pl.models.portable import ClusterNetwork, PortableModel, choose_known, portable_settings
from spice_pl.runs.edited import inherited_names, order_like, renumber_
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Stage
from spice_pl.system.provenance import versions

logger = logging.getLogger(__name__)


def keep_numbers(
    job: Job, name: str, module: Stage, images: ImageSet, upstream: Sequence[RunFolder]
) -> None:
    """Number and name clusters as in an earlier run: `like`, or the one that had names here.

    A run that lay here without names is no one's reference, and a new one keeps its own numbers.
    """
    folder, earlier = job.folder(name), None
    if job.cfg.like:
        earlier = RunFolder(Path(job.cfg.like))
    elif folder.names and (folder.path / "clusters.csv").is_file():
        earlier = folder
    num_clusters = int(job.cfg.dataset.num_clusters)
    if earlier is not None:
        clusters = torch.from_numpy(folder.probs.argmax(axis=1))
        order = order_like(earlier, clusters, images.keys, num_clusters)
        renumber_(folder, module.weights()["head"], order)
    names = inherited_names(upstream[0] if upstream else None, earlier)
    if names:
        kept = {str(k): text for k, text in names.items() if k < num_clusters}
        folder.write_json("names.json", kept)


def write_portable(job: Job, name: str, module: Stage, images: ImageSet) -> None:
    """Write model.spice, which clusters new images without this run's folder."""
    cfg, folder = job.cfg, job.folder(name)
    parts = dict(module.weights())
    # An encoder read off a checkpoint says itself how to build it.
    own = getattr(parts["encoder"], "settings", None)
    backbone = OmegaConf.create(own) if own else cfg[name].module.get("backbone", cfg.backbone)
    encoder, plain = (
        OmegaConf.to_container(each, resolve=True) for each in (backbone, cfg.augment.plain)
    )
    settings = portable_settings(encoder, parts["head"], plain)
    if settings is None:
        logger.info("%s: no %s for a head of your own", name, portable.FILE_NAME)
        return
    model = PortableModel(
        network=ClusterNetwork(build(cfg, cfg.augment.plain), parts["encoder"], parts["head"]),
        settings=settings,
        image_size=int(images.images.shape[-1]),
        names=[folder.names.get(k, f"cluster {k}") for k in range(int(cfg.dataset.num_clusters))],
        threshold=float(cfg.reliable.confidence),
        about={
            "dataset": images.name,
            "fingerprint": images.fingerprint,
            "num_images": len(images),
            "protocol": images.protocol,
            "stage": name,
            "seed": int(cfg.seed),
            "versions": versions(),
        },
        known=choose_known(images.keys, folder.features, folder.probs, int(cfg.known_images)),
    )
    model.save(folder.path / portable.FILE_NAME)

"""Which stage 1 makes the best features in equal processor time?

    python benchmarks/stage1.py --minutes 5,15 experiment=cifar10_quick dataset=folder ...

Trains each method for the same processor time, the views included, on one thread, with the settings
of the command line; `METHODS` has what is added for each of them. The time of a step at each size
is measured first; it gives the number of epochs, so that sizes and learning rate end with the time.
Then the plain images are embedded, and labels are read to score them:

- 20-NN: accuracy of up to 2,000 images among all others, by cosine;
- k-means: ACC on l2-normalised features, and on smoothed embeddings.

Choose recipes on a part of the training images, never on those of the report. Prints a table and,
as its last line, the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.nn import functional as F

from spice_pl.data.augment import PlainView
from spice_pl.data.datamodule import ViewsDataModule
from spice_pl.data.images import ImageSet
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.embeddings import smoothed_embeddings
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.job.job import Job
from spice_pl.job.parts import build_stage, open_images
from spice_pl.job.plan import plan
from spice_pl.job.settings import build
from spice_pl.job.trainer import auto_precision

CONF = Path(__file__).resolve().parents[1] / "conf"
TIMED = 8  # steps per size that are timed
NEIGHBORS, QUERIES = 20, 2000
METHODS = {
    "simclr": ("stage=simclr",),
    "empssl": ("stage=empssl", "empssl.module.sizes=[16,16,16,16,32]"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", default="5", help="processor minutes of each run, as 5,15")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0 on")
    args, settings = parser.parse_known_args()
    methods = args.methods.split(",")
    if wrong := [each for each in methods if each not in METHODS]:
        parser.error(f"--methods {', '.join(wrong)}: choose among {', '.join(METHODS)}")
    torch.set_num_threads(1)
    rows = []
    print("| stage 1 | core-minutes | epochs | images | 20-NN | k-means | k-means, smoothed |")
    print("|:--|--:|--:|--:|--:|--:|--:|")
    for minutes in map(float, args.minutes.split(",")):
        for method in methods:
            for seed in range(args.seeds):
                row = trained(method, minutes, (*METHODS[method], *settings, f"seed={seed}"))
                rows.append(row)
                scores = (row[key] for key in ("knn", "kmeans", "kmeans_smoothed"))
                print(
                    f"| {method} | {row['minutes']:.1f} | {row['epochs']} | {row['images']:,} | "
                    + " | ".join(f"{score:.3f}" for score in scores)
                    + " |",
                    flush=True,
                )
    print(json.dumps(rows))


def trained(method: str, minutes: float, settings: tuple[str, ...]) -> dict[str, Any]:
    """Train a stage for a time; return what it cost and its scores."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        job = Job(compose("config", list(settings)), settings, "none", sweep=False)
    images = open_images(job.cfg)
    if images.labels is None:
        raise SystemExit("error: the images have no labels to score with (dataset.labels=folders)")
    sizes = job.cfg[method].module.sizes or [images.images.shape[-1]]
    _, seconds, steps = fit(job, images, len(sizes), limit_train_batches=TIMED)
    per_epoch = seconds / (len(sizes) * TIMED) * steps
    epochs = max(len(sizes), round(60 * minutes / per_epoch))
    module, seconds, steps = fit(job, images, epochs)
    plain = build(job.cfg, job.cfg.augment.plain)
    features = embedded(module, images, plain)
    batch = int(job.cfg[method].streams.images.batch_size)
    return {
        "method": method,
        "seed": int(job.cfg.seed),
        "minutes": round(seconds / 60, 2),
        "epochs": epochs,
        "images": epochs * steps * batch,
        **scores(features, torch.from_numpy(images.labels), int(job.cfg.dataset.num_clusters)),
    }


def fit(
    job: Job, images: ImageSet, epochs: int, **limits: int
) -> tuple[pl.LightningModule, float, int]:
    """Return the trained module, its processor seconds, and the steps of a whole epoch."""
    (step,) = plan(job)
    module, streams = build_stage(job, step, images)
    module.to(memory_format=torch.channels_last)
    streams = dict(module.prepare(images, None, streams))
    plain = build(job.cfg, job.cfg.augment.plain)
    data = ViewsDataModule(images, streams, plain, seed=step.seed, stage=step.name)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=auto_precision("cpu"),  # type: ignore[arg-type]
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **limits,  # type: ignore[arg-type]
    )
    begun = time.process_time()
    trainer.fit(module, data)
    stream = streams["images"]
    return module, time.process_time() - begun, len(images.train_index) // stream.batch_size


@torch.no_grad()
def embedded(module: pl.LightningModule, images: ImageSet, plain: PlainView) -> Tensor:
    """Return the features (N, D) of the plain images."""
    module.eval()
    parts = []
    for rows in np.array_split(np.arange(len(images)), -(-len(images) // 500)):
        pixels = torch.from_numpy(np.asarray(images.images[rows]))
        parts.append(module(plain(pixels, torch.empty(len(rows), 0))).float())
    return torch.cat(parts)


def scores(features: Tensor, labels: Tensor, num_clusters: int) -> dict[str, float]:
    """Return 20-NN of some images among all others, and k-means on two readings of the features."""
    rows = F.normalize(features)
    queries = torch.arange(0, len(rows), -(-len(rows) // QUERIES))
    similarity = rows[queries] @ rows.T
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    voted = labels[similarity.topk(NEIGHBORS).indices].mode(dim=1).values
    found = {"knn": float((voted == labels[queries]).float().mean())}
    for name, values in (("kmeans", rows), ("kmeans_smoothed", smoothed_embeddings(features))):
        clusters = torch.from_numpy(kmeans_clusters(values.numpy(), num_clusters, 0))
        found[name] = clustering_scores(clusters, labels)["acc"]
    return {name: round(score, 4) for name, score in found.items()}


if __name__ == "__main__":
    main()

"""Which stage 1 makes the best features in equal processor time?

    python benchmarks/stage1.py --minutes 1,3,5,10,15,30 --curve NAME experiment=cifar10_quick ...

Trains each method for the same processor time, the views included, on one thread, with the settings
of the command line; `METHODS` has what is added for each of them. The time of a step at each size
is measured first; it gives the number of epochs, so that sizes and learning rate end with the time.
Then the plain images are embedded, and labels are read to score them:

- 20-NN: accuracy of up to 2,000 images among all others, by cosine;
- k-means: ACC on l2-normalised features, and on smoothed embeddings.

Choose recipes on a part of the training images, never on those of the report. Prints a table and,
as its last line, the same as JSON. `--curve NAME` also writes, after each run, the JSON to
NAME.json, the table to NAME.md, and the curves of 20-NN and of k-means on smoothed embeddings over
the core-minutes to NAME_knn.svg and NAME_kmeans.svg. A row that NAME.json has is not run again, so
a long list can be run in pieces, also by one process per core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
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
from spice_pl.reports.lines import line_figure
from spice_pl.stages.base import Stage

CONF = Path(__file__).resolve().parents[1] / "conf"
TIMED = 8  # steps per size that are timed
NEIGHBORS, QUERIES = 20, 2000
METHODS = {
    "simclr": ("stage=simclr",),
    "simclr_wide": ("stage=simclr", "backbone.widths=[64,128,256,512]"),
    "moco": (
        *("stage=moco", "moco.module.sizes=${simclr.module.sizes}", "moco.module.lr=0.12"),
        *("moco.module.queue_size=4096", "moco.module.momentum=0.99"),
    ),
    "empssl": ("stage=empssl", "empssl.module.sizes=[16,16,16,16,32]"),
    "vicreg": ("stage=vicreg", "vicreg.module.sizes=${simclr.module.sizes}"),
    "fastsiam": ("stage=fastsiam", "fastsiam.module.sizes=${simclr.module.sizes}"),
    "byol": (
        *("stage=propos", "propos.module.sizes=${simclr.module.sizes}", "propos.module.noise=0"),
        *("propos.module.scattering_weight=0", "propos.module.warmup_epochs=1"),
        *("propos.module.hidden_dim=256", "propos.module.momentum=0.99"),
    ),
}
SCORES = {"knn": "20-NN", "kmeans": "k-means", "kmeans_smoothed": "k-means, smoothed"}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", default="5", help="processor minutes of each run, as 5,15")
    parser.add_argument("--methods", default="simclr,empssl", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0 on")
    parser.add_argument("--curve", type=Path, help="begin of the names of JSON, table and figures")
    args, settings = parser.parse_known_args()
    methods = args.methods.split(",")
    if wrong := [each for each in methods if each not in METHODS]:
        parser.error(f"--methods {', '.join(wrong)}: choose among {', '.join(METHODS)}")
    torch.set_num_threads(1)
    rows = stored(args.curve)
    for minutes in map(float, args.minutes.split(",")):
        for method in methods:
            for seed in range(args.seeds):
                key = {"method": method, "asked": minutes, "seed": seed}
                if any(key.items() <= row.items() for row in rows):
                    continue
                row = key | trained(minutes, (*METHODS[method], *settings, f"seed={seed}"))
                print(table([row]).splitlines()[-1], flush=True)
                rows = [*(stored(args.curve) or rows), row]  # another process may have added some
                if args.curve:
                    write(rows, args.curve)
    print(table(rows))
    print(json.dumps(rows))


def stored(name: Path | None) -> list[Row]:
    """Return the rows that an earlier call wrote."""
    if name is None or not name.with_suffix(".json").exists():
        return []
    rows: list[Row] = json.loads(name.with_suffix(".json").read_text(encoding="utf-8"))
    return rows


def table(rows: list[Row]) -> str:
    """Return the runs as a Markdown table, sorted by time and method."""
    lines = [
        f"| stage 1 | core-minutes | epochs | images | {' | '.join(SCORES.values())} |",
        "|:--|" + "--:|" * 6,
    ]
    for row in sorted(rows, key=lambda row: (row["asked"], row["method"], row["seed"])):
        found = " | ".join(f"{row[score]:.3f}" for score in SCORES)
        cost = f"{row['minutes']:.1f} | {row['epochs']} | {row['images']:,}"
        lines.append(f"| {row['method']} | {cost} | {found} |")
    return "\n".join(lines)


def write(rows: list[Row], name: Path) -> None:
    """Write the rows, their table, and the mean scores of each method over its core-minutes."""
    name.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    name.with_suffix(".md").write_text(table(rows) + "\n", encoding="utf-8")
    for score, end in (("knn", "knn"), ("kmeans_smoothed", "kmeans")):
        curves: dict[str, list[tuple[float, float]]] = {}
        for method, asked in sorted({(row["method"], row["asked"]) for row in rows}):
            same = [row for row in rows if (row["method"], row["asked"]) == (method, asked)]
            point = [statistics.mean(row[each] for row in same) for each in ("minutes", score)]
            curves.setdefault(method, []).append((point[0], point[1]))
        figure = line_figure(curves, "core-minutes", SCORES[score])
        name.with_name(f"{name.name}_{end}.svg").write_text(figure, encoding="utf-8")


def trained(minutes: float, settings: tuple[str, ...]) -> Row:
    """Train a stage for a time; return what it cost and its scores."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        job = Job(compose("config", list(settings)), settings, "none", sweep=False)
    images = open_images(job.cfg)
    if images.labels is None:
        raise SystemExit("error: the images have no labels to score with (dataset.labels=folders)")
    stage = job.cfg[job.cfg.stages[0]]
    sizes = stage.module.sizes or [images.images.shape[-1]]
    _, seconds, steps = fit(job, images, len(sizes), limit_train_batches=TIMED)
    per_epoch = seconds / (len(sizes) * TIMED) * steps
    epochs = max(len(sizes), round(60 * minutes / per_epoch))
    module, seconds, steps = fit(job, images, epochs)
    plain = build(job.cfg, job.cfg.augment.plain)
    features = embedded(module.weights()["encoder"], images, plain)
    batch = int(stage.streams.images.batch_size)
    return {
        "minutes": round(seconds / 60, 2),
        "epochs": epochs,
        "images": epochs * steps * batch,
        **scores(features, torch.from_numpy(images.labels), int(job.cfg.dataset.num_clusters)),
    }


def fit(job: Job, images: ImageSet, epochs: int, **limits: int) -> tuple[Stage, float, int]:
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
def embedded(encoder: nn.Module, images: ImageSet, plain: PlainView) -> Tensor:
    """Return the features (N, D) of the plain images."""
    encoder.eval()
    parts = []
    for rows in np.array_split(np.arange(len(images)), -(-len(images) // 500)):
        pixels = torch.from_numpy(np.asarray(images.images[rows]))
        parts.append(encoder(plain(pixels, torch.empty(len(rows), 0))).float())
    return torch.cat(parts)


def neighbor_accuracy(features: Tensor, labels: Tensor) -> float:
    """Return the share of images that the 20 nearest others would label right, by their votes.

    Args:
        features: (N, D).
        labels: (N,); up to 2,000 of them are asked for.
    """
    rows = F.normalize(features)
    queries = torch.arange(0, len(rows), -(-len(rows) // QUERIES))
    similarity = rows[queries] @ rows.T
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    voted = labels[similarity.topk(NEIGHBORS).indices].mode(dim=1).values
    return float((voted == labels[queries]).float().mean())


def scores(features: Tensor, labels: Tensor, num_clusters: int) -> dict[str, float]:
    """Return 20-NN of some images among all others, and k-means on two readings of the features."""
    found = {"knn": neighbor_accuracy(features, labels)}
    for name, values in (
        ("kmeans", F.normalize(features)),
        ("kmeans_smoothed", smoothed_embeddings(features)),
    ):
        clusters = torch.from_numpy(kmeans_clusters(values.numpy(), num_clusters, 0))
        found[name] = clustering_scores(clusters, labels)["acc"]
    return {name: round(score, 4) for name, score in found.items()}


if __name__ == "__main__":
    main()

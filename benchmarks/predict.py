"""How much slower is `stage=predict` than the network alone?

    python benchmarks/predict.py [--images 1024] [--repeats 3]

Pure: encoder and head on batches that are prepared already. Whole: `stage=predict`, from the image
store to predictions.csv, with the three nearest of 10,000 known images per image; opening the model
is left out. Both run on one thread and are timed in turn; the fastest of the repeats counts for
each. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from spice_pl.data.augment import PlainView
from spice_pl.data.images import ImageSet
from spice_pl.models.portable import ClusterNetwork, Known, PortableModel, load
from spice_pl.nn.heads import ClusterHead
from spice_pl.nn.resnet import ResNet
from spice_pl.runs.folder import RunFolder
from spice_pl.tasks.base import Context
from spice_pl.tasks.predict import Predict, pixel_batches

PIXELS, NUM_CLUSTERS, NUM_KNOWN, BATCH = 32, 10, 10_000, 256
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
WIDTHS = [64, 128, 256, 512]  # ResNet18


def write_model(path: Path) -> None:
    """Write an untrained ResNet18 with random known images as a model.spice."""
    network = ClusterNetwork(
        PlainView(MEAN, STD),
        ResNet(widths=WIDTHS),
        ClusterHead(WIDTHS[-1], WIDTHS[-1], NUM_CLUSTERS),
    )
    head = {"feature_dim": WIDTHS[-1], "hidden_dim": WIDTHS[-1], "num_clusters": NUM_CLUSTERS}
    settings = {
        "encoder": {"_target_": "spice_pl.nn.resnet.ResNet", "widths": WIDTHS},
        "head": {"_target_": "spice_pl.nn.heads.ClusterHead", **head},
        "plain": {"_target_": "spice_pl.data.augment.PlainView", "mean": MEAN, "std": STD},
    }
    known = Known(
        keys=[f"known/{i}.jpg" for i in range(NUM_KNOWN)],
        embeddings=F.normalize(torch.randn(NUM_KNOWN, WIDTHS[-1])),
        clusters=torch.zeros(NUM_KNOWN),
    )
    names = [f"cluster {k}" for k in range(NUM_CLUSTERS)]
    PortableModel(network, settings, PIXELS, names, 0.99, known=known).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model.spice")
        shape = (arguments.images, 3, PIXELS, PIXELS)
        np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        images = ImageSet(
            name="random",
            images=np.load(folder / "images.npy", mmap_mode="r"),
            keys=[f"{i}.jpg" for i in range(arguments.images)],
            fingerprint="",
        )
        model = load(folder / "model.spice", device="cpu")
        network = model.network
        batches = [
            network.plain(torch.from_numpy(pixels), torch.empty(0))
            for _, pixels in pixel_batches(images, BATCH)
        ]
        task = Predict(str(folder / "model.spice"), batch_size=BATCH, device="cpu")
        context = Context(
            folder=RunFolder(folder),
            upstream=[],
            images=lambda **_: images,
            plain=network.plain,
            num_clusters=0,
            seed=0,
        )
        seconds: list[tuple[float, float]] = []
        for _ in range(arguments.repeats):
            with torch.inference_mode():
                start = time.process_time()
                for batch in batches:
                    network.head(network.encoder(batch).float())
                pure = time.process_time() - start
            start = time.process_time()
            load(folder / "model.spice", device="cpu")
            opening = time.process_time() - start
            start = time.process_time()
            task(context)
            seconds.append((pure, time.process_time() - start - opening))
        pure, whole = (arguments.images / min(column) for column in zip(*seconds, strict=True))
    print(
        f"pure forward {pure:,.1f} images/s, stage=predict {whole:,.1f}, ratio {whole / pure:.3f}"
    )
    print(json.dumps({"pure": pure, "whole": whole, "ratio": whole / pure}))


if __name__ == "__main__":
    main()

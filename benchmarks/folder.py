"""How long does a folder of photos take, and where does the time go?

    python benchmarks/folder.py --folder photos [settings]    # your own photos
    python benchmarks/folder.py [--images 1000] [--size 4000x3000] [--source pictures] [settings]

Without --folder, photos of that size are made first: crops of the pictures in --source (of the two
that scikit-learn has, if it is not given), enlarged, with noise, as JPEG. Then `train.py FOLDER`
runs as a process of its own, with an empty cache. The time of each part is the time between lines
that the job prints. The plain loop reads the same photos with Pillow, scales and crops them with
torchvision, and calls the network as it is, 32 images at a time; it is measured on at most 200
photos and scaled. `over_plain` compares it with decoding and embedding here. Prints a table and, as
its last line, JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms

from spice_pl.nn.encoders import pretrained
from spice_pl.nn.pretrained import efficientnet_lite

ROOT = Path(__file__).parents[1]
MOST_PLAIN = 200  # photos of the plain loop
# The part that has ended when a line with these words appears.
ENDS = {
    "once into": "start, listing, plan",
    "embed: starts": "decoding",
    "embed/seed0/metrics.json": "features",
    "proto: starts": "number of clusters",
    "views, once 100 %": "views",
    "proto 100 %": "heads",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, help="photos; made if not given")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", default="4000x3000", help="width x height of the photos made")
    parser.add_argument("--source", type=Path, help="folder of pictures to make photos of")
    arguments, settings = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = arguments.folder or work / "photos"
        if arguments.folder is None:
            width, height = map(int, arguments.size.split("x"))
            make_photos(folder, arguments.images, width, height, arguments.source)
        parts, metrics = run(folder.resolve(), work, settings)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()][: metrics["images"]]
        plain = plain_seconds(files)
    seconds = sum(parts.values())
    features = parts["decoding"] + parts["features"]
    print(f"{'part':28s}{'seconds':>10s}{'images/s':>10s}")
    for part, took in {**parts, "all": seconds, "plain loop, features only": plain}.items():
        print(f"{part:28s}{took:10.1f}{metrics['images'] / max(took, 1e-9):10.1f}")
    print(f"peak memory {metrics['peak_memory_mb']:,.0f} MB, {torch.get_num_threads()} threads")
    result = {
        **metrics,
        "seconds": seconds,
        "images_per_s": metrics["images"] / seconds,
        "over_plain": plain / features,
        "parts": parts,
    }
    print(json.dumps(result))


def run(folder: Path, work: Path, settings: list[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Run the command on a folder; return the seconds of its parts and what it measured itself."""
    runs = work / "runs"
    command = [sys.executable, str(ROOT / "train.py"), str(folder), f"runs_dir={runs}"]
    command += [f"cache_dir={work / 'cache'}", "open=false", *settings]
    parts: dict[str, float] = {}
    last = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=work
    ) as process:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            for words, part in ENDS.items():
                if words in line and part not in parts:
                    parts[part], last = time.perf_counter() - last, time.perf_counter()
    if process.returncode:
        raise SystemExit("".join(lines[-20:]))
    if "features" not in parts:  # K was given, and the features ended where the heads start
        parts["features"] = parts.pop("number of clusters")
    parts["choice, tables, report"] = time.perf_counter() - last
    found = [json.loads(file.read_text()) for file in runs.glob("*/*/*/metrics.json")]
    measured = [metrics for metrics in found if "peak_memory_mb" in metrics]
    peak = max(metrics["peak_memory_mb"] for metrics in measured)
    return parts, {"images": measured[0]["num_images"], "peak_memory_mb": peak}


def plain_seconds(files: list[Path]) -> float:
    """Return the seconds that a loop without anything of ours takes for the features of photos."""
    encoder = pretrained("efficientnet_lite0")
    network = efficientnet_lite(variant=0, pretrained=True).eval()
    prepare = transforms.Compose(
        [
            transforms.Resize(encoder.pixels),
            transforms.CenterCrop(encoder.pixels),
            transforms.ToTensor(),
            transforms.Normalize(encoder.mean, encoder.std),
        ]
    )
    some = files[:: max(1, len(files) // MOST_PLAIN)]
    start = time.perf_counter()
    with torch.no_grad():
        for first in range(0, len(some), 32):
            batch = [prepare(Image.open(file).convert("RGB")) for file in some[first : first + 32]]
            network(torch.stack(batch))
    return (time.perf_counter() - start) * len(files) / len(some)


def make_photos(folder: Path, count: int, width: int, height: int, source: Path | None) -> None:
    """Write different photos of one size: enlarged crops of real pictures with noise."""
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    if source is not None:
        known = Image.registered_extensions()
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in known)
        if not files:
            raise SystemExit(f"--source {source} holds no pictures")
        pictures = [Image.open(file) for file in files[:: max(1, len(files) // count)]]
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3)).astype(np.float32)

    def write(number: int) -> None:
        picture = pictures[number % len(pictures)].convert("RGB")
        if source is None:
            x, y = np.random.default_rng(number).integers(0, 160, 2).tolist()
            picture = picture.crop((x, y, x + 400, y + 260))
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        pixels = pixels + np.roll(noise, number * 7, axis=0)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
            folder / f"{number:06d}.jpg", quality=88
        )

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))


if __name__ == "__main__":
    main()

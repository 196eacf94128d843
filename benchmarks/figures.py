"""Draw Figures 6 and A.1 of SPICE, and what smoothing does, as SVG files.

    python benchmarks/figures.py a1 [--to gradient_ratio.svg]
    python benchmarks/figures.py 6 RUN [--to head_selection.svg]
    python benchmarks/figures.py smoothing RUN [--to smoothing.svg]

A.1: how much smaller the gradient of the double softmax is than that of a single one, against the
probability that the head gives to the pseudo-label, for 2, 10 and 200 clusters. The other clusters
share the rest evenly. Then the ratio is the same for every logit, because each loss's gradients sum
to 0.

6: accuracy of the head with the lowest label-free loss beside that of the best head by truth, after
each epoch of the run in the folder RUN (runs/digits/proto/seed0), and the regret of the choice, the
mean difference of the two.

smoothing: t-SNE of the features of a finished run of any stage beside that of its smoothed
embeddings. A dot is one of at most 1,000 images in the colour of its true label. JSON has the share
of the 10 nearest others with the same label, over all images.

Prints a table for the figures of lines and, as the last line, JSON.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from choice import of_run

from spice_pl.functional.embeddings import nearest_others, smoothed_embeddings
from spice_pl.functional.losses import double_softmax_gradient_ratio
from spice_pl.reports.lines import Points, line_figure
from spice_pl.reports.map import feature_map

DOTS = 1000  # at most
PANEL = 360  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    figures = parser.add_subparsers(dest="figure", required=True)
    ratio = figures.add_parser("a1")
    ratio.add_argument("--to", type=Path, default=Path("gradient_ratio.svg"))
    heads = figures.add_parser("6")
    heads.add_argument("run", type=Path, help="folder of a finished run of stage 2, with labels")
    heads.add_argument("--to", type=Path, default=Path("head_selection.svg"))
    smoothing = figures.add_parser("smoothing")
    smoothing.add_argument("run", type=Path, help="folder of a finished run, with labels")
    smoothing.add_argument("--to", type=Path, default=Path("smoothing.svg"))
    args = parser.parse_args()
    curves: dict[str, Points] = {}
    if args.figure == "smoothing":
        text, result = smoothing_figure(args.run)
    elif args.figure == "a1":
        curves, result = gradient_ratio()
        text = line_figure(
            curves, "probability of the pseudo-label", "gradient, double / single softmax"
        )
    else:
        curves, result = head_selection(args.run)
        text = line_figure(curves, "epoch", "ACC")
    for name, points in curves.items():
        shown = points[:: max(1, len(points) // 8)]
        print(f"{name:34}", *(f"({x:.4g}, {y:.3f})" for x, y in shown))
    args.to.write_text(text, encoding="utf-8")
    print(f"{args.to} written")
    print(json.dumps(result))


def gradient_ratio() -> tuple[dict[str, Points], dict[str, float]]:
    """Return Eq. A-6 over p_y, and its values for an unsure (p_y = 1/K) and a sure head."""
    p_y = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    curves: dict[str, Points] = {}
    result: dict[str, float] = {}
    for num_clusters in (2, 10, 200):

        def ratio(p_y: torch.Tensor, others: int = num_clusters - 1) -> list[float]:
            rest = ((1 - p_y) / others)[:, None].expand(-1, others)
            probs, label = torch.cat([p_y[:, None], rest], dim=1), torch.zeros(len(p_y)).long()
            return list(map(float, double_softmax_gradient_ratio(probs, label)[:, 0]))

        curves[f"K = {num_clusters}"] = list(zip(p_y.tolist(), ratio(p_y), strict=True))
        unsure, sure = ratio(torch.tensor([1 / num_clusters, 0.995], dtype=torch.float64))
        result |= {f"unsure_k{num_clusters}": round(unsure, 4), f"sure_k{num_clusters}": sure}
    return curves, result


def smoothing_figure(run: Path) -> tuple[str, dict[str, float]]:
    """Return an SVG of both maps, and the share of neighbours with the same label in each."""
    features, labels = of_run(run)
    drawn = np.random.default_rng(0).permutation(len(labels))[:DOTS]
    number = np.unique(labels, return_inverse=True)[1]
    rows = torch.from_numpy(features.astype(np.float32))
    maps, result = {}, {}
    for name, embedded in {
        "features": rows,
        "smoothed embeddings": smoothed_embeddings(rows),
    }.items():
        same = number[nearest_others(embedded, 10).numpy()] == number[:, None]
        result[name] = round(float(same.mean()), 4)
        maps[name] = feature_map(embedded[torch.from_numpy(drawn)].numpy()).points
    heights = np.concatenate([points[:, 1] for points in maps.values()])
    low, high = heights.min(), heights.max()
    size, panels = PANEL - 20, []
    for place, (name, points) in enumerate(maps.items()):
        left = place * PANEL
        panels.append(f'<text x="{left + PANEL / 2}" y="18" text-anchor="middle">{name}</text>')
        for (x, y), label in zip(points, number[drawn], strict=True):
            colour = f"hsl({360 * label / (number.max() + 1):.0f},75%,{42 + 12 * (label % 2)}%)"
            across, down = left + 10 + x * size, 34 + (high - y) * size
            panels.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2" fill="{colour}"/>')
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * PANEL} '
        f'{44 + (high - low) * size:.0f}" font-family="sans-serif" font-size="13">'
        "<title>Images before and after smoothing</title>"
        '<rect width="100%" height="100%" fill="#fff"/>'
    )
    return "\n".join([start, *panels, "</svg>\n"]), result


def head_selection(run: Path) -> tuple[dict[str, Points], dict[str, float]]:
    """Return `truth/best_head_acc` and `truth/epoch_head_acc` by epoch, and the regret."""
    curves: dict[str, list[tuple[float, float]]] = {"best by truth": [], "lowest loss": []}
    keys = ("truth/best_head_acc", "truth/epoch_head_acc")
    for file in sorted(run.glob("metrics*.csv")):
        with file.open(newline="", encoding="utf-8") as lines:
            for line in csv.DictReader(lines):
                if line.get(keys[0]):
                    for points, key in zip(curves.values(), keys, strict=True):
                        points.append((float(line["epoch"]), float(line[key])))
    best, chosen = ([y for _, y in points] for points in curves.values())
    if not best:
        raise SystemExit(f"error: {run} logs no {keys[0]}; that needs labels and a frozen encoder")
    regret = statistics.fmean(a - b for a, b in zip(best, chosen, strict=True))
    return dict(curves), {
        "regret": round(regret, 4),
        "regret_last": round(best[-1] - chosen[-1], 4),
    }


if __name__ == "__main__":
    main()

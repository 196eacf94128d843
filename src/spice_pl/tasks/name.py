"""Suggest names for the clusters of a finished run from a list of words.

Shapes: N images, n of them looked at, W words, K clusters.
"""

from __future__ import annotations

import csv
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_pl.errors import UsageError
from spice_pl.functional.words import word_shares
from spice_pl.models.clip import load_clip
from spice_pl.runs.edited import edits_of
from spice_pl.runs.edits import MAX_NAME
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.small_files import is_name, read_text
from spice_pl.runs.suggestions import write_suggestions
from spice_pl.system.command import command
from spice_pl.system.files import atomic, for_spreadsheet
from spice_pl.system.output import printable
from spice_pl.system.progress import Bar
from spice_pl.tasks.base import Context

logger = logging.getLogger(__name__)

BATCH = 32  # images
MOST = 20_000  # words
MAJORITY = 0.5  # a word with a larger share is in edits.json


class Name:
    """Compare images of each cluster with words, by a network trained on images and text.

    They are suggestions for the user: nothing is renamed, and no stage reads them.

    Args:
        words: file with one word or phrase per line, a list, or words separated by commas.
        network: network of open_clip.
        weights: file of its state dict, or open_clip's name of weights that it fetches.
        prompt: sentence in which {} is the word.
        num_images: images looked at per cluster, at most, drawn at random.
        num_words: words listed per cluster.
        spreadsheet: whether words in words.csv that a spreadsheet would take for a formula begin
            with '.
    """

    def __init__(
        self,
        words: str | Sequence[str] | None,
        network: str = "ViT-B-32",
        weights: str = "laion2b_s34b_b79k",
        prompt: str = "a photo of a {}.",
        num_images: int = 50,
        num_words: int = 5,
        spreadsheet: bool = False,
    ) -> None:
        if "{}" not in prompt:
            raise UsageError(f"name.prompt={prompt} has no {{}}, where the word is put; add it")
        for setting, value in (("num_images", num_images), ("num_words", num_words)):
            if value < 1:
                raise UsageError(f"name.{setting}={value} is not at least 1")
        self.words = read_words(words)
        self.network, self.weights, self.prompt = network, weights, prompt
        self.num_images, self.num_words = num_images, num_words
        self.spreadsheet = spreadsheet

    def __call__(self, context: Context) -> None:
        """Write words.csv, suggested.json and edits.json, and log the words of each cluster.

        Raises:
            UsageError: the run has no clusters, or the network cannot be loaded.
        """
        run = context.upstream[0]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = load_clip(self.network, self.weights, device)
        images = context.images()
        run.check_dataset(images.fingerprint, len(images))
        clusters, num_clusters = run.read_clusters().clusters, int(run.metrics["num_clusters"])
        chosen = drawn(clusters, self.num_images, context.seed)
        texts = network.texts([self.prompt.replace("{}", word) for word in self.words])
        found = []
        with Bar("name", (len(chosen) + BATCH - 1) // BATCH) as bar:
            for start in range(0, len(chosen), BATCH):
                pixels = torch.from_numpy(images.pixels(chosen[start : start + BATCH]))
                found.append(network.images(pixels))
                bar.advance()
                bar.show()
        shares = word_shares(
            torch.cat(found),
            texts,
            torch.from_numpy(clusters[chosen]).to(device),
            num_clusters,
            network.scale,
        ).cpu()
        sizes = np.bincount(clusters, minlength=num_clusters)
        best = self._best(shares, sizes)
        first = {cluster: words[0] for cluster, words in best.items()}
        write_suggestions(context.folder, run, first, network.name)
        self._write(context, run, best, sizes)
        logger.info("words by %s; each score is the mean probability among the words", network.name)
        again = shlex.join([*command(), "report", str(run.path)])
        logger.info("%s  shows them as suggestions on the report page", again)

    def _best(self, shares: Tensor, sizes: NDArray[np.int64]) -> dict[int, list[tuple[str, float]]]:
        """Return the best words with their scores, from the shares (K, W), by filled cluster."""
        scores, order = shares.topk(min(self.num_words, len(self.words)))  # (K, num_words)
        return {
            cluster: [
                (self.words[i], score)
                for i, score in zip(order[cluster].tolist(), scores[cluster].tolist(), strict=True)
            ]
            for cluster in np.flatnonzero(sizes).tolist()
        }

    def _write(
        self,
        context: Context,
        run: RunFolder,
        best: Mapping[int, Sequence[tuple[str, float]]],
        sizes: NDArray[np.int64],
    ) -> None:
        """Write words.csv and edits.json from the best words and the sizes (K,) of the clusters."""
        shown = for_spreadsheet if self.spreadsheet else str
        rows = [
            [
                cluster,
                shown(run.names.get(cluster, "")),
                sizes[cluster],
                rank,
                shown(word),
                f"{s:.4f}",
            ]
            for cluster, found in best.items()
            for rank, (word, s) in enumerate(found, 1)
        ]
        with (
            atomic(context.folder.path / "words.csv") as part,
            part.open("w", newline="", encoding="utf-8") as lines,
        ):
            table = csv.writer(lines)
            table.writerow(["cluster", "name", "images", "rank", "word", "score"])
            table.writerows(rows)
        for cluster, found in best.items():
            listed = ", ".join(f"{printable(word)} {score:.2f}" for word, score in found)
            logger.info("cluster %d, %s images: %s", cluster, f"{sizes[cluster]:,}", listed)
        kept = {k: found[0][0] for k, found in best.items() if found[0][1] > MAJORITY}
        file = context.folder.path / "edits.json"
        file.unlink(missing_ok=True)
        if not kept:
            logger.info("no cluster has a word of more than %.2f; words.csv lists all", MAJORITY)
            return
        edits = edits_of(run, names={**kept, **run.names})  # names that you gave stay
        context.folder.write_json(file.name, edits.as_json())
        logger.info(
            "%s  %d of %d clusters with a word of more than %.2f; the verb edit takes this file",
            *(file, len(kept), int((sizes > 0).sum()), MAJORITY),
        )


def drawn(clusters: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.int64]:
    """Return the positions (n,) of at most `limit` images of each cluster, in their order."""
    generator = np.random.default_rng(seed)
    ticket = generator.permutation(len(clusters))  # drawn before clusters are looked at
    chosen = []
    for cluster in np.unique(clusters):
        members = np.flatnonzero(clusters == cluster)
        chosen.append(members[np.argsort(ticket[members])[:limit]])
    return np.sort(np.concatenate(chosen))


def read_words(given: str | Sequence[str] | None) -> list[str]:
    """Return the words of a list, of a text with commas, or of a file with one per line.

    Raises:
        UsageError: there are fewer than two, too many, or one that cannot be a name.

    >>> read_words("cat, dog,cat")
    ['cat', 'dog']
    """
    if given is None:
        raise UsageError(
            "stage=name needs words; give name.words=FILE with one per line, or "
            "name.words='[cat,dog]'"
        )
    if isinstance(given, str):
        file = Path(given).expanduser()
        if os.path.isfile(file):
            try:
                lines = read_text(file).splitlines()
            except (OSError, ValueError) as error:
                raise UsageError(f"name.words={given} cannot be read: {error}") from error
        elif "," in given:
            lines = given.split(",")
        else:
            raise UsageError(
                f"name.words={given} is neither a file nor words with commas between them; give "
                "FILE with one word per line, or cat,dog"
            )
    else:
        lines = [str(each) for each in given]
    words = list(dict.fromkeys(filter(None, (line.strip() for line in lines))))
    if not 2 <= len(words) <= MOST:
        raise UsageError(
            f"name.words={given} holds {len(words):,} different words; give 2 to {MOST:,}, one per "
            "line of a file, or a list: a score says which word fits best among them"
        )
    if wrong := [word for word in words if not is_name(word) or len(word) > MAX_NAME]:
        raise UsageError(
            f"name.words holds {printable(wrong[0][:50])!r}, which cannot be a name: a name has at "
            f"most {MAX_NAME} characters and no control characters"
        )
    return words

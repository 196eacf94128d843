"""Published results to compare with; the numbers are in published.csv."""

import csv
from dataclasses import dataclass
from importlib.resources import files

FEATURES = {
    "images": "pretrained on other images",
    "labels": "ImageNet-supervised",
    "text": "text-supervised",
}


@dataclass(frozen=True)
class PublishedRow:
    """One published result.

    Attributes:
        method: name of the method.
        acc: accuracy in [0, 1].
        nmi: normalised mutual information in [0, 1]; None if it is not reported.
        ari: adjusted Rand index in [-1, 1]; None if it is not reported.
        protocol: "whole", "split", or "" if the source does not say.
        spread: standard deviation of ACC over runs, or None.
        features: what the network had learned from before it saw this data set: "" for nothing, or
            a key of `FEATURES`.
        source: paper and table of the numbers.
    """

    method: str
    acc: float
    nmi: float | None
    ari: float | None
    protocol: str
    spread: float | None
    features: str
    source: str

    @property
    def title(self) -> str:
        """Name of the method, and what its network had learned from besides this data set.

        >>> [row.title for row in published_results("cifar10") if row.features == "text"]
        ['TURTLE on CLIP and DINOv2 [text-supervised]']
        """
        return f"{self.method} [{FEATURES[self.features]}]" if self.features else self.method


def published_results(dataset: str) -> list[PublishedRow]:
    """Return the published results on a data set, by its name in conf/dataset; may be empty.

    >>> [row.acc for row in published_results("cifar10") if row.method == "SPICE"]
    [0.926]
    """
    text = files("spice_pl.reports").joinpath("published.csv").read_text(encoding="utf-8")
    return [
        PublishedRow(
            method=row["method"],
            acc=float(row["acc"]),
            nmi=_number(row["nmi"]),
            ari=_number(row["ari"]),
            protocol=row["protocol"],
            spread=_number(row["spread"]),
            features=row["features"],
            source=row["source"],
        )
        for row in csv.DictReader(text.splitlines())
        if row["dataset"] == dataset
    ]


def _number(text: str) -> float | None:
    return float(text) if text else None

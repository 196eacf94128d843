"""End a stage: number and name its clusters, write its files and pages, log its results."""

from __future__ import annotations

import logging
import shlex
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from rich.console import Console

from spice_pl.callbacks.dashboards import log_results
from spice_pl.data.augment import View
from spice_pl.data.images import ImageSet
from spice_pl.job.job import Job
from spice_pl.job.plan import Step
from spice_pl.job.settings import build
from spice_pl.job.trainer import progress
from spice_pl.models import portable
from spice_pl.models.portable import ClusterNetwork, PortableModel, choose_known, portable_settings
from spice_pl.nn.places import fine_feature_map
from spice_pl.reports.choices import Compared
from spice_pl.reports.oddities import odd_line
from spice_pl.reports.page import write_report
from spice_pl.reports.sections import warnings
from spice_pl.reports.tables import (
    ResultRow,
    compared_markdown,
    compared_rich,
    results_markdown,
    results_rich,
)
from spice_pl.runs.answer import NETWORK, Answer, choose_answer
from spice_pl.runs.attention import FeatureMap, write_attention
from spice_pl.runs.checked_files import ANSWER
from spice_pl.runs.clusters import ClusterTable, cluster_table
from spice_pl.runs.earlier import better_of, warn_if_worse
from spice_pl.runs.edited import inherited_names, order_like, renumber_
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.page_data import report_data
from spice_pl.runs.results import Cost, stage_metrics
from spice_pl.stages.base import Stage
from spice_pl.system.command import command
from spice_pl.system.desktop import open_page
from spice_pl.system.files import atomic
from spice_pl.system.log import FILE_NAME
from spice_pl.system.output import printable
from spice_pl.system.provenance import versions

logger = logging.getLogger(__name__)

REPORT = "report.html"


def finish_stage(
    job: Job,
    step: Step,
    module: Stage,
    images: ImageSet,
    trainer: pl.Trainer,
    plain: View,
    started: float,
) -> None:
    """Write everything that a stage leaves; metrics.json last, which marks it as finished."""
    if trainer.is_global_zero:
        upstream = step.upstream[0] if step.upstream else None
        step.folder.write_embeddings(images.train_index, upstream)
        table, answer = None, None
        if module.has_clusters:
            keep_numbers(step, module, images)
            answer = keep_better(step, module, write_answer(step, images))
            folder = step.folder
            table = cluster_table(
                images.keys,
                folder.embeddings(images.train_index),
                folder.answer,
                step.reliable,
                step.seed,
            )
            spreadsheet = bool(step.settings["spreadsheet"])
            folder.write_clusters(table, spreadsheet=spreadsheet)
        for part, weights in module.weights().items():
            step.folder.write_weights(f"{part}.safetensors", weights)
        if table is not None:
            write_portable(job, step, module, images, table, str(trainer.precision))
        cost = Cost(
            seconds=time.monotonic() - started + progress(trainer).seconds_before,
            data_wait_fraction=progress(trainer).data_wait_fraction,
            devices=trainer.world_size,
            precision=str(trainer.precision),
        )
        feature_map = feature_map_of(plain, module, trainer.strategy.root_device)
        write_results(step, module, images, table, answer, cost, feature_map)
    trainer.strategy.barrier("results written")
    for each in trainer.loggers:
        if trainer.is_global_zero:
            log_results(each, step.folder, step.upstream, images, trainer.global_step)
        finish = getattr(getattr(each, "experiment", None), "finish", None)
        if finish is not None:  # W&B keeps one run open until it is told
            finish()


def write_answer(step: Step, images: ImageSet) -> Answer | None:
    """Choose the clusters of the images at hand, if the settings ask for it."""
    folder = step.folder
    folder.write_answer(None)
    if step.settings["answer"] == NETWORK:
        return None
    if len(images.train_index) < len(images):
        logger.info("answer=auto: protocol split keeps the network's clusters")
        return None
    if step.settings["edits"]:
        logger.info("answer=auto: after edits the network's clusters are kept, which learned them")
        return None
    features, probs = (torch.from_numpy(np.array(each)) for each in (folder.features, folder.probs))
    answer = choose_answer(features, probs, step.seed)
    if answer.name != NETWORK:
        folder.write_answer(answer.probs.numpy())
    return answer


def keep_better(step: Step, module: Stage, answer: Answer | None) -> Answer | None:
    """Keep the clusters of the upstream where a stage that learned from them made them worse.

    With answer=network a warning is all.
    """
    learned = module.labelled() is not None and not module.oracle
    if not learned or not step.upstream or not (step.upstream[0].path / "probs.npy").is_file():
        return answer
    upstream, probs = step.upstream[0], torch.from_numpy(np.array(step.folder.probs))
    if upstream.answer.shape[1] != step.num_clusters:  # labels from a file, with another K
        return answer
    if answer is None:
        if step.settings["answer"] == NETWORK:
            warn_if_worse(probs, step.name, upstream)
        return None
    better = better_of(answer, probs, step.name, upstream)
    if better is not answer:
        step.folder.write_answer(better.probs.numpy())
    return better


def keep_numbers(step: Step, module: Stage, images: ImageSet) -> None:
    """Number and name clusters as in an earlier run: `like`, or one with names in this folder.

    If the run that was in this folder has no names.json, clusters are not renumbered to match it.
    """
    folder, earlier = step.folder, None
    if step.settings["like"]:
        earlier = RunFolder(Path(step.settings["like"]))
    elif folder.names and (folder.path / "clusters.csv").is_file():
        earlier = folder
    if earlier is not None:
        clusters = torch.from_numpy(folder.probs.argmax(axis=1))  # before they are renumbered
        order = order_like(earlier, clusters, images.keys, step.num_clusters)
        renumber_(folder, module.weights()["head"], order)
    names = inherited_names(step.upstream[0] if step.upstream else None, earlier)
    if names:
        kept = {str(k): text for k, text in names.items() if k < step.num_clusters}
        folder.write_json("names.json", kept)


def write_portable(
    job: Job, step: Step, module: Stage, images: ImageSet, table: ClusterTable, precision: str
) -> None:
    """Write model.spice, which clusters new images without this run's folder."""
    parts, plain = dict(module.weights()), step.settings["augment"]["plain"]
    # An encoder read from a checkpoint describes itself.
    own = getattr(parts["encoder"], "settings", None)
    backbone = own or step.own["module"].get("backbone", step.settings["backbone"])
    settings = portable_settings(backbone, parts["head"], plain)
    (step.folder.path / portable.FILE_NAME).unlink(missing_ok=True)  # of an earlier run
    if settings is None:
        logger.info("%s: no %s for a head of your own", step.name, portable.FILE_NAME)
        return
    folder = step.folder
    model = PortableModel(
        network=ClusterNetwork(build(job.cfg, plain), parts["encoder"], parts["head"]),
        settings=settings,
        image_size=int(images.images.shape[-1]),
        names=[folder.names.get(k, f"cluster {k}") for k in range(step.num_clusters)],
        threshold=step.reliable.confidence,
        about={
            "dataset": images.name,
            "fingerprint": images.fingerprint,
            "num_images": len(images),
            "protocol": images.protocol,
            "stage": step.name,
            "seed": step.seed,
            "precision": precision,
            "versions": versions(),
        },
        known=choose_known(
            images.keys, folder.features, table.clusters, int(step.settings["known_images"])
        ),
        levels=step.settings["dataset"].get("levels"),
        known_vote=(folder.path / ANSWER).is_file(),
    )
    model.save(folder.path / portable.FILE_NAME)


def write_results(
    step: Step,
    module: Stage,
    images: ImageSet,
    table: ClusterTable | None,
    answer: Answer | None,
    cost: Cost,
    feature_map: FeatureMap,
) -> None:
    """Write table.md and report.html of a stage with clusters, then metrics.json."""
    folder, upstream = step.folder, step.upstream
    metrics = stage_metrics(
        step.record, folder, upstream, images, table, answer, cost, oracle=module.oracle
    )
    if table is not None:
        write_attention(folder, table, images, step.num_clusters, feature_map)
        shown = report_data(folder, upstream, images, metrics, table, str(step.settings["map"]))
        compared = shown.comparison.rows if shown.comparison is not None else []
        metrics["compared"] = [asdict(row) for row in compared]
        metrics["not_sure"] = int(shown.not_sure.sum())
        metrics["warnings"] = warnings(shown)
        metrics["odd"] = {each.name: each.count for each in shown.oddities}
        rows = [ResultRow(**row) for row in metrics["rows"]]
        with atomic(folder.path / "table.md") as temporary:
            scored = not compared or any(row.has_scores for row in rows)
            text = results_markdown(rows) if scored else compared_markdown(compared)
            temporary.write_text(text, encoding="utf-8")
        write_report(shown, folder.path / REPORT)
    folder.write_json("metrics.json", metrics)


def feature_map_of(plain: View, module: Stage, device: torch.device) -> FeatureMap:
    """Return what makes feature maps of images, with the encoder that is handed on.

    The maps are made on the device; Lightning has moved the module off it after the prediction.
    """
    encoder = module.weights()["encoder"].eval().to(device)

    def feature_map(images: torch.Tensor) -> torch.Tensor | None:
        prepared = plain(images.to(device), torch.empty(0, device=device))
        return fine_feature_map(encoder, prepared)

    return feature_map


def show(folder: RunFolder, opened: bool | str = False, *, plain: bool = False) -> None:
    """Print the table of results of a finished run and the files to look at; open its report.

    Args:
        folder: artifacts of the run.
        opened: whether the report opens in the browser; "auto" where there is a desktop.
        plain: whether the result is said in sentences, with what to do next.
    """
    if not folder.finished:
        return
    metrics = folder.metrics
    rows = [ResultRow(**row) for row in metrics.get("rows", [])]
    compared = [Compared(**row) for row in metrics.get("compared", [])]
    if plain and (folder.path / REPORT).is_file():
        if any(row.has_scores for row in rows):
            Console().print(results_rich(rows))
        print("\n".join(map(printable, result_lines(folder))))
        open_page(folder.path / REPORT, opened)
        return
    if compared and not any(row.has_scores for row in rows):
        Console().print(compared_rich(compared))
        print(odd_line(metrics.get("odd", {})))
    elif rows:
        Console().print(results_rich(rows))
    for file, what in (
        (REPORT, "look at the clusters"),
        ("trust.html", "how far to believe them"),
        ("clusters.csv", "one line per image"),
        ("metrics.json", "scores, settings, cost"),
    ):
        if (folder.path / file).is_file():
            print(f"{folder.path / file}  {what}")
    if (folder.path / REPORT).is_file():
        open_page(folder.path / REPORT, opened)


def result_lines(folder: RunFolder) -> list[str]:
    """Return what was found, where it is and what to do next, for someone new to the method."""
    metrics, run = folder.metrics, shlex.quote(str(folder.path))
    sizes = [size for size in metrics["cluster_sizes"] if size]
    least, most = min(sizes), max(sizes)
    span = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    said = [f"{len(sizes):,} clusters of {span} images", odd_line(metrics.get("odd", {}))]
    if "not_sure" in metrics:
        share = metrics["not_sure"] / metrics["num_images"]
        said.insert(1, f"not sure: {f'{share:.1%} of the images' if share else 'none'}")
    own = [
        (f"review {run}", "name, merge and split clusters in the browser"),
        (f"trust {run}", "how far to believe them"),
        (f"predict {run} FOLDER", "put new images into these clusters"),
    ]
    steps = [(" ".join([*command(), words]), what) for words, what in own]
    width, log = max(len(line) for line, _ in steps), folder.path.parents[1] / FILE_NAME
    return [
        "; ".join(said),
        *(f"note: {text}" for text in metrics.get("warnings", [])),
        f"report   {folder.path / REPORT}",
        f"table    {folder.path / 'clusters.csv'}",
        *(
            f"{'' if i else 'next':8} {line:{width}}  {what}"
            for i, (line, what) in enumerate(steps)
        ),
        *([f"details  {log}"] if log.is_file() else []),  # Python has no such file
    ]

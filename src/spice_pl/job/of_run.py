"""Settings of a task on a finished run, `of=RUN`: those that the run was made with.

Data set, network, views and seed are read from the run, so they need not be repeated and cannot
differ. Settings of the command line come last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from spice_pl.errors import UsageError
from spice_pl.job.checks import saved_settings
from spice_pl.job.job import Job, literal
from spice_pl.runs.find import earlier_runs, find_run, find_runs
from spice_pl.runs.folder import RunFolder

TAKEN = ("seed", "dataset", "backbone", "augment", "embeddings", "answer", "reliable", "chain")
NEED = {"estimate_k": "features", "linear_probe": "features", "baselines": "features"}


def with_settings_of_run(cfg: DictConfig, given: Sequence[Override]) -> DictConfig:
    """Return the settings of a task with those of the run `of`; the command line's win.

    Args:
        cfg: composed, with the node `hydra`.
        given: settings of the command line.

    Raises:
        UsageError: there is no such run, its settings are damaged, or what runs is not a task.
    """
    stages = [str(name) for name in cfg.stages]
    task = stages[0]
    if len(stages) != 1 or "task" not in cfg[task]:
        raise UsageError(
            f"of={cfg.of} is for one task on a finished run, such as stage=trust, and stages are "
            f"{stages}; leave it out, or give stage=NAME"
        )
    run = find_run(str(cfg.of), str(cfg.runs_dir), NEED.get(task, "clusters"))
    saved, metrics = saved_settings(run / ".hydra" / "config.yaml"), RunFolder(run).metrics
    whole = run if len(run.parts) > 3 else run.absolute()
    keys = {str(each.key_or_group) for each in given}
    new = _new_values(saved, run)
    new["dataset.num_clusters"] = metrics["num_clusters"] or None
    if task == "predict" and "dataset" in keys:
        new = _other_images(new, cfg)
    elif "dataset" in keys:
        raise UsageError(
            f"the images of {run} are read as the run did; leave dataset= out, or give "
            "dataset.root=PATH where they are now"
        )
    new |= {
        "of": str(run),
        "run": run.name,
        "runs_dir": str(whole.parents[2]),
        f"{task}.upstream": run.parent.name if cfg[task].upstream else None,
        "overwrite": not cfg.resume,
    }
    if "model" in cfg[task]:
        new[f"{task}.model"] = str(run)
    with open_dict(cfg):
        for key, value in new.items():
            OmegaConf.update(cfg, key, literal(value), merge=False, force_add=True)
        for each in given:
            key = str(each.key_or_group)
            first = key.partition(".")[0]
            replaced = first in {name.partition(".")[0] for name in new} - {"of", "run", "runs_dir"}
            plain = not (each.is_delete() or each.is_sweep_override())
            if replaced and plain and not OmegaConf.is_config(OmegaConf.select(cfg, key)):
                OmegaConf.update(cfg, key, each.value(), force_add=True)
    return cfg


def chosen_run(job: Job) -> str | None:
    """Return a line that names the run of a task, where the command line named several.

    Hydra composes settings before it opens the log, so the job logs this line.
    """
    given = [text for text in job.overrides if text.startswith("of=")]
    if not given or not job.cfg.of:
        return None
    word = str(OverridesParser.create().parse_override(given[-1]).value())
    found = find_runs(word, str(job.cfg.runs_dir), NEED.get(job.stages[0], "clusters"))
    return f"run: {job.cfg.of}, the newest of {len(found)}" if len(found) > 1 else None


def _new_values(saved: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return what is taken from the settings of a run, by key."""
    new = {key: saved[key] for key in TAKEN if key in saved}
    for each in (run, *earlier_runs(run)):  # the network of an edited run is of the run before it
        module = (saved.get(each.parent.name) or {}).get("module") or {}
        if isinstance(module.get("backbone"), Mapping):
            new["backbone"] = module["backbone"]
            break
    new["cache_dir"] = saved.get("cache_dir", ".cache")
    return new


def _other_images(new: dict[str, Any], cfg: DictConfig) -> dict[str, Any]:
    """Return the settings for images other than the run's, decoded as the run's were."""
    source = new.pop("dataset")
    kept = ("levels", "max_decode_mb", "image_size", "mean", "std")
    new |= {f"dataset.{key}": source[key] for key in kept if key in source and key in cfg.dataset}
    return new | {"dataset.num_clusters": None}

"""Numbers that are both in conf/ and in a signature are the same in both places."""

from __future__ import annotations

import inspect
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tests.conftest import compose
from tests.job.test_configs import arguments, targets

from spice_pl.job.settings import plain

# Settings that differ from the default of the argument, and why.
OF_THE_DATA_SET = "a property of the data set"
OF_CLUSMATCH = "ClusMatch's own number; the class is that of the whole family"
EXCEPTIONS = {
    "moco.module.num_clusters": OF_THE_DATA_SET,
    "simclr.module.num_clusters": OF_THE_DATA_SET,
    "empssl.module.num_clusters": OF_THE_DATA_SET,
    "vicreg.module.num_clusters": OF_THE_DATA_SET,
    "fastsiam.module.num_clusters": OF_THE_DATA_SET,
    "import.module.pixels": OF_THE_DATA_SET,
    "*.streams.*.extra": "which stages train on the extra images of STL10 is part of the method",
    "clusmatch.module.losses": OF_CLUSMATCH,
    "clusmatch.module.init": OF_CLUSMATCH,
    "clusmatch.module.unlabeled_weight": OF_CLUSMATCH,
    "clusmatch.module.lr": OF_CLUSMATCH,
    "clusmatch.module.encoder_lr": OF_CLUSMATCH,
    "freematch.module.losses": "FreeMatch's own loss; the class is that of the whole family",
    "supervised.module.unlabeled_weight": "it learns from true labels alone",
    "selectors.majority.*": "a second choice of one function, beside selectors.reliable",
    "selectors.centroid.branch": "a second choice of one function, beside selectors.variance",
    "selectors.oracle.num_labels": "a second choice of one class, beside selectors.oracle_all",
    "augment.strong_joint.padding": "the strong view of stage 3; the default is that of stage 2",
    "augment.strong_joint.num_ops": "the strong view of stage 3; the default is that of stage 2",
    "inspect.task.stages": "the chain of the job, which the class does not know",
    "inspect.task.streams": "those of the stages, which the class does not know",
    "report.task.opened": "the class opens nothing unless it is told to",
    "review.task.opened": "the class opens nothing unless it is told to",
    "trainer.deterministic": "Lightning's None is False, too",
    "trainer.devices": "one device unless you ask for more; Lightning's default takes all of them",
    "trainer.precision": "`auto` is our word, which make_trainer replaces",
}


def pairs(cfg: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Setting and default of every argument that has both, by dotted key."""
    found = {}
    unresolved: Any = OmegaConf.to_container(cfg)  # so that each node is met once, where it is
    for place, node in targets(unresolved):
        parameters = arguments(node["_target_"])
        for name in node.keys() & parameters.keys():
            if (default := parameters[name].default) is not inspect.Parameter.empty:
                key = f"{place}.{name}".removeprefix(".")
                found[key] = plain(OmegaConf.select(cfg, key)), default
    return found


def same(setting: Any, default: Any) -> bool:
    """Whether they mean the same; YAML has no tuples, and Python no default that is a dict."""
    if setting in ({}, []):
        return default in (None, ())
    return bool(setting == (list(default) if isinstance(default, tuple) else default))


def test_defaults_are_the_numbers_of_conf() -> None:
    # Without what the data set brings: its preset, its kind of image and its small network.
    cfg = compose("dataset=digits", "~preset", "augment=photographs", "backbone=resnet18_cifar")
    found = pairs(cfg)
    assert len(found) > 150
    differ = {key: pair for key, pair in found.items() if not same(*pair)}
    known = {key for key in differ for name in EXCEPTIONS if fnmatchcase(key, name)}
    assert {key: pair for key, pair in differ.items() if key not in known} == {}
    for name in EXCEPTIONS:  # an exception that no longer is one is taken off the list
        assert any(fnmatchcase(key, name) for key in differ), name

"""Import paths that the docs named before 0.2 work for one release, with a warning."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("artifacts", "runs.folder", "RunFolder"),
        ("artifacts", "runs.folder", "ClusterTable"),
        ("compare", "runs.compare", "compare"),
        ("interop", "models.interop", "load_encoder"),
        ("interop", "models.interop", "load_reference_checkpoint"),
        ("portable", "models.portable", "PortableModel"),
        ("portable", "models.portable", "Predictions"),
    ],
)
def test_an_old_path_leads_to_the_new_one(old: str, new: str, name: str) -> None:
    sys.modules.pop(f"spice_pl.{old}", None)
    with pytest.warns(FutureWarning, match=rf"spice_pl\.{old} is now spice_pl\.{new}"):
        module = importlib.import_module(f"spice_pl.{old}")
    assert getattr(module, name) is getattr(importlib.import_module(f"spice_pl.{new}"), name)

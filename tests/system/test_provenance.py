"""What a result records about its packages."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from spice_pl.system import command, provenance


def test_versions_are_those_of_the_installed_packages() -> None:
    found = provenance.versions()
    assert found["torch"] == version("torch")
    assert set(found) == {"python", *provenance.PACKAGES}


def test_code_that_is_not_installed_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(command, "version", missing)
    assert provenance.versions()["spice-pl"] == "not installed"

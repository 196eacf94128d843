"""Settings, names and files from people one does not trust: refused in words, and nothing runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tests.conftest import make_job

from spice_pl.callbacks.checkpoints import read_checkpoint
from spice_pl.errors import UsageError
from spice_pl.job.checks import stamp
from spice_pl.job.plan import plan
from spice_pl.job.settings import build, masked, masked_override
from spice_pl.runs.folder import RunFolder

PLAIN = OmegaConf.create({"allow_targets": []})


def attacks(trace: Path) -> dict[str, Any]:
    """Settings that would make the file `trace`, or load code, were they followed."""
    touch = f"touch {trace}"
    inner = {"_target_": "os.system", "_args_": [touch]}
    sequential = {"_target_": "torch.nn.Sequential"}
    return {
        "plain": inner,
        "positional": {"_target_": "subprocess.getoutput", "_args_": [touch]},
        "partial": inner | {"_partial_": True},
        "nested": {"_target_": "torch.nn.Linear", "in_features": inner, "out_features": 1},
        "in a list": sequential | {"_args_": [inner]},
        "in lists of lists": sequential | {"_args_": [[{"deep": [inner]}]]},
        "among plain values": {"a": {"b": [1, {"c": inner}]}},
        "not recursive": sequential | {"_recursive_": False, "_args_": [inner]},
        "interpolated": OmegaConf.create(
            {"what": "os.system", "how": {"_target_": "${what}", "_args_": [touch]}}
        ),
        "Hydra's own call": {"_target_": "hydra.utils.call", "_args_": [inner]},
        "Hydra's instantiate": {"_target_": "hydra.utils.instantiate", "_args_": [inner]},
        "Hydra's get_method": {"_target_": "hydra.utils.get_method", "path": "os.system"},
        "hub": {
            "_target_": "torch.hub.load",
            "repo_or_dir": str(trace.parent),
            "model": "evil",
            "source": "local",
        },
        "pickle": {"_target_": "torch.load", "f": str(trace), "weights_only": False},
        "compiler": {"_target_": "torch.utils.cpp_extension.load", "name": "x", "sources": []},
        "compiler in line": {
            "_target_": "torch.utils.cpp_extension.load_inline",
            "name": "x",
            "cpp_sources": "",
        },
        "script": {"_target_": "torch.jit.load", "f": str(trace)},
        "library": {"_target_": "torch.ops.load_library", "path": str(trace)},
        "through torch": {"_target_": "torch.os.system", "command": touch},
        "through an allowed module": {"_target_": "torch.nn.functional.torch.os.mkdir"},
        "through our module": {"_target_": "spice_pl.data.store.os.mkdir", "path": str(trace)},
        "our own launcher": {
            "_target_": "spice_pl.system.ranks.launch_ranks",
            "num_ranks": 1,
            "job": "",
        },
        "our own build": {"_target_": "spice_pl.job.settings.build", "cfg": {}, "value": inner},
        "a method": {"_target_": "spice_pl.data.sources.folder.Path.touch", "_args_": [str(trace)]},
        "an instance's method": {"_target_": "spice_pl.data.store.logger.error", "msg": "x"},
        "a method of an allowed class": {"_target_": "torch.nn.Module.train", "self": None},
        "checkpoint": {
            "_target_": "spice_pl.stages.moco.MoCoModule.load_from_checkpoint",
            "checkpoint_path": str(trace),
        },
        "timm's pickles": {
            "_target_": "timm.models.load_state_dict",
            "checkpoint_path": str(trace),
            "weights_only": False,
        },
        "joblib": {"_target_": "joblib.load", "filename": str(trace)},
        "eval": {"_target_": "builtins.eval", "_args_": ["1"]},
        "a relative name": {"_target_": ".os.system", "_args_": [touch]},
        "a prefix": {"_target_": "torch.nnx.Linear", "_args_": [touch]},
        "a private function": {"_target_": "spice_pl.data.datamodule._whole", "batch": 1},
    }


NAMES = list(attacks(Path("/nowhere")))


@pytest.mark.parametrize("name", NAMES)
def test_targets_that_could_run_code_are_refused(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "hubconf.py").write_text(f"open({str(trace)!r}, 'w')\ndef evil(): pass\n")
    message = r"_target_ .* lies outside .*add allow_targets=|_recursive_ is not a key"
    with pytest.raises(UsageError, match=message):
        build(PLAIN, attacks(trace)[name])
    assert not trace.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3},
        {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.ReLU"}]},
        {"_target_": "torchvision.models.resnet18", "weights": None},
        {"_target_": "spice_pl.nn.resnet.ResNet", "blocks": [1], "widths": [4]},
    ],
    ids=lambda settings: settings["_target_"],
)
def test_networks_are_built(settings: dict[str, Any]) -> None:
    assert isinstance(build(PLAIN, settings), torch.nn.Module)


def test_what_a_person_allows_is_built() -> None:
    allowing = OmegaConf.create({"allow_targets": ["fractions"]})
    made = build(allowing, {"_target_": "fractions.Fraction", "_args_": [1, 2]})
    assert made == 0.5


# Names


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", ".", ".hidden", "a/b", "a\\b", "a\nb"])
@pytest.mark.parametrize("key", ["run", "dataset.name"])
def test_names_that_leave_the_folder_are_refused(key: str, name: str, tmp_path: Path) -> None:
    job = make_job(f"runs_dir={tmp_path / 'runs'}")
    if key == "run":
        job.cfg.run = name
    else:
        job.cfg.dataset.name = name
    with pytest.raises(UsageError, match=f"{key}=.* is not a valid folder name"):
        job.folder("moco")


def test_names_of_a_sweep_stay_in_their_folder(tmp_path: Path) -> None:
    job = make_job("moco.title=../../../x", f"runs_dir={tmp_path}", sweep=True)
    assert job.folder("moco").path.parent == tmp_path / "digits" / "moco"


# Secrets


def test_secrets_are_written_nowhere(tmp_path: Path) -> None:
    job = make_job(
        *("+logger.wandb.api_key=abc123secret", "+dataset.access_token=abc123secret"),
        *("+moco.module.password=abc123secret", f"runs_dir={tmp_path}"),
        "+note={api-key: abc123secret, pwd: 4815162342, n: 1}",
        "+source=https://me:abc123secret@host",
    )
    stamp(plan(job)[0], keep=False)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 2
    for path in written:
        assert "abc123secret" not in path.read_text()
        assert "4815162342" not in path.read_text()
        assert "***" in path.read_text()
    assert "abc123secret" not in job.command()
    assert job.cfg.logger.wandb.api_key == "abc123secret"  # what uses it still has it


@pytest.mark.parametrize(
    "name",
    [
        *("token", "authtoken", "access_token", "hf.token", "tokens", "secret", "client_secret"),
        *("password", "passwd", "db_pwd", "pwd", "passphrase", "smtp_pass", "credentials"),
        *("api_key", "api-key", "apikey", "apiKey", "WANDB_API_KEY", "secret_key", "private_key"),
        *("aws_secret_access_key", "auth_key", "basic_auth", "storage.password"),
    ],
)
def test_values_of_secrets_are_masked(name: str) -> None:
    given = {name: "s3cr3t", "n": 1, "deep": [{name: {"user": "s3cr3t", "pin": 4815}}]}
    hidden = {"user": "***", "pin": "***"}
    assert masked("", given) == {name: "***", "n": 1, "deep": [{name: hidden}]}
    assert masked("", {name: 48151623}) == {name: "***"}
    assert masked("", {name: None}) == {name: None}
    for value in ("48151623", "'a b'", "[a,b]", "choice(a,b)", "a=b"):
        assert masked_override(f"+note.{name}={value}") == f"+note.{name}=***"
    for value in (
        f"{{{name}: 4815, n: 1}}",
        f"{{a: [{{'{name}': x}}]}}",
        f'{{"{name}":x}},{{n:2}}',
    ):
        assert masked_override(f"+note={value}") == "+note=***"


def test_no_setting_of_ours_is_masked() -> None:
    settings = OmegaConf.to_container(make_job("logger=wandb").cfg, resolve=True)
    assert masked("", settings) == settings
    for text in ("moco.module.lr=0.1", "~trainer", "run=key", "a='x:y'", "b=http://h:80/a@2x.png"):
        assert masked_override(text) == text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:s3cr3t@host/x", "https://me:***@host/x"),
        ("postgresql+psycopg://me:12345@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("redis://:p@ss/w@host", "redis://:***@host"),
        ("see https://me:s3cr3t@host", "see https://me:***@host"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("https://me@host", "https://me@host"),
        ("C:/photos/a@b", "C:/photos/a@b"),
    ],
)
def test_passwords_in_urls_are_masked(url: str, shown: str) -> None:
    assert masked("url", [url]) == [shown]
    assert masked_override(f"dataset.url='{url}'") == f"dataset.url='{shown}'"


# Files


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


def test_a_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "evil": Evil(trace)}, path)
    with pytest.raises(UsageError, match=r"last\.ckpt is damaged"):
        read_checkpoint(path)
    assert not trace.exists()


def test_an_array_with_code_is_refused(tmp_path: Path) -> None:

    trace = tmp_path / "trace"
    np.save(tmp_path / "features.npy", np.array([[Evil(trace)]], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"features\.npy is damaged"):
        _ = RunFolder(tmp_path).features
    assert not trace.exists()

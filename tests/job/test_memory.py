"""Memory of a training step: estimated before it starts, and refused where it cannot fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Finished
from tests.process import ROOT
from tests.stages.small import MEAN, STD, backbone, image_set
from torch import nn

from spice_pl.data.crop_views import PatchView
from spice_pl.data.datamodule import Stream
from spice_pl.errors import UsageError
from spice_pl.job import memory
from spice_pl.job.memory import saved_bytes
from spice_pl.job.run import run_stages
from spice_pl.stages.empssl import EmpSSLModule
from spice_pl.system.memory import free_memory


def test_what_backward_needs_is_counted_by_hand() -> None:
    convolution = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    # Convolution keeps its input, ReLU its output; the second one has what the first one kept.
    network = nn.Sequential(convolution, nn.ReLU(), nn.Conv2d(5, 2, 1))
    assert saved_bytes(network, (4, 3, 8, 8)) == 4 * 4 * 64 * (3 + 5)
    assert saved_bytes(network, (8, 3, 8, 8)) == 8 * 4 * 64 * (3 + 5)


def test_the_network_stays_as_it_is() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.random.get_rng_state()
    assert saved_bytes(network, (100_000, 3, 224, 224)) > 10**11
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_network_that_looks_at_values_has_no_estimate() -> None:
    class Looks(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images * float(images.mean())

    assert saved_bytes(Looks(), (2, 3, 8, 8)) == 0


def test_all_patches_of_a_view_are_counted_at_their_own_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One image of 8 pixels: 192 bytes, and per patch float32 pixels and what is kept for it."""
    module, free = EmpSSLModule(backbone()), 0
    kept = saved_bytes(module.encoder, (4, 3, 8, 8)) // 4
    views = {str(side): PatchView(MEAN, STD, num_patches=5, side=side) for side in (4, 8)}
    need = 192 + 5 * (4 * 192 + kept)  # of the larger one: they are shown in turn
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    streams = {"images": Stream(views, 10, turns=["4", "8"])}
    free = 10 * need
    memory.check_memory(module, streams, image_set(), 1)
    free = 10 * need - 1
    with pytest.raises(UsageError, match="empssl: a training step takes at least"):
        memory.check_memory(module, streams, image_set(), 1)


@pytest.mark.parametrize("stage", ["moco", "fixmatch"])
def test_a_batch_that_cannot_fit_is_refused_before_it_is_killed(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    key = {"moco": "images", "fixmatch": "unlabelled"}[stage]
    size = {"moco": 30, "fixmatch": 10}[stage]
    monkeypatch.setattr(memory, "free_memory", lambda: 20_000)
    message = (
        rf"{stage}: a training step takes at least \d+ kB of memory and 20 kB are free; lower "
        rf"{stage}\.streams\.{key}\.batch_size={size}, for example to \d, or dataset\.image_size=8"
    )
    with pytest.raises(UsageError, match=message):
        run_stages(finished.job(f"stage={stage}", "overwrite=true"))
    monkeypatch.setattr(memory, "free_memory", lambda: None)  # unknown
    run_stages(finished.job(f"stage={stage}", "overwrite=true"))


@pytest.mark.parametrize(("precision", "share"), [("32-true", 1.0), ("bf16-mixed", 0.5)])
def test_a_batch_that_cannot_fit_on_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, precision: str, share: float
) -> None:
    """A device of 100 MB of which 60 are taken, 20 of them kept by torch and not in use.

    Per image: 8 x 8 pixels of 3 channels, two views of 4 bytes per number, and the input and output
    of one convolution with 3 and ReLU with 5 channels, which backward needs.
    """
    found = {"mem_get_info": (40_000_000, 100_000_000), "memory_reserved": 30_000_000}
    for name, value in {**found, "memory_allocated": 10_000_000}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
    module = SimpleNamespace(name="mine", trains_encoder=True, encoder=network)
    images = SimpleNamespace(images=np.zeros((1, 3, 8, 8), np.uint8))
    device = torch.device("cuda:0")
    views: Any = {"a": None, "b": None}
    per_image = 3 * 64 + int(share * (2 * 4 * 3 * 64 + 4 * 64 * (3 + 5)))
    fits = 60_000_000 // per_image
    for size in (fits, fits + 1, 10 * fits):
        streams = {"images": Stream(views, batch_size=size)}
        given: Any = (module, streams, images, 1, device, precision)
        if size == fits:
            memory.check_memory(*given)
            continue
        with pytest.raises(UsageError) as raised:
            memory.check_memory(*given)
        said = f"{size * per_image / 1e6:,.1f} MB of memory of cuda:0 and 60.0 MB are free"
        assert f"mine: a training step takes at least {said}" in str(raised.value)
        assert f"batch_size={size}, for example to {fits // 2}, or" in str(raised.value)


def test_the_estimate_is_a_lower_bound() -> None:
    """A process that trains takes at least what is estimated."""
    code = (
        "import torch\n"
        "from spice_pl.job.memory import saved_bytes\n"
        "from spice_pl.nn.resnet import ResNet\n"
        "net = ResNet(blocks=[1, 1], widths=[32, 64], stem='conv3')\n"
        "def rss():\n"  # the peak of this process; ru_maxrss may be that of its parent
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) * 1024 for line in lines if 'VmHWM' in line)\n"
        "net(torch.zeros(2, 3, 32, 32)).sum().backward()\n"
        "before = rss()\n"
        "net(torch.zeros(256, 3, 32, 32)).sum().backward()\n"
        "print(saved_bytes(net, (256, 3, 32, 32)), rss() - before)\n"
    )
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    estimated, taken = map(int, done.stdout.split())
    assert 0.4 * taken < estimated <= taken


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from spice_pl.system import memory as system

    monkeypatch.setattr(system, "GROUP", tmp_path)
    whole = free_memory()
    assert whole is not None
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory() == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 2000  # type: ignore[operator]

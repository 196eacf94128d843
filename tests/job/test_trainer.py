"""Devices, strategy and precision: what the settings mean on machines with and without GPUs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy
from tests.conftest import compose
from torch import nn

from spice_pl.errors import UsageError
from spice_pl.job.stage import check_deterministic
from spice_pl.job.trainer import auto_precision, num_ranks, trainer_settings

Gpus = Callable[..., None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Pretend that the machine has GPUs."""

    def make(count: int, *, capability: tuple[int, int] = (9, 0)) -> None:
        native = capability >= (8, 0)
        for name, value in {
            "is_available": count > 0,
            "device_count": count,
            "is_bf16_supported": native,
            "get_device_capability": capability,
            "get_device_name": "a GPU",
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, found=value, **__: found)
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)

    return make


def settings(*overrides: str) -> dict[str, Any]:
    return dict(compose(*overrides).trainer)


@pytest.mark.parametrize(
    ("override", "ranks", "devices"),
    [
        ("1", 1, 1),
        ("2", 2, 2),
        ("-1", 4, -1),
        ("auto", 4, -1),
        ("[0,1]", 2, [0, 1]),
        ("[3]", 1, [3]),
        ("'0,1'", 2, [0, 1]),
        ("'2,'", 1, [2]),
    ],
)
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_number_or_list_of_devices_means_as_many_processes(
    override: str, ranks: int, devices: object, strategy: str, gpus: Gpus
) -> None:
    gpus(4)
    overrides = (f"trainer.devices={override}", f"trainer.strategy={strategy}")
    assert num_ranks(compose(*overrides)) == ranks
    made = trainer_settings(settings(*overrides))
    assert made["devices"] == devices
    distributed = isinstance(made["strategy"], DDPStrategy)
    assert distributed is (ranks > 1 or strategy == "ddp")
    if distributed:
        given = made["strategy"]._ddp_kwargs
        assert given.pop("find_unused_parameters") is False
        assert given in ({"broadcast_buffers": False}, {"forward_sync_buffers": False})
    assert made["benchmark"] is True
    assert not {"data", "compile"} & made.keys()


@pytest.mark.parametrize(
    ("count", "overrides", "message"),
    [
        (2, ["trainer.devices=4"], "asks for GPU 3 and this machine has 2, numbered from 0"),
        (2, ["trainer.devices=[0,2]"], "asks for GPU 2 and this machine has 2"),
        (2, ["trainer.devices=0"], "trainer.devices=0 is neither a number of devices"),
        (2, ["trainer.devices=[0,0]"], "nor a list of GPUs such as"),
        (2, ["trainer.devices=many"], "trainer.devices=many is neither"),
        (2, ["trainer.devices=[]"], "is neither a number of devices"),
        (2, ["trainer.strategy=fsdp"], "trainer.strategy=fsdp is none of auto, ddp"),
        (2, ["trainer.strategy=ddp_spawn"], "starts one process per device itself"),
        (0, ["trainer.devices=2"], "trainer.devices=2 finds no GPU; use trainer=ddp_cpu"),
        (0, ["trainer=ddp"], "trainer.accelerator=gpu finds no GPU; use trainer=auto"),
    ],
)
def test_what_a_machine_does_not_have_is_one_message(
    count: int, overrides: list[str], message: str, gpus: Gpus
) -> None:
    gpus(count)
    with pytest.raises(UsageError) as error:
        num_ranks(compose(*overrides))
    assert message in str(error.value)


def test_without_a_gpu_all_devices_are_one_processor(gpus: Gpus) -> None:
    gpus(0)
    assert num_ranks(compose("trainer.devices=-1")) == 1
    made = trainer_settings(settings("trainer.devices=auto"))
    assert (made["devices"], made["strategy"]) == (1, "auto")
    assert "benchmark" not in made
    assert num_ranks(compose("trainer=ddp_cpu", "trainer.devices=3")) == 3


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((9, 0), "bf16-mixed"), ((7, 5), "16-mixed"), ((7, 0), "16-mixed"), ((6, 1), "32-true")],
)
def test_precision_is_what_the_gpu_multiplies_in(
    capability: tuple[int, int], precision: str, gpus: Gpus
) -> None:
    gpus(1, capability=capability)
    assert auto_precision("auto") == precision


@pytest.mark.parametrize(
    ("devices", "precision", "said"),
    [("2", "16-mixed", True), ("[0]", "bf16-mixed", False), ("[0,2]", "bf16-mixed", False)],
)
def test_different_gpus_share_a_precision_that_all_have_and_it_is_said(
    devices: str,
    precision: str,
    said: bool,
    gpus: Gpus,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpus(3)
    capabilities, names = ((9, 0), (7, 5), (9, 0)), ("H100", "T4", "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda each=0: capabilities[each])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda each=0: names[each])
    made = trainer_settings(settings(f"trainer.devices={devices}"))
    assert made["precision"] == precision
    assert ("the GPUs differ (H100, T4)" in caplog.text) is said


@pytest.mark.parametrize(
    ("count", "accelerator", "expected"), [(1, "auto", ["high"]), (0, "auto", []), (1, "cpu", [])]
)
def test_products_use_tf32_on_a_gpu_only(
    count: int, accelerator: str, expected: list[str], gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(count)
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    found = trainer_settings(settings(f"trainer.accelerator={accelerator}"))
    assert found["accelerator"] == ("cuda" if expected else "cpu")  # never Apple's GPU
    assert asked == expected


def test_sync_batchnorm_needs_gpus_and_deterministic_turns_the_trial_of_algorithms_off(
    gpus: Gpus,
) -> None:
    gpus(0)
    with pytest.raises(UsageError, match=r"trainer\.sync_batchnorm=true needs GPUs"):
        trainer_settings(settings("trainer.sync_batchnorm=true"))
    gpus(2)
    made = trainer_settings(settings("trainer.sync_batchnorm=true", "trainer.deterministic=true"))
    assert made["sync_batchnorm"] is True
    assert made["benchmark"] is False


def test_deterministic_refuses_layers_without_a_deterministic_gradient() -> None:
    def stage(pool: nn.Module, *, trained: bool = True) -> Any:
        encoder = nn.Sequential(nn.Conv2d(3, 4, 3), pool).requires_grad_(trained)
        return SimpleNamespace(encoder=encoder)

    with pytest.raises(UsageError, match=r"=true: 1 \(AdaptiveAvgPool2d\) .*=false or"):
        check_deterministic(stage(nn.AdaptiveAvgPool2d(7)))
    check_deterministic(stage(nn.AdaptiveAvgPool2d((1, 1))))  # a mean
    check_deterministic(stage(nn.AdaptiveAvgPool2d(7), trained=False))  # no gradient at all

import pytest
import torch
from torch import nn

from spice_pl.nn.optimizers import adam_settings, keep_rates, sgd_settings

CPU, OTHER = torch.device("cpu"), torch.device("meta")


def test_a_processor_keeps_its_kernels_and_others_get_fused_ones() -> None:
    assert sgd_settings(CPU) == {"foreach": True}
    assert adam_settings(CPU) == {}
    assert adam_settings(CPU, fused=True) == {"fused": True}
    weights = [nn.Parameter(torch.ones(2))]
    assert torch.optim.SGD(weights, lr=0.1, **sgd_settings(OTHER)).defaults["fused"]
    adam = torch.optim.Adam(weights, lr=0.1, **adam_settings(OTHER)).defaults
    assert adam["fused"]
    assert adam["capturable"]


def test_a_schedule_writes_into_the_tensor_of_a_rate() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.4, foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    group = optimizer.param_groups[0]
    keep_rates(optimizer, OTHER)
    assert group["lr"].device == OTHER
    kept = group["lr"]
    keep_rates(optimizer, OTHER)
    assert group["lr"] is kept
    group["lr"] = rate = torch.tensor(0.4)
    optimizer.step()
    schedule.step()
    assert group["lr"] is rate
    assert float(rate) == pytest.approx(0.2)


def test_a_rate_from_a_checkpoint_of_a_gpu_is_a_number_on_a_processor() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.4)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    keep_rates(optimizer, CPU)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert isinstance(optimizer.param_groups[0]["lr"], float)

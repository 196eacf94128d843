"""Training steps are traced whole: no part of them needs Python or a value of the device.

The backend "eager" runs what was traced as it is; `fullgraph` raises where tracing breaks.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.stages.small import K, backbone
from torch import Tensor

from spice_pl.data.datamodule import Views
from spice_pl.functional.losses import double_softmax_cross_entropy_per_head
from spice_pl.functional.selectors import reliable_labels
from spice_pl.nn.heads import ParallelHeads
from spice_pl.nn.thresholds import (
    ClusMatchThreshold,
    FixedThreshold,
    FlexMatchThreshold,
    FreeMatchThreshold,
    SoftMatchThreshold,
    Threshold,
)
from spice_pl.stages.base import Stage
from spice_pl.stages.cc import ContrastiveClusteringModule
from spice_pl.stages.cdc import CdcModule
from spice_pl.stages.dcboost import DCBoostModule
from spice_pl.stages.empssl import EmpSSLModule
from spice_pl.stages.fastsiam import FastSiamModule
from spice_pl.stages.moco import MoCoModule
from spice_pl.stages.propos import ProPosModule
from spice_pl.stages.scan import ScanModule
from spice_pl.stages.selflabel import SelfLabelModule
from spice_pl.stages.semi import SemiSupervisedModule
from spice_pl.stages.simclr import SimCLRModule
from spice_pl.stages.vicreg import VICRegModule

B, S, N = 6, 8, 40
OTHERS: tuple[str, ...] = (
    "simclr",
    "empssl",
    "vicreg",
    "fastsiam",
    "cc",
    "propos",
    "cdc",
    "dcboost",
)
OTHERS += ("scan", "selflabel")
THRESHOLDS: dict[str, Threshold] = {
    "fixmatch": FixedThreshold(0.2),
    "flexmatch": FlexMatchThreshold(K),
    "freematch": FreeMatchThreshold(K),
    "softmatch": SoftMatchThreshold(K),
    "clusmatch": ClusMatchThreshold(K),
}


def views(*names: str, seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.rand(B, 3, S, S, generator=generator) for name in names}
    return Views(torch.arange(B), made)


def stage_and_batch(name: str) -> tuple[Stage, Any]:
    if name == "moco":
        return MoCoModule(backbone(), projection_dim=4, queue_size=12), views("query", "key")
    if name == "moco in groups":
        grouped = MoCoModule(backbone(), projection_dim=4, queue_size=12, bn_groups=2)
        grouped._order = torch.arange(B).flip(0), torch.arange(B).flip(0)
        return grouped, views("query", "key")
    if name == "simclr":
        return SimCLRModule(backbone(), projection_dim=4, hidden_dim=8), views("query", "key")
    if name == "empssl":
        patches = torch.rand(B, 3, 3, S, S, generator=torch.Generator().manual_seed(0))
        batch = Views(torch.arange(B), {"patches": patches})
        return EmpSSLModule(backbone(), projection_dim=4, hidden_dim=8), batch
    if name == "vicreg":
        return VICRegModule(backbone(), projection_dim=4, hidden_dim=8), views("query", "key")
    if name == "fastsiam":
        return FastSiamModule(backbone(), projection_dim=4, hidden_dim=8), views("a", "b", "c")
    if name == "cc":
        return ContrastiveClusteringModule(backbone(), K, projection_dim=4), views("query", "key")
    if name == "propos":
        module = ProPosModule(backbone(), K, projection_dim=4, hidden_dim=8, warmup_epochs=0)
        module.register_buffer("clusters", torch.arange(N) % K)
        return module, views("query", "key")
    if name == "cdc":
        return CdcModule(backbone(), K, hidden_dim=8), views("weak", "strong")
    if name == "dcboost":
        boost = DCBoostModule(backbone(), K, hidden_dim=8, warmup_epochs=0)
        boost.register_buffer("clusters", torch.arange(N) % K)
        return boost, views("query", "key")
    if name == "scan":
        return ScanModule(backbone(), K), views("strong")
    if name == "selflabel":
        return SelfLabelModule(backbone(), K, confidence=0.1), views("plain", "strong")
    semi = SemiSupervisedModule(
        backbone(), K, selector=reliable_labels, threshold=THRESHOLDS[name], init="scratch"
    )
    semi.pseudo_labels = torch.arange(N) % K
    semi.threshold.begin(N)
    return semi, {"labelled": views("weak"), "unlabelled": views("weak", "strong", seed=1)}


@pytest.mark.parametrize("name", ["moco", "moco in groups", *OTHERS, *THRESHOLDS])
def test_a_training_step_is_traced_whole(name: str) -> None:
    module, batch = stage_and_batch(name)
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=1, global_rank=0, training=True, max_epochs=1, current_epoch=0
    )
    state = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():  # moving averages are paired at the first step, outside of the trace
        expected = module.training_step(batch, 0)
    module.load_state_dict(state)
    module.epoch_sums = {}
    torch._dynamo.reset()
    step = torch.compile(module.training_step, backend="eager", fullgraph=True)
    loss: Any = step(batch, 0)
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert module.epoch_sums


def test_a_step_of_the_heads_is_traced_whole() -> None:
    heads, generator = ParallelHeads(8, 8, K, 2, seed=0), torch.Generator().manual_seed(0)
    features = torch.randn(2, 30, 8, generator=generator)
    label = torch.arange(30) % K

    def step(features: Tensor) -> Tensor:
        probs = heads.logits(features).softmax(dim=-1)
        return double_softmax_cross_entropy_per_head(probs, label).sum()

    torch._dynamo.reset()
    whole = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(features), step(features))

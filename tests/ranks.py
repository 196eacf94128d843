"""Stages for test_ddp, named by `_target_`: they save each rank's state, stop or fail."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spice_pl.callbacks import checkpoints
from spice_pl.callbacks.checkpoints import Checkpoints
from spice_pl.data.datamodule import Views
from spice_pl.stages.base import Stage
from spice_pl.stages.cc import ContrastiveClusteringModule
from spice_pl.stages.cdc import CdcModule
from spice_pl.stages.dcboost import DCBoostModule
from spice_pl.stages.empssl import EmpSSLModule
from spice_pl.stages.fastsiam import FastSiamModule
from spice_pl.stages.fixmatch import ReliableFixMatchModule
from spice_pl.stages.moco import MoCoModule
from spice_pl.stages.propos import ProPosModule
from spice_pl.stages.proto import ProtoHeadModule
from spice_pl.stages.semi import SemiSupervisedModule
from spice_pl.stages.simclr import SimCLRModule
from spice_pl.stages.temi import TemiModule
from spice_pl.stages.turtle import TurtleModule
from spice_pl.stages.vicreg import VICRegModule
from spice_pl.system.ranks import PARENT


def dump(module: Stage, stage: str, **more: Tensor) -> None:
    """Write a rank's state to $RANK_DUMPS/<stage>-<ranks>-<rank>.pt."""
    ranks, rank = module.trainer.world_size, module.trainer.global_rank
    file = Path(os.environ["RANK_DUMPS"], f"{stage}-{ranks}-{rank}.pt")
    torch.save(dict(module.state_dict()) | more, file)


class DumpingMoCo(MoCoModule):
    """Stage 1."""

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "moco")


def without_batch_norm(module: nn.Module) -> None:
    """Take BatchNorm out of a module: its statistics differ between ranks."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, nn.Identity())


class DumpingSimCLR(SimCLRModule):
    """Stage 1 without BatchNorm."""

    def __init__(self, backbone: nn.Module, **settings: Any) -> None:
        super().__init__(backbone, **settings)
        without_batch_norm(self)

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "simclr")


class DumpingEmpSSL(EmpSSLModule):
    """Stage 1 without BatchNorm."""

    def __init__(self, backbone: nn.Module, **settings: Any) -> None:
        super().__init__(backbone, **settings)
        without_batch_norm(self)

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "empssl")


class DumpingVICReg(VICRegModule):
    """Stage 1 without BatchNorm."""

    def __init__(self, backbone: nn.Module, **settings: Any) -> None:
        super().__init__(backbone, **settings)
        without_batch_norm(self)

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "vicreg")


class DumpingFastSiam(FastSiamModule):
    """Stage 1 without BatchNorm."""

    def __init__(self, backbone: nn.Module, **settings: Any) -> None:
        super().__init__(backbone, **settings)
        without_batch_norm(self)

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "fastsiam")


class DumpingCC(ContrastiveClusteringModule):
    """Contrastive clustering without BatchNorm."""

    def __init__(self, backbone: nn.Module, num_clusters: int, **settings: Any) -> None:
        super().__init__(backbone, num_clusters, **settings)
        without_batch_norm(self)

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "cc")


class DumpingProPos(ProPosModule):
    """ProPos without BatchNorm."""

    def __init__(self, backbone: nn.Module, num_clusters: int, **settings: Any) -> None:
        super().__init__(backbone, num_clusters, **settings)
        without_batch_norm(self)

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "propos")


class DumpingCdc(CdcModule):
    """CDC without BatchNorm."""

    def __init__(self, backbone: nn.Module, num_clusters: int, **settings: Any) -> None:
        super().__init__(backbone, num_clusters, **settings)
        without_batch_norm(self)

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "cdc")


class DumpingDCBoost(DCBoostModule):
    """DCBoost without BatchNorm."""

    def __init__(self, backbone: nn.Module, num_clusters: int, **settings: Any) -> None:
        super().__init__(backbone, num_clusters, **settings)
        without_batch_norm(self)

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "dcboost")


class DumpingProto(ProtoHeadModule):
    """Stage 2."""

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "proto")


class DumpingFixMatch(ReliableFixMatchModule):
    """Stage 3."""

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "fixmatch", reliable=self.reliable_index, pseudo_labels=self.pseudo_labels)


class DumpingSemi(SemiSupervisedModule):
    """ClusMatch."""

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "clusmatch", reliable=self.reliable_index, pseudo_labels=self.pseudo_labels)


class DumpingTemi(TemiModule):
    """TEMI."""

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "temi")


class DumpingTurtle(TurtleModule):
    """TURTLE."""

    def on_train_end(self) -> None:
        super().on_train_end()
        dump(self, "turtle")


class Flat(nn.Module):
    """A backbone without BatchNorm, whose statistics differ between ranks."""

    def __init__(self, num_pixels: int, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.layer = nn.Linear(num_pixels, num_features)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layer(images.flatten(1)).relu()
        return features


class StoppingMoCo(MoCoModule):
    """Stage 1 that has its job told to stop in its first batch, the first time it runs."""

    def on_fit_start(self) -> None:
        checkpoints.MOST_BATCHES = 1  # the ranks agree after every batch, however short it is
        super().on_fit_start()

    def training_step(self, batch: Views, batch_idx: int) -> Any:
        marker = Path(os.environ["RANK_DUMPS"], "stopped")
        if self.trainer.global_rank == 0 and not marker.exists():
            marker.touch()
            os.kill(int(os.environ[PARENT]), signal.SIGTERM)  # which passes it on to its ranks
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            interrupts = next(c for c in callbacks if isinstance(c, Checkpoints)).interrupts
            for _ in range(600):
                if interrupts.asked is not None:
                    break
                time.sleep(0.1)
        return super().training_step(batch, batch_idx)


class BrokenMoCo(MoCoModule):
    """Stage 1 that fails on the second rank, in its second batch."""

    def training_step(self, batch: Views, batch_idx: int) -> Any:
        if self.trainer.global_rank == 1 and batch_idx == 1:
            raise OSError("the second device is broken")
        return super().training_step(batch, batch_idx)

"""Networks: backbones with `num_features`, cluster heads, the queue of negatives, thresholds."""

from spice_pl.nn.heads import ClusterHead, ParallelHeads
from spice_pl.nn.queue import Queue
from spice_pl.nn.resnet import ResNet
from spice_pl.nn.wide_resnet import WideResNet

__all__ = ["ClusterHead", "ParallelHeads", "Queue", "ResNet", "WideResNet"]

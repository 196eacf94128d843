from __future__ import annotations

from pathlib import Path

import pytest
from tests.stages.small import (
    PLAIN,
    STRONG,
    D,
    K,
    backbone,
    fit,
    image_set,
    same,
    state,
    stream,
    write_upstream,
)

from spice_pl.errors import UsageError
from spice_pl.nn.heads import ClusterHead, LinearHead
from spice_pl.stages.selflabel import SelfLabelModule

STREAMS = {"images": stream(30, plain=PLAIN, strong=STRONG)}


@pytest.mark.parametrize("head", [LinearHead(D, K), ClusterHead(D, 5, K)])
def test_starts_from_encoder_and_head_of_whatever_kind(
    tmp_path: Path, head: LinearHead | ClusterHead
) -> None:
    upstream = write_upstream(tmp_path, backbone(0), head=head)
    module = SelfLabelModule(backbone(1), K, confidence=0.3)
    streams = module.prepare(image_set(), upstream, STREAMS)
    assert same(state(module.encoder), state(backbone(0)))
    assert same(state(module.head), state(head))
    fit(module, streams, epochs=1)
    assert not same(state(module.head), state(head))


def test_head_of_another_number_of_clusters_is_refused(tmp_path: Path) -> None:
    upstream = write_upstream(tmp_path, backbone(0), head=LinearHead(D, K + 1))
    with pytest.raises(UsageError, match=r"weight is \(4, 8\), needed \(3, 8\)"):
        SelfLabelModule(backbone(1), K).prepare(image_set(), upstream, STREAMS)


def test_head_of_another_kind_and_number_of_clusters_is_refused(tmp_path: Path) -> None:
    upstream = write_upstream(tmp_path, backbone(0), head=ClusterHead(D, 5, K + 1))
    with pytest.raises(UsageError, match="holds weights of another architecture"):
        SelfLabelModule(backbone(1), K).prepare(image_set(), upstream, STREAMS)

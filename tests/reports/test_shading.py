import base64
import io

import numpy as np
import pytest
from PIL import Image
from tests.reports.test_page import Page, report

from spice_pl.reports.page import render_report, shown_wall
from spice_pl.reports.shading import TILE_PIXELS, Attention, shade, where


def looked(num_images: int = 60, num_clusters: int = 4) -> Attention:
    """Attention maps of the prototypes of `report`: each looks at the upper right."""
    data = report(num_images, num_clusters)
    wall = shown_wall(data.confidence, data.agreement, data.clusters, num_clusters)
    index = np.concatenate([chosen.prototypes for chosen in wall.clusters]).astype(np.int64)
    maps = np.zeros((len(index), 4, 4), np.uint8)
    maps[:, 0, 3] = 255
    return Attention(index, maps)


def test_shade_is_clear_where_it_looks_and_dark_elsewhere() -> None:
    maps = np.zeros((2, 2, 2), np.uint8)
    maps[0, :, 0] = maps[1, :, 1] = 255
    kind, _, text = shade(maps).partition(",")
    assert kind == "data:image/png;base64"
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGBA"))
    assert sheet.shape == (TILE_PIXELS, 2 * TILE_PIXELS, 4)
    assert not sheet[..., :3].any()  # black
    assert (sheet[:, [0, -1], 3] == 0).all()
    assert (sheet[:, [TILE_PIXELS - 1, TILE_PIXELS], 3] == round(0.8 * 255)).all()


@pytest.mark.parametrize(
    ("cell", "words"),
    [((0, 0), "the upper left"), ((4, 2), "the lower part"), ((2, 4), "the right part"),
     ((2, 2), "the centre")],
)  # fmt: skip
def test_a_map_in_words(cell: tuple[int, int], words: str) -> None:
    attention = np.zeros((5, 5), np.uint8)
    attention[cell] = 255
    assert where(attention) == words


def test_prototypes_can_be_looked_at_and_nothing_else() -> None:
    text, attention = render_report(report(attention=looked())), looked()
    tiles = [a for _, a in Page(text).tags if "data-look" in a]
    assert sorted(int(a["data-i"] or -1) for a in tiles) == sorted(attention.index.tolist())
    assert {a["data-look"] for a in tiles} == {"the upper right"}
    assert all("looks at the upper right" in (a["title"] or "") for a in tiles)
    switches = [a for _, a in Page(text).tags if a.get("id") == "look"]
    assert [(a["type"], a["aria-describedby"]) for a in switches] == [("checkbox", "look-hint")]
    assert len(text) - len(render_report(report())) < 60 * 400  # bytes per map


def test_the_page_says_that_a_backbone_has_no_map() -> None:
    none = Attention(np.zeros(0, np.int64), np.zeros((0, 1, 1), np.uint8))
    text = render_report(report(attention=none))
    assert "this backbone has no feature map" in text
    assert 'id="look"' not in text
    assert "data-look=" not in text
    assert 'id="look-hint"' not in render_report(report())  # not computed


def test_maps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one for each of 3 images; got float64 \(2, 4, 4\)"):
        Attention(np.arange(3), np.zeros((2, 4, 4)))  # type: ignore[arg-type]

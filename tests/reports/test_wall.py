import base64
import io

import numpy as np
import pytest
from PIL import Image

from spice_pl.reports.wall import atlas, choose_wall, sprite


def test_choice_by_hand() -> None:
    # Cluster 0 holds images 0-8, cluster 1 nothing, cluster 2 image 9.
    confidence = np.array([0.1, 0.7, 0.3, 0.6, 0.5, 0.2, 0.4, 0.9, 0.8, 0.9])
    agreement = np.array([0.6, 1.0, 0.49, 0.5, 1.0, 0.6, 1.0, 0.2, 0.2, 1.0])
    wall = choose_wall(confidence, agreement, np.array([0] * 9 + [2]), 3, per_row=2)
    first, empty, single = wall.clusters
    assert first.size == 9
    assert first.prototypes.tolist() == [1, 3]  # .7 .6; 7 and 8 are more confident but not sure
    assert first.typical.tolist() == [4, 6]  # .5 and the median, .4
    assert first.borderline.tolist() == [0, 5]  # .1 .2
    assert first.not_sure.tolist() == [8, 7]  # by agreement, then confidence; .5 is sure enough
    assert first.num_not_sure == 3
    assert (empty.cluster, empty.size, len(empty.shown)) == (1, 0, 0)
    assert single.shown.tolist() == [9]
    assert wall.num_not_sure == 3


@pytest.mark.parametrize("size", range(14))
def test_no_picture_twice_and_small_clusters_shown_whole(size: int) -> None:
    values = np.linspace(0.3, 1, size)  # the first 28 % are not sure
    wall = choose_wall(values, values, np.zeros(size, int), 1, per_row=3)
    shown = wall.clusters[0].shown.tolist()
    not_sure = int((values < 0.5).sum())
    assert len(shown) == len(set(shown)) == min(size - not_sure, 9) + min(not_sure, 3)


def test_ties_go_by_agreement_then_by_a_fixed_random_key() -> None:
    confidence, agreement = np.ones(600), np.repeat([1.0, 0.9], [400, 200])
    first, again = (
        choose_wall(confidence, agreement, np.zeros(600, int), 1, per_row=12).clusters[0].prototypes
        for _ in range(2)
    )
    assert first.max() < 400  # more neighbours agree
    assert np.ptp(first) > 200  # files in the order of their classes: not all from the first
    assert first.tolist() == again.tolist()


def test_not_sure_counts_more_than_it_shows() -> None:
    zeros = np.zeros(50)
    wall = choose_wall(zeros, zeros, np.zeros(50, int), 1, per_row=2, num_neighbors=500)
    assert len(wall.clusters[0].shown) == 2
    assert wall.clusters[0].num_not_sure == wall.num_not_sure == 50


def test_errors_name_the_way_out() -> None:
    two = np.zeros(2)
    with pytest.raises(ValueError, match=r"confidence \(2\), agreement \(3\)"):
        choose_wall(two, np.zeros(3), two.astype(int), 1)
    with pytest.raises(ValueError, match="ids run from 0 to 4; num_clusters 3 allows 0 to 2"):
        choose_wall(two, two, np.array([0, 4]), 3)
    with pytest.raises(ValueError, match="per_row 0"):
        choose_wall(two, two, two.astype(int), 1, per_row=0)
    with pytest.raises(ValueError, match=r"got uint8 \(0, 3, 8, 8\)"):
        sprite(np.zeros((0, 3, 8, 8), np.uint8))


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_small_pictures_keep_their_pixels_side_by_side() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    uri = sprite(images)
    assert uri.startswith("data:image/png;base64,")
    sheet = np.asarray(decoded(uri))
    assert sheet.shape == (8, 40, 3)
    np.testing.assert_array_equal(sheet[:, 16:24].transpose(2, 0, 1), images[2])


def test_grey_pictures_take_one_channel() -> None:
    grey = np.repeat(np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8), 3, axis=1)
    assert decoded(sprite(grey)).mode == "L"


def test_photographs_become_jpeg_of_the_wanted_side() -> None:
    uri = sprite(np.full((3, 3, 224, 224), 200, np.uint8), pixels=96)
    assert uri.startswith("data:image/jpeg;base64,")
    assert decoded(uri).size == (288, 96)


def test_atlas_puts_picture_i_into_row_i_over_width() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 8, 8), dtype=np.uint8)
    uri, per_row = atlas(lambda index: images[index], np.arange(7), 8)
    assert per_row == 3
    sheet = np.asarray(decoded(uri))
    assert sheet.shape == (24, 24, 3)
    np.testing.assert_array_equal(sheet[8:16, 16:24].transpose(2, 0, 1), images[5])
    assert not sheet[16:, 8:].any()

"""The drawings and pictures of the report, without a browser, by hand and against their own pixels."""

from __future__ import annotations

import base64
import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from eat_dist.report.drawing import DASHES, MARKERS, PALETTE, look
from eat_dist.report.embedding_map import MOST_IMAGES, chosen, nearest_agree, plane
from eat_dist.report.figures import transfer_matrix_figure
from eat_dist.report.strip import amplified, data_uri
from eat_dist.report.training import course
from evaluation_folders import history, showcase


def test_thirty_series_look_different() -> None:
    looks = [look(index) for index in range(30)]

    assert len(set(looks)) == 30
    # Neighbours differ in each of colour, dash and marker.
    for one, other in pairwise(looks):
        assert all(mine != theirs for mine, theirs in zip(one, other, strict=True))
    assert len(PALETTE) == len(MARKERS) != len(DASHES)


def test_the_amplified_change_is_grey_where_nothing_changed() -> None:
    """0.5 + 10·(0, 0.02, −0.02, 0.2) = 0.5, 0.7, 0.3 and 2.5, cut to 1."""
    clean = np.full((1, 1, 4), 0.5)
    change = np.array([[[0.0, 0.02, -0.02, 0.2]]])

    np.testing.assert_allclose(amplified(clean, clean + change), [[[0.5, 0.7, 0.3, 1.0]]])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_picture_keeps_its_pixels(channels: int, mode: str) -> None:
    image = np.linspace(0, 1, channels * 6).reshape(channels, 2, 3)

    content = base64.b64decode(data_uri(image, most=10).removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(content)) as picture:
        assert (picture.mode, picture.size) == (mode, (3, 2))
        np.testing.assert_array_equal(
            np.asarray(picture).reshape(2, 3, channels), np.rint(255 * image).transpose(1, 2, 0)
        )


def test_a_course_is_the_mean_of_members_and_their_range() -> None:
    """Clean loss 13 − 6·i/30 + 0.2·member over 30 iterations, a stretch each: the first is 13, 13.2 and 13.4."""
    went = course([history(iterations=30)], "clean_loss")

    assert went is not None
    assert went.x[0] == 0.5
    np.testing.assert_allclose([went.mean[0], went.low[0], went.high[0]], [13.2, 13.0, 13.4], rtol=1e-6)
    # 120 iterations are drawn in 60 stretches of two: the first is over iterations 0 and 1.
    longer = course([history(iterations=120, members=1)], "clean_loss")
    assert longer is not None
    assert len(longer.x) == 60
    np.testing.assert_allclose(longer.mean[0], 13 - 6 * 0.5 / 120, rtol=1e-6)


def test_what_was_never_measured_has_no_course() -> None:
    assert course([history(adversarial=False)], "fooled_rate") is None
    assert course([history(iterations=0)], "clean_loss") is None


def test_a_map_lays_both_out_in_one_frame_and_again_the_same() -> None:
    arrays = showcase()
    clean, attacked = (arrays[f"{which}_embeddings"] for which in ("clean", "attacked"))

    first, again = plane(clean, attacked, seed=0), plane(clean, attacked, seed=0)

    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    # In one frame an image that the attack did not move stays where it was.
    same, unmoved = plane(clean, clean, seed=0)
    spread = np.ptp(same, axis=0).max()
    assert np.abs(same - unmoved).max() < 0.02 * spread
    assert nearest_agree(first[0], arrays["labels"]) > 0.9
    assert nearest_agree(first[1], arrays["labels"]) < 0.5


def test_nearest_agree_counts_the_points_beside_one_of_their_class() -> None:
    """On a line at 0, 1, 5, 6 with labels 0, 0, 1, 0: the first two agree, the last two do not."""
    points = np.array([[0.0, 0], [1, 0], [5, 0], [6, 0]])

    assert nearest_agree(points, np.array([0, 0, 1, 0])) == 0.5


def test_a_sampled_map_keeps_the_named_classes_whole() -> None:
    labels = np.arange(3 * MOST_IMAGES) % 100

    rows = chosen(labels, [3, 7], seed=0)

    assert len(rows) == len(set(rows.tolist())) == MOST_IMAGES
    assert (np.diff(rows) > 0).all()
    assert np.isin(labels[rows], [3, 7]).sum() == np.isin(labels, [3, 7]).sum()


def test_the_transfer_figure_shows_every_cell_and_the_mean_off_the_diagonal() -> None:
    """Off the diagonal 0.2, 0.4 and one that was not measured: the mean is 30 %."""
    matrix = np.array([[0.9, 0.2], [0.4, 0.8]])
    matrix = np.block([[matrix, np.full((2, 1), np.nan)], [np.full((1, 3), np.nan)]])
    figure = transfer_matrix_figure(matrix)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["90", "20", "–", "40", "80", "–", "–", "–", "–"]
    assert "30.0 %" in axes.get_title()
    assert "attacked member i" in axes.get_ylabel()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    image = Image.open(buffer)
    assert (image.format, image.size) == ("PNG", (780, 630))


def test_a_transfer_matrix_that_is_not_square_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"square; got shape \(2, 3\)"):
        transfer_matrix_figure(np.zeros((2, 3)))

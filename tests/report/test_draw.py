from __future__ import annotations

import numpy as np
import pytest

from rcnn_svm.errors import ConfigError
from rcnn_svm.report.draw import Mark, class_colours, draw_detections, draw_marks
from rcnn_svm.structures import Detections, GroundTruth

RED = (255, 0, 0)


def grey(height=500, width=600):
    return np.full((height, width, 3), 128, np.uint8)


def has(image, colour):
    return bool((image == np.array(colour)).all(axis=2).any())


def test_box_lies_on_the_pixels_of_its_edge():
    image = grey()
    drawn = draw_marks(image, [Mark((100, 50, 300, 200), RED)])
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    for y, x in ((50, 100), (50, 299), (199, 100), (199, 299)):
        assert tuple(drawn[y, x]) == RED
    assert tuple(drawn[49, 150]) == (0, 0, 0)  # the rim
    assert tuple(drawn[120, 200]) == (128, 128, 128)
    assert (image == 128).all()


@pytest.mark.parametrize(
    ("size", "expected"), [((20, 30), (320, 480)), ((481, 300), (481, 300)), ((240, 100), (480, 200))]
)
def test_small_pictures_are_enlarged_by_a_whole_factor(size, expected):
    assert draw_marks(grey(*size), []).shape[:2] == expected


def test_longer_side_is_kept():
    assert draw_marks(grey(500, 1000), [], longer_side=200).shape == (100, 200, 3)
    assert draw_marks(grey(1, 1), [Mark((0, 0, 1, 1), RED, "a")], longer_side=5).shape == (5, 5, 3)
    with pytest.raises(ConfigError, match=r"^draw_marks: longer_side must be at least 1, got 0\.$"):
        draw_marks(grey(), [], longer_side=0)


def test_dashed_box_shows_both_colours():
    drawn = draw_marks(grey(), [Mark((100, 50, 300, 200), RED, dashed=True)])
    edge = {tuple(pixel) for pixel in drawn[50, 100:300].tolist()}
    assert edge == {RED, (0, 0, 0)}


@pytest.mark.parametrize("box", [(0, 0, 600, 500), (550, 0, 600, 10), (-20, 480, 40, 520), (5, 5, 5, 5)])
def test_tags_stay_inside_the_picture(box):
    drawn = draw_marks(grey(), [Mark(box, RED, "a long name of a class")])
    assert (drawn == np.array(RED)).all(axis=2).sum() > 2000


def test_tags_do_not_cover_each_other_while_there_is_room():
    blue = (0, 0, 255)
    box = (100, 100, 300, 300)
    alone = (draw_marks(grey(), [Mark(box, blue, "one")]) == np.array(blue)).all(axis=2).sum()
    both = draw_marks(grey(), [Mark(box, blue, "one"), Mark(box, RED, "two")])
    outline = (draw_marks(grey(), [Mark(box, blue)]) == np.array(blue)).all(axis=2).sum()
    assert (both == np.array(blue)).all(axis=2).sum() >= 0.9 * (alone - outline)


def test_detections_are_drawn_by_class_and_score():
    found = Detections("a", [[50, 100, 200, 300], [300, 100, 500, 300]], [0.9, 0.2], [0, 1])
    first, second = class_colours(2)
    everything = draw_detections(grey(), found, ("cat", "dog"))
    assert has(everything, first)
    assert has(everything, second)
    assert not has(draw_detections(grey(), found, ("cat", "dog"), min_score=0.5), second)
    per_class = draw_detections(grey(), found, ("cat", "dog"), min_score=np.array([1.0, 0.2]))
    assert not has(per_class, first)
    assert has(per_class, second)


def test_truth_is_drawn_dashed_in_white():
    truth = GroundTruth([[50, 100, 200, 300]], [0])
    drawn = draw_detections(grey(), Detections.empty("a"), ("cat",), truth=truth)
    assert has(drawn, (255, 255, 255))
    np.testing.assert_array_equal(draw_detections(grey(), Detections.empty("a"), ("cat",)), grey())


def test_class_colours_differ():
    colours = class_colours(80)
    assert len(set(colours)) == 80
    assert colours[:20] == class_colours(20)
    assert class_colours(0) == ()

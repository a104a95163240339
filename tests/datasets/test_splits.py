from __future__ import annotations

import pytest

from rcnn_svm.datasets import load_splits
from rcnn_svm.errors import ConfigError, DataError

PARTS = ("train", "val", "trainval", "test")


def ids(dataset):
    return [sample.image_id for sample in dataset]


@pytest.fixture
def voc(make_voc, xml):
    def build(**splits):
        names = sorted({name for given in splits.values() for name in given})
        return make_voc({name: xml([("dog", 1, 1, 9, 9)]) for name in names}, splits)

    return build


def names(first, last):
    return [f"{i:02d}" for i in range(first, last)]


def test_what_is_given_is_used_as_given(voc):
    root = voc(train=names(0, 4), val=names(4, 6), test=names(6, 9), trainval=names(0, 6)[::-1])
    splits = load_splits(root)
    assert ids(splits.train) == names(0, 4)
    assert ids(splits.val) == names(4, 6)
    assert ids(splits.test) == names(6, 9)
    assert ids(splits.trainval) == names(0, 6)[::-1]
    assert splits.notes == ()
    assert [getattr(splits, part).split for part in PARTS] == list(PARTS)


def test_trainval_is_train_and_val(voc):
    splits = load_splits(voc(train=names(0, 4), val=names(4, 6), test=names(6, 9)))
    assert ids(splits.trainval) == names(0, 6)
    assert splits.notes == ()


def test_without_test_val_becomes_test(voc):
    root = voc(train2017=names(0, 10), val2017=names(10, 14))
    splits = load_splits(root)
    assert ids(splits.test) == names(10, 14)
    assert ids(splits.trainval) == names(0, 10)
    assert len(splits.val) == 2
    assert sorted(ids(splits.train) + ids(splits.val)) == names(0, 10)
    assert splits.notes == (
        "There is no test split: the given val2017 (4 images) is the test set.",
        "There is no val split beside it: 2 of the 10 images of train2017 were set aside with seed 0.",
    )
    assert ids(load_splits(root).val) == ids(splits.val)
    draws = {tuple(ids(load_splits(root, seed=seed).val)) for seed in range(8)}
    assert len(draws) > 1


@pytest.mark.parametrize("role", ["train", "trainval"])
def test_without_val_a_fifth_is_set_aside(voc, role):
    splits = load_splits(voc(**{role: names(0, 10)}, test=names(10, 12)))
    assert ids(splits.trainval) == names(0, 10)
    assert len(splits.val) == 2
    assert ids(splits.test) == names(10, 12)
    assert len(splits.notes) == 1


def test_train_is_trainval_without_val(voc):
    splits = load_splits(voc(trainval=names(0, 6), val=names(4, 6), test=names(6, 8)))
    assert ids(splits.train) == names(0, 4)


def test_a_single_split_is_divided(make_voc, xml):
    root = make_voc({name: xml([("dog", 1, 1, 9, 9)]) for name in names(0, 10)})
    splits = load_splits(root)
    assert [len(getattr(splits, part)) for part in PARTS] == [6, 2, 8, 2]
    assert sorted(ids(splits.trainval) + ids(splits.test)) == names(0, 10)
    assert splits.notes == (
        "Only one split is given (all): it was divided with seed 0 into 6 images for train, 2 for val and 2 "
        "for test.",
    )


def test_a_quick_look_draws_from_all_over(voc):
    root = voc(train=names(0, 30), val=names(30, 40), test=names(40, 60), trainval=names(0, 40))
    splits = load_splits(root, max_images=5)
    assert [len(getattr(splits, part)) for part in PARTS] == [5, 5, 10, 5]
    assert ids(splits.trainval) == ids(splits.train) + ids(splits.val)
    assert ids(splits.train) == sorted(ids(splits.train)) != names(0, 5)
    assert splits.notes == ("A quick look: at most 5 images of train, val and test each, drawn with seed 0.",)
    with pytest.raises(ConfigError) as caught:
        load_splits(root, max_images=0)
    assert str(caught.value) == "load_splits: max_images must be at least 1, got 0."


def test_dropped_boxes_are_counted_once(make_voc, xml, capsys):
    bad = xml([("dog", 1, 1, 9, 9), ("dog", 3, 3, 3, 3)])
    root = make_voc(
        {"a": bad, "b": bad, "c": bad},
        {"train": ["a"], "val": ["b"], "trainval": ["a", "b"], "test": ["c"]},
    )
    splits = load_splits(root, drop_bad_boxes=True)
    assert [len(getattr(splits, part).samples[0].truth) for part in PARTS] == [1, 1, 1, 1]
    assert capsys.readouterr().err.startswith(
        f"Dropped 3 bad boxes, the first: {root}/Annotations/a.xml: object 2"
    )


def test_splits_that_no_rule_covers(voc):
    root = voc(left=["a"], right=["b"])
    with pytest.raises(DataError) as caught:
        load_splits(root)
    assert str(caught.value) == (
        f"{root}: must have splits named train, val, test or trainval, found left, right."
    )


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (
            {"train": ["a", "b"], "trainval": ["a", "b"]},
            "must have a test or a val split to measure on, has train, trainval.",
        ),
        ({"val": ["a"], "test": ["b"]}, "must have a train split, has val, test."),
        ({"train2014": ["a"], "train2017": ["b"]}, "must have one train split, has train2014, train2017."),
        ({"train": [], "test": ["a"]}, "split 'train' has no image. Add images to it or name another split."),
    ],
)
def test_no_split_to_train_or_measure_on(voc, given, rule):
    root = voc(**given)
    with pytest.raises(DataError) as caught:
        load_splits(root)
    assert str(caught.value) == f"{root}: {rule}"


@pytest.mark.parametrize("given", [{"all": ["a", "b"]}, {"all": ["a"]}, {"train": ["a", "b"], "test": []}])
def test_one_or_two_images_play_all_parts(voc, given):
    splits = load_splits(voc(**given))
    everything = ["a", "b"] if "b" in next(iter(given.values())) else ["a"]
    for part in PARTS:
        assert [sample.image_id for sample in getattr(splits, part)] == everything
        assert getattr(splits, part).split == part
    said = " ".join(splits.notes)
    assert "too few to set any aside; all play all parts" in said
    assert "what is measured on them says nothing" in said


def test_a_single_training_image_is_val_as_well(voc):
    splits = load_splits(voc(train=["a"], test=["b"]))
    ids = {part: [sample.image_id for sample in getattr(splits, part)] for part in PARTS}
    assert ids == {"train": ["a"], "val": ["a"], "trainval": ["a"], "test": ["b"]}
    assert "it is val as well" in splits.notes[0]

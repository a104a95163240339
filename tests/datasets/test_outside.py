"""Nothing outside of a data set is opened unless a file or link of it leads there and the user allows it."""

from __future__ import annotations

import contextlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rcnn_svm.cli import build_parser, main
from rcnn_svm.datasets import check_dataset, load_dataset, load_splits
from rcnn_svm.errors import DataError, RcnnSvmError
from tests.datasets import cases
from tests.datasets.cases import GREY

_watched: list[tuple[str, list[str]]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if (
        _watched
        and event in ("open", "os.listdir", "os.scandir")
        and isinstance(arguments[0], str | os.PathLike)
    ):
        folder, opened = _watched[-1]
        real = os.path.realpath(arguments[0])
        if real == folder or real.startswith(folder + os.sep):
            opened.append(real)


sys.addaudithook(_watch)


@contextlib.contextmanager
def opened_in(folder: Path) -> Iterator[list[str]]:
    """Collect what is opened or listed in a folder, by whatever path."""
    opened: list[str] = []
    _watched.append((os.path.realpath(folder), opened))
    try:
        yield opened
    finally:
        _watched.pop()


def elsewhere(root: Path) -> Path:
    """Write image 9 with labels of every format beside the data set, and return the folder."""
    folder = root.parent / "elsewhere"
    cases.picture(folder / "images" / "im9.jpg", 9)
    cases.write(folder / "labels" / "im9.txt", cases.yolo_rows(9))
    cases.write(folder / "images" / "im9.xml", cases.voc_xml(9, "im9.jpg"))
    cases.write(folder / "list.txt", "images/im9.jpg\n")
    cases.write(folder / "obj.names", "disc\nbar\n")
    return folder


Make = Callable[[Path, Path], Path | None]
NAMED: dict[str, Make] = {}
"""Data sets whose files name a place outside: the train split has image 9 and it alone, or as well."""


def named(name: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        NAMED[name] = make
        return make

    return register


def yolo_entry(name: str, entry: str, more: str = "") -> None:
    @named(f"yolo {name}")
    def _(root: Path, outside: Path) -> None:
        cases.yolo(root, more=more.format(outside))
        cases.change(root / "data.yaml", "train: train/images", f"train: {entry.format(outside)}")


yolo_entry("absolute folder", "{}/images")
yolo_entry("folder above", "../elsewhere/images")
yolo_entry("backslashes", r"..\elsewhere\images")
yolo_entry("up and down", "val/../../elsewhere/images")
yolo_entry("image", "['{}/images/im9.jpg']")
yolo_entry("list outside", "{}/list.txt")
yolo_entry("sibling path, as ultralytics writes it", "elsewhere/images", "path: ../\n")
yolo_entry("absolute path", "images", "path: {}\n")


@named("yolo one YAML")
def _(root: Path, outside: Path) -> Path:
    NAMED["yolo folder above"](root, outside)
    return root / "data.yaml"


@named("yolo link to a folder that the YAML names")
def _(root: Path, outside: Path) -> Path:
    cases.yolo(root)
    (root / "more").symlink_to(outside)
    cases.change(root / "data.yaml", "train: train/images", "train: more/images")
    return root / "data.yaml"


@named("yolo zip")
def _(root: Path, outside: Path) -> Path:
    NAMED["yolo absolute folder"](root, outside)
    with zipfile.ZipFile(root.parent / "set.zip", "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root))
    return root.parent / "set.zip"


@named("yolo darknet names and list")
def _(root: Path, outside: Path) -> None:
    cases.CASES["yolo darknet"].make(root)
    cases.change(root / "obj.data", "train = data/train.txt", f"train = {outside}/list.txt")
    cases.change(root / "obj.data", "names = data/obj.names", f"names = {outside}/obj.names")


for _line in ("{}/images/im9.jpg", "../elsewhere/images/im9.jpg", "train/../../elsewhere/images/im9.jpg"):

    @named(f"yolo line {_line}")
    def _(root: Path, outside: Path, line: str = _line) -> None:
        cases.yolo(root, entry="{}.txt", line="{}/images/im{}.jpg")
        cases.write(root / "train.txt", f"train/images/im0.jpg\n{line.format(outside)}\n")


for _name in ("{}/images/im9.jpg", "../elsewhere/images/im9.jpg", "../../elsewhere/images/im9.jpg"):

    @named(f"coco file_name {_name}")
    def _(root: Path, outside: Path, name: str = _name) -> None:
        record = {"id": 9, "file_name": name.format(outside), "width": cases.WIDTH, "height": cases.HEIGHT}
        cases.coco(root, only="train", edit=cases.also("images", **record))


for _tag, _name in (("filename", "../../elsewhere/images/im9.jpg"), ("path", "{}/images/im9.jpg")):

    @named(f"voc {_tag}")
    def _(root: Path, outside: Path, tag: str = _tag, name: str = _name) -> None:
        cases.voc(root)
        text = cases.voc_xml(9, "im9.jpg") if tag == "path" else cases.voc_xml(9, name)
        more = f"<path>{name.format(outside)}</path><size>"
        cases.write(root / "Annotations/im9.xml", text.replace("<size>", more) if tag == "path" else text)
        cases.write(root / "ImageSets/Main/train.txt", "im0\nim9\n")


for _line in ("{}/images/im9.xml", "JPEGImages/im9.jpg ../elsewhere/images/im9.xml"):

    @named(f"voc line {_line}")
    def _(root: Path, outside: Path, line: str = _line) -> None:
        cases.voc(root)
        cases.write(root / "ImageSets/Main/train.txt", f"im0\n{line.format(outside)}\n")


REFUSED = (
    r"names '.*', which is .*elsewhere.* and lies outside of the data set .*set.*"
    r"\. Name a folder that holds both, or allow it with --allow-outside\."
)


@pytest.mark.parametrize("name", NAMED)
def test_what_lies_outside_is_read_where_a_file_names_it_and_the_user_allows_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, outside = tmp_path / "set", elsewhere(tmp_path / "set")
    path = NAMED[name](root, outside) or root
    with opened_in(outside) as opened:
        with pytest.raises(DataError, match=REFUSED):
            load_dataset(path, "train")
        assert main(["data", "check", str(path)]) == 3
        for skip_bad in (False, True):
            with contextlib.suppress(DataError):
                load_splits(path, skip_bad=skip_bad)
    assert "Traceback" not in capsys.readouterr().err
    assert opened == []
    with opened_in(outside) as opened:
        samples = load_dataset(path, "train", allow_outside=True).samples
        greys = [round(float(sample.read()[5, 5].mean()) / GREY) for sample in samples]
    assert greys in ([9], [0, 9], [0, 1, 9])
    assert opened
    assert main(["data", "check", str(path), "--allow-outside"]) == 0
    expected = [] if "coco" in name else [[12, 5, 42, 40], [50, 29, 80, 60]]
    np.testing.assert_allclose(samples[-1].truth.boxes, np.reshape(expected, (-1, 4)), atol=1e-4)


def test_one_image_outside_is_a_bad_one_that_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = [name for name in NAMED if name.startswith(("yolo line", "coco", "voc"))]
    assert len(single) == 10
    for k, name in enumerate(single):
        root = tmp_path / str(k) / "set"
        NAMED[name](root, elsewhere(root))
        with pytest.raises(DataError, match=r"--allow-outside\. --skip-bad leaves such images out\.$"):
            load_splits(root)
        dataset = load_dataset(root, "train", skip_bad=True)
        assert "im0" in [sample.image_id for sample in dataset]
        assert "Left out 1 image, the first: " in capsys.readouterr().err


LINKED: dict[str, tuple[str, str, str]] = {
    "voc XML": ("voc", "Annotations/im0.xml", "images/im9.xml"),
    "voc image": ("voc", "JPEGImages/im0.jpg", "images/im9.jpg"),
    "voc list": ("voc", "ImageSets/Main/train.txt", "list.txt"),
    "coco JSON": ("coco", "annotations/instances_train.json", "labels/im9.txt"),
    "coco image": ("coco", "images/im0.jpg", "images/im9.jpg"),
    "coco images": ("coco", "images", "images"),
    "yolo YAML": ("yolo", "data.yaml", "list.txt"),
    "yolo image": ("yolo", "train/images/im0.jpg", "images/im9.jpg"),
    "yolo images": ("yolo", "train/images", "images"),
    "yolo label": ("yolo", "train/labels/im0.txt", "labels/im9.txt"),
    "yolo labels": ("yolo", "train/labels", "labels"),
}


@pytest.mark.parametrize("name", LINKED)
def test_a_link_that_leads_out_is_followed_where_the_user_allows_it(name: str, tmp_path: Path) -> None:
    root, outside = tmp_path / "set", elsewhere(tmp_path / "set")
    kind, link, target = LINKED[name]
    getattr(cases, kind)(root)
    (root / link).rename(tmp_path / "aside")
    (root / link).symlink_to(outside / target)
    with opened_in(outside) as opened:
        with contextlib.suppress(RcnnSvmError):
            report = check_dataset(root)
            assert "is a link that leads out of the data set, and is not followed. --allow-outside does." in (
                report.to_text()
            )
        with contextlib.suppress(RcnnSvmError):
            [sample.read() for sample in load_splits(root, skip_bad=True).train]
    assert opened == []
    with opened_in(outside) as opened, contextlib.suppress(RcnnSvmError):
        check_dataset(root, allow_outside=True)
    assert opened


def test_what_is_inside_is_used_without_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths of another machine, and folders one too high, that by chance exist here as well."""
    root, outside = tmp_path / "set", elsewhere(tmp_path / "set")
    for entry in (f"{tmp_path}/train/images", "../train/images"):
        cases.yolo(root)
        cases.picture(tmp_path / "train/images/im0.jpg", 5)
        cases.change(root / "data.yaml", "train: train/images", f"train: {entry}")
        with opened_in(tmp_path / "train") as opened:
            splits = load_splits(root)
        assert (len(splits.train), opened, capsys.readouterr().err) == (2, [], "")
    cases.yolo(tmp_path / "lists/set", entry="{}.txt", line=f"{outside}/{{}}/images/im{{}}.jpg")
    cases.picture(outside / "train/images/im0.jpg", 5)
    with opened_in(outside) as opened:
        assert load_splits(tmp_path / "lists/set").train.samples[0].read()[0, 0, 0] == 0
    assert opened == []


def test_a_place_inside_may_be_named_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.yolo(tmp_path / "set", entry=f"{tmp_path}/set/{{}}/images")
    (tmp_path / "link").symlink_to("set")
    monkeypatch.chdir(tmp_path)
    for path in ("set", "link", tmp_path / "set", tmp_path / "link"):
        assert check_dataset(path).defects == ()


def test_a_test_split_outside_is_refused_and_not_replaced(tmp_path: Path) -> None:
    outside = elsewhere(tmp_path / "set")
    cases.yolo(tmp_path / "set")
    cases.change(tmp_path / "set/data.yaml", "test: test/images", "test: ../elsewhere/images")
    with pytest.raises(DataError, match="--allow-outside"):
        load_splits(tmp_path / "set")
    splits = load_splits(tmp_path / "set", allow_outside=True)
    assert [sample.path for sample in splits.test] == [outside / "images/im9.jpg"]


SPELLED = st.sampled_from([
    "{out}/images", "{out}", "{out}/images/im9.jpg", "{out}/images/im9.xml", "{out}/list.txt",
    "{out}/obj.names",
    "../elsewhere/images", "../elsewhere/list.txt", "link/images", "link/list.txt", "link/images/im9.jpg",
    "train/../../elsewhere/images/im9.jpg", "images/../../elsewhere/images/im9.jpg", "/", "..", "../", "/etc",
    "..\\elsewhere\\images", "%2e%2e/elsewhere/images/im9.jpg", "file://{out}/images/im9.jpg", "loop/x", "~",
    "link/../../elsewhere/images", "{out}/images/im9.jpg {out}/images/im9.xml", "im0 {out}/images/im9.xml",
])  # fmt: skip
PLACES = {
    "yolo": ("train: train/images", "val: val/images", "test: test/images", "names:"),
    "yolo list": ("train/images/im0.jpg", "val/images/im2.jpg", "train: train.txt"),
    "darknet": ("data/train.txt", "data/val.txt", "data/obj.names", "data/obj_train_data/im0.jpg"),
    "coco": ('"im0.jpg"', '"im2.jpg"'),
    "voc": ("im0.jpg</filename>", "</filename>", "im0\n", "im3\n"),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(sorted(PLACES)), skip_bad=st.booleans())
def test_however_a_file_names_a_place_outside_nothing_there_is_opened(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, skip_bad: bool
) -> None:
    root = tmp_path_factory.mktemp("x") / "set"
    outside = elsewhere(root)
    {
        "yolo": cases.yolo,
        "yolo list": lambda root: cases.yolo(root, entry="{}.txt", line="{}/images/im{}.jpg"),
        "darknet": cases.CASES["yolo darknet"].make,
        "coco": cases.coco,
        "voc": cases.voc,
    }[kind](root)
    (root / "link").symlink_to("../elsewhere")
    (root / "loop").symlink_to("loop")
    texts = [path for path in root.rglob("*") if path.suffix in (".xml", ".json", ".txt", ".yaml", ".data")]
    for _ in range(data.draw(st.integers(1, 3))):
        old = data.draw(st.sampled_from(PLACES[kind]))
        spelled = data.draw(SPELLED).format(out=outside)
        key = old.partition(":")[0] + ": " if ": " in old else ""
        new = {
            "coco": f'"{spelled}"'.replace("\\", "\\\\"),
            "voc": f"{spelled}\n" if "\n" in old else f"{spelled}</filename><path>{spelled}</path>",
        }.get(kind, f"path: {spelled}\nnames:" if old == "names:" else f"{key}{spelled}")
        for file in texts:
            file.write_text(file.read_text().replace(old, new))
    with opened_in(outside) as opened:
        with contextlib.suppress(RcnnSvmError):
            check_dataset(root)
        with contextlib.suppress(RcnnSvmError):
            load_splits(root, drop_bad_boxes=True, skip_bad=skip_bad)
    assert opened == []


def test_the_option_exists_on_the_verbs_that_read_labelled_data(capsys: pytest.CaptureFixture[str]) -> None:
    reading = {"train", "compare", "study", "curve", "finetune", "propose", "evaluate", "bench", "add-class"}
    of_data = {f"data {verb}" for verb in ("check", "convert", "split", "review")}
    others = ("data digits", "data next")
    verbs = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    for verb in (*verbs, *of_data, *others):
        with pytest.raises(SystemExit):
            build_parser().parse_args([*verb.split(), "--help"])
        assert ("--allow-outside" in capsys.readouterr().out) == (verb in reading | of_data), verb

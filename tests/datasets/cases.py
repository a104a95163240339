"""Small data sets as tools write them: every layout, list and label that the readers take, and what is wrong.

`CASES` has a builder for each, and what is right. Unless a case says otherwise there are four images of
96 x 72 pixels, 0 and 1 for train, 2 for val, 3 for test, each with one disc and one bar. Image `i` has the
grey value `GREY * i`, by which tests know it again whatever its name.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 96, 72
GREY = 20
CLASSES = ("disc", "bar")
SPLITS: Mapping[str, Sequence[int]] = {"train": (0, 1), "val": (2,), "test": (3,)}
BOM = b"\xef\xbb\xbf"
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "
"""What `._name` files of macOS begin with."""

USUAL = {"train": (2, 4), "val": (1, 2), "test": (1, 2)}
"""Images and objects of each split, unless a case says otherwise."""

Objects = list[tuple[str, tuple[int, int, int, int]]]


@dataclass(frozen=True)
class Case:
    """A data set and what reading it must give.

    Attributes:
        make: writes it into a folder and returns what to name on the command line, None for the folder.
        splits: images and objects of each split.
        kinds: the kinds of defects that are reported.
        words: what the report says among others.
        same: the boxes are those of `objects`.
    """

    make: Callable[[Path], Path | None]
    splits: Mapping[str, tuple[int, int]] = field(default_factory=lambda: USUAL)
    kinds: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()
    same: bool = True


CASES: dict[str, Case] = {}


def case(name: str, *kinds: str, **more: Any) -> Callable[[Callable[[Path], Path | None]], None]:
    """Register a builder as a case with these kinds of defects."""

    def register(make: Callable[[Path], Path | None]) -> None:
        CASES[name] = Case(make, kinds=frozenset(kinds), **more)

    return register


def objects(i: int) -> Objects:
    """Return the objects of image `i` as half-open boxes."""
    return [("disc", (3 + i, 5, 33 + i, 40)), ("bar", (50, 20 + i, 80, 60))]


def picture(path: Path, i: int, form: str | None = None) -> None:
    """Write image `i`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    form = form or ("JPEG" if path.suffix.lower() in (".jfif", ".jpe") else None)
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), GREY * i, np.uint8)).save(path, form)


def write(path: Path, content: str | bytes) -> None:
    """Write text or bytes, making the folders on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def change(path: Path, old: str, new: str) -> None:
    """Replace the first `old`, which must be there, in a text file."""
    text = path.read_text()
    assert old in text
    write(path, text.replace(old, new, 1))


# --- VOC ---------------------------------------------------------------------------------------------------


def voc_xml(i: int, file_name: str) -> str:
    """Return the annotation of image `i`."""
    parts = [f"<annotation><filename>{file_name}</filename>"]
    parts.append(f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>")
    for name, (x1, y1, x2, y2) in objects(i):
        parts.append(
            f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        )
    return "".join([*parts, "</annotation>"])


def voc(
    root: Path,
    labels: str = "Annotations",
    images: str = "JPEGImages",
    *,
    name: str = "im{}",
    suffix: str = ".jpg",
    numbers: Sequence[int] = range(4),
    lists: str = "ImageSets/Main/{}.txt",
    line: str = "{}",
    splits: Mapping[str, Sequence[int]] = SPLITS,
) -> None:
    """Write a VOC data set."""
    for i in numbers:
        picture(root / images / f"{name.format(i)}{suffix}", i)
        write(root / labels / f"{name.format(i)}.xml", voc_xml(i, f"{name.format(i)}{suffix}"))
    for split, members in splits.items():
        text = "".join(line.format(name.format(i)) + "\n" for i in members)
        write(root / lists.format(split), text)


ALL = {"all": (4, 8)}


def voc_variant(case_name: str, splits: Mapping[str, tuple[int, int]] = USUAL, /, **how: Any) -> None:
    CASES[f"voc {case_name}"] = Case(lambda root: voc(root, **how), splits)


voc_variant("plain")
voc_variant("inside a folder", labels="down/VOC2007/Annotations", images="down/VOC2007/JPEGImages",
            lists="down/VOC2007/ImageSets/Main/{}.txt")  # fmt: skip
voc_variant("xml beside images", ALL, labels=".", images=".", splits={})
for _labels, _images in (
    ("annotations", "images"),
    ("annots", "images"),
    ("Annotation", "Images"),
    ("xml", "img"),
    ("labels", "data"),
):
    voc_variant(f"{_labels} and {_images}", ALL, labels=_labels, images=_images, splits={})
voc_variant("images folder", images="images")
voc_variant("sub-folders", {"default": (4, 8)}, labels="Annotations/cam 1", images="JPEGImages/cam 1",
            splits={"default": range(4)}, line="cam 1/{}")  # fmt: skip
voc_variant("images in sub-folders only", images="JPEGImages/cam 1")
voc_variant("lists outside Main", lists="ImageSets/{}.txt")
voc_variant("lists at the root", lists="{}.txt", line="JPEGImages/{0}.jpg Annotations/{0}.xml")
voc_variant("lists called train_list", lists="{}_list.txt", line="JPEGImages/{0}.jpg Annotations/{0}.xml")
for _line in ("{}  1", "{}\t-1", "{}.jpg", "{}.xml", '"{}"', "'{}'", "JPEGImages/{0}.jpg Annotations/{0}.xml",
              "/home/me/data/JPEGImages/{}.jpg", "C:\\data\\JPEGImages\\{}.jpg",
              "./JPEGImages/{}.jpg"):  # fmt: skip
    voc_variant(f"lists of {_line!r}", line=_line)
voc_variant("ids with spaces", name="my photo {}", line='"{}"')
voc_variant("ids with dots", name="v1.{}.rf.0a")
voc_variant("names with capitals", {"Train": (2, 4), "Val": (1, 2), "Test": (1, 2)},
            splits={k.title(): v for k, v in SPLITS.items()})  # fmt: skip
for _suffix in (".jfif", ".JPG", ".jpeg", ".png", ".webp", ".bmp", ".tif"):
    voc_variant(f"{_suffix} images", suffix=_suffix)


@case("voc split folders", splits={"train": (2, 4), "valid": (1, 2), "test": (1, 2)})
def _(root: Path) -> None:
    for split, numbers in zip(("train", "valid", "test"), SPLITS.values(), strict=True):
        voc(root / split, ".", ".", numbers=numbers, splits={})


@case("voc folder per split")
def _(root: Path) -> None:
    for split, numbers in SPLITS.items():
        voc(root / split, numbers=numbers, splits={})


@case("voc folder per split, each with a list default")
def _(root: Path) -> None:
    for split, numbers in SPLITS.items():
        voc(root / split, numbers=numbers, splits={"default": numbers})


@case("voc equal names in each split")
def _(root: Path) -> None:
    for split, numbers in SPLITS.items():
        for k, i in enumerate(numbers):
            picture(root / split / f"{k}.jpg", i)
            write(root / split / f"{k}.xml", voc_xml(i, f"{k}.jpg"))


@case("voc lists of single classes only", splits={"train": (3, 6), "val": (1, 2)})
def _(root: Path) -> None:
    voc(root, splits={"disc_train": (0, 1, 2), "bar_train": (0, 1, 2), "disc_val": (3,)}, line="{}.jpg 1")


@case("voc texts of another encoding", words=("disc",))
def _(root: Path) -> None:
    voc(root)
    write(root / "classes.txt", "disc\r\nbar\r\n".encode("utf-16"))
    for file in root.glob("ImageSets/Main/*"):
        write(file, BOM + file.read_bytes().replace(b"\n", b"\r\n"))
    for i, encoding in enumerate(("utf-8-sig", "utf-16", "gbk", "shift_jis")):
        head = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>'
        body = (head + voc_xml(i, f"im{i}.jpg")).replace("</filename>", "</filename><path>\u4e2d</path>")
        write(root / "Annotations" / f"im{i}.xml", body.encode(encoding))


@case("voc namespace")
def _(root: Path) -> None:
    voc(root)
    change(root / "Annotations/im0.xml", "<annotation>", '<annotation xmlns="http://example.org/voc">')


@case("voc .XML", splits=ALL)
def _(root: Path) -> None:
    voc(root, splits={})
    for i in (1, 2):
        (root / f"Annotations/im{i}.xml").rename(root / f"Annotations/im{i}.XML")


@case("voc hidden files", splits=ALL)
def _(root: Path) -> None:
    voc(root, splits={})
    for name in ("Annotations/._im0.xml", "JPEGImages/._im0.jpg", "__MACOSX/Annotations/im0.xml"):
        write(root / name, APPLE_DOUBLE)


@case("voc file name differs", splits=ALL)
def _(root: Path) -> None:
    voc(root, splits={})
    for i in range(4):
        (root / f"Annotations/im{i}.xml").rename(root / f"Annotations/{1000 + i}.xml")


@case("voc all XMLs broken", "labels", "empty-split", splits=dict.fromkeys(SPLITS, (0, 0)))
def _(root: Path) -> None:
    voc(root)
    for file in root.glob("Annotations/*"):
        write(file, file.read_bytes()[:90])


@case("voc size wrong", "size", splits=USUAL | {"train": (1, 2)}, words=("im0.xml: says 72 x 50 pixels",))
def _(root: Path) -> None:
    voc(root)
    change(root / "Annotations/im0.xml", "<width>96</width><height>72<", "<width>72</width><height>50<")


@case("voc polygon and turned box", same=False)
def _(root: Path) -> None:
    voc(root)
    polygon = "<polygon><x1>5</x1><y1>6</y1><x2>40</x2><y2>6</y2><x3>40</x3><y3>36</y3></polygon>"
    turned = "<robndbox><cx>30</cx><cy>30</cy><w>20</w><h>30</h><angle>0</angle></robndbox>"
    for i, new in enumerate((polygon, turned)):
        text = (root / f"Annotations/im{i}.xml").read_text()
        start, end = text.index("<bndbox>"), text.index("</bndbox>") + len("</bndbox>")
        write(root / f"Annotations/im{i}.xml", text[:start] + new + text[end:])


@case("voc object without a box", "malformed", splits=USUAL | {"train": (2, 3)}, same=False)
def _(root: Path) -> None:
    voc(root)
    change(root / "Annotations/im0.xml", "<xmin>4</xmin>", "")


for _flag in ("Unspecified", "False", "No", ""):

    @case(f"voc difficult {_flag!r}")
    def _(root: Path, flag: str = _flag) -> None:
        voc(root)
        change(root / "Annotations/im0.xml", "<difficult>0", f"<difficult>{flag}")


@case("voc two suffixes")
def _(root: Path) -> None:
    voc(root)
    for i in range(4):
        picture(root / f"JPEGImages/im{i}.png", 9)


@case("voc two pictures of one id", "image", splits=USUAL | {"train": (1, 2)}, words=("im0.png",))
def _(root: Path) -> None:
    voc(root)
    picture(root / "JPEGImages/im0.png", 9)
    change(root / "Annotations/im0.xml", "<filename>im0.jpg", "<filename>other.jpg")


@case("voc masks beside images")
def _(root: Path) -> None:
    voc(root)
    for i in range(4):
        picture(root / f"SegmentationClass/im{i}.png", 9)


@case("voc classes in two cases", "similar", "missing-class", same=False)
def _(root: Path) -> None:
    voc(root)
    change(root / "Annotations/im0.xml", "<name>disc", "<name>Disc")


@case("voc doubled objects", "doubled")
def _(root: Path) -> None:
    voc(root)
    text = (root / "Annotations/im0.xml").read_text()
    one = text[text.index("<object>") : text.index("</object>") + len("</object>")]
    change(root / "Annotations/im0.xml", "</annotation>", one + "</annotation>")


@case("voc image without XML", "unlabelled", splits=ALL)
def _(root: Path) -> None:
    voc(root, splits={})
    picture(root / "JPEGImages/more.jpg", 9)


@case("voc image without XML in a split folder", "unlabelled")
def _(root: Path) -> None:
    for split, numbers in SPLITS.items():
        voc(root / split, ".", ".", numbers=numbers, splits={})
    picture(root / "val" / "more.jpg", 9)


@case(
    "voc XML without its image in another folder",
    "image",
    "empty-split",
    "unlabelled",
    splits=USUAL | {"val": (0, 0)},
)
def _(root: Path) -> None:
    for split, numbers in SPLITS.items():
        voc(root / split, numbers=numbers, splits={}, name="{}" if split != "val" else "0{}")
    (root / "val/JPEGImages/02.jpg").rename(root / "test/JPEGImages/02.jpg")


# --- COCO --------------------------------------------------------------------------------------------------


def coco_content(numbers: Sequence[int]) -> dict[str, Any]:
    """Return the JSON of some images; ids count from 1."""
    images = [{"id": i + 1, "file_name": f"im{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in numbers]
    annotations = [
        {"id": 10 * i + k, "image_id": i + 1, "category_id": CLASSES.index(name) + 1,
         "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
        for i in numbers for k, (name, (x1, y1, x2, y2)) in enumerate(objects(i))
    ]  # fmt: skip
    categories = [{"id": k, "name": name, "supercategory": "none"} for k, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco(
    root: Path,
    jsons: str = "annotations/instances_{}.json",
    images: str = "images",
    *,
    splits: Mapping[str, Sequence[int]] = SPLITS,
    edit: Callable[[dict[str, Any]], object] = lambda content: None,
    only: str = "",
    start: bytes = b"",
) -> None:
    """Write a COCO data set; `edit` works on the content of each split, or of the one that `only` names."""
    for split, numbers in splits.items():
        content = coco_content(numbers)
        if only in ("", split):
            edit(content)
        write(root / jsons.format(split), start + json.dumps(content).encode())
        for i in numbers:
            picture(root / images.format(split) / f"im{i}.jpg", i)


def coco_variant(
    name: str,
    *how: str,
    splits: Mapping[str, tuple[int, int]] = USUAL,
    kinds: Sequence[str] = (),
    **more: Any,
) -> None:
    CASES[f"coco {name}"] = Case(lambda root: coco(root, *how, **more), splits, frozenset(kinds))


def each(key: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Return an edit of all records of a list; texts may have the old value as `{}`."""

    def edit(content: dict[str, Any]) -> None:
        for record in content[key]:
            record.update(
                {k: v.format(record.get(k)) if isinstance(v, str) else v for k, v in values.items()}
            )

    return edit


def also(key: str, **record: Any) -> Callable[[dict[str, Any]], None]:
    """Return an edit that adds a record."""
    return lambda content: content[key].append(record)


for _json, _images in (
    ("annotations/instances_{}.json", "images"), ("annotations/instances_{}.json", "{}"),
    ("Annotations/instances_{}.json", "images/{}"), ("instances_{}.json", "images"), ("{}.json", "images"),
    ("{}/annotations.json", "{}"), ("{}/_annotations.coco.json", "{}"), ("{}/labels.json", "{}/data"),
    ("annotations/{}_annotations.json", "images"), ("annotations/shapes_{}.json", "images"),
    ("annotations/instances_{}.json", "shapes/images"),
):  # fmt: skip
    coco_variant(f"{_json} and {_images}", _json, _images)
coco_variant(
    "with a year", splits={f"{k}2017": v for k, v in USUAL.items()}, jsons="annotations/instances_{}2017.json"
)
CASES["coco result.json"] = Case(
    lambda root: coco(root, "result.json", splits={"": range(4)}, edit=each("images", file_name="images/{}")),
    ALL,
)
coco_variant("byte order mark", start=BOM)
for _name in ("images\\{}", "https://example.org/data/{}?key=1", "/content/data/images/{}", "./images/{}",
              "../../data/{}", "C:\\data\\{}", "/data/local-files/?d=images/{}", "{}"):  # fmt: skip
    coco_variant(f"file_name {_name}", edit=each("images", file_name=_name))
coco_variant("sizes as text", edit=each("images", width="96", height="72"))
coco_variant("no sizes", edit=each("images", width=None, height=0))
coco_variant("ids mixed", edit=lambda content: content["categories"][1].update(id="2"))
coco_variant("group without objects", "{}/_annotations.coco.json", "{}", kinds=["category"],
             edit=lambda c: (each("categories", supercategory="shapes")(c),
                             also("categories", id=0, name="shapes", supercategory="none")(c)))  # fmt: skip
coco_variant("group of the same name", edit=also("categories", id=0, name="disc", supercategory="none"))
coco_variant("doubled annotation", kinds=["doubled"], only="test",
             edit=lambda c: c["annotations"].append(c["annotations"][0] | {"id": 999}))  # fmt: skip
coco_variant("no annotation", splits=USUAL | {"test": (1, 0)}, kinds=["no-object", "missing-class"],
             only="test", edit=lambda c: c["annotations"].clear())  # fmt: skip
_EXTRA = {"id": 900, "image_id": 1, "category_id": 1}
for _name, _more in {
    "empty bbox": {"bbox": []}, "no bbox": {}, "bbox of five": {"bbox": [1, 1, 9, 9, 30]},
    "bbox of texts": {"bbox": ["1", "1", "9", "9"]}, "bbox of bools": {"bbox": [True, True, 9, 9]},
    "bbox a text": {"bbox": "1199"}, "bbox NaN": {"bbox": [1, 1, float("nan"), 9]},
    "bbox huge": {"bbox": [1, 1, 10**400, 9]}, "bbox nested": {"bbox": [[1], 1, 9, 9]},
    "image unknown": {"bbox": [1, 1, 9, 9], "image_id": 555},
    "image a list": {"bbox": [1, 1, 9, 9], "image_id": []},
    "category a list": {"bbox": [1, 1, 9, 9], "category_id": []},
    "category a bool": {"bbox": [1, 1, 9, 9], "category_id": True},
    "crowd a text": {"bbox": [1, 1, 9, 9], "iscrowd": "no"},
}.items():  # fmt: skip
    coco_variant(_name, kinds=["malformed"], only="train", edit=also("annotations", **_EXTRA | _more))
for _name, _edit in {
    "id twice": also("images", id=1, file_name="im1.jpg"),
    "id a list": also("images", id=[], file_name="im1.jpg"),
    "file_name a number": also("images", id=9, file_name=5),
    "category null": also("categories", id=9, name=None),
    "category twice": also("categories", id=1, name="ring"),
    "no images": lambda c: c.pop("images"),
    "images a mapping": lambda c: c.update(images={}),
    "names twice": lambda c: c["categories"][1].update(name="disc"),
}.items():  # fmt: skip
    coco_variant(
        _name, kinds=["split", "empty-split"], only="train", edit=_edit, splits=USUAL | {"train": (0, 0)}
    )
coco_variant("width NaN", kinds=["labels"], only="train", splits=USUAL | {"train": (1, 2)},
             edit=lambda c: c["images"][0].update(width=float("nan")))  # fmt: skip


@case("coco one JSON", splits={"train": (2, 4)})
def _(root: Path) -> Path:
    coco(root)
    return root / "annotations" / "instances_train.json"


@case("coco other files", "unused")
def _(root: Path) -> None:
    coco(root)
    write(root / "annotations/settings.json", '{"colours": {"disc": "red"}}')
    write(root / "annotations/._instances_train.json", APPLE_DOUBLE)
    write(root / "annotations/captions_train.json", "{}")


@case("coco broken JSON", "split", "empty-split", splits=USUAL | {"val": (0, 0)})
def _(root: Path) -> None:
    coco(root)
    write(root / "annotations/instances_val.json", "[" * 5000)


@case("coco turned box", same=False)
def _(root: Path) -> None:
    coco(root, edit=each("annotations", attributes={"rotation": 30.0}))


@case("coco polygon without bbox", splits=USUAL | {"train": (2, 5)}, same=False)
def _(root: Path) -> None:
    coco(root, only="train", edit=also("annotations", **_EXTRA, segmentation=[[5, 6, 40, 6, 40, 36]]))


@case("coco two suffixes", splits=USUAL | {"train": (3, 4)})
def _(root: Path) -> None:
    coco(root, only="train", edit=also("images", id=50, file_name="im0.png", width=WIDTH, height=HEIGHT))
    picture(root / "images" / "im0.png", 9)


@case("coco equal names in each split")
def _(root: Path) -> None:
    coco(root, "{}/_annotations.coco.json", "{}")
    for split, i in (("val", 2), ("test", 3)):
        change(root / split / "_annotations.coco.json", f"im{i}.jpg", "im0.jpg")
        (root / split / f"im{i}.jpg").rename(root / split / "im0.jpg")


@case("coco categories in another order")
def _(root: Path) -> None:
    def turn(content: dict[str, Any]) -> None:
        each("categories", id=None)(content)
        for record, number in zip(content["categories"], (2, 1), strict=True):
            record["id"] = number
        for record in content["annotations"]:
            record["category_id"] = 3 - record["category_id"]

    coco(root, only="val", edit=turn)


@case("coco image only in another split", "image", splits=USUAL | {"train": (1, 2)})
def _(root: Path) -> None:
    coco(root, "{}/_annotations.coco.json", "{}")
    (root / "train/im0.jpg").rename(root / "val/im0.jpg")


# --- YOLO --------------------------------------------------------------------------------------------------


def yolo_rows(i: int) -> str:
    """Return the label file of image `i`."""
    return "".join(
        f"{CLASSES.index(name)} {(x1 + x2) / 2 / WIDTH!r} {(y1 + y2) / 2 / HEIGHT!r} {(x2 - x1) / WIDTH!r} "
        f"{(y2 - y1) / HEIGHT!r}\n"
        for name, (x1, y1, x2, y2) in objects(i)
    )


def yolo(
    root: Path,
    images: str = "{}/images",
    labels: str = "{}/labels",
    *,
    entry: str | None = "{}/images",
    names: str = "[disc, bar]",
    more: str = "",
    line: str | None = None,
    start: bytes = b"",
) -> None:
    """Write a YOLO data set; `line` is that of lists of images, which are written where it is given."""
    for split, numbers in SPLITS.items():
        for i in numbers:
            picture(root / images.format(split) / f"im{i}.jpg", i)
            write(root / labels.format(split) / f"im{i}.txt", start + yolo_rows(i).encode())
        if line is not None:
            text = "".join(line.format(split, i) + "\n" for i in numbers)
            write(root / f"{split}.txt", start + text.encode())
    if entry is not None:
        rows = "".join(f"{split}: {entry.format(split)}\n" for split in SPLITS)
        write(root / "data.yaml", f"{rows}names: {names}\n{more}")


def yolo_variant(case_name: str, splits: Mapping[str, tuple[int, int]] = USUAL, /, **how: Any) -> None:
    CASES[f"yolo {case_name}"] = Case(lambda root: yolo(root, **how), splits)


yolo_variant("plain")
for _images, _labels, _entry in (
    ("images/{}", "labels/{}", "images/{}"), ("{}/Images", "{}/Labels", "{}/Images"), ("{}", "{}", "{}"),
    ("{}", "labels/{}", "{}"), ("images/{}/more", "labels/{}/more", "images/{}"), ("{}", "{}/labels", "{}"),
):  # fmt: skip
    yolo_variant(f"{_images} and {_labels}", images=_images, labels=_labels, entry=_entry)
for _entry in ("{}\\images", "C:\\Users\\me\\shapes\\{}\\images", "/content/shapes/{}/images", "../{}/images",
               "./{}/images", "[{}/images]"):  # fmt: skip
    yolo_variant(f"entry {_entry}", entry=_entry)
for _line in (
    "{}\\images\\im{}.jpg",
    "/content/shapes/{}/images/im{}.jpg",
    "./{}/images/im{}.jpg",
    '"{}/images/im{}.jpg"',
):
    yolo_variant(f"list of {_line}", entry="{}.txt", line=_line)
yolo_variant("byte order mark", entry="{}.txt", line="{}/images/im{}.jpg", start=BOM)
yolo_variant("further keys", more="author: me\nlicense: AGPL-3.0\nversion: 1.0\nnc: 2\ncolors: [red, blue]\n")
yolo_variant("path of another machine", more="path: /content/shapes\n")
for _names in ('{{"0": disc, "1": bar}}', "{1: bar, 0: disc}", "\n- disc\n- bar"):
    yolo_variant(f"names {_names!r}", names=_names.replace("{{", "{").replace("}}", "}"))


@case("yolo names that YAML converts", same=False, words=("yes", "1e3"))
def _(root: Path) -> None:
    yolo(root, names="[yes, 1e3]")


@case("yolo two YAMLs")
def _(root: Path) -> None:
    yolo(root)
    (root / "data.yaml").rename(root / "shapes.yaml")
    write(root / "augment.yaml", "hsv: 0.1\n")


@case("yolo one YAML")
def _(root: Path) -> Path:
    yolo(root)
    write(root / "other.yaml", "names: [x]\n")
    return root / "data.yaml"


for _file in ("classes.txt", "obj.names", "labels/classes.txt", "_darknet.labels"):

    @case(f"yolo without YAML, {_file}", splits=ALL)
    def _(root: Path, file: str = _file) -> None:
        yolo(root, "images", "labels", entry=None)
        write(root / file, "disc\nbar\n")


@case("yolo without YAML, all in one folder", splits=ALL)
def _(root: Path) -> None:
    yolo(root, ".", ".", entry=None)
    write(root / "classes.txt", "disc\nbar\n")


@case("yolo labels in another case")
def _(root: Path) -> None:
    yolo(root)
    (root / "train/labels/im0.txt").rename(root / "train/labels/IM0.TXT")


@case("yolo without YAML, beside images in split folders")
def _(root: Path) -> None:
    yolo(root, "{}", "{}", entry=None)
    for split in SPLITS:
        write(root / split / "_darknet.labels", "disc\nbar\n")


@case("yolo darknet", splits={"train": (2, 4), "valid": (1, 2)})
def _(root: Path) -> None:
    yolo(root, "obj_{}_data", "obj_{}_data", entry=None, line="data/obj_{}_data/im{}.jpg")
    write(root / "obj.names", "disc\nbar\n")
    pairs = (
        "classes = 2\ntrain = data/train.txt\nvalid=data/val.txt\nnames = data/obj.names\nbackup = backup/\n"
    )
    write(root / "obj.data", pairs)


@case("yolo linked folder", splits=USUAL | {"train": (3, 6)})
def _(root: Path) -> None:
    yolo(root)
    picture(root / "elsewhere" / "im9.jpg", 9)
    write(root / "train/labels/more/im9.txt", yolo_rows(9))
    (root / "train/images/more").symlink_to("../../elsewhere")


@case("yolo link out and a loop", "link", "orphan")
def _(root: Path) -> None:
    yolo(root / "set")
    picture(root / "secret" / "im9.jpg", 9)
    write(root / "set/train/labels/im9.txt", yolo_rows(9))
    (root / "set/train/images/im9.jpg").symlink_to("../../../secret/im9.jpg")
    (root / "set/train/images/round").symlink_to("..")
    return root / "set"


@case("yolo doubled rows", "doubled", words=("im0.txt: line 3 (disc) of image 'im0' repeats line 1",))
def _(root: Path) -> None:
    yolo(root)
    for file in root.glob("*/labels/*"):
        write(file, file.read_bytes() * 2)


@case("yolo image without labels", "unlabelled", splits=USUAL | {"train": (2, 2)}, same=False)
def _(root: Path) -> None:
    yolo(root)
    (root / "train/labels/im0.txt").unlink()


@case("yolo labels elsewhere", "no-labels", "empty-split", splits=dict.fromkeys(SPLITS, (0, 0)))
def _(root: Path) -> None:
    yolo(root, labels="boxes of {}")


@case(
    "yolo labels of another split only", "no-labels", "empty-split", "orphan", splits=USUAL | {"val": (0, 0)}
)
def _(root: Path) -> None:
    yolo(root)
    (root / "val/labels/im2.txt").rename(root / "test/labels/im2.txt")


@case("yolo empty labels", "missing-class", "no-object", splits=USUAL | {"train": (2, 0)})
def _(root: Path) -> None:
    yolo(root)
    for file in root.glob("train/labels/*"):
        write(file, "")


@case("yolo equal names in each split")
def _(root: Path) -> None:
    yolo(root)
    for split, i in (("val", 2), ("test", 3)):
        for file in (root / split / "images" / f"im{i}.jpg", root / split / "labels" / f"im{i}.txt"):
            file.rename(file.with_name(f"im0{file.suffix}"))


@case("yolo poses", same=True)
def _(root: Path) -> None:
    yolo(root, more="kpt_shape: [4, 2]\n")
    for file in root.glob("*/labels/*"):
        rows = [f"{row} 0.1 0.1 0.9 0.9 0 0 0.2 0.9\n" for row in file.read_text().splitlines()]
        write(file, "".join(rows))


@case("yolo turned boxes", same=False)
def _(root: Path) -> None:
    yolo(root)
    write(root / "train/labels/im0.txt", "0 .2 .1 .4 .2 .3 .5 .1 .4\n1 .5 .5 .9 .5 .9 .9\n")


@case("yolo rows of predictions", "malformed", splits=USUAL | {"train": (2, 2)}, same=False)
def _(root: Path) -> None:
    yolo(root)
    file = root / "train/labels/im0.txt"
    write(file, "".join(f"{row} 0.9\n" for row in file.read_text().splitlines()))


@case("yolo val is train", "leakage", splits={"train": (2, 4), "val": (2, 4)})
def _(root: Path) -> None:
    yolo(root)
    write(root / "data.yaml", "train: train/images\nval: train/images\nnames: [disc, bar]\n")


@case("yolo test missing", "split", "empty-split", splits=USUAL | {"test": (0, 0)})
def _(root: Path) -> None:
    yolo(root)
    shutil.rmtree(root / "test")


# --- Archives and mixtures ---------------------------------------------------------------------------------


def zipped(folder: Path, top: str = "") -> Path:
    """Return a zip archive of a folder, beside it."""
    target = folder.with_name("shapes.zip")
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, top + file.relative_to(folder).as_posix())
    return target


for _name, _make in {"voc": voc, "coco": coco, "yolo": yolo}.items():

    @case(f"{_name} zipped")
    def _(root: Path, make: Callable[..., None] = _make) -> Path:
        make(root / "set")
        write(root / "set/readme.md", "no label")
        return zipped(root / "set", "shapes/")


@case("voc and coco", "unused")
def _(root: Path) -> None:
    voc(root)
    coco(root, "coco/instances_{}.json", "JPEGImages")

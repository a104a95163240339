from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from rcnn_svm.errors import ConfigError
from rcnn_svm.report.html import write_html_report
from rcnn_svm.report.tables import LOCALISATION

VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """Collects what the tests ask about and checks that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.ids, self.text = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(values)
        if "href" in values:
            self.links.append(values["href"])
        if "id" in values:
            self.ids.append(values["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "pre"):
            self.text.append(data)


def write(folder, comparison, **changes):
    parts = {
        name: getattr(comparison, name) for name in ("metrics", "evals", "detections", "dataset", "bootstrap")
    } | changes
    return write_html_report(folder, **parts)


@pytest.fixture(scope="module")
def text(comparison, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("report"), comparison, config={"seed": 0, "list": ["<b>"]})
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_self_contained(text):
    page = Page(text)
    assert page.open == []
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert all(image["src"].startswith("data:image/") for image in page.images)
    without_data = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?://|url\(|@import|<script|<link", without_data)


def test_every_picture_says_what_it_shows(text):
    images = Page(text).images
    assert len(images) > 15
    assert all(len(image["alt"]) > 15 for image in images)
    for image in images:
        if "jpeg" in image["src"][:30]:
            data = base64.b64decode(image["src"].split(",")[1])
            with Image.open(io.BytesIO(data)) as picture:
                assert picture.size == (int(image["width"]), int(image["height"]))


def test_names_are_escaped(text):
    assert "<head>" not in text.replace("<head>\n<meta", "")
    assert "im<" not in text
    assert "my&lt;head&gt;" in text
    assert "cat &amp; dog" in text


def test_names_are_never_markup(build_comparison, tmp_path):
    """Whatever names classes, images and heads have: they are text, in attributes and between tags."""
    evil = "\"'><script>x</script>&amp;"
    made = build_comparison(
        {evil: 0.9, f"{evil}+bbox": 0.5, "b": 0.4}, classes=(evil, "car", "ghost"), image_id=evil + "{}"
    )
    for key in ("experiment", "dataset", "train_split", "test_split"):
        made.metrics[key] = evil
    made.metrics["provenance"] = {**made.metrics["provenance"], "command": evil, "versions": {evil: evil}}
    made.metrics["heads"]["b"]["measures"] = {evil: 1.0}
    text = write(tmp_path, made, config={evil: {evil: evil}}).read_text(encoding="utf-8")
    assert "<script" not in text
    page = Page(text)
    words = "".join(page.text)
    assert page.open == []
    assert evil in words.replace("−", "-")
    assert f"{evil}3" in words
    assert all(set(image) <= {"alt", "src", "width", "height"} for image in page.images)
    assert any(f"on image {evil}3: " in image["alt"] for image in page.images)


def test_page_tells_the_finding_first(text, comparison):
    words = " ".join(Page(text).text)
    best = max(comparison.evals, key=lambda name: comparison.evals[name].map())
    headline = words.index("wins with") if "wins with" in words else words.index("No clear winner")
    assert headline < words.index("Heads by mean average precision")
    assert f"Best and worst images of {best}" in words
    summary = comparison.cocos[best].summary()
    assert f"an AP50 of {100 * summary['AP50']:.1f} and an AP75 of {100 * summary['AP75']:.1f}." in words
    for part in (
        LOCALISATION,
        "COCO AP",
        "Missed objects",
        "Configuration and provenance",
        "abc",
        "4.2 min",
        "1,234",
    ):
        assert part in words


def test_pages_of_little(build_comparison, tmp_path):
    one = write(tmp_path / "one", build_comparison({"a": 0.5}))
    assert "There is no other head to compare it with." in one.read_text()
    nothing = write(tmp_path / "nothing", build_comparison({"a": 0.5, "b": 0.5}, objects=False))
    assert "The test split has no objects: there is nothing to measure." in nothing.read_text()
    older = build_comparison({"a": 0.5, "b": 0.5})
    for head in older.metrics["heads"].values():
        del head["coco"]
    assert "AP75" not in write(tmp_path / "older", older).read_text()
    assert not re.search(r"\bnan\b", " ".join(Page(nothing.read_text()).text), re.IGNORECASE)


def test_messages(comparison, tmp_path):
    fewer = {name: found for name, found in comparison.detections.items() if name != "rbf-svm"}
    with pytest.raises(ConfigError, match=r"^write_html_report: detections must be of the heads .*, got "):
        write(tmp_path, comparison, detections=fewer)
    short = comparison.detections | {"rbf-svm": comparison.detections["rbf-svm"][:3]}
    with pytest.raises(
        ConfigError,
        match=r"^write_html_report: head 'rbf-svm' must have results for the 14 images of made up, got 3\.$",
    ):
        write(tmp_path, comparison, detections=short)
    assert list(tmp_path.iterdir()) == []

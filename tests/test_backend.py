"""`rcnn-svm label-studio`: a server on a free port, asked as Label Studio asks."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rcnn_svm import load_detector
from rcnn_svm.cli import backend, main
from rcnn_svm.config import to_dict
from rcnn_svm.datasets import SplitRecord, load_splits, write_dataset
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.evaluation.thresholds import Thresholds
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig
from rcnn_svm.experiment.parts import Run
from rcnn_svm.formats import confidences
from rcnn_svm.heads.scorers import SoftmaxScorer
from rcnn_svm.label_studio import MOST_BYTES, Backend, LabelConfig, LabelStudio, Served, is_loopback, serve
from rcnn_svm.structures import Sample
from tests.campaign.scene import CLASSES, SIZE, picture, save_detector, tiny_dataset

CONFIG = (
    '<View><Image name="photo" value="$picture"/><RectangleLabels name="box" toName="photo">'
    '<Label value="cat"/><Label value="dog"/><Label value="bird"/></RectangleLabels></View>'
)


def task(number: int, path: str, **more: Any) -> dict[str, Any]:
    return {"id": number, "data": {"picture": f"/data/local-files/?d={quote(path)}"}, **more}


def region(label: str = "cat", **more: Any) -> dict[str, Any]:
    value = {"x": 7.8125, "y": 12.5, "width": 39.0625, "height": 70.8333, "rotation": 0}
    return {
        "type": "rectanglelabels",
        "from_name": "box",
        "value": {**value, "rectanglelabels": [label], **more},
    }


def labelled(number: int, path: str, *regions: Any) -> dict[str, Any]:
    skipped = {"was_cancelled": True, "result": [region("nonsense")]}
    return task(number, path, annotations=[{"result": list(regions)}, skipped])


@dataclass
class World:
    """A detector in a folder, with its data and photographs, and what trains it."""

    folder: Path
    detector: Path
    photos: Path
    train: Callable[..., Served]

    def backend(self, train: Any = None, exported: Any = ()) -> Backend:
        served = backend._served(load_detector(self.detector), self.detector)
        return Backend(served, self.photos, train or self.train, lambda project: exported)


@pytest.fixture
def world(tmp_path: Path) -> World:
    detector, data, photos = tmp_path / "detector", tmp_path / "voc", tmp_path / "photos"
    save_detector(detector)
    write_dataset((tiny_dataset("train", 3), tiny_dataset("val", 2), tiny_dataset("test", 2)), data)
    config = ExperimentConfig(data=DataConfig(path=str(data)))
    (detector / "config.json").write_text(json.dumps(to_dict(config, finite=True)))
    splits = load_splits(data)
    SplitRecord.of(splits, seed=0).write(detector)
    photos.mkdir()
    for i in range(2):
        Image.fromarray(picture(i)).save(photos / f"a b{i}.png")
    shutil.copy(splits.test.samples[0].path, photos / "held.png")
    loaded = load_detector(detector)
    return World(
        tmp_path,
        detector,
        photos,
        backend._Corrected(detector, tmp_path / "out", loaded, None, Run(tmp_path / "cache")),
    )


@dataclass
class Server:
    port: int

    def ask(self, path: str, content: Any = None, **headers: str) -> tuple[int, Any]:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            body = None if content is None else json.dumps(content)
            words = {"Content-Type": "application/json", **headers}
            link.request("GET" if content is None else "POST", path, body, words)
            answer = link.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            link.close()

    def ask_raw(self, **headers: str) -> tuple[int, Any]:
        """Send the head of a request alone."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            link.putrequest("POST", "/predict")
            for name, value in headers.items():
                link.putheader(name.replace("_", "-"), value)
            link.endheaders()
            answer = link.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            link.close()


@pytest.fixture
def server(world: World) -> Iterator[Server]:
    with serve(world.backend(), "127.0.0.1", 0) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Server(made.server_port)
        finally:
            made.shutdown()
            thread.join()


def test_it_predicts_what_the_detector_finds_then_learns_corrections_and_predicts_anew(
    world: World, server: Server
) -> None:
    before = load_detector(world.detector)
    assert server.ask("/health") == (200, {"status": "UP", "model_class": "linear-svm+bbox"})
    code, set_up = server.ask("/setup", {"project": "1.2", "schema": CONFIG})
    assert code == 200
    asked = {"tasks": [task(1, "a b0.png"), task(2, "a b1.png")], "label_config": CONFIG, "project": "1.2"}
    code, answer = server.ask("/predict", asked)
    assert code == 200
    assert len(answer["results"]) == 2
    for i, made in enumerate(answer["results"]):
        found = before.thresholds.believed(before.detect(picture(i)))
        assert made["model_version"] == set_up["model_version"]
        assert [one["value"]["rectanglelabels"][0] for one in made["result"]] == [
            CLASSES[k] for k in found.labels
        ]
        np.testing.assert_allclose(
            [one["score"] for one in made["result"]], confidences(found), rtol=1e-3, atol=1e-3
        )
        first = made["result"][0]
        assert (first["from_name"], first["to_name"]) == ("box", "photo")
        corner = np.array([first["value"]["x"] * SIZE[1], first["value"]["y"] * SIZE[0]]) / 100
        np.testing.assert_allclose(corner, found.boxes[0, :2], atol=1e-2)

    tasks = [
        labelled(1, "a b0.png", region(), {"type": "choices", "value": {"choices": ["x"]}}),
        labelled(2, "a b1.png", region("dog")),
        task(3, "a b1.png", annotations=[]),
        labelled(4, "held.png", region()),
    ]
    code, trained = server.ask("/train", {"annotations": tasks, "label_config": CONFIG})
    assert (code, trained.get("error")) == (200, None)
    assert trained["model_version"] != set_up["model_version"]
    after = load_detector(world.folder / "out")
    assert (after.model.scorer.coef != before.model.scorer.coef).any(axis=1).all()
    np.testing.assert_array_equal(after.model.regressor.coef_, before.model.regressor.coef_)
    np.testing.assert_array_equal(after.thresholds.scores, before.thresholds.scores)
    assert after.calibration is None
    assert np.isnan(after.thresholds.precision).all()
    assert after.info["relearned"] == {"n_images": 7, "n_corrected": 2}  # the one held out is left out
    assert "2 of them corrected in Label Studio" in (world.folder / "out" / "README.md").read_text()
    record = SplitRecord.read(world.folder / "out")
    assert list(record.added[0].parts["train"]) == ["label-studio/a b0.png", "label-studio/a b1.png"]
    assert len(record.parts["test"]) == 2
    assert (world.folder / "out" / "config.json").exists()
    code, answer = server.ask("/predict", asked)
    assert answer["model_version"] == trained["model_version"]
    believed = after.thresholds.believed(after.detect(picture(0)))
    assert len(answer["results"][0]["result"]) == len(believed) > 0


def test_the_classes_of_a_project_alone_are_shown_and_thresholds_held(world: World) -> None:
    detector = load_detector(world.detector)
    ones = np.ones(3)
    middle = np.float32(np.median(detector.detect(picture(0)).scores))
    chosen = Thresholds(CLASSES, np.full(3, middle), ones, ones, np.ones(3, np.int64), 3)
    config = CONFIG.replace('<Label value="dog"/>', "")
    asked = Backend(
        Served(replace(detector, thresholds=chosen), "v"), world.photos, world.train, lambda project: ()
    )
    (made,) = asked.predict({"tasks": [task(1, "a b0.png")], "label_config": config})["results"]
    found = detector.detect(picture(0))
    shown = [CLASSES[k] for k, s in zip(found.labels, found.scores, strict=True) if s >= middle and k != 1]
    assert [one["value"]["rectanglelabels"][0] for one in made["result"]] == shown
    assert shown


@pytest.mark.parametrize(
    "path",
    ["../detector/detector.json", "/etc/passwd", "out.png", "a\0b", "..", "%2e%2e/voc", "x" * 5000],
)
def test_no_file_outside_of_the_root_is_read(world: World, path: str) -> None:
    (world.photos / "out.png").symlink_to(world.detector / "detector.json")
    asked = {"tasks": [task(7, path)], "label_config": CONFIG}
    with pytest.raises((ConfigError, DataError)) as caught:
        world.backend().predict(asked)
    outside = path not in ("%2e%2e/voc", "x" * 5000)  # these name files that are not there
    assert ("task 7" in str(caught.value) and "must lie below" in str(caught.value)) == outside


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(st.sampled_from(["..", ".", "a", "/", "in", "up", "\0"]), max_size=6))
def test_whatever_a_path_is_made_of_it_stays_below_the_root(
    steps: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp() / "tree"
    root = base / "root"
    (root / "in").mkdir(parents=True, exist_ok=True)
    if not (root / "up").is_symlink():
        (root / "up").symlink_to(base)
        for folder in (base, root, root / "in"):
            Image.fromarray(picture(0)).save(folder / "a", format="PNG")
    path = "/".join(steps)
    asked = Backend(Served(None, "v"), root, None, None)  # type: ignore[arg-type]
    try:
        sample = asked._sample(task(1, path), LabelConfig("box", "photo", "picture", CLASSES))
    except (ConfigError, DataError):
        sample = None
    wanted = None if "\0" in path else (root / path).resolve()
    allowed = wanted is not None and wanted.is_file() and wanted.is_relative_to(root.resolve())
    assert (sample is not None) == allowed
    assert sample is None or sample.path == wanted


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("/data/upload/1/a.png", "uploaded files and other addresses are not read"),
        ("http://127.0.0.1/a.png", "uploaded files and other addresses are not read"),
        (None, "got None"),
        ("/data/local-files/?d=absent.png", "absent.png: no such image file."),
    ],
)
def test_what_is_no_image_here_is_a_sentence(world: World, address: Any, sentence: str) -> None:
    asked = {"tasks": [{"id": 7, "data": {"picture": address}}], "label_config": CONFIG}
    with pytest.raises((ConfigError, DataError), match=sentence):
        world.backend().predict(asked)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "must be the XML of a project's labelling interface, got None"),
        ("<View", "must be the XML"),
        ("<View/>", "must have RectangleLabels whose toName is an Image"),
        (CONFIG.replace("$picture", "fixed"), "must have RectangleLabels whose toName is an Image"),
        (CONFIG.replace('"dog"', '"wolf"'), r"\(cat, dog, bird\), got wolf\. Rename or remove them"),
        (CONFIG.replace("Label ", "Other "), "got none"),
    ],
)
def test_a_label_config_that_the_detector_cannot_serve_is_a_sentence(text: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LabelConfig.parse(text, CLASSES)


def test_requests_that_are_none_are_refused(server: Server) -> None:
    kind = {"Content_Type": "application/json"}
    for code, sentence, answer in (
        (413, "at most 16 MB", server.ask_raw(**kind, Content_Length=str(MOST_BYTES + 1))),
        (413, "at most 16 MB", server.ask_raw(**kind, Content_Length="9" * 5000)),
        (411, "must state its Content-Length", server.ask_raw(**kind)),
        (411, "must state its Content-Length", server.ask_raw(**kind, Content_Length="-1")),
        (415, "must be of type application/json", server.ask_raw(Content_Type="text/plain")),
        (404, "/nothing: is not known", server.ask("/nothing", {})),
        (404, "/nothing: is not known", server.ask("/nothing")),
        (400, "must be a JSON object, got list", server.ask("/predict", [])),
        (400, "tasks: must be a list", server.ask("/predict", {"label_config": CONFIG})),
        (400, "label_config: must be the XML", server.ask("/setup", {})),
    ):
        assert answer[0] == code
        assert sentence in answer[1]["error"]


@pytest.mark.parametrize(
    ("regions", "sentence"),
    [
        ([region(rotation=10)], "task 1: must hold upright rectangles alone, .* turned"),
        ([{"type": "polygonlabels", "value": {}}], "got a region of type polygonlabels"),
        ([region(x=None)], "must hold upright rectangles alone"),
        ([region(x=float("nan"))], "must hold upright rectangles alone"),
        ([region("wolf")], r"must have one of the labels cat, dog, bird, got \['wolf'\]"),
        ([region(x=101)], "every rectangle must lie in the image"),
    ],
)
def test_labels_that_cannot_be_learned_from_are_a_sentence(world: World, regions: Any, sentence: str) -> None:
    asked = {"annotations": [labelled(1, "a b0.png", *regions)], "label_config": CONFIG}
    with pytest.raises(DataError, match=sentence):
        world.backend().train(asked)
    assert not (world.folder / "out").exists()


def test_labels_are_read_as_pixels_and_fetched_when_training_is_started(world: World) -> None:
    seen: list[Sample] = []

    def train(samples: Any) -> Served:
        seen.extend(samples)
        return Served(load_detector(world.detector), "new")

    asked = world.backend(train, [labelled(1, "a b0.png", region("dog", width=900)), labelled(2, "a b1.png")])
    project = {"id": 5, "label_config": CONFIG}
    assert asked.webhook({"action": "ANNOTATION_CREATED", "project": project}) == {"status": "noted"}
    assert asked.webhook({"action": "PROJECT_UPDATED"}) == {"status": "ignored"}
    assert not seen
    done = asked.webhook({"action": "START_TRAINING", "project": project})
    assert (done["model_version"], done["n_images"]) == ("new", 2)
    np.testing.assert_allclose(seen[0].truth.boxes, [[5, 6, 64, 40]], atol=1e-3)
    assert seen[0].truth.labels.tolist() == [1]
    assert len(seen[1].truth) == 0  # submitted without an object: all of it is background
    with pytest.raises(ConfigError, match="must have a number as its id"):
        asked.webhook({"action": "START_TRAINING", "project": {}})
    with pytest.raises(DataError, match="must hold a labelled task"):
        asked.train({"annotations": [task(1, "a b0.png")], "label_config": CONFIG})
    twice = [labelled(1, "a b0.png"), labelled(2, "a b0.png")]
    with pytest.raises(DataError, match=r"task 2: is of the same image as another, a b0\.png"):
        asked.train({"annotations": twice, "label_config": CONFIG})


def test_one_training_at_a_time(world: World) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def train(samples: Any) -> Served:
        begun.set()
        assert go_on.wait(30)
        return Served(load_detector(world.detector), "new")

    asked = world.backend(train)
    work = {"annotations": [labelled(1, "a b0.png", region())], "label_config": CONFIG}
    first = threading.Thread(target=asked.train, args=(work,))
    first.start()
    assert begun.wait(30)
    with pytest.raises(ConfigError, match="Training is under way"):
        asked.train(work)
    go_on.set()
    first.join()
    assert asked.setup({"schema": CONFIG}) == {"model_version": "new"}


def test_heads_that_share_what_was_learned_are_not_trained(world: World) -> None:
    detector, draw = load_detector(world.detector), np.ones((4, 12), np.float32)
    softmax = replace(
        detector, head="softmax-refit", model=replace(detector.model, scorer=SoftmaxScorer(draw, draw[:, 0]))
    )
    joined = replace(detector, info={"added": [{}]})
    for one, sentence in (
        (softmax, "this detector's head is softmax-refit"),
        (joined, "classes have joined"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            replace(world.train, detector=one)(())  # type: ignore[type-var]


def test_labels_come_from_label_studio_with_a_key(world: World) -> None:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            key = self.headers["Authorization"]
            text = b'{"access": "short"}' if self.path == "/api/token/refresh" else b'[{"id": 1}]'
            right = key in ("Token 0123", "Bearer short") or "refresh" in self.path
            self.send_response(200 if right else 401)
            self.end_headers()
            self.wfile.write(b"[" if self.path.startswith("/api/projects/6/") else text)

        do_GET = do_POST = answer

        def log_message(self, format: str, *words: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stub:
        thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{stub.server_port}/"
        try:
            for key in ("0123", "a.b.c"):
                assert LabelStudio(url, key).labelled(5) == [{"id": 1}]
            with pytest.raises(DataError, match="answers 401 Unauthorized"):
                LabelStudio(url, "wrong").labelled(5)
            with pytest.raises(DataError, match="must be JSON"):
                LabelStudio(url, "0123").labelled(6)
        finally:
            stub.shutdown()
            thread.join()
    with pytest.raises(DataError, match="does not answer"):
        LabelStudio(url, "0123").labelled(5)
    with pytest.raises(ConfigError, match="LABEL_STUDIO_API_KEY: must hold"):
        LabelStudio(url, "").labelled(5)
    with pytest.raises(ConfigError, match="must begin with http"):
        LabelStudio("file:///etc/passwd", "")


def test_nothing_listens_elsewhere_unless_a_host_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bound: list[Any] = []

    def stopped(server: Any) -> None:
        bound.append(server.socket.getsockname())
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", stopped)
    words = ["label-studio", str(world.detector), "--port", "0", "--root", str(world.photos)]
    assert main(words) == 130
    said = capsys.readouterr().err
    assert f"Listening on http://127.0.0.1:{bound[0][1]}" in said
    assert "Other machines" not in said
    assert main([*words, "--host", "0.0.0.0"]) == 130
    assert "Other machines may reach it" in capsys.readouterr().err
    assert [name for name, _ in bound] == ["127.0.0.1", "0.0.0.0"]
    assert [is_loopback(host) for host in ("::1", "localhost", "0.0.0.0", "a.test")] == [
        True,
        True,
        False,
        False,
    ]


def test_a_server_that_cannot_start_says_why(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["label-studio", str(world.detector), "--root", str(world.photos)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*words, "--port", str(port)]) == 2
        assert f"127.0.0.1:{port}: cannot be listened on (Address already in use)" in capsys.readouterr().err
    for more, code, sentence in (
        (["--port", "65536"], 2, "--port must be 0 to 65535, got 65536."),
        (["--port", "0", "--host", "192.0.2.1"], 2, "192.0.2.1:0: cannot be listened on"),
        (["--root", str(world.folder / "no")], 3, "must be the folder of the images (--root), is none."),
        (["--url", "ftp://x"], 2, "--url must begin with http:// or https://"),
    ):
        assert main([*words, *more]) == code
        assert sentence in capsys.readouterr().err
    assert main(["label-studio", str(world.photos), "--port", "0"]) == 3
    assert "holds no trained detector" in capsys.readouterr().err

"""`scripts/label_studio.py` against a server that answers as Label Studio 1.23 does."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rcnn_svm.datasets import image_size, load_dataset, read_image
from rcnn_svm.formats import LabelStudioWriter
from rcnn_svm.structures import Detections, GroundTruth, Sample

SCRIPT = Path(__file__).parents[1] / "scripts" / "label_studio.py"


class Stub:
    """What was asked of the server, and the COCO export that it gives."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.export: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                content = json.loads(self.rfile.read(size)) if size else None
                stub.asked.append((self.command, self.path, content))
                reply, code = stub.reply(self.path, self.headers["Authorization"])
                self.send_response(code)
                self.end_headers()
                self.wfile.write(reply)

            do_GET = do_POST = do_PATCH = answer

            def log_message(self, format: str, *words: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def reply(self, path: str, key: str | None) -> tuple[bytes, int]:
        if path == "/api/token/refresh":
            return b'{"access": "short"}', 200
        if key not in ("Token 0123", "Bearer short"):
            return b'{"detail": "Invalid token."}', 401
        if "/export" in path:
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w") as archive:
                archive.writestr("result.json", json.dumps(self.export))
            return packed.getvalue(), 200
        return b'{"id": 7}', 201


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def run(stub: Stub, *words: str | Path, key: str = "0123") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--url", stub.url, *map(str, words)]
    environment = {"LABEL_STUDIO_API_KEY": key}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


def test_detections_go_in_and_labels_come_out(stub: Stub, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(photos / "a b.png")
    path = photos / "a b.png"
    sample = Sample("a b", image_size(path), GroundTruth.empty(), path=path, reader=read_image)
    found = Detections("a b", np.array([[5, 5, 25, 35]]), np.array([1.5]), np.array([1]))
    LabelStudioWriter(tmp_path, ("cat", "dog"), "m 1", tmp_path).finish([(sample, found)])
    done = run(stub, "import", tmp_path / "labelstudio", "--images", photos, key="a.b.c")
    assert done.returncode == 0, done.stderr
    assert f"{stub.url}/projects/7/data, 1 images" in done.stdout
    _, project, storage, tasks, shown = stub.asked
    assert '<Label value="dog"/>' in project[2]["label_config"]
    assert storage[1:] == (
        "/api/storages/localfiles",
        {"project": 7, "path": str(photos), "use_blob_urls": True},
    )
    assert tasks[2][0]["data"]["image"] == "/data/local-files/?d=photos/a%20b.png"
    assert shown == ("PATCH", "/api/projects/7", {"show_collab_predictions": True, "model_version": "m 1"})
    address = "..\\..\\label-studio\\data\\local-files\\?d=photos/a%20b.png"
    stub.export = {
        "images": [{"id": 0, "width": 50, "height": 40, "file_name": address}],
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": 1, "bbox": [5, 5, 20, 30], "segmentation": []}
        ],
    }
    done = run(stub, "export", "7", "--images", photos, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (one,) = load_dataset(tmp_path / "out", "all")
    assert one.truth.boxes.tolist() == [[5, 5, 25, 35]]
    assert one.size == (40, 50)


def test_what_goes_wrong_is_a_sentence(stub: Stub, tmp_path: Path) -> None:
    words = ("export", "7", "--images", tmp_path, "--out", tmp_path / "out")
    for key, sentence in (
        ("0123", "Project 7: no image is labelled yet."),
        ("wrong", "401 Unauthorized"),
        ("", "LABEL_STUDIO_API_KEY: must hold the API key"),
    ):
        done = run(stub, *words, key=key)
        assert done.returncode == 1
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
    stub.export["images"] = [{"id": 0, "file_name": "x/?d=a.png"}]
    assert "must hold one image a.png, holds 0." in run(stub, *words).stderr

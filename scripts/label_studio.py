"""Carries detections into a running Label Studio, and corrected labels out of it (see docs/label-studio.md).

export LABEL_STUDIO_API_KEY=...                # of your account there
python scripts/label_studio.py import found/labelstudio --images photos --title fruit
python scripts/label_studio.py export 1 --images photos --out corrected
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import os
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

KEY = "LABEL_STUDIO_API_KEY"


class Server:
    """A Label Studio that runs somewhere.

    Args:
        url: of it.
        key: of an account: a personal access token, or one of the older kind.
    """

    def __init__(self, url: str, key: str) -> None:
        self._url, self._authorization = url.rstrip("/"), f"Token {key}"
        if key.count(".") == 2:  # a personal access token only asks for others, which last for minutes
            self._authorization = ""
            short = json.loads(self.ask("/api/token/refresh", {"refresh": key}))["access"]
            self._authorization = f"Bearer {short}"

    def ask(self, path: str, content: Any = None, method: str | None = None) -> bytes:
        """Return what the server answers; with content it is sent as JSON."""
        words = {"Content-Type": "application/json"}
        if self._authorization:
            words["Authorization"] = self._authorization
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._url + path, data, words, method=method)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            sys.exit(f"{self._url}{path}: {error.code} {error.reason}: {error.read().decode()[:500]}")
        except urllib.error.URLError as error:
            sys.exit(f"{self._url}: does not answer ({error.reason}). Start `label-studio` first.")


def bring_in(server: Server, options: argparse.Namespace) -> None:
    """Make a project of the images and pre-annotations that `detect --format labelstudio` wrote."""
    tasks = json.loads((options.folder / "tasks.json").read_text(encoding="utf-8"))
    config = (options.folder / "config.xml").read_text(encoding="utf-8")
    made = json.loads(server.ask("/api/projects", {"title": options.title, "label_config": config}))
    project = made["id"]
    # Label Studio shows files of folders that are a storage of the project, and no others.
    storage = {"project": project, "path": str(options.images.resolve()), "use_blob_urls": True}
    server.ask("/api/storages/localfiles", storage)
    server.ask(f"/api/projects/{project}/import", tasks)
    versions = {one["model_version"] for task in tasks for one in task["predictions"]}
    shown = {"show_collab_predictions": True, "model_version": next(iter(versions), "")}
    server.ask(f"/api/projects/{project}", shown, "PATCH")
    print(f"Project {project}: {options.url}/projects/{project}/data, {len(tasks)} images")


def take_out(server: Server, options: argparse.Namespace) -> None:
    """Write the labels of a project as COCO beside its images, as `rcnn-svm train` reads them."""
    packed = server.ask(f"/api/projects/{options.project}/export?exportType=COCO&download_resources=false")
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        content = json.loads(archive.read("result.json"))
    if not content["images"]:
        sys.exit(f"Project {options.project}: no image is labelled yet.")
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        # Such as ../../data/local-files/?d=photos/a%20b.jpg
        address = urllib.parse.unquote(image["file_name"]).replace("\\", "/")
        name = address.rpartition("?d=")[2].rpartition("/")[2]
        paths = [path for path in options.images.rglob(glob.escape(name)) if path.is_file()]
        if len(paths) != 1:
            sys.exit(f"{options.images}: must hold one image {name}, holds {len(paths)}.")
        shutil.copyfile(paths[0], options.out / "images" / name)
        image["file_name"] = f"images/{name}"
    (options.out / "result.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(f"{len(content['images'])} images, {len(content['annotations'])} boxes in {options.out}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of Label Studio")
    verbs = parser.add_subparsers(dest="verb", required=True)
    own = verbs.add_parser("import", help="pre-annotations into a new project")
    own.add_argument("folder", type=Path, help="the folder `labelstudio` that detect wrote")
    own.add_argument("--images", type=Path, required=True, help="the folder of the images")
    own.add_argument("--title", default="rcnn_svm")
    own.set_defaults(run=bring_in)
    own = verbs.add_parser("export", help="labels of a project as COCO, with images")
    own.add_argument("project", type=int, help="its number")
    own.add_argument("--images", type=Path, required=True, help="the folder of the images")
    own.add_argument("--out", type=Path, required=True)
    own.set_defaults(run=take_out)
    options = parser.parse_args()
    key = os.environ.get(KEY)
    if not key:
        sys.exit(f"{KEY}: must hold the API key of your account in Label Studio (Account & Settings).")
    options.run(Server(options.url, key), options)


if __name__ == "__main__":
    main()

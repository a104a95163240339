"""A detector as an ML backend of Label Studio: what it finds in tasks, and training on what people corrected.

The protocol is HTTP with JSON, as Label Studio 1.x speaks it: `GET /health`, `POST /setup`, `/predict`,
`/webhook` and `/train`. Images are read from one folder of this machine and from nowhere else; what is asked
of other machines is only the export of labels, of the address that the server was started with.
"""

from __future__ import annotations

import ipaddress
import json
import math
import socket
import socketserver
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import numpy as np

from rcnn_svm.boxes import area, clip
from rcnn_svm.datasets import image_size, read_image
from rcnn_svm.detector import Detector
from rcnn_svm.errors import ConfigError, DataError, RcnnSvmError
from rcnn_svm.formats import label_studio_prediction
from rcnn_svm.progress import say
from rcnn_svm.structures import GroundTruth, Sample

__all__ = ["MOST_BYTES", "Backend", "LabelConfig", "LabelStudio", "Served", "is_loopback", "serve"]

MOST_BYTES = 16 * 2**20
"""A larger request is refused."""
_MOST_EXPORTED = 256 * 2**20
_LOCAL = "/data/local-files/"
_PATIENCE_S = 60
_CHANGES = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATION_DELETED")


class Served(NamedTuple):
    """A detector, and the name by which Label Studio tells its predictions from those of another.

    Attributes:
        detector: finds objects.
        version: `model_version`.
    """

    detector: Detector
    version: str


@dataclass(frozen=True)
class LabelConfig:
    """What a project's labelling interface calls things.

    Attributes:
        label: name of its `RectangleLabels`.
        image: name of the `Image` that they are drawn on.
        key: of a task's data, where the address of the image stands.
        classes: its labels, all known to the detector.
    """

    label: str
    image: str
    key: str
    classes: tuple[str, ...]

    @classmethod
    def parse(cls, text: Any, known: Sequence[str]) -> LabelConfig:
        """Read a labelling interface.

        Args:
            text: its XML.
            known: the classes of the detector.

        Raises:
            ConfigError: it is none, it has no rectangles on an image, or labels that the detector does not
                know.
        """
        try:
            root = ElementTree.fromstring(text if isinstance(text, str) else "")
        except (ElementTree.ParseError, ValueError) as error:
            raise ConfigError(
                f"label_config: must be the XML of a project's labelling interface, got {text!r:.80} "
                f"({error})."
            ) from error
        images = {one.get("name"): one.get("value", "") for one in root.iter("Image")}
        for labels in root.iter("RectangleLabels"):
            name, image = labels.get("name"), labels.get("toName")
            value = images.get(image, "")
            if name and image and value.startswith("$"):
                break
        else:
            raise ConfigError(
                "label_config: must have RectangleLabels whose toName is an Image with a value such as "
                "$image, got none. Take the config.xml that `rcnn-svm detect --format labelstudio` writes."
            )
        classes = tuple(str(one.get("value")) for one in labels.iter("Label"))
        unknown = [one for one in classes if one not in known]
        if unknown or not classes:
            raise ConfigError(
                f"label_config: its labels must be classes of the detector ({', '.join(known)}), got "
                f"{', '.join(unknown) or 'none'}. Rename or remove them, or train a detector that knows them."
            )
        return cls(name, image, value[1:], classes)


class LabelStudio:
    """A Label Studio that labels are fetched from.

    Args:
        url: of it, such as http://127.0.0.1:8080.
        key: of an account: a personal access token, or one of the older kind.

    Raises:
        ConfigError: the address is none of http or https.
    """

    def __init__(self, url: str, key: str) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ConfigError(f"--url must begin with http:// or https://, got {url!r}.")
        self._url, self._key = url.rstrip("/"), key

    def labelled(self, project: int) -> list[Any]:
        """Return the labelled tasks of a project with their annotations.

        Raises:
            ConfigError: there is no key.
            DataError: it does not answer, refuses the key, or answers what is no list of tasks.
        """
        if not self._key:
            raise ConfigError(
                "LABEL_STUDIO_API_KEY: must hold the key of an account of Label Studio, from which labels "
                "are fetched. Set it, and start the backend again."
            )
        authorization = f"Token {self._key}"
        if self._key.count(".") == 2:  # a personal access token only asks for others, which last for minutes
            short = self._ask("/api/token/refresh", None, {"refresh": self._key})
            authorization = f"Bearer {short.get('access') if isinstance(short, dict) else None}"
        tasks = self._ask(f"/api/projects/{project}/export?exportType=JSON", authorization)
        if not isinstance(tasks, list):
            raise DataError(f"{self._url}: must export a list of tasks, got {type(tasks).__name__}.")
        return tasks

    def _ask(self, path: str, authorization: str | None, content: Any = None) -> Any:
        words = {"Content-Type": "application/json"}
        if authorization is not None:
            words["Authorization"] = authorization
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._url + path, data, words)
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
                text = answer.read(_MOST_EXPORTED + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise DataError(
                    f"{self._url}{path}: answers {error.code} {error.reason}. Is LABEL_STUDIO_API_KEY the "
                    f"key of an account that sees the project?"
                ) from error
        except OSError as error:
            raise DataError(f"{self._url}: does not answer ({error}). Name it with --url.") from error
        if len(text) > _MOST_EXPORTED:
            raise DataError(f"{self._url}{path}: must answer at most {_MOST_EXPORTED >> 20} MB.")
        return _parsed(text, f"{self._url}{path}")


class Backend:
    """What Label Studio asks of a detector. Several threads may ask at once.

    Args:
        served: the detector that is asked first.
        root: the folder whose files Label Studio serves; no other file is read.
        train: labelled images -> the detector trained with them, which is asked from then on; raises what
            prevents that.
        labelled: number of a project -> its labelled tasks.
    """

    def __init__(
        self,
        served: Served,
        root: Path,
        train: Callable[[Sequence[Sample]], Served],
        labelled: Callable[[int], Sequence[Any]],
    ) -> None:
        self._served, self._root = served, root.resolve()
        self._train, self._labelled = train, labelled
        self._looking, self._training = threading.Lock(), threading.Lock()

    def health(self) -> dict[str, Any]:
        """Return that it is there."""
        return {"status": "UP", "model_class": self._served.detector.head}

    def setup(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return the version of the detector.

        Raises:
            ConfigError: see `LabelConfig.parse`.
        """
        served = self._served
        LabelConfig.parse(asked.get("schema"), served.detector.classes)
        return {"model_version": served.version}

    def predict(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the detector finds in the image of each task and believes, in their order.

        Raises:
            ConfigError: see `LabelConfig.parse`; or an image that is not below the folder.
            DataError: an image cannot be read.
        """
        detector, version = self._served
        config = LabelConfig.parse(asked.get("label_config"), detector.classes)
        samples = [self._sample(task, config) for task in _listed(asked, "tasks")]
        wanted = [k for k, name in enumerate(detector.classes) if name in config.classes]
        least, results = detector.least_scores, []
        with self._looking:  # one request at a time has the memory that a network needs
            for sample, found in zip(samples, detector.detect_all(samples), strict=True):
                shown = found[(found.scores >= least[found.labels]) & np.isin(found.labels, wanted)]
                results.append(
                    label_studio_prediction(
                        sample, shown, detector.classes, version, label=config.label, image=config.image
                    )
                )
        return {"results": results, "model_version": version}

    def webhook(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Train on all that is labelled in a project where that is asked for; take note of other events.

        Raises:
            ConfigError: as `train`.
            DataError: as `train`; or Label Studio does not hand out the labels.
        """
        action = asked.get("action")
        if action != "START_TRAINING":
            return {"status": "noted" if action in _CHANGES else "ignored"}
        project = asked.get("project")
        if not isinstance(project, dict) or not isinstance(project.get("id"), int):
            raise ConfigError(f"project: must have a number as its id, got {project!r:.80}.")
        tasks = self._labelled(project["id"])
        return self.train({"label_config": project.get("label_config"), "annotations": tasks})

    def train(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Train on labelled tasks, `annotations`, and answer when the new detector has taken over.

        Raises:
            ConfigError: see `LabelConfig.parse`; training is under way, or what `train` raises.
            DataError: no task is labelled, or one is in a way that cannot be learned from.
        """
        config = LabelConfig.parse(asked.get("label_config"), self._served.detector.classes)
        samples: dict[str, Sample] = {}
        for task in _listed(asked, "annotations"):
            if (result := _submitted(task)) is None:
                continue
            sample = self._sample(task, config)
            if sample.image_id in samples:
                raise DataError(f"{_named(task)}: is of the same image as another, {sample.image_id}.")
            truth = _truth(result, sample.size, config, self._served.detector.classes, _named(task))
            samples[sample.image_id] = replace(sample, truth=truth)
        if not samples:
            raise DataError("annotations: must hold a labelled task, got none. Submit one first.")
        if not self._training.acquire(blocking=False):
            raise ConfigError("Training is under way. Ask again when it is done.")
        try:
            started = time.perf_counter()
            self._served = self._train(tuple(samples.values()))
            seconds = time.perf_counter() - started
        finally:
            self._training.release()
        version = self._served.version
        say(f"Trained with {len(samples)} labelled images in {seconds:.1f} s: {version}")
        return {"status": "ok", "model_version": version, "n_images": len(samples), "seconds": seconds}

    def _sample(self, task: Any, config: LabelConfig) -> Sample:
        """Return the image of a task, without labels.

        Raises:
            ConfigError: it does not lie below the folder, or is no file that Label Studio serves from there.
            DataError: it cannot be read.
        """
        data = task.get("data") if isinstance(task, dict) else None
        address = data.get(config.key) if isinstance(data, dict) else None
        parts = urlsplit(address) if isinstance(address, str) else None
        named = parse_qs(parts.query).get("d", []) if parts and parts.path.endswith(_LOCAL) else []
        if len(named) != 1:
            raise ConfigError(
                f"{_named(task)}: {config.key} must be a file that Label Studio serves from a folder of this "
                f"machine ({_LOCAL}?d=PATH), got {address!r:.80}. Add the folder as a local storage; "
                f"uploaded files and other addresses are not read."
            )
        try:
            path = (self._root / named[0]).resolve()
        except (ValueError, OSError, RuntimeError):  # a NUL, a name that is too long, links in a circle
            path = self._root.parent
        if not path.is_relative_to(self._root):
            raise ConfigError(f"{_named(task)}: {named[0]!r:.80} must lie below {self._root} (--root).")
        name = path.relative_to(self._root).as_posix()
        return Sample(name, image_size(path), GroundTruth.empty(), path=path, reader=read_image)


def _listed(asked: Mapping[str, Any], name: str) -> list[Any]:
    value = asked.get(name)
    if not isinstance(value, list):
        raise ConfigError(f"{name}: must be a list of tasks, got {value!r:.80}.")
    return value


def _named(task: Any) -> str:
    return f"task {task.get('id', '?') if isinstance(task, dict) else '?'!s:.20}"


def _submitted(task: Any) -> list[Any] | None:
    """Return the regions of the last annotation of a task; None where it has none that was submitted."""
    annotations = task.get("annotations") if isinstance(task, dict) else None
    for one in reversed(annotations if isinstance(annotations, list) else []):
        if isinstance(one, dict) and not one.get("was_cancelled") and isinstance(one.get("result"), list):
            return list(one["result"])
    return None


def _truth(
    result: Sequence[Any], size: tuple[int, int], config: LabelConfig, classes: Sequence[str], where: str
) -> GroundTruth:
    """Return the labelled objects of an image.

    Raises:
        DataError: a region is no upright rectangle in the image, or of a class that is not known. To leave it
            out would make its object background.
    """
    boxes, labels = [], []
    for region in result:
        kind = region.get("type") if isinstance(region, dict) else None
        if not isinstance(kind, str) or not kind.endswith("labels"):
            continue  # of another control: a choice, a text, a rating
        value = region.get("value")
        value = value if isinstance(value, dict) else {}
        names, sides = value.get(kind), [value.get(side) for side in ("x", "y", "width", "height")]
        numbers = [side for side in sides if isinstance(side, int | float) and math.isfinite(side)]
        turned = value.get("rotation") or region.get("image_rotation")
        if kind != "rectanglelabels" or turned or len(numbers) < 4:
            raise DataError(
                f"{where}: must hold upright rectangles alone, got a region of type {kind:.40}"
                f"{', turned' if turned else ''}. Draw it as one."
            )
        if not isinstance(names, list) or len(names) != 1 or names[0] not in config.classes:
            raise DataError(
                f"{where}: a region must have one of the labels {', '.join(config.classes)}, got "
                f"{names!r:.80}."
            )
        x, y, width, height = numbers
        boxes.append([x, y, x + width, y + height])
        labels.append(classes.index(names[0]))
    scale = np.tile([size[1], size[0]], 2) / 100
    pixels = clip(np.array(boxes, np.float64).reshape(-1, 4) * scale, size)
    if (area(pixels) <= 0).any():
        raise DataError(f"{where}: every rectangle must lie in the image, got one that does not. Remove it.")
    return GroundTruth(pixels, np.array(labels, np.int64))


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: must be JSON ({type(error).__name__}).") from error


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches what listens on an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(backend: Backend, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server that listens; its `serve_forever` answers, each request in a thread of its own.

    Args:
        backend: is asked.
        host: a name or address of this machine; it listens there and on no other.
        port: 0 takes any that is free.

    Raises:
        ConfigError: the port is taken or may not be had, or the host is no address of this machine.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port must be 0 to 65535, got {port}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]

        class Server(ThreadingHTTPServer):
            address_family = family

            def server_bind(self) -> None:
                socketserver.TCPServer.server_bind(self)  # http.server's asks who has the address, and waits
                self.server_name, self.server_port = host, self.server_address[1]

        class Asked(_Asked):
            asks = backend

        return Server((str(address[0]), port), Asked)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"{host}:{port}: cannot be listened on ({getattr(error, 'strerror', None) or error}). Choose "
            f"another with --port or --host."
        ) from error


class _Asked(BaseHTTPRequestHandler):
    """One request."""

    asks: Backend
    timeout = _PATIENCE_S

    def do_GET(self) -> None:
        """Answer whether it is there."""
        if urlsplit(self.path).path in ("/", "/health"):
            self._answer(200, self.asks.health())
        else:
            self._refuse(404, f"{self.path}: is not known.")

    def do_POST(self) -> None:
        """Answer what is asked of the detector."""
        name = urlsplit(self.path).path.strip("/")
        work = {
            "setup": self.asks.setup,
            "predict": self.asks.predict,
            "webhook": self.asks.webhook,
            "train": self.asks.train,
        }.get(name)
        length = self.headers.get("Content-Length", "")
        if work is None:
            self._refuse(404, f"{self.path}: is not known.")
        elif self.headers.get_content_type() != "application/json":
            # What a page in a browser can send to this machine without being asked is of other types.
            self._refuse(415, "A request must be of type application/json.")
        elif not (length.isascii() and length.isdigit()):
            self._refuse(411, "A request must state its Content-Length.")
        elif len(length) > 12 or int(length) > MOST_BYTES:
            self._refuse(413, f"A request must have at most {MOST_BYTES >> 20} MB, got {length:.20} bytes.")
        else:
            self._work(work, int(length))

    def _work(self, work: Callable[[Mapping[str, Any]], dict[str, Any]], length: int) -> None:
        try:
            asked = _parsed(self.rfile.read(length), "A request")
            if not isinstance(asked, dict):
                raise DataError(f"A request: must be a JSON object, got {type(asked).__name__}.")
            self._answer(200, work(asked))
        except RcnnSvmError as error:
            self._refuse(400, str(error))
        except (ConnectionError, TimeoutError) as error:
            say(f"{self.path}: who asked has left ({error}).")
        except Exception:
            self._refuse(500, "A mistake of rcnn_svm: the traceback is where it was started.")
            raise

    def _refuse(self, code: int, sentence: str) -> None:
        say(f"{self.path:.80}: {sentence}")
        self._answer(code, {"error": sentence})

    def _answer(self, code: int, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, allow_nan=False).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *words: Any) -> None:
        """Say nothing of requests that are answered."""

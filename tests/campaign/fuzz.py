"""Broken files for every reader: each is read, and is then sane, or refused with one sentence.

`python -m tests.campaign.fuzz READER SEED NUMBER` shows what one input does.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image as pillow
from PIL import features as pillow_features

from rcnn_svm import files
from rcnn_svm.boxes import area
from rcnn_svm.config import to_dict, with_overrides
from rcnn_svm.datasets import SplitRecord, load_dataset, write_dataset
from rcnn_svm.datasets.check import check_dataset
from rcnn_svm.datasets.images import header_sizes, read_image
from rcnn_svm.detector import load_detector
from rcnn_svm.errors import RcnnSvmError
from rcnn_svm.evaluation.exchange import (
    DetectionLines,
    read_coco_results,
    read_comp4,
    read_detections,
    write_coco_results,
    write_comp4,
    write_detections,
)
from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.features.build import FeatureConfig, build_featurizer
from rcnn_svm.features.store import FeatureStore
from rcnn_svm.networks.backbone import load_backbone
from rcnn_svm.proposals import GridConfig
from rcnn_svm.proposals.cache import proposals_of
from rcnn_svm.structures import Dataset, Detections, GroundTruth, Sample
from rcnn_svm.training.loop import Checkpoints, Trainer, groups_of, train_in_chunks
from tests.campaign.mutations import mutate
from tests.campaign.scene import CLASSES, SIZE, picture, save_detector, tiny_dataset
from tests.campaign.tally import Defect, Tally, fault_in, is_one_sentence

__all__ = ["READERS", "Reader", "fuzz", "judge", "settle"]

SECONDS = 5.0
"""An input must be done with after so long, of the processor's time: others may work on the machine."""
MEMORY = 1 << 30
"""Bytes that an input may take beyond what the process has."""


class Insane(AssertionError):
    """Nonsense was taken for good."""


class TooLong(BaseException):
    """The alarm of an input that takes too long."""


@dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Attributes:
        seeds: good files by name.
        read: reads the file of this name with this content; raises `Insane` for nonsense that it gave.
    """

    seeds: Mapping[str, bytes]
    read: Callable[[str, bytes, Random], None]


def _require(good: bool, words: str) -> None:
    if not good:
        raise Insane(words)


def _sane_classes(classes: Sequence[Any]) -> None:
    _require(all(isinstance(name, str) and name for name in classes), f"classes are {classes!r:.200}")
    _require(len(set(classes)) == len(classes), f"a class comes twice in {classes!r:.200}")


def _sane_detections(found: Detections, n_classes: int) -> None:
    _require(isinstance(found.image_id, str), "an image id is no text")
    _require(
        bool(np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()), "a figure is not finite"
    )
    _require(bool((found.boxes[:, 2:] >= found.boxes[:, :2]).all()), f"a box is upside down: {found.boxes}")
    _require(bool(((found.labels >= 0) & (found.labels < n_classes)).all()), "a label is no class")


def _sane_dataset(dataset: Dataset) -> None:
    _sane_classes(dataset.classes)
    ids = [sample.image_id for sample in dataset]
    _require(len(set(ids)) == len(ids), "an image comes twice")
    for sample in dataset:
        truth, (height, width) = sample.truth, sample.size
        _require(bool(np.isfinite(truth.boxes).all()), "a box is not finite")
        _require(bool((area(truth.boxes) > 0).all()), "a box has no area")
        _require(bool((truth.boxes >= 0).all()), "a box leaves the image")
        _require(bool((truth.boxes[:, 2:] <= (width, height)).all()), "a box leaves the image")
        _require(bool((truth.labels < len(dataset.classes)).all()), "a label is no class")


def _dataset_reader(format: str) -> Callable[[Path], Reader]:
    def make(folder: Path) -> Reader:
        root = folder / "data"
        write_dataset((tiny_dataset("train", 3), tiny_dataset("test", 2)), root, format)  # type: ignore[arg-type]
        kinds = {".xml", ".json", ".yaml", ".txt"}
        labels = sorted(path for path in root.rglob("*") if path.suffix in kinds)
        seeds = {str(path.relative_to(root)): path.read_bytes() for path in labels}

        def read(name: str, content: bytes, rng: Random) -> None:
            file = root / name
            file.write_bytes(content)
            try:
                if rng.random() < 0.25:
                    check_dataset(root, format=format, decode=False).to_text()
                    return
                split = rng.choice(("train", "test"))
                options = {"drop_bad_boxes": rng.random() < 0.5, "skip_bad": rng.random() < 0.3}
                _sane_dataset(load_dataset(root, split, format=format, **options))
            finally:
                file.write_bytes(seeds[name])

        return Reader(seeds, read)

    return make


def _found() -> list[Detections]:
    boxes = np.array([[1, 2, 30, 40], [5.5, 6, 20, 21]], np.float32)
    return [
        Detections("1", boxes, np.array([2.5, -1], np.float32), np.array([0, 2])),
        Detections("2", boxes[:1], np.array([0.25], np.float32), np.array([1])),
        Detections.empty("3"),
    ]


def _one_file(folder: Path, names: Sequence[str], read: Callable[[Path], None]) -> Reader:
    """Return the reader of files that lie in `folder` by these names."""
    seeds = {name: (folder / name).read_bytes() for name in names}

    def read_one(name: str, content: bytes, rng: Random) -> None:
        (folder / name).write_bytes(content)
        try:
            read(folder / name)
        finally:
            (folder / name).write_bytes(seeds[name])

    return Reader(seeds, read_one)


def _detections(folder: Path) -> Reader:
    write_detections(folder / "detections.json", _found(), CLASSES)

    def read(path: Path) -> None:
        classes, found = read_detections(path)
        _sane_classes(classes)
        _require(len({one.image_id for one in found}) == len(found), "an image comes twice")
        for one in found:
            _sane_detections(one, len(classes))

    return _one_file(folder, ["detections.json"], read)


def _detection_lines(folder: Path) -> Reader:
    made_by = {"detector": "abc"}
    lines = DetectionLines(folder / "detections.jsonl", CLASSES, made_by)
    for one in _found():
        lines.add(one, "0123456789")

    def read(path: Path) -> None:
        done = DetectionLines(path, CLASSES, made_by).done
        for name, (digest, found) in done.items():
            _require(isinstance(digest, str) and name == found.image_id, "an image is another")
            _sane_detections(found, len(CLASSES))

    return _one_file(folder, ["detections.jsonl"], read)


def _comp4(folder: Path) -> Reader:
    names = [path.name for path in write_comp4(folder, _found(), CLASSES)]

    def read(path: Path) -> None:
        for one in read_comp4(folder, CLASSES, ["1", "2", "3"]):
            _sane_detections(one, len(CLASSES))

    return _one_file(folder, names, read)


def _coco_results(folder: Path) -> Reader:
    write_coco_results(folder / "results.json", _found(), [3, 7, 8])

    def read(path: Path) -> None:
        for one in read_coco_results(path, [3, 7, 8], ["1", "2", "3"]):
            _sane_detections(one, len(CLASSES))

    return _one_file(folder, ["results.json"], read)


def _boxes(folder: Path) -> Reader:
    from rcnn_svm.cli.network import read_regions

    (folder / "boxes.json").write_text('{"a": [[0.0, 0.0, 64.0, 48.0], [3.5, 4.0, 20.0, 30.0]], "b": []}')
    features = _tiny_featurizer()

    def read(path: Path) -> None:
        sample = Sample("a", SIZE, GroundTruth.empty(), render=picture)
        boxes = read_regions(path, [sample])["a"]
        _require(bool((area(boxes) > 0).all() and (boxes >= 0).all()), f"boxes are {boxes}")
        _require(bool((boxes[:, 2:] <= SIZE[::-1]).all()), f"boxes are {boxes}")
        _require(bool(np.isfinite(features(picture(), boxes[:8])).all()), "features are not finite")

    return _one_file(folder, ["boxes.json"], read)


def _config(folder: Path) -> Reader:
    lines: list[str] = []

    def write(values: Mapping[str, Any], table: str) -> None:
        lines.extend([f"[{table}]"] if table else [])
        for key, value in values.items():
            if not isinstance(value, dict) and value is not None:
                lines.append(f"{key} = {json.dumps(value)}")
        for key, value in values.items():
            if isinstance(value, dict):
                write(value, f"{table}.{key}" if table else key)

    write(to_dict(ExperimentConfig(), finite=True), "")
    (folder / "config.toml").write_text("\n".join(lines) + "\n")
    assignments = ["heads.loss=hinge", "proposals.max_width=500", "heads.max_ious=[0.3]", "seed=3"]
    (folder / "set.txt").write_text("\n".join(assignments) + "\n")

    def read(path: Path) -> None:
        if path.suffix == ".toml":
            config = with_overrides(ExperimentConfig(), path)
        else:
            text = path.read_bytes().decode("utf-8", "surrogateescape")
            config = with_overrides(ExperimentConfig(), None, text.split("\n")[:4])
        config.build()
        json.dumps(to_dict(config, finite=True), allow_nan=False)

    return _one_file(folder, ["config.toml", "set.txt"], read)


def _splits(folder: Path) -> Reader:
    parts = {name: {"a": "0" * 20, "b": "1" * 20} for name in ("train", "val", "trainval", "test")}
    SplitRecord("digits", 0, ("a note",), parts).write(folder)

    def read(path: Path) -> None:
        record = SplitRecord.read(folder)
        assert record is not None
        _require(all(isinstance(digest, str) for digest in record.known), "a digest is no text")

    return _one_file(folder, ["splits.json"], read)


def _images(folder: Path) -> Reader:
    image = pillow.fromarray(picture())
    exif = pillow.Exif()
    exif[0x0112] = 6
    image.save(folder / "a.jpg", exif=exif, quality=80)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "a.png", exif=exif)
    image.convert("RGBA").save(folder / "rgba.png")
    image.quantize(16).save(folder / "palette.png", transparency=3)
    pillow.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(SIZE)).save(folder / "wide.png")
    image.save(folder / "a.bmp")
    image.convert("1").save(folder / "bits.bmp")
    image.save(folder / "a.gif", save_all=True, append_images=[pillow.fromarray(picture(1))])
    image.save(folder / "a.ppm")
    (folder / "text.ppm").write_text("P3\n# words\n4 3\n255\n" + " 1 2 255" * 12)
    image.save(folder / "a.tiff", compression="tiff_lzw", tiffinfo={0x0112: 8})
    image.convert("L").save(folder / "l.tiff", tiffinfo={0x0112: 6})
    for kind in ("webp", "avif"):
        if kind in pillow_features.modules and pillow_features.check(kind):
            image.save(folder / f"a.{kind}")
    names = sorted(path.name for path in folder.iterdir())

    def read(path: Path) -> None:
        upright, stored = header_sizes(path)
        pixels = read_image(path)
        _require(pixels.dtype == np.uint8 and pixels.shape == (*upright, 3), "pixels are of another size")
        _require(sorted(upright) == sorted(stored), "turning changes the size")

    return _one_file(folder, names, read)


def _tiny_featurizer() -> Any:
    config = FeatureConfig("small_cnn", "random", "warped", "fc7")
    return build_featurizer(config, load_backbone("small_cnn", "random", n_outputs=4))


def _detector_folder(folder: Path) -> Reader:
    save_detector(folder)
    load_detector(folder).detect(picture())  # compiles what has to be
    seeds = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(seeds["detector.json"])

    def read(name: str, content: bytes, rng: Random) -> None:
        (folder / name).write_bytes(content)
        if name != "detector.json" and rng.random() < 0.8:  # or the hash tells it and nothing else is tried
            kind = name.partition(".")[0]
            entry = {"name": name, "sha256": files.file_digest(folder / name)}
            told = {**manifest, "files": {**manifest["files"], kind: entry}}
            (folder / "detector.json").write_text(json.dumps(told))
        try:
            detector = load_detector(folder)
            _sane_classes(detector.classes)
            found = detector.detect(picture())
            _sane_detections(found, len(detector.classes))
            if detector.thresholds is not None:
                detector.thresholds.believed(found)
            repr(detector)
        finally:
            for changed in {name, "detector.json"}:
                (folder / changed).write_bytes(seeds[changed])

    return Reader(seeds, read)


def _weights(folder: Path) -> Reader:
    backbone = load_backbone("small_cnn", "random", n_outputs=2)
    backbone.save(folder / "w.safetensors")
    torch.save(backbone.net.state_dict(), folder / "w.pth")
    torch.save(backbone.net.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)

    def read(path: Path) -> None:
        loaded = load_backbone("small_cnn", path)
        values = loaded.net.state_dict().values()
        _require(all(bool(torch.isfinite(value).all()) for value in values), "weights are not finite")
        _require(loaded.classes is None or len(loaded.classes) == loaded.n_outputs, "classes are no outputs")

    return _one_file(folder, ["w.safetensors", "w.pth", "old.pth"], read)


class _Featurizer:
    """Features that say which boxes they are of."""

    key: Mapping[str, Any] = {"name": "campaign"}
    n_features = 6

    def __call__(self, image: Any, boxes: Any) -> Any:
        return np.concatenate([boxes, boxes[:, :2]], axis=1).astype(np.float32)

    def ofpicture(self, image: Any) -> Any:
        return lambda boxes: self(image, boxes)


def _feature_cache(folder: Path) -> Reader:
    store = FeatureStore(folder, _Featurizer(), precision="float32")
    boxes = np.arange(400, dtype=np.float32).reshape(100, 4)
    samples = [
        Sample(name, SIZE, GroundTruth.empty(), render=lambda i=i: picture(i)) for i, name in enumerate("ab")
    ]
    stored = {}
    for sample in samples:
        store.get(sample, boxes)
        stored[str(store.path(sample, boxes).relative_to(folder))] = sample

    def read(name: str, content: bytes, rng: Random) -> None:
        others = [other for other in seeds if other != name]
        (folder / name).write_bytes(seeds[others[0]] if rng.random() < 0.05 else content)
        files._checked.clear()  # what a process has checked it trusts; each input is one of its own
        found = np.array(store.get(stored[name], boxes))
        _require(bool((found == _Featurizer()(None, boxes)).all()), "damaged features are used")

    seeds = {name: (folder / name).read_bytes() for name in stored}
    return Reader(seeds, read)


def _proposal_cache(folder: Path) -> Reader:
    proposer = GridConfig()
    samples = [
        Sample(name, SIZE, GroundTruth.empty(), render=lambda i=i: picture(i)) for i, name in enumerate("ab")
    ]
    expected, seeds = {}, {}
    for sample in samples:
        before = {path for path in folder.rglob("*.npz")}
        regions = proposals_of(sample, proposer, folder)
        (path,) = {path for path in folder.rglob("*.npz")} - before
        name = str(path.relative_to(folder))
        expected[name], seeds[name] = (sample, regions), path.read_bytes()

    def read(name: str, content: bytes, rng: Random) -> None:
        others = [other for other in seeds if other != name]
        (folder / name).write_bytes(seeds[others[0]] if rng.random() < 0.05 else content)
        sample, regions = expected[name]
        found = proposals_of(sample, proposer, folder)
        same = found.boxes.tobytes() == regions.boxes.tobytes()
        _require(
            same and found.priority.tobytes() == regions.priority.tobytes(), "damaged proposals are used"
        )

    return Reader(seeds, read)


def _checkpoint(folder: Path) -> Reader:
    def train(n_steps: int) -> None:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2)
        trainer = Trainer(
            module,
            lambda module, part: (module(part.content[0]).square().sum(), 1),
            groups_of(module.parameters(), 0.1, 0.0),
            lambda step: 1.0,
            optimizer="adam",
            what="campaign",
            remedy="Stop.",
        )

        checkpoints = Checkpoints(folder / "a.checkpoint", "identity", 1)
        history = train_in_chunks(
            trainer, lambda c, n: [(torch.ones(1, 3),)], checkpoints, n_steps=n_steps, per_chunk=1, seed=0
        )
        _require(all(math.isfinite(entry.loss) for entry in history), "a loss is not finite")

    train(2)
    return _one_file(folder, ["a.checkpoint"], lambda path: train(3))


READERS: Mapping[str, Callable[[Path], Reader]] = {
    "voc": _dataset_reader("voc"),
    "coco": _dataset_reader("coco"),
    "yolo": _dataset_reader("yolo"),
    "detections": _detections,
    "detection-lines": _detection_lines,
    "comp4": _comp4,
    "coco-results": _coco_results,
    "boxes": _boxes,
    "config": _config,
    "splits": _splits,
    "images": _images,
    "detector": _detector_folder,
    "weights": _weights,
    "feature-cache": _feature_cache,
    "proposal-cache": _proposal_cache,
    "checkpoint": _checkpoint,
}
"""All that reads files which somebody else may have written, by name: makes good files in an empty folder."""


def _input(reader: str, seeds: Mapping[str, bytes], seed: int, i: int) -> tuple[str, bytes, Random]:
    rng = Random(f"{seed}/{reader}/{i}")
    name = rng.choice(sorted(seeds))
    return name, mutate(name, seeds[name], rng), rng


def judge(read: Callable[[], None], seconds: float = SECONDS) -> tuple[str, str]:
    """Return how reading ended: `read`, `refused`, or the kind of a defect, and the last words."""
    said = io.StringIO()
    started = time.process_time()
    try:
        with contextlib.redirect_stderr(said):
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                read()
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        outcome, words = "read", ""
    except RcnnSvmError as error:
        outcome, words = "refused", str(error)
        if not is_one_sentence(words):
            return "a message that is no printable line", repr(words)
    except Insane as error:
        return f"nonsense taken for good: {str(error).partition(':')[0]:.60}", str(error)
    except TooLong as error:
        return f"longer than {seconds:g} s ({fault_in(error)})", ""
    except MemoryError as error:
        return f"more than {MEMORY >> 20} MB ({fault_in(error)})", ""
    except Exception as error:
        return fault_in(error), f"{type(error).__name__}: {error}"
    if time.process_time() - started > seconds:
        return f"longer than {seconds:g} s", words
    for line in said.getvalue().splitlines():
        if not is_one_sentence(line):
            return "a line said that is not printable", repr(line)
    return outcome, words


def fuzz(readers: Sequence[str], n: int, seed: int, folder: Path, *, deadline: float = math.inf) -> Tally:
    """Try `n` inputs on each reader, in children that may hang, crash or run out of memory."""
    tally = Tally()
    for reader in readers:
        start = 0
        while start < n and time.monotonic() < deadline:
            start = _child(reader, range(start, n), seed, folder, tally, deadline)
    return tally


def _child(reader: str, numbers: range, seed: int, folder: Path, tally: Tally, deadline: float) -> int:
    """Try inputs in a child as far as it comes; return the first that is left."""
    place = folder / reader
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    there, here = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(there)
            with os.fdopen(here, "w") as stream:
                _work(reader, numbers, seed, place, stream, deadline)
        except BaseException as error:
            print(f"{reader}: the campaign itself fails: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(here)
    doing, waiting = numbers.start, b""
    made = False
    while True:
        patience = 3 * SECONDS if made else 60.0
        ready, _, _ = select.select([there], [], [], patience)
        block = os.read(there, 1 << 16) if ready else b""
        if not block:
            break
        *lines, waiting = (waiting + block).split(b"\n")
        for line in lines:
            made = True
            number, outcome, words, example = json.loads(line)
            if outcome:
                _note(tally, reader, seed, number, outcome, words, bytes.fromhex(example))
            doing = number + bool(outcome)
    os.close(there)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if not made and code:
        raise AssertionError(f"{reader}: its good files could not be made")
    if code or not ready:
        what = "a hang" if not ready else f"the process ended with {code}"
        _note(tally, reader, seed, doing, what, "", b"")
        return doing + 1
    return numbers.stop


def _note(tally: Tally, reader: str, seed: int, i: int, outcome: str, words: str, example: bytes) -> None:
    if outcome in ("read", "refused"):
        tally.add(reader, outcome)
    else:
        tally.add(reader, outcome, Defect(reader, outcome, f"{seed}/{reader}/{i}", words, example))


def settle(reader: str, folder: Path) -> Reader:
    """Make a reader and its good files, and bound the time and memory of this process."""

    def stop(number: int, frame: object) -> None:
        raise TooLong

    torch.set_num_threads(1)
    made = READERS[reader](folder)
    files._sync = lambda path: None  # a power cut is not tried here, and waiting for the disk is slow
    signal.signal(signal.SIGPROF, stop)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resource.setrlimit(resource.RLIMIT_AS, (int(status["VmSize"].split()[0]) * 1024 + MEMORY,) * 2)
    return made


def _work(
    reader: str, numbers: range, seed: int, folder: Path, stream: io.TextIOBase | Any, deadline: float
) -> None:
    made = settle(reader, folder)
    for i in numbers:
        if time.monotonic() > deadline:
            return
        stream.write(json.dumps([i, "", "", ""]) + "\n")
        stream.flush()
        name, content, rng = _input(reader, made.seeds, seed, i)
        outcome, words = judge(lambda: made.read(name, content, rng))  # noqa: B023
        example = b"" if outcome in ("read", "refused") else f"{name}: ".encode() + content[:100_000]
        stream.write(json.dumps([i, outcome, words[:2000], example.hex()]) + "\n")
        stream.flush()


def _main() -> None:
    import tempfile

    reader, seed, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as folder:
        made = READERS[reader](Path(folder))
        name, content, rng = _input(reader, made.seeds, seed, number)
        print(name, repr(content[:2000]))
        made.read(name, content, rng)


if __name__ == "__main__":
    _main()

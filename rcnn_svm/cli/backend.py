"""The verb `label-studio`: a detector as an ML backend of Label Studio."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rcnn_svm.cli import options as shared
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.progress import say

if TYPE_CHECKING:
    from rcnn_svm.detector import Detector
    from rcnn_svm.experiment.parts import Run
    from rcnn_svm.label_studio import Served
    from rcnn_svm.structures import Sample

__all__ = ["add_label_studio"]

_KEY = "LABEL_STUDIO_API_KEY"


def add_label_studio(verb: argparse.ArgumentParser) -> None:
    """Add the options of `label-studio`."""
    verb.add_argument("detector", type=Path, help="a folder that `rcnn-svm train` made")
    verb.add_argument("--port", type=int, default=9090, metavar="N", help="default: 9090; 0 takes a free one")
    verb.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="address of this machine to listen on (default: 127.0.0.1, which no other machine reaches)",
    )
    verb.add_argument(
        "--root",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="images are read below it alone: LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT (default: here)",
    )
    verb.add_argument(
        "--url",
        default="http://127.0.0.1:8080",
        metavar="URL",
        help=f"Label Studio, whose labels are fetched for training with the key in {_KEY} (default: "
        f"http://127.0.0.1:8080)",
    )
    verb.add_argument(
        "--out", type=Path, metavar="DIR", help="a trained detector goes here (default: where it is)"
    )
    shared.add_run_options(verb)
    verb.set_defaults(run=_label_studio, resumes=False)


def _label_studio(options: argparse.Namespace) -> None:
    """Listen until it is stopped."""
    from rcnn_svm.detector import load_detector
    from rcnn_svm.experiment.relearning import require_relearnable
    from rcnn_svm.label_studio import Backend, LabelStudio, is_loopback, serve

    detector = load_detector(options.detector, device=shared.device_of(options))
    if detector.whole_images:
        raise ConfigError(f"{options.detector}: must find objects, this detector classifies whole images.")
    if not options.root.is_dir():
        raise DataError(f"{options.root}: must be the folder of the images (--root), is none.")
    labels = LabelStudio(options.url, os.environ.get(_KEY, ""))
    train = _Corrected(
        options.detector, options.out or options.detector, detector, options.seed, shared.run_of(options)
    )
    backend = Backend(_served(detector, options.detector), options.root, train, labels.labelled)
    with serve(backend, options.host, options.port) as server:
        host = f"[{options.host}]" if ":" in options.host else options.host
        say(
            f"Listening on http://{host}:{server.server_port} until Ctrl-C; images are read below "
            f"{options.root.resolve()}."
        )
        if not is_loopback(options.host):
            say("Other machines may reach it, and nothing asks them who they are.")
        try:
            require_relearnable(detector, str(options.detector))
        except ConfigError as error:
            say(f"It predicts and does not train. {error}")
        server.serve_forever()


def _served(detector: Detector, folder: Path) -> Served:
    from rcnn_svm.files import file_digest
    from rcnn_svm.label_studio import Served

    return Served(detector, f"{detector.head} {file_digest(folder / 'detector.json')[:12]}")


@dataclass(frozen=True, eq=False)
class _Corrected:
    """Trains a detector again on its own images and corrected ones, and saves it.

    Attributes:
        folder: where it lies, with the settings that name its own images.
        out: where the trained one goes.
        detector: as it was loaded.
        seed: of its solver; None takes that of its settings.
        run: cache, threads and device.
    """

    folder: Path
    out: Path
    detector: Detector
    seed: int | None
    run: Run

    def __call__(self, corrected: Sequence[Sample]) -> Served:
        """Train, save and return it; a corrected image takes the place of the same one among its own.

        Images that are held out to measure the detector are not learned from.
        """
        from rcnn_svm.cli.sharing import settings_of
        from rcnn_svm.datasets import SplitRecord
        from rcnn_svm.experiment.data import load_data
        from rcnn_svm.experiment.relearning import relearned, require_relearnable
        from rcnn_svm.files import read_text, write_text
        from rcnn_svm.report.card import relearned_info, remove_card, write_card

        require_relearnable(self.detector, str(self.folder))
        config, record = settings_of(self.folder), SplitRecord.read(self.folder)
        if self.seed is not None:
            config = replace(config, seed=self.seed)
        own = load_data(config.data, seed=config.seed).with_classes(self.detector.classes).trainval
        held = frozenset() if record is None else frozenset(record.parts["test"].values())
        fresh = [
            replace(s, image_id=f"label-studio/{s.image_id}") for s in corrected if s.digest() not in held
        ]
        if len(fresh) < len(corrected):
            n = len(corrected) - len(fresh)
            say(f"{n} of {len(corrected)} labelled images are held out to measure the detector: left out.")
        if not fresh:
            raise DataError("annotations: all labelled images are held out to measure the detector.")
        known = {sample.digest() for sample in fresh}
        kept = [sample for sample in own if sample.digest() not in known]
        images = replace(own, samples=(*kept, *fresh))
        trained = relearned(self.detector, images, config, self.run)
        trained = replace(trained, info=relearned_info(trained, len(images), len(fresh)))
        SplitRecord.remove(self.out)  # it must never lie beside another detector
        remove_card(self.out)
        trained.save(self.out)
        if record is not None:
            record.with_learned("Label Studio", fresh, seed=config.seed).write(self.out)
        if self.out.resolve() != self.folder.resolve():
            write_text(self.out / "config.json", read_text(self.folder / "config.json"))
        write_card(self.out, trained)
        return _served(trained, self.out)

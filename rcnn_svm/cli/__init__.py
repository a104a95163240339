"""The `rcnn-svm` command: one verb per stage, and what every verb has in common.

Exit codes: 0 done, 2 wrong usage, 3 wrong data; `endings` has the others. Every error is one sentence on
stderr. What a verb prints as its result goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rcnn_svm import __version__, threads

__all__ = ["VERBS", "Verb", "build_parser", "main"]


class Verb(NamedTuple):
    """A verb of the command.

    Attributes:
        module: of this package; its function `add_VERB` adds the options, `-` in VERB being `_` there.
        help: what it does, in a line.
    """

    module: str
    help: str


VERBS: Mapping[str, Verb] = {
    "demo": Verb(
        "training", "digits in scenes: train a network from nothing, compare all heads, write a report"
    ),
    "train": Verb("training", "from labelled images to a trained, evaluated, saved detector"),
    "compare": Verb("training", "the same regions and features through every head"),
    "study": Verb(
        "studying", "why SVMs and not the softmax: label rule, negatives, loss and kernel one at a time"
    ),
    "curve": Verb("studying", "how many images do I need: mAP against the number of labelled images"),
    "presets": Verb("training", "the recipes that --preset names, and what tells them apart"),
    "add-class": Verb("sharing", "new classes join a detector; the weights of those it has stay as they are"),
    "finetune": Verb("training", "train a network on warped regions by R-CNN's recipe"),
    "detect": Verb("using", "find objects in images: JSON, and boxes drawn on them"),
    "explain": Verb(
        "explaining", "why an image's detections score as they do: the sum, drawn on the picture"
    ),
    "export": Verb("exporting", "a detector as an ONNX graph, which runs without torch"),
    "info": Verb("sharing", "what a detector is, reaches and promises: classes, thresholds, licence, origin"),
    "evaluate": Verb("using", "AP of a detector, or of detections in a file, on labelled images"),
    "data": Verb("data", "write the embedded digits in scenes; check any data set"),
    "label-studio": Verb(
        "backend", "an ML backend of Label Studio: a detector predicts, and learns what is corrected"
    ),
    "propose": Verb("regions", "region proposals by selective search, and their recall"),
    "layers": Verb("network", "every layer of a network that can be read, with shapes and weights"),
    "extract": Verb("network", "write a layer's output, before the softmax, to a file"),
    "bench": Verb("bench", "how fast this machine is, and what a data set would take on it"),
    "cache": Verb("cache", "what is kept between runs, its size and limit; remove some of it"),
}
"""Every verb, in the order of `rcnn-svm --help`."""


class _VerbParser(argparse.ArgumentParser):
    """The parser of a verb, or of one of its actions.

    A verb's options say which choices and defaults there are, which loads what the verb is about. So it
    gets them when it is named, and what is not named costs nothing.
    """

    def __init__(self, *args: Any, verb: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verb = verb

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse with the options of the verb."""
        if self._verb is not None:
            module = importlib.import_module(f"{__name__}.{VERBS[self._verb].module}")
            getattr(module, f"add_{self._verb.replace('-', '_')}")(self)
            self._verb = None  # once
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command.

    What it parses holds `run`, the verb, and `resumes`: whether finished work is kept where a verb is
    interrupted, and the same command goes on from there.
    """
    parser = argparse.ArgumentParser(
        prog="rcnn-svm",
        description="R-CNN with per-class SVMs: train, compare and use a detector.",
        epilog="`rcnn-svm VERB --help` tells the options of a verb.",
    )
    parser.add_argument("--version", action="version", version=f"rcnn-svm {__version__}")
    parser.set_defaults(resumes=False)  # a verb that keeps finished work says so
    parser.set_defaults(jobs=0)  # a verb without --jobs takes all cores
    parser.set_defaults(learns=False, ranks=None)  # one that can train in several processes says so
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_VerbParser)
    for name, verb in VERBS.items():
        verbs.add_parser(name, help=verb.help, verb=name)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    from rcnn_svm.cli.endings import Ending

    given = list(sys.argv[1:] if arguments is None else arguments)
    with Ending(last=arguments is None) as ending, contextlib.ExitStack() as closing:
        own_pools = threads.wait_asleep()  # before the options of the verbs load numpy
        options = build_parser().parse_args(given)
        options.words, options.closing = given, closing
        ending.resumes = options.resumes
        if own_pools:
            from rcnn_svm.cli.options import n_jobs_of

            threads.limit(n_jobs_of(options), asked=options.jobs > 0)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this process, and others
            from rcnn_svm.cli.options import run_in_the_first

            run_in_the_first(options)
        else:
            options.run(options)
    return ending.code

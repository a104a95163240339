"""The `rcnn-svm` command: one verb per stage, and what every verb has in common.

Exit codes: 0 done, 2 wrong usage, 3 wrong data; `endings` has the others. Every error is one sentence on
stderr. What a verb prints as its result goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rcnn_svm import __version__, threads

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command.

    What it parses holds `run`, the verb, and `resumes`: whether finished work is kept where a verb is
    interrupted, and the same command goes on from there.
    """
    from rcnn_svm.cli import bench, cache, data, network, regions, training, using

    parser = argparse.ArgumentParser(
        prog="rcnn-svm",
        description="R-CNN with per-class SVMs: train, compare and use a detector.",
        epilog="`rcnn-svm VERB --help` tells the options of a verb.",
    )
    parser.add_argument("--version", action="version", version=f"rcnn-svm {__version__}")
    parser.set_defaults(resumes=False)  # a verb that keeps finished work says so
    parser.set_defaults(jobs=0)  # a verb without --jobs takes all cores
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for part in (training, using, data, regions, network, bench, cache):
        part.add_verbs(verbs)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    from rcnn_svm.cli.endings import Ending

    given = list(sys.argv[1:] if arguments is None else arguments)
    with Ending(last=arguments is None) as ending:
        own_pools = threads.wait_asleep()  # before the options of the verbs load numpy
        options = build_parser().parse_args(given)
        options.words = given
        ending.resumes = options.resumes
        if own_pools:
            from rcnn_svm.cli.options import n_jobs_of

            threads.limit(n_jobs_of(options), asked=options.jobs > 0)
        options.run(options)
    return ending.code

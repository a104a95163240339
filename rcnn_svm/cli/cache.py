"""The verb `cache`: what is kept between runs, how much of the disk it takes, and how to be rid of it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rcnn_svm.cache import (
    KINDS,
    LIMIT_VARIABLE,
    counted,
    default_cache,
    in_words,
    kept_files,
    parse_size,
    prune,
    size_limit,
)
from rcnn_svm.errors import ConfigError

__all__ = ["add_cache"]

_DAY_S = 24 * 3600.0


def add_cache(cache: argparse.ArgumentParser) -> None:
    """Add the options of `cache`."""
    cache.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR", help="the folder")
    cache.set_defaults(run=_show)
    actions = cache.add_subparsers(dest="action", metavar="ACTION")

    less = actions.add_parser("prune", help="remove what was used least recently, down to the limit")
    # No default of its own, which would go over what was said before the word `prune`.
    less.add_argument("--cache", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="the folder")
    less.add_argument("--all", action="store_true", help="remove everything that runs have kept")
    less.add_argument(
        "--limit", metavar="SIZE", help="what may stay, such as 2GB (default: the cache's limit)"
    )
    less.add_argument(
        "--older-than",
        type=float,
        metavar="DAYS",
        help="also remove what was not used for so many days, even where there is room for it",
    )
    less.set_defaults(run=_prune)


def _show(options: argparse.Namespace) -> None:
    files = sorted(kept_files(options.cache))
    width = max(map(len, KINDS))
    print(f"Cache: {options.cache}")
    print(f"{'':<{width}}  {'files':>7}  {'MB':>10}  {'least recent use':>16}  {'most recent use':>16}")
    for kind in (*KINDS, "in all"):
        own = [file for file in files if kind in (file.kind, "in all")]
        times = [_when(own[0].used), _when(own[-1].used)] if own else ["-", "-"]
        n_bytes = sum(file.n_bytes for file in own)
        print(f"{kind:<{width}}  {len(own):>7}  {n_bytes / 1e6:>10.1f}  {times[0]:>16}  {times[1]:>16}")
    limit = in_words(size_limit(options.cache))
    print(f"Limit: {limit} (--cache-limit of a run, or {LIMIT_VARIABLE}, sets another)")


def _when(used: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(used))


def _prune(options: argparse.Namespace) -> None:
    days = options.older_than
    if options.all and (options.limit is not None or days is not None):
        raise ConfigError("--all leaves nothing. Name it alone, or --limit and --older-than without it.")
    if days is not None and not 0 <= days < float("inf"):
        raise ConfigError(f"--older-than must be a finite number of days >= 0, got {days}.")
    limit = size_limit(options.cache) if options.limit is None else parse_size(options.limit, "--limit")
    older_than = float("-inf") if days is None else time.time() - days * _DAY_S
    done = prune(options.cache, limit, older_than=float("inf") if options.all else older_than)
    refused = f"; the system refused to remove {done.n_refused}" if done.n_refused else ""
    print(
        f"{options.cache}: removed {counted(done.n_files, done.n_bytes)}{refused}; "
        f"{in_words(done.n_bytes_left)} stay."
    )

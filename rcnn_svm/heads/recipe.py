"""One head of an experiment: what it is called, what is tried for it, which scaling of rows it reads.

The label rule, negatives, loss, kernel and solver are parameters of the head itself, so that any combination
can be put side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rcnn_svm.errors import ConfigError
from rcnn_svm.heads.base import DrawnBlocks, Fitted, HeadBase, RegionBlocks
from rcnn_svm.heads.kernels import shown

__all__ = ["HeadRecipe"]


@dataclass(frozen=True, eq=False)
class HeadRecipe:
    """A head, and the values of its parameters that are tried.

    Attributes:
        name: in tables, files and pictures; `+bbox` is appended where box regression is on.
        head: as it is where nothing is tried; it is left alone, copies are trained.
        grid: parameter -> values, from small to large. All combinations are tried, the last parameter
            changing fastest; where nothing is chosen, the middle of each.
        scaling: of the rows that the head reads, see `features.scaling.FeatureScaler`.
        random_negatives: train on so many regions of an image's background, drawn at random; None trains on
            all, which for SVMs means to mine the hard ones.
        seed: of that draw.
    """

    name: str
    head: HeadBase
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    scaling: str = "l2"
    random_negatives: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.head, HeadBase):
            raise ConfigError(
                f"HeadRecipe {self.name!r}: head must be one of ours or an EstimatorHead around yours, got "
                f"{type(self.head).__name__}."
            )
        known = self.head.get_params()
        for name, values in self.grid.items():
            if name not in known:
                raise ConfigError(
                    f"HeadRecipe {self.name!r}: grid must name parameters of {type(self.head).__name__} "
                    f"({', '.join(known)}), got {name!r}."
                )
            if len(values) == 0:
                raise ConfigError(f"HeadRecipe {self.name!r}: grid must hold a value for {name}, got none.")

    def settings(self) -> list[dict[str, Any]]:
        """Return every combination, in the order in which they are tried."""
        return [
            dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())
        ]

    def settled(self) -> dict[str, Any]:
        """Return the combination that is taken where none is tried: the middle of each, the larger of two."""
        return {name: values[len(values) // 2] for name, values in self.grid.items()}

    def fit(
        self, blocks: RegionBlocks, settings: Sequence[Mapping[str, Any]], *, n_jobs: int = 1
    ) -> Iterator[Fitted]:
        """Train a copy of the head with each of several settings, in order.

        Args:
            blocks: the training regions, scaled.
            settings: some of `settings`, in their order.
            n_jobs: classes in parallel, where the head can.
        """
        head = self.head.clone()
        if "n_jobs" in head.get_params():
            head.set_params(n_jobs=n_jobs)
        if self.random_negatives is None:
            yield from head.fit_grid(blocks, settings)
            return
        drawn = DrawnBlocks(blocks, self.random_negatives, seed=self.seed)
        for fitted in head.fit_grid(drawn, settings):
            own = fitted.support
            yield fitted if own is None else replace(fitted, support=drawn.among_all(own))

    @staticmethod
    def shown(settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings as plain data, a kernel by its own settings or its name."""
        flat: dict[str, Any] = {}
        for name, value in settings.items():
            flat |= shown(value) if name == "kernel" else {name: value}
        return flat

"""The design of a study: factors and their levels, and the cells that are trained.

All combinations of all levels would be thousands of trainings. What belongs together is crossed in full (a
plane: label rule, negatives and loss; kernel and rows), and what the rows are made of is crossed with the
loss alone, which is the question. What a plane does not name stays at its first level, so that planes share
cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.learning import (
    FcOnFrozen,
    FineTuned,
    Frozen,
    Learner,
    Representation,
    TunedTrunk,
)
from rcnn_svm.experiment.parts import Parts
from rcnn_svm.features.fc_layers import HiddenLayer
from rcnn_svm.features.store import DerivedStore
from rcnn_svm.heads.assign import LabelRule
from rcnn_svm.heads.base import HeadBase
from rcnn_svm.heads.kernel_svm import KernelSVMHead
from rcnn_svm.heads.kernels import RBF, HistogramIntersection
from rcnn_svm.heads.linear_svm import LinearSVMHead
from rcnn_svm.heads.mining import FixedPointMining, PaperMining
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.heads.softmax import LogisticHead, SoftmaxHead
from rcnn_svm.proposals import GridConfig, Proposer, SelectiveSearchConfig, WholeImage
from rcnn_svm.training.config import FcConfig

__all__ = [
    "BOXES",
    "FACTORS",
    "SOFTMAX",
    "SVM",
    "THREE",
    "Cell",
    "Design",
    "Factor",
    "Layer",
    "Plane",
    "design",
    "factors_of",
    "three_heads",
]

_COSTS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_RBF_COSTS, _GAMMAS = (1.0, 10.0), (0.5, 1.0, 2.0)
"""What every cell chooses from on val: six settings for all."""
_RANDOM_NEGATIVES = 64
"""Background regions of an image where they are drawn at random: about what a softmax sees in fine-tuning."""
_DENSE = 10_000
"""Boxes of the dense grid."""


@dataclass(frozen=True)
class Factor:
    """One thing that differs between cells.

    Attributes:
        name: of the factor.
        question: what it is about.
        levels: the name of each level and its value; the first one is taken where the factor is not studied.
    """

    name: str
    question: str
    levels: Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """Which rows the heads read.

    Attributes:
        learner: what is trained before them; None for that of the experiment.
        depth: of the layers that it learns, how many are run; None for all.
    """

    learner: Learner | None = None
    depth: int | None = None

    def rows(self, learned: Representation) -> Representation:
        """Return the rows of this layer; no box regression that was learned for others comes with them."""
        if self.depth is None:
            return replace(learned, regressor=None)
        # `_layers` gives a depth to learners of layers alone.
        assert learned.layers is not None
        assert isinstance(learned.store, DerivedStore)
        store = DerivedStore(learned.store.base, HiddenLayer(learned.layers, self.depth))
        return replace(learned, store=store, regressor=None)


FACTORS: Mapping[str, Factor] = {
    factor.name: factor
    for factor in (
        Factor(
            "label",
            "Which regions are positives and which are negatives?",
            {
                "objects against IoU < 0.3": LabelRule(None, 0.3),
                "IoU >= 0.5 against the rest": LabelRule(0.5, 0.5),
                "IoU >= 0.7 against IoU < 0.3": LabelRule(0.7, 0.3),
            },
        ),
        Factor(
            "negatives",
            "Which negatives?",
            {"all": "all", "mined once": "mined", "random": "random"},
        ),
        Factor(
            "loss",
            "Hinge, squared hinge, logistic, or softmax?",
            {
                "hinge": "hinge",
                "squared hinge": "squared_hinge",
                "logistic": "logistic",
                "softmax": "softmax",
            },
        ),
        Factor(
            "kernel",
            "Is a kernel worth it?",
            {"linear": None, "RBF": RBF, "intersection": HistogramIntersection},
        ),
        Factor(
            "rows",
            "How are feature rows scaled?",
            {"length 1": "l2", "root, length 1": "sqrt-l2", "mean length 20": "mean-norm-20"},
        ),
        Factor("layer", "Which layer is read?", {}),
        Factor("proposals", "How many regions of an image?", {}),
    )
}
"""The factors by name. Box regression is one more, which every cell has both levels of; the levels of `layer`
and `proposals` depend on the experiment (`design`)."""

BOXES = Factor("boxes", "What does box regression add?", {"as proposed": False, "regressed": True})

_SLOW = {"negatives": "mined once", "kernel": "intersection"}
"""Levels that take many times as long as the others of their factor."""
_CROSSED = (("label", "negatives", "loss"), ("kernel", "rows"))
_WITH_LOSS = ("layer", "proposals")
_QUESTION = ("hinge", "softmax")

SVM = {"label": "objects against IoU < 0.3", "negatives": "all", "loss": "hinge"}
"""R-CNN's SVMs, every negative seen."""
SOFTMAX = {"label": "IoU >= 0.5 against the rest", "negatives": "random", "loss": "softmax"}
"""Its softmax, as fine-tuning trains it."""


THREE = {
    "linear SVM": SVM,
    "RBF SVM": {**SVM, "kernel": "RBF"},
    "softmax": {**SOFTMAX, "negatives": "all"},
}
"""The heads that are looked at closer: all see every negative."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One combination of levels.

    Attributes:
        levels: name of the level by factor, all factors.
        recipe: the head that it is; None where there is no such head.
        left_out: why there is none; empty where there is one.
    """

    levels: Mapping[str, str]
    recipe: HeadRecipe | None
    left_out: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """Its levels, in the order of `FACTORS`."""
        return tuple(self.levels[name] for name in FACTORS)

    def head(self, seed: int) -> HeadRecipe:
        """Return its head, with solvers and random negatives of a seed."""
        assert self.recipe is not None
        head = self.recipe.head.clone()
        if "random_state" in head.get_params():
            head.set_params(random_state=seed)
        return replace(self.recipe, head=head, seed=seed)


@dataclass(frozen=True)
class Plane:
    """Factors that are crossed in full.

    Attributes:
        levels: of each factor, those that are crossed.
        about: the factors whose effects it is there for; others are crossed for their interactions.
    """

    levels: Mapping[str, Sequence[str]]
    about: tuple[str, ...]

    def keys(self, home: Mapping[str, str]) -> dict[tuple[str, ...], tuple[str, ...]]:
        """Return the levels of its own factors -> the levels of all."""
        return {
            combination: tuple(
                {**home, **dict(zip(self.levels, combination, strict=True))}[n] for n in FACTORS
            )
            for combination in itertools.product(*self.levels.values())
        }


@dataclass(frozen=True, eq=False)
class Design:
    """What a study trains.

    Attributes:
        factors: by name, with the levels that they have here.
        planes: which are crossed.
        cells: by their levels, each once; those that are no head too.
    """

    factors: Mapping[str, Factor]
    planes: tuple[Plane, ...]
    cells: Mapping[tuple[str, ...], Cell]

    @property
    def home(self) -> dict[str, str]:
        """The level of each factor where it is not studied."""
        return _home(self.factors)

    @property
    def trained(self) -> list[Cell]:
        """The cells that are heads, those of the same rows together."""
        heads = [cell for cell in self.cells.values() if cell.recipe is not None]
        order = {key: i for i, key in enumerate(dict.fromkeys(map(self._rows, heads)))}
        return sorted(heads, key=lambda cell: order[self._rows(cell)])

    @staticmethod
    def _rows(cell: Cell) -> tuple[str, str]:
        return cell.levels["proposals"], cell.levels["layer"]

    def parts_of(self, cell: Cell, parts: Parts) -> Parts:
        """Return the experiment with the proposals and the learner of a cell."""
        proposer: Proposer = self.factors["proposals"].levels[cell.levels["proposals"]]
        n = proposer.max_regions if isinstance(proposer, SelectiveSearchConfig) else None
        layer: Layer = self.factors["layer"].levels[cell.levels["layer"]]
        assert cell.recipe is not None
        return replace(
            parts,
            proposer=proposer,
            test_regions=parts.test_regions if proposer is parts.proposer else n,
            learner=layer.learner or parts.learner,
            heads=(cell.recipe,),
            choose=True,
        )


def design(names: Sequence[str], parts: Parts, *, thorough: bool = False) -> Design:
    """Return the cells that answer the questions of some factors.

    Args:
        names: of `FACTORS`.
        parts: of the experiment that they are varied around.
        thorough: take the levels that take many times as long, too: negatives mined once, class by class, the
            intersection kernel, and a dense grid of proposals, whose features take ten times the disk.

    Raises:
        ConfigError: no factor, an unknown one, one twice, or one that this experiment has one level of.
    """
    if not names or len(set(names)) < len(names) or not set(names) <= FACTORS.keys():
        raise ConfigError(
            f"--factors must be some of {', '.join(FACTORS)}, each once, got {', '.join(names) or 'none'}."
        )
    factors = factors_of(parts, thorough=thorough)
    for name in names:
        if len(factors[name].levels) < 2:
            raise ConfigError(
                f"--factors: {name} has one level alone in this experiment, "
                f"{next(iter(factors[name].levels))}. Leave it out."
            )
    planes = []
    for group in _CROSSED:
        if picked := tuple(name for name in group if name in names):
            planes.append(Plane({name: list(factors[name].levels) for name in picked}, picked))
    for name in _WITH_LOSS:
        if name in names:
            planes.append(Plane({name: list(factors[name].levels), "loss": _QUESTION}, (name,)))
    home = _home(factors)
    cells: dict[tuple[str, ...], Cell] = {}
    for plane in planes:
        for key in plane.keys(home).values():
            if key not in cells:
                levels = dict(zip(FACTORS, key, strict=True))
                cells[key] = Cell(levels, *_recipe(levels, factors))
    return Design(factors, tuple(planes), cells)


def three_heads() -> tuple[HeadRecipe, ...]:
    """Return the heads of `THREE`, under those names."""
    found = []
    for name, levels in THREE.items():
        recipe, _ = _recipe({**_home(FACTORS), **levels}, FACTORS)
        assert recipe is not None
        found.append(replace(recipe, name=name))
    return tuple(found)


def _home(factors: Mapping[str, Factor]) -> dict[str, str]:
    return {name: next(iter(factor.levels)) for name, factor in factors.items() if factor.levels}


def factors_of(parts: Parts, *, thorough: bool = False) -> dict[str, Factor]:
    """Return all factors with the levels that they have in an experiment.

    Args:
        parts: of the experiment.
        thorough: take the levels that take many times as long, too.
    """
    own: dict[str, Mapping[str, Any]] = {
        **{
            name: {level: value for level, value in FACTORS[name].levels.items() if thorough or level != slow}
            for name, slow in _SLOW.items()
        },
        "layer": _layers(parts),
        "proposals": _proposals(parts.proposer, thorough=thorough),
    }
    return {name: replace(factor, levels=own.get(name, factor.levels)) for name, factor in FACTORS.items()}


def _layers(parts: Parts) -> dict[str, Layer]:
    """Return the layers that there are to read: as the experiment does, before, and frozen."""
    learner = parts.learner
    frozen = {"pooled, frozen": Layer(Frozen())}
    if isinstance(learner, Frozen):
        return frozen
    if isinstance(learner, FineTuned):
        # Of whole images there is no background to draw, and no box to learn.
        whole = isinstance(parts.proposer, WholeImage)
        fc = FcConfig(positive_share=1.0, box_weight=0.0) if whole else FcConfig()
        return {
            "before the softmax, fine-tuned": Layer(),
            "fc7 of our own on the frozen": Layer(FcOnFrozen(fc)),
            "before the softmax, frozen": Layer(Frozen()),
        }
    deep = isinstance(learner, FcOnFrozen | TunedTrunk) and len(learner.fc.hidden) > 1
    below = {"fc6, learned": Layer(depth=1)} if deep else {}  # of one layer the first is the last
    return {"fc7, learned": Layer(), **below, **frozen}


def _proposals(proposer: Proposer, *, thorough: bool) -> dict[str, Proposer]:
    """Return the proposers to compare, that of the experiment first."""
    if not isinstance(proposer, SelectiveSearchConfig):
        return {"its own": proposer}
    own = {f"{proposer.max_regions or 'all'}": proposer}
    others = {f"{n}": replace(proposer, max_regions=n) for n in (300, 1000, 2000)}
    grid: dict[str, Proposer] = {f"grid of {_DENSE}": GridConfig(_DENSE)} if thorough else {}
    return {**own, **{name: other for name, other in others.items() if name not in own}, **grid}


def _recipe(levels: Mapping[str, str], factors: Mapping[str, Factor]) -> tuple[HeadRecipe | None, str]:
    """Return the head of a combination, or None and why there is none."""
    value = {name: factors[name].levels[level] for name, level in levels.items()}
    # R-CNN's C of 1e-3 at mean length 20 is 0.4 at length 1.
    longer = 20.0 if value["rows"] == "mean-norm-20" else 1.0
    costs = [c / longer**2 for c in _COSTS]
    head: HeadBase
    grid: dict[str, Sequence[Any]] = {"C": costs}
    rule, loss, negatives, kernel = value["label"], value["loss"], value["negatives"], value["kernel"]
    if kernel is not None and loss != "hinge":
        return None, "kernel machines are trained with the hinge loss alone"
    if negatives == "mined" and (kernel is not None or loss not in ("hinge", "squared_hinge")):
        return None, "R-CNN's schedule of hard negatives asks for a margin, which only linear SVMs have"
    # A positive weighs what a negative does, as it does for the other losses; with R-CNN it is twice that.
    if kernel is RBF:
        head = KernelSVMHead(rule=rule, positive_weight=1.0)
        grid = {"kernel": [RBF(gamma / longer**2) for gamma in _GAMMAS], "C": _RBF_COSTS}
    elif kernel is HistogramIntersection:
        head, grid = (
            KernelSVMHead(kernel=kernel(), rule=rule, positive_weight=1.0),
            {"C": [c / longer for c in _COSTS]},
        )
    elif loss == "softmax":
        head = SoftmaxHead(rule=rule)
    elif loss == "logistic":
        head = LogisticHead(rule=rule)
    else:
        mining = PaperMining() if negatives == "mined" else FixedPointMining()
        head = LinearSVMHead(rule=rule, loss=loss, mining=mining, positive_weight=1.0)
    drawn = _RANDOM_NEGATIVES if negatives == "random" else None
    name = " / ".join(levels.values())
    return HeadRecipe(name, head, grid, value["rows"], random_negatives=drawn), ""

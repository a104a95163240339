"""What each part of a small network is worth: `SmallCNN` with one part exchanged at a time, on digits.

Every seed has training digits of its own, twenty a class, since thousands would bring every variant to 99 %
and hide what the parts do. All seeds are tested on the same digits of writers whom no training saw. Each
variant chooses one setting (the learning rate, or that of an SVM) from as many, on digits held out of
training; then it is trained on all training digits of each seed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rcnn_svm.config import Count, Interval, NotNegative, Seed, Share, check
from rcnn_svm.datasets.digits import DIGIT_CLASSES, single_digits
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.evaluation.crossed import CrossedMean, crossed_mean
from rcnn_svm.evaluation.effects import holm_corrected
from rcnn_svm.files import appending, digest, read_text, write_text
from rcnn_svm.networks.radial import RadialBasis
from rcnn_svm.networks.small_cnn import SmallCNN
from rcnn_svm.progress import track
from rcnn_svm.training.loop import cosine

__all__ = [
    "BASE",
    "FACTORS",
    "QUICK",
    "Augmentation",
    "CnnDesign",
    "CnnFactor",
    "CnnStudy",
    "Comparison",
    "Finished",
    "Variant",
    "run_cnn_study",
]

_SIDE = 32
"""Pixels of an image: the smallest that the network is made for, and four times what the digits have."""
_CURVE = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of the training after which the learning curve has a point."""
_RUNS = "runs.jsonl"
_TRIAL, _RUN = "trial", "run"
_Key = tuple[str, str, str, int]
"""Of what is kept: trial or run, name of the variant, setting, seed."""

Digits = tuple[Tensor, Tensor]
"""(N, 1, 32, 32) float32 ink in [0, 1], and (N,) int64 labels."""


@dataclass(frozen=True)
class Augmentation:
    """How each training image is changed anew whenever it is drawn; the defaults change nothing.

    Attributes:
        shift: it moves by up to this share of its side, both ways and directions.
        rotation: it turns by up to so many degrees, both ways.
        scale: its side grows or shrinks by up to this share.
        noise: standard deviation of what is added to each pixel; ink is 1.
        flip: share that is mirrored, left to right.
    """

    shift: Share = 0.0
    rotation: NotNegative = 0.0
    scale: Share = 0.0
    noise: NotNegative = 0.0
    flip: Share = 0.0

    def __post_init__(self) -> None:
        check(self)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return changed copies of (B, 1, S, S) images in [0, 1]."""
        n = len(images)
        if self.shift or self.rotation or self.scale or self.flip:
            drawn = 2 * torch.rand(4, n, generator=generator) - 1
            turn = drawn[0] * math.radians(self.rotation)
            zoom = 1 / (1 + drawn[1] * self.scale)
            mirror = 1 - 2 * (torch.rand(n, generator=generator) < self.flip).float()
            # The grid reaches from -1 to 1, two for a whole side.
            rows = [
                torch.stack([zoom * turn.cos() * mirror, -zoom * turn.sin(), 2 * self.shift * drawn[2]], 1),
                torch.stack([zoom * turn.sin() * mirror, zoom * turn.cos(), 2 * self.shift * drawn[3]], 1),
            ]
            grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
            images = functional.grid_sample(images, grid, align_corners=False)
        if self.noise:
            images = images + self.noise * torch.randn(images.shape, generator=generator)
        return images


_SGD = partial(torch.optim.SGD, momentum=0.9)


@dataclass(frozen=True, eq=False)
class Variant:
    """The network with one part exchanged.

    Attributes:
        factor: which part; empty for the network as it is.
        level: what stands in its place.
        network: arguments of `SmallCNN`.
        augmentation: of training images.
        optimizer: called with the parameters and `lr`.
        loss: of (B, K) logits and (B,) labels.
        n_centres: of each class, of a layer of radial basis functions in place of the last one; 0 keeps it.
        machines: classifiers that take the place of the last layer once the network is trained as it is, by
            the setting to choose. Rows are fc7 scaled to length 1.
    """

    factor: str
    level: str
    network: Mapping[str, Any] = field(default_factory=dict)
    augmentation: Augmentation = Augmentation()
    optimizer: Callable[..., torch.optim.Optimizer] = _SGD
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    n_centres: int = 0
    machines: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`factor: level`, for people and files."""
        return f"{self.factor}: {self.level}" if self.factor else self.level

    def build(self, images: Tensor) -> SmallCNN:
        """Return the network with random weights; centres are put on `images`, in turn one of each class."""
        net = SmallCNN(len(DIGIT_CLASSES), **self.network)
        if self.n_centres:
            radial = RadialBasis(net.logits.in_features, self.n_centres, len(DIGIT_CLASSES))
            radial.place(_fc7(net, images[: self.n_centres * len(DIGIT_CLASSES)]))
            net.logits = radial  # type: ignore[assignment]
        return net.to(memory_format=torch.channels_last)


BASE = Variant("", "as it is")
"""Max pooling, PReLU, dropout 0.5, no normalisation, fc6 and fc7 of 256, images as they are, SGD, softmax."""


@dataclass(frozen=True, eq=False)
class CnnFactor:
    """A part of the network.

    Attributes:
        question: that its variants answer.
        base: what `BASE` has there.
        variants: what else is tried.
    """

    question: str
    base: str
    variants: Sequence[Variant]


def _factors() -> dict[str, CnnFactor]:
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.svm import SVC

    from rcnn_svm.heads.estimator import LinearSVM

    def networks(factor: str, **levels: Mapping[str, Any]) -> list[Variant]:
        return [Variant(factor, level.replace("_", " "), network=given) for level, given in levels.items()]

    def changed(level: str, **how: float) -> Variant:
        return Variant("augmentation", level, augmentation=Augmentation(**how))

    every = {"shift": 0.1, "rotation": 12.0, "scale": 0.15, "noise": 0.1}
    names = {"shift": "shift 10 %", "rotation": "rotation 12°", "scale": "scale 15 %", "noise": "noise 0.1"}
    costs = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    linear = {f"C {cost:g}": LinearSVM(C=cost, loss="hinge") for cost in costs}
    rbf = {f"C {cost:g}": OneVsRestClassifier(SVC(C=cost, gamma=1.0)) for cost in costs}
    return {
        "pooling": CnnFactor(
            "What does max pooling do?",
            "max",
            networks("pooling", average={"pooling": "average"}, strided={"pooling": "strided"}),
        ),
        "activation": CnnFactor(
            "What does PReLU do?",
            "PReLU",
            networks("activation", ReLU={"activation": "relu"}, none={"activation": "none"}),
        ),
        "dropout": CnnFactor(
            "What does dropout do?",
            "0.5",
            [Variant("dropout", f"{share:g}", network={"dropout": share}) for share in (0.0, 0.25)],
        ),
        "normalisation": CnnFactor(
            "What does normalisation do?",
            "none",
            networks(
                "normalisation",
                local_response={"normalisation": "local"},
                batch={"normalisation": "batch"},
            ),
        ),
        "fc": CnnFactor(
            "What do the fully connected layers do?",
            "256",
            [
                *(Variant("fc", str(width), network={"width": width}) for width in (64, 1024)),
                Variant("fc", "none, global average", network={"width": None}),
            ],
        ),
        "augmentation": CnnFactor(
            "What does augmentation do?",
            "none",
            [
                *(changed(names[name], **{name: size}) for name, size in every.items()),
                changed("these four", **every),
                changed("flips", flip=0.5),
            ],
        ),
        "optimizer": CnnFactor(
            "Which optimizer?",
            "SGD with momentum",
            [
                Variant("optimizer", kind.__name__, optimizer=kind)
                for kind in (torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam)
            ],
        ),
        "last layer": CnnFactor(
            "Softmax, hinge loss, radial basis functions or SVMs?",
            "softmax",
            [
                Variant("last layer", "hinge loss", loss=functional.multi_margin_loss),
                Variant("last layer", "RBF layer", n_centres=3),
                Variant("last layer", "linear SVM on fc7", machines=linear),
                Variant("last layer", "RBF SVM on fc7", machines=rbf),
            ],
        ),
    }


FACTORS: Mapping[str, CnnFactor] = _factors()
"""The parts that are exchanged, by name, in the order of the report."""


@dataclass(frozen=True)
class CnnDesign:
    """How much is trained.

    Attributes:
        seed: of the draw of training digits and of everything random.
        n_seeds: networks of each variant; no digit is in the training of two.
        per_class: training digits of each class and seed.
        held_out: of these are held out where settings are chosen.
        n_choosing: seeds whose held-out digits settings are chosen on, all together.
        n_epochs: passes over the training digits.
        batch_size: digits of a step.
        rates: learning rates to choose from, rising.
    """

    seed: Seed = 0
    n_seeds: Annotated[int, Interval(2)] = 5
    per_class: Count = 20
    held_out: Count = 5
    n_choosing: Count = 2
    n_epochs: Count = 30
    batch_size: Count = 20
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

    def __post_init__(self) -> None:
        check(self)
        if self.held_out >= self.per_class:
            raise ConfigError(f"held_out must be less than per_class, {self.per_class}, got {self.held_out}.")
        if self.n_choosing > self.n_seeds:
            raise ConfigError(f"n_choosing must be at most n_seeds, {self.n_seeds}, got {self.n_choosing}.")


QUICK = CnnDesign(n_seeds=2, n_choosing=1, n_epochs=3, rates=(0.01, 0.1))
"""To see what comes out, not to learn from it."""


@dataclass(frozen=True)
class Finished:
    """A variant trained on all training digits of a seed, and tested.

    Attributes:
        variant: its name.
        seed: 0 .. n_seeds - 1.
        setting: what was chosen: the learning rate, or the settings of the SVM.
        predictions: of the test digits in order, a character each; `-` where training diverged.
        curve: after some epochs (epoch, mean loss of it, accuracy in training on it, accuracy on test).
        n_parameters: learned numbers, those of SVMs included.
        memory_mb: of a training step, in 10^6 bytes: parameters, gradients, the optimizer's state, and what a
            batch leaves for the way back.
        wall_s: seconds of training by the clock, without choice and test,
        cpu_s: and of one core.
    """

    variant: str
    seed: int
    setting: str
    predictions: str
    curve: Sequence[tuple[int, float, float, float]]
    n_parameters: int
    memory_mb: float
    wall_s: float
    cpu_s: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """A variant, and what it changes.

    Attributes:
        variant: which.
        at_edge: whether its setting is the first or last of those to choose from.
        accuracy: on the test digits, a fraction, mean over the seeds.
        change: of accuracy against `BASE`, on the same digits and seeds; None for `BASE`.
        p_holm: of the change, corrected for all variants by Holm's method; 1 for `BASE`.
        runs: one a seed.
    """

    variant: Variant
    at_edge: bool
    accuracy: CrossedMean
    change: CrossedMean | None
    p_holm: float
    runs: Sequence[Finished]

    @property
    def decided(self) -> bool:
        """Whether the change stands after the correction."""
        return self.p_holm < 0.05


@dataclass(frozen=True, eq=False)
class CnnStudy:
    """A finished study.

    Attributes:
        design: of it.
        comparisons: of every variant, `BASE` first.
        n_test: digits that each was tested on.
    """

    design: CnnDesign
    comparisons: Sequence[Comparison]
    n_test: int

    def __repr__(self) -> str:
        return f"CnnStudy({len(self.comparisons)} variants, {self.design.n_seeds} seeds)"


def run_cnn_study(
    folder: Path, design: CnnDesign, *, n_jobs: int = 1, factors: Mapping[str, CnnFactor] = FACTORS
) -> CnnStudy:
    """Train and test every variant; what is finished is kept in `folder` and not trained again.

    Each training runs on one thread, so that results do not depend on `n_jobs`.

    Args:
        folder: `runs.jsonl` is kept here.
        design: how much is trained.
        n_jobs: trainings at once, in processes of their own where there are several.
        factors: the parts that are exchanged.

    Raises:
        ConfigError: a design that needs more digits than there are.
        DataError: `runs.jsonl` is of another design, damaged, or cannot be written.
    """
    learned, test = _draw(design), _images(*single_digits("val", "test"))
    variants = [BASE, *(variant for factor in factors.values() for variant in factor.variants)]
    networks, machines = ([v for v in variants if bool(v.machines) == kind] for kind in (False, True))
    kept = _Kept(folder / _RUNS, _identity(design, variants))
    seeds = range(design.n_seeds)

    def best(variant: Variant, settings: Sequence[str]) -> int:
        """Return which setting gets most held-out digits right; of equal ones the first."""
        found = [
            [kept[_TRIAL, variant.name, one, s]["right"] for s in range(design.n_choosing)]
            for one in settings
        ]
        return int(np.argmax(np.sum(found, axis=1).ravel()))

    def trials(tried: Sequence[Variant], rates: Sequence[float]) -> dict[_Key, Any]:
        return {
            (_TRIAL, v.name, _named(rate), s): delayed(_trial)(v, rate, s, design, learned[s])
            for v in tried
            for rate in rates
            for s in range(design.n_choosing)
        }

    settings = list(map(_named, design.rates))
    tried = trials(networks, design.rates)
    kept.fill("learning rates", tried, n_jobs)
    chosen = {variant.name: best(variant, settings) for variant in networks}
    own = design.rates[chosen[BASE.name]]
    of_machines = trials(machines, (own,))
    kept.fill("settings of SVMs", of_machines, n_jobs)
    chosen |= {variant.name: best(variant, [_named(own)]) for variant in machines}
    tasks: dict[str, dict[_Key, Any]] = {}
    for variant in variants:
        at = chosen[variant.name]
        rate = own if variant.machines else design.rates[at]
        machine = list(variant.machines)[at] if variant.machines else ""
        setting = f"{_named(rate)}, {machine}" if machine else _named(rate)
        tasks[variant.name] = {
            (_RUN, variant.name, setting, s): delayed(_run)(
                variant, rate, machine, s, design, learned[s], test
            )
            for s in seeds
        }
    trainings = {key: task for own in tasks.values() for key, task in own.items()}
    kept.fill("trainings", trainings, n_jobs)
    kept.settle([*tried, *of_machines, *trainings])
    runs = {
        name: [Finished(**{f.name: kept[key][f.name] for f in fields(Finished)}) for key in own]
        for name, own in tasks.items()
    }
    truth = test[1].numpy()
    right = {name: np.stack([_right(run.predictions, truth) for run in own]) for name, own in runs.items()}
    n_tests = len(variants) - 1
    changes = [
        crossed_mean(right[variant.name] - right[BASE.name], n_tests=n_tests) for variant in variants[1:]
    ]
    corrected = [1.0, *holm_corrected([change.p for change in changes])]
    comparisons = []
    for variant, change, p in zip(variants, [None, *changes], corrected, strict=True):
        n_settings = len(variant.machines or design.rates)
        edge = chosen[variant.name] in (0, n_settings - 1)
        accuracy = crossed_mean(right[variant.name])
        comparisons.append(Comparison(variant, edge, accuracy, change, p, runs[variant.name]))
    return CnnStudy(design, comparisons, len(truth))


def _named(rate: float) -> str:
    return f"rate {rate:g}"


def _identity(design: CnnDesign, variants: Sequence[Variant]) -> str:
    """Return what all that is kept depends on, as far as it is data; settings are named where it is kept."""
    settings = ("rates", "n_choosing")
    about = {
        "design": {name: value for name, value in asdict(design).items() if name not in settings},
        "variants": [
            {
                "name": variant.name,
                "network": dict(variant.network),
                "augmentation": asdict(variant.augmentation),
                "n_centres": variant.n_centres,
                "machines": list(variant.machines),
            }
            for variant in variants
        ],
    }
    return digest(about)


def _right(predictions: str, truth: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.array([float(said == str(label)) for said, label in zip(predictions, truth, strict=True)])


def _draw(design: CnnDesign) -> list[Digits]:
    """Return each seed's digits: first those that may be held out, every class equally often in both."""
    ink, labels = single_digits("train")
    rng = np.random.default_rng([design.seed, 0])
    dealt: list[list[NDArray[np.int64]]] = [[] for _ in range(design.n_seeds)]
    for k in range(len(DIGIT_CLASSES)):
        rows = rng.permutation(np.flatnonzero(labels == k))
        if len(rows) < design.n_seeds * design.per_class:
            raise ConfigError(
                f"CnnDesign: n_seeds x per_class must be at most {len(rows)}, the digits {k} to train on, "
                f"got {design.n_seeds} x {design.per_class}."
            )
        for s in range(design.n_seeds):
            dealt[s].append(rows[s * design.per_class : (s + 1) * design.per_class])
    # One of each class in turn.
    order = [np.stack(one, axis=1).ravel() for one in dealt]
    return [_images(ink[rows], labels[rows]) for rows in order]


def _images(ink: NDArray[np.float32], labels: NDArray[np.int64]) -> Digits:
    """Enlarge (N, 8, 8) digits in a frame of one pixel."""
    framed = torch.from_numpy(np.pad(ink, ((0, 0), (1, 1), (1, 1))))[:, None]
    images = functional.interpolate(framed, size=(_SIDE, _SIDE), mode="bicubic", align_corners=False)
    return images.clamp(0, 1), torch.from_numpy(labels)


def _inputs(images: Tensor) -> Tensor:
    """Return what the network reads: three channels alike, normalised as its crops are."""
    return (2 * images - 1).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def _outputs(net: nn.Module, images: Tensor) -> Tensor:
    net.eval()
    outputs = torch.cat([net(_inputs(block)) for block in torch.split(images, 256)])
    net.train()
    return outputs


def _fc7(net: SmallCNN, images: Tensor) -> Tensor:
    return _outputs(nn.Sequential(*list(net.children())[:-1]), images)


def _rows(net: SmallCNN, images: Tensor) -> NDArray[np.float32]:
    """Return fc7 scaled to length 1, for SVMs."""
    return functional.normalize(_fc7(net, images)).numpy()


class _Training(NamedTuple):
    """What a training leaves: its points of the curve only where test digits were given."""

    net: SmallCNN
    optimizer: torch.optim.Optimizer
    diverged: bool
    curve: list[tuple[int, float, float, float]]
    wall_s: float
    cpu_s: float


def _train(
    variant: Variant, rate: float, seed: int, design: CnnDesign, digits: Digits, test: Digits | None = None
) -> _Training:
    """Train a network, which depends on the arguments but the last alone; stop where it diverges."""
    images, labels = digits
    weights, order, changes = np.random.default_rng([design.seed, 1, seed]).integers(2**62, size=3).tolist()
    torch.manual_seed(weights)
    shuffling, augmenting = (torch.Generator().manual_seed(one) for one in (order, changes))
    net = variant.build(images).train()
    optimizer = variant.optimizer(net.parameters(), lr=rate)
    per_epoch = -(-len(images) // design.batch_size)
    schedule = cosine(design.n_epochs * per_epoch)
    points = {math.ceil(share * design.n_epochs) for share in _CURVE} if test is not None else set()
    curve: list[tuple[int, float, float, float]] = []
    wall = cpu = 0.0
    for epoch in range(1, design.n_epochs + 1):
        wall, cpu = wall - time.perf_counter(), cpu - time.process_time()
        total, n_right = 0.0, 0
        batches = torch.split(torch.randperm(len(images), generator=shuffling), design.batch_size)
        for i, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule((epoch - 1) * per_epoch + i)
            logits = net(_inputs(variant.augmentation(images[rows], augmenting)))
            loss = variant.loss(logits, labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() * len(rows)
            n_right += int((logits.argmax(1) == labels[rows]).sum())
        wall, cpu = wall + time.perf_counter(), cpu + time.process_time()
        if not math.isfinite(total) or not all(bool(p.isfinite().all()) for p in net.parameters()):
            return _Training(net, optimizer, True, curve, wall, cpu)
        if test is not None and epoch in points:
            accuracy = float((_outputs(net, test[0]).argmax(1) == test[1]).float().mean())
            curve.append((epoch, total / len(images), n_right / len(images), accuracy))
    return _Training(net, optimizer, False, curve, wall, cpu)


def _trial(variant: Variant, rate: float, seed: int, design: CnnDesign, digits: Digits) -> dict[str, Any]:
    """Train without the held-out digits; return how many of these are right, or with each SVM."""
    n_held = design.held_out * len(DIGIT_CLASSES)
    held, truth = (part[:n_held] for part in digits)
    rest = digits[0][n_held:], digits[1][n_held:]
    trained = _train(variant, rate, seed, design, rest)
    if trained.diverged:
        return {"right": [0] * max(1, len(variant.machines))}
    if not variant.machines:
        return {"right": [int((_outputs(trained.net, held).argmax(1) == truth).sum())]}
    rows, of_held = _rows(trained.net, rest[0]), _rows(trained.net, held)
    said = [machine.fit(rows, rest[1].numpy()).predict(of_held) for machine in variant.machines.values()]
    return {"right": [int((one == truth.numpy()).sum()) for one in said]}


def _run(
    variant: Variant, rate: float, machine: str, seed: int, design: CnnDesign, digits: Digits, test: Digits
) -> dict[str, Any]:
    """Train on all digits of a seed, predict the test digits, return what `Finished` has beside its key."""
    trained = _train(variant, rate, seed, design, digits, test)
    net, wall, cpu = trained.net, trained.wall_s, trained.cpu_s
    n_parameters = sum(parameter.numel() for parameter in net.parameters())
    if trained.diverged:
        predictions = "-" * len(test[1])
    elif variant.machines:
        classifier = variant.machines[machine]
        wall, cpu = wall - time.perf_counter(), cpu - time.process_time()
        classifier.fit(_rows(net, digits[0]), digits[1].numpy())
        wall, cpu = wall + time.perf_counter(), cpu + time.process_time()
        predictions = "".join(map(str, classifier.predict(_rows(net, test[0]))))
        n_parameters += _n_learned(classifier) - sum(p.numel() for p in net.logits.parameters())
    else:
        predictions = "".join(map(str, _outputs(net, test[0]).argmax(1).tolist()))
    batch = digits[0][: design.batch_size], digits[1][: design.batch_size]
    return {
        "predictions": predictions,
        "curve": trained.curve,
        "n_parameters": n_parameters,
        "memory_mb": _step_bytes(variant, net, trained.optimizer, batch) / 1e6,
        "wall_s": wall,
        "cpu_s": cpu,
    }


def _n_learned(machine: Any) -> int:
    """Return how many numbers a fitted SVM keeps: weights, or support vectors and their factors."""
    if hasattr(machine, "coef_"):
        return int(machine.coef_.size + machine.intercept_.size)
    n_support = len(np.unique(np.concatenate([one.support_ for one in machine.estimators_])))
    factors = sum(one.dual_coef_.size + one.intercept_.size for one in machine.estimators_)
    return int(n_support * machine.estimators_[0].n_features_in_ + factors)


def _step_bytes(variant: Variant, net: SmallCNN, optimizer: torch.optim.Optimizer, batch: Digits) -> int:
    """Return the bytes that a step holds on to until it goes back: what a batch leaves, and all else."""
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # and so alive, or another would take its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        variant.loss(net(_inputs(batch[0])), batch[1])
    left = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    state = sum(
        value.numel() * value.element_size()
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    )
    return 2 * weights + state + left  # gradients are as large as weights


class _Kept:
    """Finished work in a file, a line each; the first one says of which study.

    Args:
        path: of the file.
        identity: of the study.

    Raises:
        DataError: the file is of another study, no such file at all, or cannot be written.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._head = {"study": identity}
        lines = read_text(path).splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill cuts the last one short
        if whole and whole[0] != _line(self._head):
            raise DataError(
                f"{path}: must hold the runs of this study, got those of another design or seed. Delete it, "
                f"or name another folder."
            )
        if whole != lines or not whole:
            write_text(path, "".join(whole) or _line(self._head))
        try:
            records = [json.loads(line) for line in whole[1:]]
            self._found = {(one["what"], one["variant"], one["setting"], one["seed"]): one for one in records}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: a line is damaged ({error}). Delete the file to start anew.") from error

    def __getitem__(self, key: _Key) -> dict[str, Any]:
        record: dict[str, Any] = self._found[key]
        return record

    def fill(self, what: str, tasks: Mapping[_Key, Any], n_jobs: int) -> None:
        """Run those tasks whose results are not there, and keep them."""
        missing = [key for key in tasks if key not in self._found]
        done = Parallel(n_jobs, return_as="generator")(delayed(_alone)(tasks[key]) for key in missing)
        with appending(self._path) as stream:
            for key, result in zip(missing, track(done, what, total=len(missing), unit="run"), strict=True):
                record = dict(zip(("what", "variant", "setting", "seed"), key, strict=True)) | result
                stream.write(_line(record))
                stream.flush()
                self._found[key] = record

    def settle(self, keys: Iterable[_Key]) -> None:
        """Keep these alone, in their order, whatever was tried or killed on the way."""
        write_text(self._path, _line(self._head) + "".join(_line(self._found[key]) for key in keys))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _alone(task: tuple[Callable[..., dict[str, Any]], tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """Run one task of `delayed` on one thread, and leave torch's random numbers as they were."""
    work, arguments, named = task
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            return work(*arguments, **named)
    finally:
        torch.set_num_threads(n_threads)

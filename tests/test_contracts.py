"""Our own parts keep the contracts, and a part that breaks one is told how."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from rcnn_svm import contracts
from rcnn_svm.contracts import (
    ContractError,
    check_featurizer,
    check_head,
    check_kernel,
    check_postprocess,
    check_proposer,
    check_scorer,
)
from rcnn_svm.features.featurizers import SharedFeatures, WarpedFeatures
from rcnn_svm.heads.estimator_head import EstimatorHead
from rcnn_svm.heads.kernel_svm import KernelSVMHead, NystroemSVMHead
from rcnn_svm.heads.kernels import RBF, HistogramIntersection, Polynomial, gram
from rcnn_svm.heads.linear_svm import LinearSVMHead
from rcnn_svm.heads.scorers import LinearScorer, scorer_from_arrays
from rcnn_svm.heads.softmax import LogisticHead, NetworkSoftmaxHead, SoftmaxHead
from rcnn_svm.networks.backbone import load_backbone
from rcnn_svm.postprocess import PAPER, PostprocessConfig
from rcnn_svm.proposals import GridConfig, SelectiveSearchConfig


def laplacian(x, v):
    return np.exp(-np.abs(x[:, None] - v).sum(axis=2) / 4)


KERNELS = [RBF(0.3), Polynomial(3), HistogramIntersection(), laplacian]


@pytest.mark.parametrize("proposer", [SelectiveSearchConfig(min_size=4), GridConfig(50)])
def test_our_proposers(proposer):
    check_proposer(proposer)


@pytest.mark.parametrize("kind", [WarpedFeatures, SharedFeatures])
def test_our_featurizers(kind):
    name, taps = ("small_cnn", "fc7") if kind is WarpedFeatures else ("mobilenet_v2", "block13@3x3,block17")
    check_featurizer(kind(load_backbone(name, "random"), taps))


@pytest.mark.parametrize("postprocess", [PostprocessConfig(), PAPER, PostprocessConfig(soft_nms_sigma=0.2)])
def test_our_postprocessing(postprocess):
    check_postprocess(postprocess)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: getattr(k, "name", "function"))
def test_our_kernels(kernel):
    check_kernel(kernel)


HEADS = [
    LinearSVMHead(C=1.0),
    SoftmaxHead(C=1.0),
    LogisticHead(C=1.0),
    NystroemSVMHead(n_landmarks=60),
    EstimatorHead(name="logistic", estimator=LogisticRegression()),
    *(KernelSVMHead(kernel=kernel, max_rows=400) for kernel in KERNELS),
]


@pytest.mark.parametrize("head", HEADS, ids=lambda h: type(h).__name__)
def test_our_heads(head):
    check_head(head)


def test_heads_say_what_they_are():
    kinds = [tuple(head.about.values()) for head in (*HEADS[:5], NetworkSoftmaxHead())]
    assert kinds == [
        ("svm", "linear"),
        ("softmax", None),
        ("other", None),
        ("svm", "rbf"),
        ("other", None),
        ("softmax", None),
    ]
    assert KernelSVMHead(kernel=laplacian).about == {"family": "svm", "kernel": "laplacian"}


@pytest.mark.parametrize("head", HEADS[2:], ids=lambda h: type(h).__name__)
def test_what_is_saved_of_a_head_scores_the_same(head):
    blocks = contracts.example_blocks()
    scorer = head.clone().fit(blocks).scorer_
    again = scorer_from_arrays(scorer.kind, scorer.to_arrays(), {"laplacian": laplacian})
    rows = blocks.features(0)
    np.testing.assert_array_equal(again.decision_function(rows), scorer.decision_function(rows))


def test_a_linear_classifier_becomes_arrays():
    blocks = contracts.example_blocks()
    scorer = EstimatorHead(name="logistic", estimator=LogisticRegression()).fit(blocks).scorer_
    assert scorer.kind == "linear"


@pytest.mark.parametrize("kernel", [RBF(0.2), Polynomial(2, 0.5, 0.0), HistogramIntersection()])
def test_kernels_against_their_definitions(kernel, rng):
    x, v = (np.abs(rng.normal(size=(n, 7))).astype(np.float32) for n in (5, 4))
    definition = {
        "rbf": lambda a, b: np.exp(-0.2 * ((a - b) ** 2).sum()),
        "polynomial": lambda a, b: (0.5 * (a @ b)) ** 2,
        "histogram-intersection": lambda a, b: np.minimum(a, b).sum(),
    }[kernel.name]
    expected = np.array([[definition(a.astype(float), b.astype(float)) for b in v] for a in x])
    np.testing.assert_allclose(kernel(x, v), expected, rtol=1e-5)
    whole = gram(kernel, x)
    np.testing.assert_array_equal(whole, whole.T)
    np.testing.assert_allclose(whole, kernel(x, x), rtol=1e-4, atol=1e-6)


class Outside:
    def propose(self, image):
        return np.float32([[0, 0, image.shape[1] + 5, 4]])


class Moody:
    def __init__(self):
        self.n = 0

    def propose(self, image):
        self.n += 1
        return np.float32([[0, 0, self.n, 4]])


class Vandal(SelectiveSearchConfig):
    def propose(self, image):
        image[:] = 0
        return np.float32([[0, 0, 4, 4]])


@pytest.mark.parametrize(
    ("check", "part", "words"),
    [
        (check_proposer, Outside(), r"^Outside: must work on a small example, raised .*inside the 128 x 96"),
        (check_proposer, Moody(), r"^Moody: must propose the same regions each time, in any thread"),
        (check_proposer, Vandal(), r"^Vandal: must leave the image alone"),
        (check_kernel, lambda x, v: -(x @ v.T), r"^<lambda>: must be positive semidefinite, got an eigen"),
        (check_kernel, lambda x, v: x @ v.T + np.arange(len(v)), r"^<lambda>: must be symmetric"),
        (
            check_kernel,
            lambda x, v: x,
            r"^<lambda>: must work on a small example, raised .*must return shape",
        ),
        (check_postprocess, lambda *_: None, r"^<lambda>: must return the Detections of the image"),
        (
            check_head,
            LinearSVMHead(C=-1),
            r"^LinearSVMHead: must work on a small example, raised ConfigError",
        ),
    ],
)
def test_what_breaks_a_contract_is_told_how(check, part, words):
    with pytest.raises(ContractError, match=words):
        check(part)


def test_scorers_and_features_that_break_the_contract():
    class Backwards(LinearScorer):
        def decision_function(self, features):
            return super().decision_function(features)[::-1].copy()

    check_scorer(LinearScorer(np.eye(3, 5), np.zeros(3)), 5, 3)
    with pytest.raises(ContractError, match="must return float32 of shape"):
        check_scorer(LinearScorer(np.eye(3, 5), np.zeros(3)), 5, 2)
    with pytest.raises(ContractError, match="must give a row the same score beside any others"):
        check_scorer(Backwards(np.eye(3, 5), np.zeros(3)), 5, 3)

    class Means:
        key, n_features = {"mean": 1}, 3

        def __call__(self, image, boxes):
            return np.float32([image.reshape(-1, 3).mean(axis=0) * len(boxes)] * len(boxes)).reshape(-1, 3)

        def of_image(self, image):
            return lambda boxes: self(image, boxes)

    with pytest.raises(ContractError, match=r"^Means: must give a box the same features beside any others"):
        check_featurizer(Means())


def test_a_part_that_was_not_brought_is_named():
    from rcnn_svm.errors import DataError

    with pytest.raises(DataError) as caught:
        scorer_from_arrays("kernel:laplacian", {}, {"other": 1})
    assert str(caught.value) == (
        "This detector was made with the kernel 'laplacian', which is not one of rcnn_svm's: bring it with "
        "load_detector(folder, parts={'laplacian': ...}), got the parts other."
    )


def test_parts_that_do_not_exist_or_clash_are_refused():
    from rcnn_svm import ExperimentConfig, HeadRecipe
    from rcnn_svm.errors import ConfigError

    with pytest.raises(ConfigError, match=r"has no part 'proposers'\. Did you mean 'proposer'\?"):
        ExperimentConfig().build(proposers=GridConfig())
    with pytest.raises(ConfigError, match=r"^heads: must be at least one, each with a name of its own, got"):
        ExperimentConfig().build(heads=["linear-svm", "linear-svm"])
    with pytest.raises(ConfigError, match=r"heads: .* got none"):
        replace(ExperimentConfig().build(), heads=())
    with pytest.raises(ConfigError, match=r"grid must name parameters of LinearSVMHead .* got 'gamma'"):
        HeadRecipe("mine", LinearSVMHead(), {"gamma": [1.0]})

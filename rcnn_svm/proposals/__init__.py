"""Region proposals: selective search, a network's, a grid to compare with, the whole image; recall and cache.

Numba is imported by the first selective search, matplotlib by the first plot.
"""

from __future__ import annotations

from rcnn_svm.proposals.cache import (
    KeyedProposer,
    Proposer,
    cached_proposals,
    iterate_proposals,
    proposals_of,
    regions_of,
)
from rcnn_svm.proposals.grid import GridConfig, dense_grid
from rcnn_svm.proposals.recall import BUDGETS, ProposalRecall, proposal_recall
from rcnn_svm.proposals.rpn import RpnConfig, RpnProposals
from rcnn_svm.proposals.selective_search import SelectiveSearchConfig, selective_search
from rcnn_svm.proposals.whole import WholeImage

__all__ = [
    "BUDGETS",
    "GridConfig",
    "KeyedProposer",
    "ProposalRecall",
    "Proposer",
    "RpnConfig",
    "RpnProposals",
    "SelectiveSearchConfig",
    "WholeImage",
    "cached_proposals",
    "dense_grid",
    "iterate_proposals",
    "proposal_recall",
    "proposals_of",
    "regions_of",
    "selective_search",
]

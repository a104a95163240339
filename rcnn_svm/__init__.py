"""R-CNN with per-class SVMs: region proposals, fc7 features, linear and RBF SVMs against a softmax."""

from __future__ import annotations

__version__ = "0.1.0"

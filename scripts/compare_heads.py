#!/usr/bin/env python3
"""Compare linear SVMs, RBF SVMs and softmax heads on the same regions and features.

    python scripts/compare_heads.py DATA --out FOLDER [--heads linear-svm,rbf-svm,...] [options]

The same as `rcnn-svm compare`; `--help` tells all options.
"""

import sys

from rcnn_svm.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))

#!/usr/bin/env python3
"""Train per-class SVMs on the regions of a data set, evaluate them, save the detector.

    python scripts/train_svm.py DATA --out DETECTOR [--head linear-svm|rbf-svm] [options]

The same as `rcnn-svm train`; `--help` tells all options.
"""

import sys

from rcnn_svm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

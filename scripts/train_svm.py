#!/usr/bin/env python3
"""Train per-class SVMs on the regions of a data set, evaluate them, save the detector.

    python scripts/train_svm.py DATA --out DETECTOR [--head rbf-svm] [options]

The same as `rcnn-svm train --head linear-svm`, unless another head is named; `--help` tells all options.
"""

import sys

from rcnn_svm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--head", "linear-svm", *sys.argv[1:]]))  # the last --head has the word

"""`python -m rcnn_svm` is the `rcnn-svm` command."""

import sys

from rcnn_svm.cli import main

if __name__ == "__main__":
    sys.exit(main())

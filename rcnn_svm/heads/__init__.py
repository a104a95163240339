"""Heads: what turns region features into class scores and better boxes.

Import the modules by name (`from rcnn_svm.heads.linear_svm import LinearSVMHead`): this package
loads nothing by itself, so that a saved detector needs `scorers` and numpy only.
"""

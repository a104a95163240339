"""Features of regions: warping, networks, taps, pooling on shared maps, stores and scaling.

Import the modules by name; this package loads nothing by itself, since most of them need torch.
"""

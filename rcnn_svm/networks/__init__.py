"""Networks with named layers, their weights, and what makes them quick on a CPU.

torch is loaded by whatever needs it, so that `taps` can be read without it.
"""

"""What is trained before the heads: fc layers on stored rows, last blocks on maps, a whole network on crops.

`config` is plain data and loads nothing; the other modules load torch.
"""

"""Draft heads from other frameworks and back: python -m convert, installed redrafter_mlx.convert.

The only place that may import torch.
"""

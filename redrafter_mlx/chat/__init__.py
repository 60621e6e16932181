"""Chat with a model in a terminal: python -m redrafter_mlx.chat."""

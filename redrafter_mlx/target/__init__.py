"""The target: any mlx-lm model as something that verifies trees."""

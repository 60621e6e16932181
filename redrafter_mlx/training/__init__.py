"""Trains a draft head for a target, on text that the target writes itself."""

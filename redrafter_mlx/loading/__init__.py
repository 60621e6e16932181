"""Finds and loads models and drafters."""

"""Drafters, which propose continuations. A new one is one file here."""

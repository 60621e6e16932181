"""Drafters: what proposes continuations. A new one is one file here."""

"""Training a draft head for a target, from what the target itself says."""

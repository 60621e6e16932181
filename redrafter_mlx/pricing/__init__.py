"""What speculation costs and yields on this machine, and which trees are worth it."""

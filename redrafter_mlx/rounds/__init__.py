"""What the parts of a round hand to each other, and the rules that judge it."""

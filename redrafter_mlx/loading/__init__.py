"""Where models and drafters come from."""

"""The whole few-step pipeline as one graph."""

"""Recipes of public few-step checkpoints, one JSON file each, with their sources."""

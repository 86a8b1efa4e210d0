"""Turns a few-step pipeline into a deployable folder. This release does not export yet."""

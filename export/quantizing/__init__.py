"""Graphs of an export folder in fewer bits: which layers, by which rule, and at what cost."""

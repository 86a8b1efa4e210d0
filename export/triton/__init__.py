"""Writes a model repository for NVIDIA Triton from an export folder (docs/triton.md)."""

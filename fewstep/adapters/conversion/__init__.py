"""Adapter files of every naming in the wild, as diffusers, ComfyUI or kohya name them."""

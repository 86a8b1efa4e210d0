"""Adapter files of every naming in the wild, as diffusers, ComfyUI or kohya name them."""

from fewstep.adapters.conversion.converted import ConvertedAdapter
from fewstep.adapters.conversion.reading import convert_to_diffusers

__all__ = ["ConvertedAdapter", "convert_to_diffusers"]

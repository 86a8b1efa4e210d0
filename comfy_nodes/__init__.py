"""The folder ComfyUI loads. This release brings no nodes yet; importing it needs no ComfyUI."""

NODE_CLASS_MAPPINGS: dict[str, type] = {}
"""What ComfyUI reads: node name -> node class."""

__all__ = ["NODE_CLASS_MAPPINGS"]

"""Tests inside a real ComfyUI, the one COMFYUI_PATH names."""

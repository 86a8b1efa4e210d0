"""Inference from an export folder: numpy, ONNX Runtime, tokenizers and Pillow; never torch."""

"""Builds TensorRT engines from an export folder, and says beforehand whether it can work.

Engine build and run are not verified on this release: no machine with TensorRT's libraries and a
GPU was there to try. docs/tensorrt.md says what was checked without them.
"""

NOT_VERIFIED = "engine build not verified on this release"
"""Printed by every run, until a machine with a GPU and TensorRT has run the gpu tests."""

"""Runs engines that `fewstep export tensorrt` built, with TensorRT itself (10.12 and newer, 11).

Engine build and run are not verified on this release: no machine with TensorRT's libraries and a
GPU was there to try. What was checked without them is in docs/tensorrt.md.
"""

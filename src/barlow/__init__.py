"""Barlow Twins, from unlabelled images to a served ONNX encoder."""

__version__ = "0.1.0"

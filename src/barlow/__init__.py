"""Barlow Twins, from unlabelled images to a served ONNX encoder."""

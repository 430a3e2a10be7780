"""What runs on onnxruntime alone: the exported encoder, search, the registry."""

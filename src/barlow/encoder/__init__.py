"""What needs onnxruntime but no torch: the exported encoder, search, the registry."""

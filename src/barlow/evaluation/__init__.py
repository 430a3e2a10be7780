"""What embeddings are worth: probes, nearest neighbours, confidence intervals, tables."""

"""What every other part uses: errors, files, image decoding, the shard format, weights, provenance."""

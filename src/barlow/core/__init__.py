"""What every other part stands on: errors, files, decoding, the shard format, where results come from."""

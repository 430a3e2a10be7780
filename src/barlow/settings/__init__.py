"""params.yaml and the flags of `barlow serve`: schema, reading, and the message when a value is wrong."""

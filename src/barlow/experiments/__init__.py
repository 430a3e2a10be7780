"""The parts of `barlow claims` and `barlow tune`: which experiments there are, and the DVC runs."""

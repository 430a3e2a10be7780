"""The parts of `barlow claims`: the grid of experiments, and the DVC runs."""

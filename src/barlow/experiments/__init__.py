"""The parts of `barlow claims`: the grid of experiments, and DVC running them."""

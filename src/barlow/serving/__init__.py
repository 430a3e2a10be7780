"""The parts of `barlow serve`."""

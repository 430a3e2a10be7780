"""What decides on production: the gate, git tags, tests for drift."""

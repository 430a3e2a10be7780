"""The parts of the report: pages, charts, pictures."""

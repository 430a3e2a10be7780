"""Chromium, for the tests that look at pages; conftest's `browser` starts it."""

import shutil

import pytest

CHROMIUM = shutil.which("chromium")
needed = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `make system` installs it where it runs as root")

"""Settings of all tests."""

import os

from hypothesis import settings

# No deadline: a test never judges by time. In CI the examples are the same in every run.
settings.register_profile("finback", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("finback")

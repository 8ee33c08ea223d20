"""Settings of all tests."""

import os

from hypothesis import Phase, settings

pytest_plugins = ["pulling"]  # its fixtures serve two files
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers is an oracle on local folders; no test asks the network

# No deadline: a test never judges by time. In CI the examples are the same in every run.
settings.register_profile("finback", deadline=None, derandomize="CI" in os.environ)
# For planted bugs: that a test fails is enough, the smallest example is not asked for.
quick = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
settings.register_profile("mutation", deadline=None, derandomize=True, phases=quick)
settings.load_profile("finback")

"""Tests of what is no network's own (sources, sinks, the page, batches ...) name none, and run the
compact one, which takes a fifth of the default's time. Tests of the default name it.
"""

import os

os.environ["SIGHTLINE_MODEL"] = "compact"

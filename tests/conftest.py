"""Settings for the whole suite; fixtures live beside the tests that use them, or in tests/support."""

import os

# Tests run torch in this process and in stage processes beside it: one thread each, or they spin against one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

"""Prints its process id and never finishes being imported."""

import os
import time

print(os.getpid(), flush=True)
time.sleep(600)

"""Never done being imported; says who imports it."""

import os
import time

print(os.getpid(), flush=True)
time.sleep(600)

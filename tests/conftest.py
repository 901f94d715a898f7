"""One thread per process: threads that wait for each other cost more than they bring here."""

import os

# Before torch is first imported, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

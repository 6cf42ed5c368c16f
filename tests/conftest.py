"""Marks the folder whose modules (``helpers``) every test may import, and shares the cores among parallel workers."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with two threads each would only wait for each other; subprocesses of tests inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

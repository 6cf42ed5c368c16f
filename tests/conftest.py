"""Marks the folder whose modules (``helpers``) every test may import; no network, cores shared by workers."""

import os

# A hub id that nothing answers is retried for a minute and a half; tests that want another answer patch the client.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with two threads each would only wait for each other; subprocesses of tests inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

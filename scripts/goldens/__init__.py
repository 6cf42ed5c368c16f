"""Adapters between reference outputs and our passes: one file a family, one line in ``ADAPTERS`` of ``cases.py``.

An adapter names, indexes and reshapes; it does no mathematics (a test checks that).
"""

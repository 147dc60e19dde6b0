"""Unmodified client programs against a real pipeline.

Their heavy dependencies are in their own environment (`make test-clients`). A test whose client is not installed is skipped.
"""

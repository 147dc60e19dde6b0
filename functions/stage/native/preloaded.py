"""Layers that are loaded by this import: for a process that others are forked from, which then have them at once."""

from contextlib import suppress

from functions.stage.native.library import UNAVAILABLE, library

# A stage that needs them says what is in the way.
with suppress(*UNAVAILABLE):
    library()

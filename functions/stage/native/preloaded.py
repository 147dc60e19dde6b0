"""Machine code that is loaded by this import: for a process that others are forked from, which then have it at once."""

from functions.stage.native import machine_code

machine_code.for_this_machine()

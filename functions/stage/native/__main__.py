"""Compiles the layers ahead of the first start: `python -m functions.stage.native`, or for an image `… --all-levels`."""

import argparse
import logging
import platform
import subprocess
import sys

from functions.stage.native import machine_code, target


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m functions.stage.native", description=__doc__)
    parser.add_argument("--all-levels", action="store_true", help="for every level of x86-64, not only this machine's")
    parser.add_argument("--level", type=int, choices=range(len(target.LEVELS)), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.level is not None:
        target.select(target.LEVELS[arguments.level])
        machine_code.for_selected_target()
    elif arguments.all_levels and platform.machine() == "x86_64":
        # Each in a process of its own: numba's target is chosen once.
        for level in range(len(target.LEVELS)):
            subprocess.run([sys.executable, "-m", "functions.stage.native", "--level", str(level)], check=True)
    else:
        machine_code.for_this_machine()


if __name__ == "__main__":
    main()

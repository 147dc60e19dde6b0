"""Compiles the layers before the first start: `python -m functions.stage.native`."""

import argparse
import logging

from functions.stage.native.library import library


def main() -> None:
    argparse.ArgumentParser(prog="python -m functions.stage.native", description=__doc__).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(f"layers for {library().level} are ready")


if __name__ == "__main__":
    main()

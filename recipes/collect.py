"""Gathers run directories into one result file.

Usage: python recipes/collect.py recipes/results/NAME.json runs/a runs/b ...
"""

import json
import sys

import keras_stable as ks


def main(out, *paths):
    runs = [ks.read_run(path) for path in paths]
    with open(out, "w") as file:
        json.dump({"schema": 1, "runs": runs}, file, indent=1)
        file.write("\n")
    for run in runs:
        config = run["config"]
        print(f"{config['variant']:14} {run['validation_loss']:.4f}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

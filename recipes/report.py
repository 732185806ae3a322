"""Writes one HTML page about runs: where they broke, and how.

Question: what did these runs do, and where do variants stop to be stable?

    python recipes/report.py runs/table
    python recipes/report.py runs/table runs/more --file both.html
    python recipes/report.py runs/table --format markdown
    python recipes/report.py runs/table --csv numbers/ --png figures/

The page needs no other file and no network. Any directory of runs will do: of
`pretrain.py`, of `sweep.py`, of a `StabilityMonitor`; also while they go on.
A hundred runs take about ten seconds on one core. PNG files are drawn by a
Chromium or Chrome of the system, or the one in KERAS_STABLE_BROWSER.
"""

import argparse
import os
import sys
import warnings

# Reads files alone: whichever backend is there.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("directories", nargs="+", metavar="DIR", help="of runs or sweeps")
    add("--file", help="the page (report.html in the first directory)")
    add(
        "--format",
        default="html",
        help="html; markdown: the tables, printed, or into --file (html)",
    )
    add("--csv", metavar="DIR", help="outcomes.csv and curves.csv, all steps")
    add("--png", metavar="DIR", help="the page's figures")
    args = parser.parse_args(arguments)
    if args.png and args.format == "markdown":
        parser.error("--png draws the page: leave --format markdown out")

    import keras_stable as ks

    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            written = ks.write_report(
                args.directories, args.file, args.format, args.csv, args.png
            )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"report: {error}")
    for warning in told:
        print(f"report: {warning.message}")
    print(written)


if __name__ == "__main__":
    main()

"""Keeps what is worth keeping of a sweep, in two files.

Question: how do the numbers and curves of a sweep travel, in a repository or
to another machine?

    python recipes/archive.py runs/edge recipes/results/edge

Writes `edge.json`: what was asked, the stability table, a line a run, hardware,
versions and commits; and `edge.tar.xz`: the runs that ended with a result, all
their steps, a few of their tables (the first, the last, and between),
no models and black boxes. Reports read it and sweeps go on from it, unpacked:

    mkdir -p runs && tar -C runs -xf recipes/results/edge.tar.xz
    python recipes/sweep.py --out runs/edge
"""

import argparse
import io
import json
import os
import sys
import tarfile
from pathlib import Path

# Reads files alone: whichever backend is there.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

KEPT = ("run.json", "output.txt")


def thin(lines, tables, mark):
    """Lines of a `health.jsonl`, of which at most so many are tables."""
    steps = {
        i: json.loads(line)["step"]
        for i, line in enumerate(lines)
        if line.startswith(mark)
    }
    if len(steps) <= tables:
        return lines
    # Even in time: where a run is in trouble, tables are dense.
    first, last = min(steps.values()), max(steps.values())
    wanted = [first + k * (last - first) / (tables - 1) for k in range(tables)]
    kept = {min(steps, key=lambda i: abs(steps[i] - w)) for w in wanted}
    return [x for i, x in enumerate(lines) if i not in steps or i in kept]


def add(tar, name, content):
    """A file without owner and time: the same sweep gives the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def pack(sweep, paths, file, tables, ks):
    with tarfile.open(file, "w:xz", preset=9) as tar:
        for path in (sweep.path / "sweep.json", *paths):
            name = Path(sweep.path.name, path.relative_to(sweep.path))
            if path.is_file():
                add(tar, str(name), path.read_bytes())
                continue
            for part in KEPT:
                if (path / part).exists():
                    add(tar, str(name / part), (path / part).read_bytes())
            if (health := path / "health.jsonl").exists():
                lines = health.read_bytes().splitlines(keepends=True)
                lines = b"".join(thin(lines, tables, ks.health.TABLE))
                add(tar, str(name / health.name), lines)


def different(values):
    """Each of some JSON values once, in the order in which they came."""
    return [v for i, v in enumerate(values) if v not in values[:i]]


def summary(sweep, paths, ks):
    declared = ks.records.read_json(sweep.path / "sweep.json")
    found = [ks.records.read_json(path / "run.json") for path in paths]
    table = ks.sweep_record(sweep)
    named = ("experiment", "question", "search", "flags")
    return {
        "schema": 1,
        **{name: declared[name] for name in named},
        "hardware": different([run["device"] for run in found]),
        "versions": different([run["versions"] for run in found]),
        "git_commits": different([run["git_commit"] for run in found]),
        **{name: table[name] for name in ("arms", "runs")},
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep", help="its directory")
    parser.add_argument("to", help="path of both files, without their endings")
    parser.add_argument(
        "--tables", type=int, default=16, help="kept of a run, from 2 (16)"
    )
    args = parser.parse_args(arguments)
    if args.tables < 2:
        parser.error("--tables must be at least 2: the first and the last.")

    import keras_stable as ks

    try:
        sweep = ks.Sweep(args.sweep)
        runs = [run for label in sweep.arms for run in sweep.runs(label)]
        every, runs = runs, [r for r in runs if sweep.status(r) == "ended"]
        paths = [sweep.path / run.folder for run in runs]
        record = summary(sweep, paths, ks)
        Path(args.to).parent.mkdir(parents=True, exist_ok=True)
        ks.records.write_json(args.to + ".json", record)
        pack(sweep, paths, args.to + ".tar.xz", args.tables, ks)
    except (ValueError, OSError) as error:
        sys.exit(f"archive: {error}")
    print(f"{len(paths)} runs: {args.to}.json, {args.to}.tar.xz")
    print(f"It unpacks as {sweep.path.name}/.")
    left_out = [run.folder for run in every if run not in runs]
    if left_out:
        print(f"Left out, without a result: {', '.join(left_out)}")


if __name__ == "__main__":
    main()

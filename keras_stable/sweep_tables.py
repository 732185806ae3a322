"""What a sweep has found, as a table; and how far it is, as it runs."""

import collections
import csv
import io
import math
import os
import shutil
import time

from keras_stable import json_files
from keras_stable import records
from keras_stable.choices import check_choice
from keras_stable.standings import standing
from keras_stable.sweeps import given_up

FORMATS = ("text", "markdown")
# Of a `health.jsonl`, the end that holds its last step.
TAIL = 1 << 16


def sweep_table(sweep):
    """The stability table: a dictionary for each arm.

    Args:
        sweep: `Sweep`.

    Returns:
        List of dictionaries of `"label"`, `"interval"` (text), `"low"` and
        `"high"` (its ends: the last stable rate, 0 if there is none; the
        first unstable one, infinity if there is none), `"counts"` (`{rate:
        [stable, runs]}`), `"runs"`, `"failed"`, `"given_up"`,
        `"lr_sensitivity"`, `"best_rate"` and `"best_loss"` (the final
        validation loss there, a mean over seeds; NaN if there is none).
    """
    rows = []
    for label in sweep.arms:
        outcomes = sweep.outcomes(label)
        found = standing(outcomes)
        interval = found["interval"]
        counts = {f"{k:g}": [*v] for k, v in interval.counts.items()}
        rows.append(
            {
                "label": label,
                "interval": str(interval),
                "low": interval.low,
                "high": interval.high,
                "counts": counts,
                "runs": sum(n for _, n in counts.values()),
                "failed": found["failed"],
                "given_up": given_up(outcomes),
                "lr_sensitivity": found["sensitivity"],
                "best_rate": found["best_rate"],
                "best_loss": found["best_loss"],
            }
        )
    return rows


def format_sweep_table(rows, format="text"):
    """What `sweep_table` returns, to be read.

    Args:
        rows: list of dictionaries.
        format: `"text"` or `"markdown"`. Defaults to `"text"`.

    Returns:
        String of lines. "k/n" is how many of n runs were stable.
    """
    check_choice(format, FORMATS, "format of a table")
    cells = [
        ("arm", "stable (k/n) to unstable", "runs", "failed")
        + ("LR sensitivity", "best loss", "at")
    ]
    for row in rows:
        rate = row["best_rate"]
        failed = f"{row['failed']}{', given up' * row['given_up']}"
        cells.append(
            (
                *(row["label"], row["interval"], str(row["runs"]), failed),
                *(_number(row[k]) for k in ("lr_sensitivity", "best_loss")),
                "" if rate is None else f"{rate:g}",
            )
        )
    if format == "markdown":
        cells.insert(1, ("---",) * len(cells[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return _aligned(cells)


def _number(value):
    return f"{value:.4f}" if math.isfinite(value) else ""


def _aligned(cells):
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip()
        for row in cells
    )


def sweep_record(sweep):
    """What `table.json` holds: `"arms"`, see `sweep_table`, and `"runs"`."""
    outcomes = [o for label in sweep.arms for o in sweep.outcomes(label)]
    runs = [
        {
            "label": o.label,
            "learning_rate": o.learning_rate,
            "seed": o.seed,
            "ending": o.ending,
            "loss": o.loss,
            "initial": o.initial,
            "steps_done": o.steps_done,
            "max_logit": o.max_logit,
        }
        for o in sorted(outcomes, key=_key)
    ]
    return {"schema": 1, "arms": sweep_table(sweep), "runs": runs}


def write_sweep_table(sweep):
    """Writes `table.json` and `table.csv`, of arms and rates, to a sweep.

    Returns:
        The rows of `sweep_table`.
    """
    table = sweep_record(sweep)
    records.write_json(sweep.path / "table.json", table)
    rows, text = table["arms"], io.StringIO()
    if rows:
        # What is different for each rate is in table.json.
        rows = [{k: v for k, v in row.items() if k != "counts"} for row in rows]
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part = sweep.path / "table.csv.part"
    part.write_text(text.getvalue())
    os.replace(part, sweep.path / "table.csv")
    return table["arms"]


def _key(outcome):
    return outcome.label, outcome.learning_rate, outcome.seed


def last_step(path):
    """`(step, loss)` of the last line of a run's `health.jsonl`, or None."""
    try:
        with open(path / "health.jsonl", "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if line.startswith(b'{"kind": "step"'):
            try:
                found = records.from_json(json_files.parse(line, path))
                return int(found["step"]), float(found["loss"])
            except json_files.WRONG:
                continue
    return None


class Display:
    """Tells how far a sweep is: a table drawn anew, or a line for each run.

    Args:
        stream: file. On a terminal the table is drawn, elsewhere lines are
            printed.
        seconds: between two drawings. Defaults to 1.
    """

    def __init__(self, stream, seconds=1.0):
        self._stream, self._seconds = stream, seconds
        self._drawn, self._last, self._said = 0, -math.inf, set()
        self._begun, self._count = time.monotonic(), 0

    def once(self, text):
        """As `say`, but for what was said before."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def say(self, text):
        """A line that stays, above the table."""
        self._erase()
        print(text, file=self._stream, flush=True)
        self._last = -math.inf

    def ended(self, sweep, run):
        """The line of a run that ended, with a result or without."""
        self._count += 1
        where = f"{run.label}, {run.learning_rate:g}, seed {run.seed}"
        if sweep.status(run) == "ended":
            record = sweep.record(run)
            loss = record.get("validation_loss", math.nan)
            how = f"{record['status']}, loss {loss:.4f}"
            if record["status"] == "diverged":
                how += f" ({record.get('verdict')})"
        else:
            failure = sweep.failure(run)
            lines = failure.get("tail", "").splitlines() or [""]
            how = (
                f"FAILED (attempt {failure.get('attempts')}, exit code "
                f"{failure.get('exit_code')}): {lines[-1][:200]}"
            )
        minutes = (time.monotonic() - self._begun) / 60
        self.say(f"{self._count:4}  {minutes:6.1f} min  {where}: {how}")

    def update(self, sweep, running, waiting):
        """Draws the table, if it is time.

        Args:
            running: `PlannedRun`s at work.
            waiting: how many others are known to follow, at least.
        """
        now = time.monotonic()
        if not self._stream.isatty() or now - self._last < self._seconds:
            return
        self._last = now
        size = shutil.get_terminal_size()
        lines = self._lines(sweep, running, waiting)[: size.lines - 1]
        self._erase()
        self._drawn = len(lines)
        lines = [line[: size.columns - 1] for line in lines]
        print("\n".join(lines), file=self._stream, flush=True)

    def _erase(self):
        if self._drawn:
            # Up so many lines, and clear what is below.
            self._stream.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0

    def _lines(self, sweep, running, waiting):
        minutes = (time.monotonic() - self._begun) / 60
        total = collections.Counter()
        grid = [[label] for label in sweep.arms]
        for row, label in zip(grid, sweep.arms):
            outcomes = sweep.outcomes(label)
            total.update(o.ending == "failed" for o in outcomes)
            rates = {o.learning_rate for o in outcomes}
            rates |= {r.learning_rate for r in running if r.label == label}
            for rate in sorted(rates):
                own = [o for o in outcomes if o.learning_rate == rate]
                own = [o for o in own if o.ending != "failed"]
                stable = sum(o.stable for o in own)
                text = f"{rate:g}: {stable}/{len(own)}"
                for run in running:
                    if (run.label, run.learning_rate) == (label, rate):
                        text += _progress(sweep, run)
                failed = sum(o.learning_rate == rate for o in outcomes)
                text += "!" * (failed - len(own))
                row.append(text)
        width = max(map(len, grid), default=0)
        cells = [row + [""] * (width - len(row)) for row in grid]
        return [
            f"{total[False]} ended, {len(running)} running, {total[True]} "
            f"failed, {waiting} more known; {minutes:.1f} min. Stable/runs:",
            *_aligned(cells).splitlines(),
        ]


def _progress(sweep, run):
    found = last_step(sweep.path / run.folder)
    return " (begins)" if found is None else " ({}: {:.3f})".format(*found)

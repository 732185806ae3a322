"""Run directories -> one HTML page, tables as markdown, numbers as CSV."""

import csv
import datetime
import math
import warnings
from pathlib import Path

import numpy as np

from keras_stable import json_files
from keras_stable.choices import check_choice
from keras_stable.comparison import compare_configs
from keras_stable.comparison import growths
from keras_stable.criteria import MEANINGS
from keras_stable.criteria import spike_rate_robust
from keras_stable.digests import SCALARS
from keras_stable.digests import find_runs
from keras_stable.digests import number
from keras_stable.digests import read_digest
from keras_stable.digests import text
from keras_stable.growth import reference_of
from keras_stable.outcomes import OPEN
from keras_stable.outcomes import read_outcomes
from keras_stable.page import render
from keras_stable.records import read_json
from keras_stable.screenshots import save_figures
from keras_stable.stability import ENDINGS
from keras_stable.standings import in_order
from keras_stable.standings import stability_table

# What a page holds of all runs together: each of a hundred gets 1000 points
# of a curve, of fewer as well, and of more accordingly less.
RUNS, POINTS, CELLS = 100, 1000, 8000
# Endings of a page: those of an outcome, and of a run that has none.
NO_ENDING = {
    "unfinished": "It goes on or was interrupted, and counts nowhere.",
    "unknown": "What a monitor wrote, without a run.json: it counts nowhere.",
    "unreadable": "Its records cannot be read: it counts nowhere.",
}
STATES = (*ENDINGS, *NO_ENDING)
COLUMNS = (
    *("label", "rate", "seed", "ending", "verdict", "status", "loss"),
    *("perplexity", "initial", "max_logit", "min_entropy", "growth", "spikes"),
    *("events_total", "steps_done", "parameters", "started", "path"),
)


def write_report(paths, file=None, format="html", csv=None, png=None):
    """Writes what runs did as one page that needs no other file.

    The page has the stability table beside the paper's, loss against learning
    rate, loss curves with events and verdicts, and of each run the growth of
    its output norms, logits and entropy of its attention, gradient and update
    norms, and its configuration. It filters, sorts, compares and saves PNG
    and CSV itself, and asks no network.

    Directories may be of strangers, of runs that go on, or damaged: what
    cannot be read is listed. Of a curve of more than 1000 steps (of more than
    a hundred runs fewer) the page draws extremes, see `curves.decimate`.

    Args:
        paths: a directory or a list: of runs, or of sweeps that hold runs.
        file: path of the page. Defaults to `report.html` in the first
            directory. With `format="markdown"`, None writes no file.
        format: `"html"`, or `"markdown"`: the tables alone, as text.
        csv: directory for `outcomes.csv`, a line a run, and `curves.csv`,
            every step of every run; or None.
        png: directory for the page's figures, which a headless Chromium
            draws; or None.

    Returns:
        Path of the page; string with `format="markdown"`.

    Raises:
        FileNotFoundError: for no directory, one without a run, or if no
            Chromium is found for `png`.
        ImportError: if Plotly, or Playwright for `png`, is not installed:
            `pip install "keras-stable[lab]"`.
        ValueError: for another format.

    Warns:
        UserWarning: if the page has no stability table, and why.

    Example:

    >>> write_report("runs/table", "table.html")        # doctest: +SKIP
    PosixPath('table.html')
    >>> print(write_report("runs/table", format="markdown"))  # doctest: +SKIP
    """
    check_choice(format, ("html", "markdown"), "format")
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if png is not None and format != "html":
        raise ValueError("`png` draws the page: give it with format='html'.")
    digests = read_digests(paths)
    data = page_data(digests, paths)
    if csv is not None:
        write_csv(digests, data, csv)
    if format == "markdown":
        tables = to_markdown(data)
        if file is not None:
            Path(file).write_text(tables, "utf-8")
        return tables
    file = Path(file or Path(paths[0]) / "report.html")
    file.write_text(render(data, data["title"]), "utf-8", newline="\n")
    if "missing" in data["stability"]:
        warnings.warn(data["stability"]["missing"], stacklevel=2)
    if png is not None:
        save_figures(file, png)
    return file


def read_digests(paths):
    """The `Digest`s of all runs in directories; see `digests.find_runs`."""
    directories = find_runs(paths)
    share = share_of(len(directories))
    return [read_digest(path, *share) for path in directories]


def share_of(count):
    """Points of a curve and cells of a heat map, for each of `count` runs."""
    share = RUNS / max(count, RUNS)
    return max(100, int(POINTS * share)), int(CELLS * share)


def page_data(digests, paths):
    """Everything that the page shows, as JSON values."""
    outcomes, notes = _outcomes(digests)
    by_path = {Path(o.path): o for o in outcomes}
    by_place = {digest.path: digest for digest in digests}
    runs = []
    for place, digest in enumerate(digests):
        outcome = by_path.get(digest.path)
        tenth = outcome and reference_of(outcome, outcomes)
        tenth = by_place[Path(tenth.path)] if tenth else None
        shown, largest = growths(digest, tenth)
        run = {**digest.facts, "id": place, "place": place}
        run |= {"growth": largest, "growths": shown}
        run |= {"loss": digest.facts["validation_loss"]}
        run["ending"] = outcome.ending if outcome else _state(digest)
        run["spikes"] = _spikes(digest)
        if outcome is not None:
            run |= {"label": outcome.label, "rate": outcome.learning_rate}
        names = "curves events events_total verdicts attention updates problems"
        run |= {name: getattr(digest, name) for name in names.split()}
        runs.append(run)

    def present(key, order=None):
        found = {r[key] for r in runs if r[key] is not None}
        return sorted(found, key=order.index if order else None)

    variants = {}
    for run in runs:
        # A run whose record is lost does not say of which variant it is.
        known = variants.get(run["label"], "")
        variants[run["label"]] = run["variant"] or known
    variants = in_order(variants)
    now = datetime.datetime.now(datetime.timezone.utc)
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [*dict.fromkeys(map(str, paths))]
    named = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return {
        "title": f"Stability report: {named}",
        "made": f"{len(runs)} runs, read {now:%Y-%m-%d %H:%M} UTC from "
        + ", ".join(map(str, paths)),
        "questions": list(filter(None, map(_question, paths))),
        "limits": _limits(len(runs)),
        "runs": runs,
        "endings": ENDINGS,
        "meanings": MEANINGS | NO_ENDING,
        "present": present("ending", STATES),
        "labels": list(variants),
        "rates": present("rate"),
        "seeds": present("seed"),
        "stability": _stability(outcomes, variants, notes),
        "config": compare_configs(digests),
    }


def _question(path):
    """What a sweep was made to find out, None if it does not say."""
    try:
        declared = read_json(Path(path) / "sweep.json")
    except (OSError, *json_files.WRONG):
        return None
    names = ("experiment", "question")
    known = [text(declared[name]) for name in names if declared.get(name)]
    return ": ".join(known) or None


def _outcomes(digests):
    """Outcomes of the runs, and what is to be said of them together."""
    notes, found, paths = [], [], [digest.path for digest in digests]
    try:
        outcomes = read_outcomes(paths, problems=found)
    except json_files.WRONG as error:
        # Two runs of one name, or a name for different things.
        notes, found, outcomes = [str(error)], [], []
        for digest in digests:
            try:
                outcomes += read_outcomes(digest.path, problems=found)
            except json_files.WRONG as wrong:
                digest.problems.append(f"it cannot be scored: {wrong}")
    # What is said of one run stands beside it.
    by_path = {str(digest.path): digest for digest in digests}
    for note in dict.fromkeys(found):
        own = [path for path in by_path if note.startswith(f"{path} ")]
        if not own:
            notes.append(note)
            continue
        path = max(own, key=len)
        digest, note = by_path[path], note[len(path) + 1 :]
        if not (note.startswith("is left out") and digest.problems):
            digest.problems.append(text(note))
    return outcomes, notes


def _stability(outcomes, variants, notes):
    try:
        table = stability_table(outcomes, variants)
    except ValueError:
        why = f"There is no stability table: {' '.join(notes)}"
        return {"rates": [], "rows": [], "notes": [why], "missing": why}
    return {**table, "notes": table["notes"] + notes}


def _limits(count):
    points, _ = share_of(count)
    return [
        f"A curve of more than {points} steps is drawn with so many points at "
        "most: the least and the greatest value of each of its pieces, and the "
        "first that is not finite, so that no spike is lost. Heat maps of many "
        "layers show some of the tables, evenly spread. `recipes/report.py "
        "--csv` writes every step.",
        "The running median is over the last 20 steps, or 2 % of them if that "
        "is more. Norms, logits and entropies are those of the tables that "
        "keras_stable's monitor records. This page asks no network.",
    ]


def _state(digest):
    """The ending of a run of which there is no outcome."""
    if digest.facts["status"] in OPEN:
        return "unfinished"
    if digest.facts["failure"]:
        return "failed"
    if "loss" in digest.series and digest.facts["status"] == "no run.json":
        return "unknown"
    return "unreadable"


def _spikes(digest):
    if "loss" not in digest.series:
        return None
    return number(spike_rate_robust(digest.series["loss"][1]))


def csv_cell(value):
    """A value that a spreadsheet shows and does not compute.

    >>> csv_cell("=1+1"), csv_cell(-1.5), csv_cell(None)
    ("'=1+1", -1.5, '')
    """
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return value
    cell = str(value)
    # Spreadsheets pass over blanks before a formula, a tab among them.
    return f"'{cell}" if cell.lstrip()[:1] in set("=+-@|%") else cell


def write_csv(digests, data, folder):
    """Writes `outcomes.csv` and `curves.csv`, all steps, into a directory."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "outcomes.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for run in data["runs"]:
            rows.writerow([csv_cell(run.get(name)) for name in COLUMNS])
    with open(folder / "curves.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "rate", "seed", "step", *SCALARS])
        for digest in digests:
            names = ("path", "label", "rate", "seed")
            run = [csv_cell(digest.facts[name]) for name in names]
            if not digest.series:
                continue
            steps = next(iter(digest.series.values()))[0]
            gap = np.full(len(steps), np.nan)
            series = [digest.series.get(name, (0, gap))[1] for name in SCALARS]
            for row in zip(steps, *series):
                rows.writerow([*run, *(f"{value:.6g}" for value in row)])


def to_markdown(data):
    """The stability table and the outcomes of all runs, as markdown."""
    table = data["stability"]
    rows = [
        [
            row["label"],
            *(f"{c['k']}/{c['n']}" if c else "" for c in row["cells"]),
            *map(_show, (row["last_stable"], row["first_unstable"])),
            _show(row["sensitivity"]),
            *map(_interval, (row["loss"], row["perplexity"])),
            _show(row["best_rate"]),
            (row["paper"] or {}).get("diverges_at", ""),
            _show((row["paper"] or {}).get("perplexity")),
        ]
        for row in table["rows"]
    ]
    head = ["variant", *(f"{rate:g}" for rate in table["rates"])]
    head += ["last stable", "first unstable", "LR sensitivity", "best loss"]
    head += ["perplexity", "at rate", "paper: diverges at", "paper: perplexity"]
    shown = [name for name in COLUMNS if name not in ("started", "parameters")]
    runs = [[run.get(name) for name in shown] for run in data["runs"]]
    runs = [[x if isinstance(x, str) else _show(x) for x in r] for r in runs]
    problems = [
        f"* {_plain(run['path'])}: {_plain('; '.join(run['problems']))}"
        for run in data["runs"]
        if run["problems"]
    ]
    parts = [
        f"# {_plain(data['title'])}",
        _plain(data["made"]),
        "\n\n".join(map(_plain, data["questions"])),
        "## Stability\n\nStable runs of all seeds at each learning rate.",
        _markdown_table(head, rows),
        "\n\n".join(map(_plain, table["notes"])),
        "## Runs",
        _markdown_table(shown, runs),
    ]
    if problems:
        parts.append("## Not read, or in part\n\n" + "\n".join(problems))
    return "\n\n".join(part for part in parts if part) + "\n"


def _show(value):
    return "" if value is None else f"{value:.5g}"


def _interval(estimate):
    if estimate is None:
        return ""
    low, high = estimate["low"], estimate["high"]
    interval = f" [{low:.4g}, {high:.4g}]" if math.isfinite(high - low) else ""
    return f"{estimate['mean']:.4g}{interval}"


def _plain(value):
    # Markdown passes HTML through, and a bar ends a cell.
    plain = str(value).replace("&", "&amp;").replace("<", "&lt;")
    for character in "\\|`[]*_":
        plain = plain.replace(character, f"\\{character}")
    return plain


def _markdown_table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(x if x == "---" else _plain(x) for x in line) + " |"
        for line in lines
    )

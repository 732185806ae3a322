"""A sweep directory: what was declared, which runs there are, what is next.

```
sweep.json                  the declaration: arms, flags, search
sweep.lock                  who is at work on it; empty if nobody is
table.json, table.csv       the result, see `sweep_tables`
LABEL/lr-RATE/seed-SEED/    a run directory, see `records`, and
    output.txt              what its process printed
    failure.json            how it ended without a result, and how often
```

All that is known is in these files and derived from them anew: a sweep goes on
after any end, and where the directory was copied to.
"""

import contextlib
import dataclasses
import itertools
import json
import socket
from pathlib import Path

from keras_stable import processes
from keras_stable import records
from keras_stable.choices import check_choice
from keras_stable.choices import nearest
from keras_stable.lr_search import Bisection
from keras_stable.lr_search import Ladder
from keras_stable.outcomes import ENDED
from keras_stable.outcomes import read_outcomes
from keras_stable.sampling import TPESearch
from keras_stable.snapshots import differences
from keras_stable.stability import Outcome
from keras_stable.stability import rate_of
from keras_stable.variants import get as get_variant

SCHEMA = 1
SEARCHES = {"ladder": Ladder, "bisect": Bisection, "tpe": TPESearch}
# A run is tried so often, and an arm of which so many failed and none gave a
# result is given up.
ATTEMPTS, HOPELESS = 2, 3


@dataclasses.dataclass(frozen=True, order=True)
class PlannedRun:
    """One training of a sweep: an arm at a learning rate, with a seed.

    Attributes:
        label: str, of the arm.
        learning_rate: float, the schedule's peak.
        seed: int.
        folder: str. Its directory within the sweep's.

    >>> PlannedRun("qk_norm", 8e-3, 0).folder
    'qk_norm/lr-0.008/seed-0'
    """

    label: str
    learning_rate: float
    seed: int

    @property
    def folder(self):
        return f"{self.label}/lr-{self.learning_rate:g}/seed-{self.seed}"


class Sweep:
    """The runs of some arms over learning rates and seeds, in a directory.

    Args:
        path: the directory. Made if it is not there.
        arms: `Arm`s: what is compared. Defaults to None: with `search`, those
            that the directory was declared with.
        search: `Ladder`, `Bisection` or `TPESearch`, made for each arm alone.
        flags: dictionary of flags of all runs, names with underscores; an
            arm's own win.
        experiment, question: strings, for reports.
        extend: bool. Whether these arms, and the rates and seeds of a
            `Ladder`, are added to those of a sweep that is there; of other
            searches the new one takes the old one's place. Its runs count.
            Defaults to False: only a sweep that was declared the same is gone
            on with.

    Attributes:
        path: `Path`.
        arms: dictionary from labels to `{"variant": dictionary, "flags":
            dictionary}`.
        flags, search, experiment, question: as given, or as joined.
        problems: dictionary from labels to lists of sentences about results
            that cannot be read, or are of mixed versions: see
            `read_outcomes`. Filled by `outcomes`.

    Raises:
        ValueError: for labels given twice, and for another declaration, with
            what differs.
        FileNotFoundError: without `arms`, if there is no sweep.
        OSError: if the directory cannot be written.

    Example:

    >>> sweep = Sweep("runs/a", arms, Ladder("paper"))       # doctest: +SKIP
    >>> sweep.wanted()[0].folder                             # doctest: +SKIP
    'baseline/lr-0.006/seed-0'
    """

    def __init__(
        self,
        path,
        arms=None,
        search=None,
        flags=None,
        experiment=None,
        question="",
        extend=False,
    ):
        self.path = Path(path)
        file = self.path / "sweep.json"
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(
                f"{self.path} is a file. Give a directory for the sweep."
            )
        if (arms is None) != (search is None):
            raise ValueError("`arms` and `search` are given together.")
        before = _read(file) if file.exists() else None
        if arms is None:
            if before is None:
                raise FileNotFoundError(
                    f"There is no sweep in {self.path}: no {file.name}. Say "
                    "what to run, or give the directory of a sweep."
                )
            self._take(before)
        else:
            declared = {
                "schema": SCHEMA,
                "experiment": experiment,
                "question": question,
                "arms": _arms(arms),
                "flags": flags or {},
                "search": _search_to_json(search),
            }
            declared = json.loads(json.dumps(declared))
            if before is not None:
                before.pop("environment", None)
                _compare(before, declared, self.path, extend)
                if extend:
                    declared = _joined(before, declared)
            self._take(declared)
            if before != declared:
                self.path.mkdir(parents=True, exist_ok=True)
                now = {"environment": records.software()}
                records.write_json(file, declared | now)
        self._ended, self._outcomes, self.problems = set(), {}, {}

    def _take(self, declared):
        try:
            self.arms, self.flags = declared["arms"], declared["flags"]
            self.experiment = declared["experiment"]
            self.question = declared["question"]
            self.search = _search_of(declared["search"])
            for arm in self.arms.values():
                get_variant(arm["variant"])
                dict(arm["flags"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path / 'sweep.json'} is no declaration of a sweep: "
                f"{type(error).__name__}: {error}"
            ) from error

    # What its files say.

    def runs(self, label):
        """All runs of an arm of which there is a directory, by rate."""
        found = []
        for folder in (self.path / label).glob("lr-*/seed-*"):
            with contextlib.suppress(ValueError):
                rate = rate_of(float(folder.parent.name[3:]))
                run = PlannedRun(label, rate, int(folder.name[5:]))
                if self.path / run.folder == folder:
                    found.append(run)
        return sorted(found)

    def record(self, run):
        """Its `run.json`, numbers as numbers; {} if it cannot be read."""
        try:
            file = self.path / run.folder / "run.json"
            return records.read_json(file)
        except (OSError, ValueError):
            return {}

    def failure(self, run):
        """Its `failure.json`, {} if there is none."""
        try:
            found = records.read_json(self.path / run.folder / "failure.json")
            return {"attempts": 1, **found}
        except (OSError, ValueError):
            return {}

    def status(self, run):
        """`"new"`, `"begun"`, `"ended"` (with a result) or `"failed"`.

        Raises:
            ValueError: if its directory holds the result of another run.
        """
        if run in self._ended:
            return "ended"
        record = self.record(run)
        if record.get("status") in ENDED:
            self._check(run, record)
            self._ended.add(run)
            return "ended"
        if self.failure(run).get("attempts", 0) >= ATTEMPTS:
            return "failed"
        return "begun" if record else "new"

    def _check(self, run, record):
        config = record.get("config", {})
        for name in ("label", "learning_rate", "seed"):
            if config.get(name) != getattr(run, name):
                raise ValueError(
                    f"{self.path / run.folder} holds another run: its {name} "
                    f"is {config.get(name)!r}. Move it out of the sweep."
                )

    def outcomes(self, label):
        """`Outcome`s of an arm's runs that ended, or failed for good.

        A run whose result cannot be read counts as failed: see `problems`.

        Raises:
            ValueError: for an arm that the sweep has not.
        """
        check_choice(label, self.arms, "arm")
        status = {run: self.status(run) for run in self.runs(label)}
        ended = {run for run, state in status.items() if state == "ended"}
        failed = {run for run, state in status.items() if state == "failed"}
        if self._outcomes.get(label, [None])[0] != (ended, failed):
            paths = [self.path / run.folder for run in sorted(ended)]
            problems = self.problems[label] = []
            found = read_outcomes(paths, problems=problems) if paths else []
            read = {PlannedRun(o.label, o.learning_rate, o.seed) for o in found}
            found += [
                Outcome(
                    *dataclasses.astuple(run),
                    ending="failed",
                    path=str(self.path / run.folder),
                )
                for run in sorted(failed | ended - read)
            ]
            self._outcomes[label] = (ended, failed), found
        return [*self._outcomes[label][1]]

    def wanted(self):
        """The runs to make next, of all arms in turn; [] at the end."""
        columns = []
        for label in self.arms:
            outcomes = self.outcomes(label)
            if not given_up(outcomes):
                runs = self.search.wanted(outcomes)
                runs = [(label, rate_of(rate), seed) for rate, seed in runs]
                columns.append([PlannedRun(*run) for run in runs])
        rows = itertools.zip_longest(*columns)
        return [run for row in rows for run in row if run is not None]

    # What is written of a run beside what it writes itself.

    def fail(self, run, exit_code, tail):
        """Notes that a run ended without a result."""
        attempts = self.failure(run).get("attempts", 0) + 1
        failure = {
            "attempts": attempts,
            "exit_code": exit_code,
            "host": socket.gethostname(),
            "tail": tail,
        }
        file = self.path / run.folder / "failure.json"
        records.write_json(file, failure)

    def forgive(self, run):
        """Forgets that a run failed: it has a result, or is tried again."""
        file = self.path / run.folder / "failure.json"
        file.unlink(missing_ok=True)

    def retry(self):
        """Forgets all failures: what failed is tried again."""
        for label in self.arms:
            for run in self.runs(label):
                self.forgive(run)

    def lock(self):
        """Keeps other sweeps out of the directory: see `processes.alone`."""
        return processes.alone(self.path / "sweep.lock", "sweep")


def given_up(outcomes):
    """Whether too many runs of an arm failed, and none had a result."""
    failed = [o for o in outcomes if o.ending == "failed"]
    return len(failed) == len(outcomes) and len(failed) >= HOPELESS


def _arms(arms):
    found, lower = {}, set()
    for arm in arms:
        # Some file systems do not tell a from A.
        if arm.label.lower() in lower:
            raise ValueError(
                f"Two arms are called {arm.label!r}: give each a label of its "
                "own."
            )
        lower.add(arm.label.lower())
        variant = get_variant(arm.variant).to_dict()
        found[arm.label] = {"variant": variant, "flags": dict(arm.flags)}
    if not found:
        raise ValueError("A sweep needs one arm at least. Received none.")
    return found


def _search_to_json(search):
    for kind, cls in SEARCHES.items():
        if type(search) is cls:
            return {"kind": kind, **dataclasses.asdict(search)}
    raise TypeError(
        "`search` must be one of "
        f"{', '.join(cls.__name__ for cls in SEARCHES.values())}. "
        f"Received: {search!r}"
    )


def _search_of(config):
    config = dict(config)
    kind = config.pop("kind")
    if kind not in SEARCHES:
        raise nearest(kind, SEARCHES, "search")
    lists = {k: tuple(v) for k, v in config.items() if isinstance(v, list)}
    return SEARCHES[kind](**config | lists)


def _read(file):
    found = records.read_json(file)
    if found.get("schema") != SCHEMA:
        raise ValueError(
            f"{file} is not the declaration of a sweep of schema {SCHEMA}, "
            f"but of {found.get('schema')!r}. Give another directory."
        )
    return found


def _compare(before, declared, path, extend):
    """Refuses another declaration than the directory's."""
    theirs, ours = dict(before), dict(declared)
    if extend:
        # Runs of other rates, and other arms, are other directories.
        both = theirs["arms"].keys() & ours["arms"].keys()
        for part in (theirs, ours):
            part.pop("search")
            part["arms"] = {label: part["arms"][label] for label in both}
    found = differences(theirs, ours)
    if found:
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise ValueError(
            f"The sweep in {path} was declared otherwise: "
            f"{'; '.join(found[:8])}{more}. Go on with it as it is, naming "
            "the directory alone, or give another directory. More rates, "
            "seeds or arms can be added to it: --extend."
        )


def _joined(before, declared):
    """What two declarations ask for together."""
    found = {**declared, "arms": before["arms"] | declared["arms"]}
    theirs, ours = before["search"], declared["search"]
    if theirs["kind"] == ours["kind"] == "ladder":
        joined = {k: [*theirs[k], *ours[k]] for k in ("rates", "seeds")}
        joined = {k: [*dict.fromkeys(v)] for k, v in joined.items()}
        ends = dict.fromkeys(theirs["at_ends"] + ours["at_ends"])
        ends = [seed for seed in ends if seed not in joined["seeds"]]
        joined |= {"rates": sorted(joined["rates"]), "at_ends": ends}
        found["search"] = {"kind": "ladder", **joined}
    return found

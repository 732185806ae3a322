"""What is committed of sweeps: whole where it matters, and true."""

import json
import sys
import tarfile
from pathlib import Path

import keras
import numpy as np
import pytest
from test_sweeps import RATES
from test_sweeps import RECIPES
from test_sweeps import arms
from test_sweeps import work

import keras_stable as ks

sys.path.append(str(RECIPES))
import archive
import claims
import detection
import detection_sweeps

RESULTS = RECIPES / "results"
ARCHIVES = sorted(RESULTS.glob("*.tar.xz"))

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="Reads files: the same on all backends.",
)


def unpack(file, to):
    with tarfile.open(file) as tar:
        tar.extractall(to, filter="data")
    (folder,) = Path(to).iterdir()
    return ks.Sweep(folder)


def lab_book():
    """Its text, whatever its lines."""
    return " ".join((RECIPES / "README.md").read_text().split())


def same(a, b):
    """Whether two tables have the same text; NaN is equal to NaN then."""
    a, b = (json.dumps(ks.records.to_json(x)) for x in (a, b))
    return a == b


def test_a_sweep_travels_in_two_files(tmp_path, capsys):
    declared = arms("a", "weak", "broken")
    sweep = ks.Sweep(tmp_path / "edge", declared, ks.Ladder(RATES, (0, 1)))
    rows, _ = work(sweep)
    packed = tmp_path / "results" / "packed"
    archive.main([str(sweep.path), str(packed)])
    printed = capsys.readouterr().out
    assert "16 runs" in printed and "It unpacks as edge/." in printed
    *_, left_out = printed.splitlines()
    assert left_out.startswith("Left out, without a result: broken/lr-")
    assert "a/lr-" not in left_out and "weak/" not in left_out

    found = unpack(f"{packed}.tar.xz", tmp_path / "there")
    assert found.path.name == "edge" and found.arms == sweep.arms
    assert same(ks.sweep_table(found)[:2], rows[:2])
    for label in ("a", "weak"):
        run = found.runs(label)[0]
        health = (found.path / run.folder / "health.jsonl").read_text()
        assert health == (sweep.path / run.folder / "health.jsonl").read_text()
    record = ks.records.read_json(f"{packed}.json")
    assert record["hardware"] == ["cpu x 1"]
    assert same(record["arms"], rows)
    endings = [run["ending"] for run in record["runs"]]
    assert set(endings) == {"converged", "diverged", "failed"}
    assert len(endings) - endings.count("failed") == 16
    # Goes on: what has a result is not run again, what failed is.
    assert {run.label for run in found.wanted()} == {"broken"}
    # The same sweep gives the same bytes.
    first = Path(f"{packed}.tar.xz").read_bytes()
    archive.main([str(sweep.path), str(packed)])
    assert Path(f"{packed}.tar.xz").read_bytes() == first


def test_some_tables_are_kept_and_all_else():
    lines = [b'{"kind": "layout"}\n']
    for step in range(30):
        lines += [b'{"kind": "step", "step": %d}\n' % step]
        lines += [ks.health.TABLE + b', "step": %d}\n' % step]
    kept = archive.thin(lines, 4, ks.health.TABLE)
    kept = [json.loads(line) for line in kept]
    assert len(kept) == 1 + 30 + 4
    tables = [line["step"] for line in kept if line["kind"] == "table"]
    assert tables == [0, 10, 19, 29]
    assert all(
        archive.thin(lines, n, ks.health.TABLE) == lines for n in (30, 99)
    )


def test_bad_input_is_one_clear_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="archive: .*nowhere"):
        archive.main([str(tmp_path / "nowhere"), str(tmp_path / "x")])
    with pytest.raises(SystemExit):
        archive.main([str(tmp_path), str(tmp_path / "x"), "--tables", "1"])
    assert "at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("file", ARCHIVES, ids=lambda file: file.name)
def test_committed_tables_follow_from_the_committed_curves(file, tmp_path):
    record = ks.records.read_json(str(file).replace(".tar.xz", ".json"))
    sweep = unpack(file, tmp_path)
    found = ks.sweep_table(sweep)
    assert same(found, record["arms"])
    # Readable, and of no machine in particular.
    digests = ks.report.read_digests([sweep.path])
    assert len(digests) == sum(row["runs"] for row in found)
    for path in sweep.path.rglob("run.json"):
        command = ks.records.read_json(path)["command"]
        assert command.startswith("python recipes/")


@pytest.mark.parametrize("file", ARCHIVES, ids=lambda file: file.name)
def test_tables_in_the_text_are_of_the_committed_results(file):
    record = ks.records.read_json(str(file).replace(".tar.xz", ".json"))
    text = (RECIPES / "README.md").read_text()
    table = ks.format_sweep_table(record["arms"], "markdown")
    assert table in text, f"The table of {file.name} is stale."


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The committed sweep of the paper's ten methods."""
    to = tmp_path_factory.mktemp("paper")
    return unpack(RESULTS / "paper-lr.tar.xz", to)


def test_claims_in_the_text_are_of_the_committed_curves(paper, capsys):
    claims.main([str(paper.path)])
    losses, growth, order, *ranks, qkv, cap = capsys.readouterr().out.split(
        "\n\n"
    )
    text = (RECIPES / "README.md").read_text()
    for table in (losses, growth):
        assert table in text, "A table of claims is stale."
    assert order == "order of the rates that lose runs, 10 methods: 0.79"
    text = " ".join(text.split())
    assert "that lose runs is 0.79, over all ten" in text
    base, *ranks = ranks
    assert "at 0.001 " in base and base.endswith("6 methods: 0.37")
    assert "six that the paper has is 0.37; 0.54 over six" in text
    assert all(", 6 methods: " in rank for rank in ranks)
    low, high, *above = [rank.split(": ")[-1] for rank in ranks]
    assert low == high == "0.54" and (min(above), max(above)) == (
        "0.43",
        "0.71",
    )
    assert "six at 0.006 and 0.008, and 0.43 to 0.71 above" in text
    first = {
        label: ks.output_norms(paper.path / f"{label}/lr-0.006/seed-0", 1)[1]
        for label in ("soft_clip", "baseline")
    }
    first = [f"{np.median(norms['proj']):.2f}" for norms in first.values()]
    assert first == ["0.07", "1.67"]
    for ratio in (qkv, cap.strip()):
        assert ratio.endswith("0.666667 to 1.5, 1.5 is open")


def test_runs_that_the_monitor_ends_and_that_go_on(paper, tmp_path):
    """`observed`: what became of runs that are ended otherwise."""
    observed = unpack(RESULTS / "observed.tar.xz", tmp_path)
    text = lab_book()
    ends, above, back = [], [], []
    for label in observed.arms:
        own = paper.outcomes(label)
        best = min(o.loss for o in own)
        twins = {(o.learning_rate, o.seed): o.steps_done for o in own}
        for o in observed.outcomes(label):
            steps, losses = ks.read_health(o.path).series("loss")
            middles = detection.middle(losses.astype("float64"))
            back.append(steps[np.flatnonzero(middles > 5.9)[-1]])
            ends.append(o.loss)
            above.append(o.loss - best)
            # The same was ended long before its loss came back.
            assert twins[o.learning_rate, o.seed] < 204 < back[-1]
    assert f"({len(ends)} runs on H200s" in text
    assert f"end at {min(ends):.2f} to {max(ends):.2f}," in text
    assert f"{min(above):.2f} to {max(above):.2f} above the best of" in text
    assert min(above) > 0.25 and "not one is healthy" in text
    assert f"until step {min(back)} to {max(back)} of 700" in text


def test_what_the_text_says_of_seeds_at_the_ends(paper):
    for label, runs in claims.by_rate(paper).items():
        interval = claims.edge(runs)
        for end in (interval.low, interval.high):
            assert len(runs[end]) == 3, label
        # All seeds agree, but that one of `soft_cap` was not ended.
        stable = [o.stable for o in claims.forgiving(runs[interval.high])]
        assert all(o.stable for o in claims.forgiving(runs[interval.low]))
        assert sum(stable) == (label == "soft_cap")


def test_a_longer_warmup(tmp_path):
    """`warmup`: which runs come back, and when the others are lost."""
    sweep = unpack(RESULTS / "warmup.tar.xz", tmp_path)
    text = lab_book()
    peaks, judged, ended = {True: [], False: []}, [], []
    for o in (o for label in sweep.arms for o in sweep.outcomes(label)):
        _, losses = ks.read_health(o.path).series("loss")
        losses = losses.astype("float64")
        if o.learning_rate == 0.18:
            assert o.stable == (o.label == "qk_norm")
            part = detection.middle(losses)[300:400]
            peaks[o.stable].append(part.max())
            ended += [] if o.stable else [o.steps_done]
        if o.learning_rate > 0.18:
            assert o.steps_done == 400 and not o.stable
            judge, events = ks.Judge(warmup=350), []
            for i, loss in enumerate(losses):
                events += judge.update(i + 1, {"loss": loss})
            judged.append(next(e for e in events if e.detector == "verdict"))
    stood, lost = peaks[True], peaks[False]
    assert f"reach {min(stood):.1f} and {max(stood):.1f} in the two" in text
    assert f"and {min(lost):.1f} to {max(lost):.1f} in the four" in text
    assert f"between steps {min(ended)} and {max(ended)}. At 0.27" in text
    onsets, steps = [e.onset for e in judged], [e.step for e in judged]
    assert f"since steps {min(onsets)} to {max(onsets)}, and" in text
    assert f"at steps {min(steps)} to {max(steps)}." in text


def test_heads_that_collapse_in_a_warmup(tmp_path):
    """`long-warmup`: which, from when on, and that they do not come back."""
    sweep = unpack(RESULTS / "long-warmup.tar.xz", tmp_path)
    text = lab_book()
    since, said, ended, largest = [], [], [], []
    for o in (o for label in sweep.arms for o in sweep.outcomes(label)):
        _, shares, _ = detection_sweeps.curves(o)
        *_, last = shares.values()
        if o.stable:
            largest.append(max(shares.values()))
        collapse = ks.Collapse()
        events = filter(None, (collapse.update(*x) for x in shares.items()))
        lasting = [e for e in events if e.step - e.onset >= collapse.patience]
        if lasting and lasting[0].onset < 200:
            assert o.label == "baseline" and o.learning_rate == 0.1
            assert last == 1.0 and not o.stable
            since.append(str(lasting[0].onset))
            said.append(str(lasting[0].step))
            ended.append(f"{o.loss:.2f}")
    assert f"in the warm-up, from step {' and '.join(since)} on" in text
    assert f"ended these two at steps {' and '.join(said)}." in text
    assert f"end at {' and '.join(ended)}. In the {len(largest)} that" in text
    assert f"at most {max(largest):.0%}".replace("%", " %") in text


def test_what_the_text_says_of_initial_gains():
    record = ks.records.read_json(str(RESULTS / "layer-scale.json"))
    losses = {}
    for run in record["runs"]:
        row = losses.setdefault(run["label"], {})
        row[run["learning_rate"]] = run["loss"]
    small = [f"init={x:g}" for x in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)]
    for rate in (3e-3, 8e-3, 2e-2):
        found = [losses[label][rate] for label in small]
        assert max(found) - min(found) < 0.05
    best = {a["label"]: (a["interval"], a["best_loss"]) for a in record["arms"]}
    assert {best[label][0] for label in small} == {"0.02 (1/1) to 0.06 (0/1)"}
    gains = [best["baseline"][1] - best[label][1] for label in small]
    text = lab_book()
    assert f"are {min(gains):.2f} to {max(gains):.2f} below the base" in text


def test_what_the_text_says_of_repeats():
    """One configuration in three sweeps: how far its runs differ."""
    same = ("where", "baseline"), ("cap", "cap=inf")
    same += (("precision", "baseline.float32"),)
    losses = {}
    for name, label in same:
        record = ks.records.read_json(str(RESULTS / f"{name}.json"))
        for run in record["runs"]:
            if run["label"] == label:
                key = run["learning_rate"], run["seed"]
                losses.setdefault(key, []).append(run["loss"])
    assert len(losses) == 15 and {len(v) for v in losses.values()} == {3}
    apart = {key: max(v) - min(v) for key, v in losses.items()}

    def ends(*rates):
        own = [d for (rate, _), d in apart.items() if rate in rates]
        return f"{min(own):.2f} to {max(own):.2f}"

    assert ends(3e-3) == "0.01 to 0.01" and ends(8e-3) == "0.02 to 0.04"
    assert ends(2e-2, 6e-2, 2e-1) == "0.01 to 0.17"


def test_what_the_text_says_of_edges_is_in_the_file():
    """Rows of means, and how far apart the two methods are."""
    text = (RECIPES / "README.md").read_text()
    losses = {}
    for run in ks.records.read_json(str(RESULTS / "edges.json"))["runs"]:
        label, _, training = run["label"].partition(".")
        rates = losses.setdefault(training, {}).setdefault(label, {})
        rates.setdefault(run["learning_rate"], []).append(run["loss"])
    apart, lead = {}, []
    for training, found in losses.items():
        means = {
            label: np.array([np.mean(rates[r]) for r in sorted(rates)])
            for label, rates in found.items()
        }
        apart[training] = means
        lead.append(means["qkv_norm"] - means["qk_norm"])
        cells = np.concatenate([means["qk_norm"], means["qkv_norm"]])
        cells = [training or "as it is", *(f"{x:.3f}" for x in cells)]
        assert f"| {' | '.join(cells)} |" in text
        assert means["qk_norm"][2] - means["qk_norm"][0] < 0.15
    assert np.min(lead) > 0 and np.size(lead) == 27

    def moved(training):
        own, plain = apart[training], apart[""]
        moves = np.abs([own[label] - plain[label] for label in own])
        return f"{moves.min():.2f} to {moves.max():.2f}"

    text = " ".join(text.split())
    assert f"better by {moved('warmup=200')} at every rate" in text
    assert f"both lose {moved('warmup=0')}." in text
    assert f"both are worse, by {moved('beta_2=0.999')}." in text


def test_claims_are_of_ten_methods(tmp_path):
    sweep = ks.Sweep(tmp_path / "a", arms("a"), ks.Ladder(RATES, (0,)))
    with pytest.raises(SystemExit, match="claims: .*ten methods"):
        claims.main([str(sweep.path)])

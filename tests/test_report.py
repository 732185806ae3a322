"""A report says what the runs say, whoever made them."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from runs import copy_run
from runs import make_run
from runs import make_sweep

import keras_stable as ks
from keras_stable import detectors
from keras_stable import report
from keras_stable.comparison import growth
from keras_stable.curves import unpack
from keras_stable.digests import read_digest
from keras_stable.page import json_for_html
from keras_stable.page import render

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="reads files, tested once"
)

EVIL = "</script><img src=x onerror=window.hacked=1><!--"
RATES = (2e-3, 2e-2, 6e-2, 2e-1)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    return make_sweep(path, ("baseline", "qk_norm"), RATES, (0, 1))


def data_of(page):
    text = Path(page).read_text()
    (found,) = re.findall(
        r'<script id="data" type="application/json">(.*?)</script>', text
    )
    return json.loads(found)


def test_the_page_holds_what_the_runs_did(sweep, tmp_path):
    page = ks.write_report(sweep, tmp_path / "page.html")
    data = data_of(page)
    assert len(data["runs"]) == 16 and data["rates"] == list(RATES)
    assert data["labels"] == ["baseline", "qk_norm"]
    rows = {row["label"]: row for row in data["stability"]["rows"]}
    ends = ("last_stable", "first_unstable")
    assert [rows["baseline"][end] for end in ends] == [2e-2, 6e-2]
    assert [rows["qk_norm"][end] for end in ends] == [6e-2, 2e-1]
    counts = [cell["k"] for cell in rows["baseline"]["cells"]]
    assert counts == [2, 2, 0, 0]
    assert rows["baseline"]["paper"]["diverges_at"] == "0.008"
    outcomes = {o.path: o for o in ks.read_outcomes(sweep)}
    for run in data["runs"]:
        outcome = outcomes[run["path"]]
        assert run["ending"] == outcome.ending
        assert run["loss"] == pytest.approx(outcome.loss)
        assert run["initial"] == pytest.approx(outcome.initial)
        losses = ks.read_health(run["path"]).series("loss")[1]
        shown = unpack(run["curves"]["loss"]["y"])
        np.testing.assert_allclose(shown, losses, rtol=1e-6)
        lost = outcome.ending == "diverged"
        event = [40, 35, "spike", "loss", 5.0, "loss is high"]
        assert run["events"] == [event] * lost
        assert run["verdicts"] == [[40, "DIVERGED"]] * lost


def test_growth_is_that_of_the_lab(sweep):
    """Against `output_growth`, and against the formula of the fixture."""
    folder = sweep / "qk_norm"
    run, tenth = folder / "lr-0.02/seed-1", folder / "lr-0.002/seed-1"
    found = growth(read_digest(run), read_digest(tenth))
    truth = ks.output_growth(run, tenth).ratios
    assert set(found) == {"QKV", "Proj", "FC1", "FC2", "Other"}
    for kind, (names, values) in found.items():
        if kind != "Other":
            assert names == ["block_0", "block_1"]
            np.testing.assert_allclose(2 ** values[:, -1], truth[kind.lower()])
    # Tables are of steps 1, 21 and 41; Proj's norm is 1 + rate * step.
    steps = np.array([1, 21, 41])
    proj = np.log2((1 + 2e-2 * steps) / (1 + 2e-3 * steps))
    np.testing.assert_allclose(found["Proj"][1], [proj, proj], atol=1e-4)
    first = growth(read_digest(run))
    own = np.log2((1 + 2e-2 * steps) / (1 + 2e-2))
    np.testing.assert_allclose(first["Proj"][1], [own, own], atol=1e-4)


def test_a_reference_that_ended_early_says_nothing_of_later_steps(tmp_path):
    long = read_digest(make_run(tmp_path / "a", steps=200, every=20))
    early = read_digest(make_run(tmp_path / "b", steps=60, every=20))
    _, values = growth(long, early)["QKV"]
    assert np.isfinite(values[:, :4]).all() and np.isnan(values[:, 4:]).all()


def test_layers_of_other_models_have_kinds(tmp_path):
    names = {
        "transformer_layer_0/self_attention/query": "QKV",
        "transformer_layer_11/self_attention/attention_output": "Proj",
        "h/0/feedforward_intermediate_dense": "FC1",
        "encoder/mlp/down_proj": "FC2",
        "classifier": None,
        "output": None,
    }
    from keras_stable.digests import _place

    assert {name: _place(name)[1] for name in names} == names


def test_nothing_of_strangers_runs_or_ends_the_data(tmp_path):
    run = tmp_path / EVIL.replace("/", "_")
    make_run(run, diverges=True, config={"label": EVIL, EVIL: EVIL})
    with open(run / "health.jsonl", "a") as file:
        event = {"kind": "event", "step": 30, "onset": 20, "value": "nan"}
        event |= {"detector": EVIL, "series": EVIL, "detail": EVIL}
        file.write(json.dumps(event) + "\n")
    page = ks.write_report(tmp_path)
    assert page == tmp_path / "report.html"
    text = page.read_text()
    assert "<img" not in text and "<!--" not in text.split("<script>")[0]
    # Of the page's own: data, Plotly, code. An end tag within ends nothing.
    assert text.count("</script") == 3
    assert data_of(page)["runs"][0]["label"] == EVIL
    markdown = ks.write_report(tmp_path, format="markdown")
    assert "<img" not in markdown and "onerror" in markdown


@pytest.mark.parametrize("value", [EVIL, "\u2028<!--&", float("nan"), {1: [2]}])
def test_json_stays_json_in_html(value):
    text = json_for_html([value])
    assert not set(text) & set("<>&\u2028")
    if isinstance(value, str):
        assert json.loads(text) == [value]


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =cmd|' /C x'"]
)
def test_no_cell_of_a_csv_is_a_formula(text, tmp_path):
    make_run(tmp_path / "a", config={"label": text})
    ks.write_report(tmp_path, tmp_path / "a.html", csv=tmp_path / "csv")
    for name in ("outcomes.csv", "curves.csv"):
        with open(tmp_path / "csv" / name, newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows[0]["label"][0] == "'" and rows[0]["label"] != text


def test_csv_has_every_step(sweep, tmp_path):
    ks.write_report(sweep, tmp_path / "a.html", csv=tmp_path)
    with open(tmp_path / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 * 60
    health = ks.read_health(sweep / "baseline/lr-0.002/seed-0")
    found = [float(row["loss"]) for row in rows[:60]]
    np.testing.assert_allclose(found, health.series("loss")[1], rtol=1e-5)
    with open(tmp_path / "outcomes.csv", newline="") as file:
        outcomes = list(csv.DictReader(file))
    assert len(outcomes) == 16 and outcomes[1]["seed"] == "1"
    assert float(outcomes[0]["min_entropy"]) == 0.5
    assert {o["ending"] for o in outcomes} == {"converged", "diverged"}


def test_runs_that_go_on_or_are_damaged_are_listed(sweep, tmp_path):
    run = sweep / "baseline/lr-0.002/seed-0"
    copy_run(run, tmp_path / "good")
    going = copy_run(run, tmp_path / "going", seed=1)
    record = ks.read_run(going) | {"status": "running"}
    (going / "run.json").write_text(json.dumps(record))
    torn = copy_run(run, tmp_path / "torn", seed=2)
    (torn / "run.json").write_text('{"config": {"variant"')
    lines = copy_run(run, tmp_path / "lines", seed=3) / "health.jsonl"
    lines.write_text("no record\n" + lines.read_text())
    (copy_run(run, tmp_path / "bare", seed=4) / "health.jsonl").unlink()
    (copy_run(run, tmp_path / "alone", seed=5) / "run.json").unlink()
    failed = tmp_path / "x/lr-0.01/seed-0"
    failed.mkdir(parents=True)
    failure = {"attempts": 3, "exit_code": 1, "tail": "out of memory"}
    (failed / "failure.json").write_text(json.dumps(failure))
    data = data_of(ks.write_report(tmp_path, tmp_path / "page.html"))
    runs = {Path(run["path"]).name: run for run in data["runs"]}
    endings = {name: run["ending"] for name, run in runs.items()}
    assert endings == {
        "good": "converged",
        "going": "unfinished",
        "torn": "unreadable",
        "lines": "converged",
        "bare": "converged",
        "alone": "unknown",
        "seed-0": "failed",
    }
    assert "run.json" in runs["torn"]["problems"][0]
    assert "line 1" in runs["lines"]["problems"][0]
    assert runs["seed-0"]["failure"] == "out of memory"
    assert runs["seed-0"]["rate"] == 0.01
    assert (runs["seed-0"]["label"], runs["seed-0"]["seed"]) == ("x", 0)
    assert not runs["bare"]["curves"] and runs["going"]["curves"]
    assert "by its run.json alone" in runs["bare"]["problems"][0]
    assert not runs["good"]["problems"]
    assert "torn" in ks.write_report(tmp_path, format="markdown")


def test_without_a_record_the_place_says_which_run_it_is(sweep, tmp_path):
    run = sweep / "baseline/lr-0.02"
    for seed in (0, 1):
        copy_run(run / f"seed-{seed}", tmp_path / f"arm/lr-0.02/seed-{seed}")
    (tmp_path / "arm/lr-0.02/seed-1/run.json").unlink()
    data = data_of(ks.write_report(tmp_path, tmp_path / "page.html"))
    good, bare = data["runs"]
    assert [bare[x] for x in ("label", "rate", "seed")] == ["arm", 2e-2, 1]
    assert bare["ending"] == "unknown" and good["ending"] == "converged"
    assert "no run.json" in bare["problems"][0] and not good["problems"]
    # It counts nowhere, and takes its row's place beside the paper from none.
    (row,) = data["stability"]["rows"]
    assert [cell["n"] for cell in row["cells"]] == [1] and row["paper"]


def test_curves_that_were_cut_off_are_told(sweep, tmp_path):
    run = copy_run(sweep / "baseline/lr-0.02/seed-0", tmp_path / "a")
    lines = (run / "health.jsonl").read_text().splitlines(True)
    steps = [i for i, line in enumerate(lines) if '"step", "step"' in line]
    assert len(steps) == 60
    (run / "health.jsonl").write_text("".join(lines[: steps[28]]))
    data = data_of(ks.write_report(tmp_path, tmp_path / "page.html"))
    (problem,) = data["runs"][0]["problems"]
    assert "28 steps alone, of 60" in problem
    assert "28 steps alone" in ks.write_report(tmp_path, format="markdown")


def test_what_is_named_after_the_endings_is_what_they_are(sweep, tmp_path):
    """The page and the README define them, by the limits of the code."""
    data = data_of(ks.write_report(sweep, tmp_path / "page.html"))
    assert set(data["meanings"]) == set(report.STATES)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for ending in data["endings"]:
        assert f"| {ending} | {data['meanings'][ending]} |" in readme
    limits = ks.Thresholds()
    for ending, text in {
        "diverged": f"more than {limits.rise} nats above its least",
        "degraded": f"more than {limits.gap} nats",
        "collapsed": f"entropy is below {detectors.SINGLE_KEY}",
    }.items():
        assert text in data["meanings"][ending]
    for part in (limits.window, limits.tail):
        assert f"last {part:.0%} of".replace("%", " %") in (
            data["meanings"]["diverged"]
        )
    spike = detectors.Spike("loss", *detectors.SERIES["loss"])
    for text in (
        f"After step {spike.warmup},",
        f"over 6 sigma and {spike.large} nats",
        f"the last {spike.window.maxlen} usual ones",
        f"6 sigma and {spike.floor} nats",
    ):
        assert text in data["meanings"]["spiked"]


def test_perplexities_are_not_to_be_compared(sweep, tmp_path):
    data = data_of(ks.write_report(sweep, tmp_path / "page.html"))
    notes = " ".join(data["stability"]["notes"])
    assert "Perplexities of the runs and of the paper cannot be" in notes


def test_titles_tell_directories_of_one_name_apart(sweep, tmp_path):
    run = sweep / "baseline/lr-0.002/seed-0"
    paths = [tmp_path / f"{x}/runs" for x in "pq"]
    for seed, path in enumerate(paths):
        copy_run(run, path, seed=seed)
    data = data_of(ks.write_report(paths, tmp_path / "page.html"))
    assert data["title"] == f"Stability report: {paths[0]}, {paths[1]}"
    data = data_of(ks.write_report(paths[0], tmp_path / "page.html"))
    assert data["title"] == "Stability report: runs"


WEIRD = (
    *(None, [], {}, "x", "nan", "-inf", -1, 0, True, 1e308, 10**400),
    *([[1]], {"a": [1]}, "\x00\ud7ff", {"name": None}),
)


def test_no_value_in_a_record_stops_the_report(sweep, tmp_path):
    run = sweep / "baseline/lr-0.06/seed-0"
    record = ks.read_run(run)
    health = (run / "health.jsonl").read_text().splitlines()
    count = 0
    for part in (record, record["config"], record["corpus"]):
        for key in list(part):
            for value in WEIRD[count % 3 :: 3]:
                before, part[key] = part[key], value
                folder = tmp_path / f"run-{count:04}"
                folder.mkdir()
                (folder / "run.json").write_text(json.dumps(record))
                part[key] = before
                count += 1
                if count % 9:
                    continue
                # And a line of the curves.
                line = json.loads(health[count % len(health)])
                line[list(line)[count % len(line)]] = value
                lines = [*health[:9], json.dumps(line), *health[9:12]]
                (folder / "health.jsonl").write_text("\n".join(lines) + "\n")
    assert count > 100
    with pytest.warns(UserWarning, match="no stability table"):
        page = ks.write_report(tmp_path, tmp_path / "page.html")
    assert len(data_of(page)["runs"]) == count
    assert ks.write_report(tmp_path, format="markdown").count("run-") >= count


def test_two_runs_of_one_name_are_shown_without_a_table(sweep, tmp_path):
    for name in "ab":
        copy_run(sweep / "baseline/lr-0.002/seed-0", tmp_path / name)
    page = tmp_path / "page.html"
    with pytest.warns(UserWarning, match="no stability table: Two runs of"):
        data = data_of(ks.write_report(tmp_path, page))
    assert [run["ending"] for run in data["runs"]] == ["converged"] * 2
    assert not data["stability"]["rows"]
    assert any("Two runs of" in note for note in data["stability"]["notes"])


def test_what_differs_between_configurations_is_found(sweep, tmp_path):
    run = sweep / "baseline/lr-0.002/seed-0"
    for i in range(3):
        other = {"beta_2": 0.95 if i else 0.99, "seed": i}
        copy_run(run, tmp_path / f"{i}", **other, label=f"arm-{min(i, 1)}")
    config = data_of(ks.write_report(tmp_path, tmp_path / "a.html"))["config"]
    assert config["keys"] == ["beta_2"] and config["usual"] == ["0.95"]
    assert config["values"] == [["0.99"], ["0.95"], ["0.95"]]
    assert ["versions.keras", "3.15.1"] in config["common"]


def test_a_hundred_long_runs_fit_into_a_page(tmp_path):
    """Runs of 2000 steps and 100 tables, of 24 layers with 16 heads."""
    shape = {"steps": 2000, "layers": 24, "heads": 16, "every": 20}
    for i in range(2):
        make_run(tmp_path / f"{i}", seed=i, diverges=i > 0, **shape)
    paths = [tmp_path / f"{i % 2}" for i in range(100)]
    share = report.share_of(len(paths))
    two = [read_digest(path, *share) for path in paths[:2]]
    data = report.page_data(two * 50, [tmp_path])
    assert len(data["runs"]) == 100
    assert 5e6 < len(json_for_html(data)) < 15e6
    for digest in two:
        for curve in digest.curves.values():
            assert curve["x"]["shape"][0] <= 1000
        whole = digest.series["loss"][1]
        shown = unpack(digest.curves["loss"]["y"])
        assert shown.max() == pytest.approx(whole.max(), rel=1e-6)
        assert np.prod(digest.attention["entropy"]["shape"]) <= report.CELLS
    points, cells = report.share_of(400)
    assert (points, cells) == (share[0] / 4, share[1] / 4)


def test_missing_directories_and_packages_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        ks.write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no run in .*run.json"):
        ks.write_report(tmp_path)
    make_run(tmp_path / "a")
    with pytest.raises(ValueError, match="format.*pdf"):
        ks.write_report(tmp_path, format="pdf")
    with pytest.raises(ValueError, match="png"):
        ks.write_report(tmp_path, format="markdown", png=tmp_path / "png")
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"keras-stable\[lab\]"):
        ks.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    assert "| baseline |" in ks.write_report(tmp_path, format="markdown")


def test_the_recipe_writes_what_it_says(sweep, tmp_path, capsys):
    recipes = Path(__file__).parents[1] / "recipes"
    spec = importlib.util.spec_from_file_location("r", recipes / "report.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    page = tmp_path / "page.html"
    csv_folder = tmp_path / "csv"
    recipe.main([str(sweep), "--file", str(page), "--csv", str(csv_folder)])
    assert capsys.readouterr().out.strip() == str(page)
    assert page.exists() and (csv_folder / "curves.csv").exists()
    recipe.main([str(sweep), "--format", "markdown"])
    printed = capsys.readouterr().out
    (line,) = re.findall(r"\| baseline \| 2/2 \| 2/2 \| 0/2 .*", printed)
    assert "0.008" in line
    with pytest.raises(SystemExit, match="report: .* does not exist"):
        recipe.main([str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        recipe.main([str(sweep), "--format", "markdown", "--png", "x"])
    assert "leave --format markdown out" in capsys.readouterr().err
    for name in "ab":
        copy_run(sweep / "baseline/lr-0.002/seed-0", tmp_path / f"two/{name}")
    recipe.main([str(tmp_path / "two"), "--file", str(page)])
    problem, written = capsys.readouterr().out.splitlines()
    assert problem.startswith("report: There is no stability table: Two runs")
    assert written == str(page)


def test_scripts_are_those_that_the_policy_names():
    import base64
    import hashlib

    text = render({"runs": []}, "a & b")
    assert "<title>a &amp; b</title>" in text
    (policy,) = re.findall(r"script-src ([^;]*);", text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = hashlib.sha256(script.encode()).digest()
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "unsafe" not in policy and "\r" not in text

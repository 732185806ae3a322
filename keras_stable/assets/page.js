// The page: filters, tables, and when which figure is drawn.

const state = {
  hidden: {label: new Set(), rate: new Set(), seed: new Set(),
    ending: new Set()},
  picked: new Set(), run: null, reference: "first", others: false,
  layout: "auto", curve: "loss", trend: RUNS.length > 4, log: false,
  marks: true, panels: DATA.labels.length > 1,
  colour: DATA.rates.length > 1 ? "rate" : "variant",
  sort: "place", down: false,
};

const passes = (run) => Object.entries(state.hidden)
  .every(([key, values]) => !values.has(String(run[key])));
const shownRuns = () => RUNS.filter(passes);
const comparedRuns = () => {
  const runs = shownRuns();
  const picked = runs.filter((run) => state.picked.has(run.id));
  return picked.length ? picked : runs;
};
const theRun = () => RUNS.find((run) => run.id === state.run);

// Figures are drawn when they come into sight, and again when that changes.

const figures = [];
const CONFIG = {responsive: true, displaylogo: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};

function figure(id, draw, onClick) {
  const box = document.getElementById(`figure-${id}`);
  const entry = {id, draw, box, stale: true, near: false, onClick,
    task: Promise.resolve()};
  figures.push(entry);
  new IntersectionObserver((seen) => {
    entry.near = seen[seen.length - 1].isIntersecting;
    if (entry.near) refresh(entry);
  }, {rootMargin: "300px"}).observe(box);
}

// One drawing after the other: the last is of the newest state.
function refresh(entry) {
  const drawn = entry.task.then(() => redraw(entry));
  entry.task = drawn.catch(() => {});
  return drawn;
}

async function redraw(entry) {
  if (!entry.stale) return;
  entry.stale = false;
  const found = [entry.draw()].flat().filter(Boolean);
  entry.box.classList.toggle("empty", !found.length);
  entry.box.querySelectorAll(".plot").forEach((plot) => Plotly.purge(plot));
  entry.box.replaceChildren();
  if (!found.length) {
    entry.box.textContent = "Nothing was recorded for this figure.";
    return;
  }
  for (const [i, {traces, layout}] of found.entries()) {
    const plot = make("div", {class: "plot"});
    entry.box.append(plot);
    const name = `${entry.id}${found.length > 1 ? `-${i + 1}` : ""}`;
    await Plotly.newPlot(plot, traces, layout, {...CONFIG,
      displayModeBar: narrow() ? false : "hover",
      toImageButtonOptions: {format: "png", scale: 2, filename: name}});
    plot.dataset.name = name;
    if (entry.onClick) plot.on("plotly_click", entry.onClick);
  }
}

function renew(...ids) {
  for (const entry of figures) {
    if (ids.length && !ids.includes(entry.id)) continue;
    entry.stale = true;
    if (entry.near) refresh(entry);
  }
}

async function savePng(id) {
  const entry = figures.find((figure) => figure.id === id);
  await refresh(entry);
  for (const plot of entry.box.querySelectorAll(".plot")) {
    await Plotly.downloadImage(plot, {format: "png", scale: 2,
      width: plot.clientWidth, height: plot.clientHeight,
      filename: plot.dataset.name});
  }
}

// For programs: every figure as a PNG in a data URL.
window.stabilityReport = {figures, state, async drawAll() {
  for (const entry of figures) await refresh(entry);
}, async pngs(scale = 2) {
  await this.drawAll();
  const found = {};
  for (const plot of document.querySelectorAll(".plot")) {
    found[plot.dataset.name] = await Plotly.toImage(plot, {format: "png",
      scale, width: plot.clientWidth, height: plot.clientHeight});
  }
  return found;
}};

// Controls.

function choice(text, options, value, change) {
  const select = make("select", {onchange: () => change(select.value)},
    ...options.map(([key, name]) => make("option", {value: key}, name)));
  select.value = value;
  return make("label", {}, text, select);
}

const tick = (text, value, change) => {
  const input = make("input", {type: "checkbox", checked: value,
    onchange: () => change(input.checked)});
  return make("label", {}, input, text);
};

const button = (text, act, title = null) =>
  make("button", {type: "button", onclick: act, title}, text);

function filters() {
  const groups = [["label", "Variant", DATA.labels],
    ["rate", "Learning rate", DATA.rates], ["seed", "Seed", DATA.seeds],
    ["ending", "Ending", DATA.present]];
  put("filter-groups", ...groups.map(([key, title, values]) => {
    const chips = values.map((value) => {
      const input = make("input", {type: "checkbox", checked: true,
        "data-filter": key, value: String(value), onchange: () => {
          const hidden = state.hidden[key];
          if (input.checked) hidden.delete(String(value));
          else hidden.add(String(value));
          renewAll();
        }});
      const colour = {label: variantColour, rate: rateColour,
        ending: (v) => ENDING_COLOURS[v]}[key];
      const swatch = colour && make("span", {class: "swatch",
        style: `background:${colour(value)}`});
      return make("label", {class: "chip", title: String(value)}, input,
        swatch || "", key === "rate" ? showRate(value) : short(String(value)));
    });
    const none = button("none", () => {
      state.hidden[key] = new Set(values.map(String));
      check();
    }, `Hide every ${title.toLowerCase()}, then tick what to show`);
    return make("fieldset", {}, make("legend", {}, title), ...chips,
      values.length > 3 ? none : "");
  }));
  const check = () => {
    document.querySelectorAll("[data-filter]").forEach((input) => {
      input.checked = !state.hidden[input.dataset.filter].has(input.value);
    });
    renewAll();
  };
  document.getElementById("clear").addEventListener("click", () => {
    Object.values(state.hidden).forEach((values) => values.clear());
    state.picked.clear();
    check();
  });
  document.getElementById("filters").open = !narrow() && RUNS.length > 1;
}

// Tables.

function table(columns, rows, {row = () => ({}), head = null} = {}) {
  const line = make("tr", {}, ...columns.map((column) => make("th",
    {class: column.class || null, scope: "col", title: column.title || null},
    column.head || column.name)));
  return make("table", {}, make("thead", {}, ...(head || []), line),
    make("tbody", {}, ...rows.map((item) => make("tr", row(item),
      ...columns.map((column, i) => {
        const value = column.value(item);
        const cell = make(i ? "td" : "th", {class: column.class || null,
          title: typeof value === "string" && value.length > 24 ? value : null,
          ...(i ? {} : {scope: "row"})}, value);
        if (column.mark && column.mark(item)) {
          cell.classList.add(...column.mark(item));
        }
        return cell;
      })))));
}

function stabilityTable() {
  const {rows, rates, notes, missing} = DATA.stability;
  const bounded = (e) => e && known(e.low) && known(e.high);
  const spread = (e) => !e ? "–" : show(e.mean) + (bounded(e) ?
    ` ± ${show((e.high - e.low) / 2, 2)}` : "");
  const interval = (e) => !e ? "–" : show(e.mean) + (bounded(e) ?
    ` [${show(e.low, 3)}, ${show(e.high, 3)}]` : "");
  const anyPaper = rows.some((row) => row.paper);
  const number = (name, value, title, group = false) => ({name, title, value,
    class: group ? "group" : null});
  const columns = [
    {name: "variant", value: (row) => row.label},
    ...rates.map((rate, i) => ({name: showRate(rate), class: "cell",
      title: `learning rate ${rate}`,
      value: (row) => row.cells[i] ? `${row.cells[i].k}/${row.cells[i].n}` : "",
      mark: (row) => row.cells[i] && [row.cells[i].k === row.cells[i].n ? "all"
        : row.cells[i].k ? "some" : "none"]})),
    number("last stable", (row) => showRate(row.last_stable) +
      (row.monotone ? "" : " *"),
    "the last learning rate at which all seeds were stable", true),
    number("first unstable", (row) => showRate(row.first_unstable),
      "the first learning rate at which a seed was not"),
    ...(anyPaper ? [number("paper: diverges at",
      (row) => row.paper ? row.paper.diverges_at : "–",
      "the least of the paper's six learning rates that diverges")] : []),
    number("sensitivity", (row) => show(row.sensitivity, 3), "LR sensitivity: " +
      "mean over learning rates of min(loss, l_0) - least loss (Wortsman)",
    true),
    number("best loss", (row) => spread(row.loss),
      "mean, half the interval of 95 %"),
    number("at rate", (row) => showRate(row.best_rate), "where it was reached"),
    number("perplexity", (row) => interval(row.perplexity),
      "of the best loss"),
    ...(anyPaper ? [number("paper: perplexity",
      (row) => row.paper ? show(row.paper.perplexity) : "–",
      "830M parameters, learning rate 3e-4; of other tokens: not to be " +
      "compared with ours")] : []),
  ];
  const spans = [["", 1], ["stable seeds at learning rate", rates.length],
    ["boundary", anyPaper ? 3 : 2], ["loss", anyPaper ? 5 : 4]];
  const head = [make("tr", {}, ...spans.filter(([, n]) => n).map(
    ([text, n], i) => make("th", {colspan: n, scope: "colgroup",
      class: i > 1 ? "text group" : "text"}, text)))];
  put("stability-table", rows.length ? table(columns, rows, {head})
    : missing ? "" : "No run has ended yet.");
  put("stability-notes", ...notes.map((note) => make("p", {}, note)));
}

const RUN_COLUMNS = [
  {key: "label", name: "variant", text: true},
  {key: "rate", name: "rate", show: showRate},
  {key: "seed", name: "seed"},
  {key: "ending", name: "ending", text: true},
  {key: "verdict", name: "verdict", text: true},
  {key: "loss", name: "loss", title: "final validation loss, nats a token"},
  {key: "perplexity", name: "perplexity"},
  {key: "initial", name: "l₀", title: "training loss of the first step"},
  {key: "max_logit", name: "max logit", title: "largest attention logit"},
  {key: "min_entropy", name: "min entropy",
    title: "least normalised entropy of a head in the last table"},
  {key: "growth", name: "growth", title: "largest output norm of QKV, Proj, " +
    "FC1 or FC2 in the last table, in those of the same seed at a tenth of " +
    "the rate"},
  {key: "spikes", name: "spikes / 10k",
    title: "steps 0.1 nat over the median of 201 steps, in 10 000"},
  {key: "events_total", name: "events"},
  {key: "steps_done", name: "steps", show: whole},
  {key: "parameters", name: "parameters", show: whole},
  {key: "path", name: "directory", text: true},
];

function sorted(runs) {
  const sign = state.down ? -1 : 1;
  const column = RUN_COLUMNS.find((c) => c.key === state.sort);
  if (!column) return runs;
  return [...runs].sort((a, b) => {
    const x = a[state.sort], y = b[state.sort];
    if (column.text) return sign * String(x).localeCompare(String(y));
    // What is not known comes last, up or down.
    return known(x) && known(y) ? sign * (x - y) : known(y) - known(x);
  });
}

function runsTable() {
  const heading = (column) => make("button", {type: "button", class: "sort",
    "data-sort": column.key, onclick: () => {
      state.down = state.sort === column.key ? !state.down : false;
      state.sort = column.key;
      runsTable();
    }}, column.name + (state.sort !== column.key ? "" :
    state.down ? " ▾" : " ▴"));
  const columns = RUN_COLUMNS.map((column) => ({
    name: column.name, title: column.title, head: heading(column),
    class: column.text ? "text long" : null,
    value: (run) => {
      const value = run[column.key];
      if (column.key === "ending") return pill(value);
      if (column.text) return value || "–";
      return (column.show || show)(value);
    }}));
  const pick = {name: "", head: "", class: "text", value: (run) => {
    const input = make("input", {type: "checkbox", "data-pick": run.id,
      checked: state.picked.has(run.id), "aria-label": `compare ${nameOf(run)}`,
      onclick: (event) => event.stopPropagation(), onchange: () => {
        if (input.checked) state.picked.add(run.id);
        else state.picked.delete(run.id);
        renew("curves");
        tell();
      }});
    return input;
  }};
  columns.splice(1, 0, pick);
  const runs = sorted(shownRuns());
  put("runs-table", runs.length ? table(columns, runs, {row: (run) => ({
    "data-run": run.id, class: run.id === state.run ? "here" : null,
    onclick: () => choose(run.id, true)})})
    : "No run passes the filters.");
}

async function csvOfCurves() {
  const names = ["loss", "gradient_norm", "update_norm", "max_logit"];
  const rows = [["path", "label", "learning_rate", "seed", "series", "step",
    "value"]];
  for (const run of comparedRuns()) {
    for (const name of names.filter((n) => run.curves[n])) {
      const x = unpack(run.curves[name].x), y = unpack(run.curves[name].y);
      x.forEach((step, i) => rows.push([run.path, run.label, run.rate,
        run.seed, name, step, Number.isFinite(y[i]) ? y[i] : "nan"]));
    }
  }
  download("curves.csv", rows);
}

function csvOfRuns() {
  const keys = RUN_COLUMNS.map((column) => column.key);
  download("outcomes.csv", [keys, ...sorted(shownRuns()).map(
    (run) => keys.map((key) => run[key]))]);
}

function problems() {
  const bad = RUNS.filter((run) => run.problems.length);
  if (!bad.length) return;
  const columns = [{name: "run", class: "text", value: (run) => run.path},
    {name: "what is wrong", class: "text wrap",
      value: (run) => run.problems.join("; ")}];
  put("problems", make("h3", {}, "Not shown, or in part"),
    make("div", {class: "wide"}, table(columns, bad)));
}

// One run.

function choose(id, scroll = false) {
  state.run = id;
  document.querySelectorAll("tr[data-run]").forEach((row) =>
    row.classList.toggle("here", row.dataset.run === String(id)));
  oneRun();
  renew("curves", "growth", "attention", "norms", "updates");
  if (scroll) document.getElementById("run").scrollIntoView();
}

function oneRun() {
  const run = theRun();
  if (!run) return;
  if (!run.growths[state.reference]) state.reference = "first";
  const references = [["first", "its first table"]];
  if (run.growths.tenth) {
    references.unshift(["tenth", `the same seed at ${
      showRate(run.growths.tenth.rate)}, a tenth of the rate`]);
  }
  const others = run.growths.first && "Other" in run.growths.first.kinds &&
    Object.keys(run.growths.first.kinds).length > 1;
  put("run-controls",
    choice("run", RUNS.map((r) => [r.id, `${nameOf(r, 60)} (${
      r.ending})`]), run.id, (id) => choose(Number(id))),
    choice("growth against", references, state.reference, (value) => {
      state.reference = value;
      oneRun();
      renew("growth");
    }),
    others ? tick("other layers", state.others, (value) => {
      state.others = value;
      renew("growth");
    }) : "");
  const facts = [["ending", run.ending], ["verdict", run.verdict],
    ["most severe", run.worst], ["status", run.status],
    ["validation loss", show(run.loss)], ["perplexity", show(run.perplexity)],
    ["l₀", show(run.initial)], ["unigram entropy", show(run.unigram)],
    ["steps", `${whole(run.steps_done)} of ${whole(run.steps)}`],
    ["max logit", show(run.max_logit)], ["min entropy", show(run.min_entropy)],
    ["growth", known(run.growth) ? `${show(run.growth, 3)} times` : "–"],
    ["events", whole(run.events_total)], ["parameters", whole(run.parameters)],
    ["started", run.started.slice(0, 16).replace("T", " ")]];
  put("run-facts", make("p", {}, make("strong", {}, nameOf(run)),
    " ", pill(run.ending), make("br"), make("code", {}, run.path)),
  make("div", {class: "facts"}, ...facts.map(([name, value]) =>
    make("div", {}, make("span", {}, name), make("span", {}, value || "–")))),
  run.command ? make("pre", {}, run.command) : "",
  run.failure ? make("pre", {}, run.failure) : "");
  const reference = run.growths[state.reference];
  put("growth-lead", reference && state.reference === "tenth" ?
    "Of the l2 norm of each layer's outputs, against the run of the same " +
    `seed at learning rate ${showRate(reference.rate)}, step by step, in ` +
    "powers of two. The paper's diverging runs are above 1 (twice the norm) in QKV, Proj " +
    "and FC2." :
    "Of the l2 norm of each layer's outputs, against the first table that " +
    "was recorded, in powers of two. White is no change, 1 is twice the norm.");
  put("attention-lead", run.attention ? "Rows are heads, layers from top to " +
    `bottom; measured on ${run.attention.labels.join(", ")}.` : "");
  const columns = [["step", 0], ["since", 1], ["detector", 2], ["series", 3],
    ["value", 4], ["what", 5]].map(([name, i]) => ({name,
    class: [2, 3].includes(i) ? "text long" : i === 5 ? "text wrap" : null,
    value: (event) => i === 4 ? show(event[i]) : String(event[i] ?? "–")}));
  put("run-events", run.events.length ? table(columns, run.events)
    : "None was found.", run.events_total > run.events.length ?
    make("p", {class: "quiet"}, `The first ${run.events.length} of ${
      whole(run.events_total)}.`) : "");
}

function configs() {
  const {common, keys, usual, values} = DATA.config;
  put("configs-lead", keys.length ? "Flags and versions that differ between " +
    "runs; marked is what differs from most." :
    "All runs have the same flags and versions, but for rate and seed.");
  const runs = shownRuns();
  const columns = [{name: "run", value: (run) => nameOf(run)},
    ...keys.map((key, i) => ({name: key, class: "text long",
      value: (run) => values[run.id][i] ?? "–",
      mark: (run) => values[run.id][i] !== usual[i] && ["differs"]}))];
  put("configs-table", keys.length ? table(columns, runs) : "");
  document.getElementById("configs-table").hidden = !keys.length;
  put("configs-common", table([
    {name: "name", class: "text", value: ([name]) => name},
    {name: "value", class: "text wrap", value: ([, value]) => value}], common));
}

function tell() {
  const runs = shownRuns();
  const picked = runs.filter((run) => state.picked.has(run.id)).length;
  put("shown", `${runs.length} of ${RUNS.length} runs shown` +
    (picked ? `, ${picked} compared` : ""));
}

function renewAll() {
  tell();
  runsTable();
  configs();
  renew("rates", "curves");
}

function begin() {
  document.getElementById("title").textContent = DATA.title;
  put("made", DATA.made);
  put("questions", ...DATA.questions.map((text) => make("p", {}, text)));
  put("limits", ...DATA.limits.map((text) => make("p", {}, text)));
  put("endings", ...DATA.present.map((ending) => make("li", {}, pill(ending,
    `${RUNS.filter((run) => run.ending === ending).length} ${ending}`))));
  put("endings-meanings", ...Object.entries(DATA.meanings).flatMap(
    ([ending, text]) => [make("dt", {}, pill(ending)), make("dd", {}, text)]));
  const again = (key, id) => (value) => {
    state[key] = value;
    renew(id);
  };
  put("rates-controls", choice("variants", [["auto", "as many as fit"],
    ["together", "in one figure"], ["panels", "each in its own"]],
  state.layout, again("layout", "rates")), button("PNG",
    () => savePng("rates")), button("CSV", csvOfRuns));
  put("curves-controls", choice("curve", [["loss", "training loss"],
    ["gradient_norm", "gradient norm"], ["update_norm", "update norm"],
    ["max_logit", "largest logit"]], state.curve, again("curve", "curves")),
  choice("colour", [["variant", "variant"], ["rate", "learning rate"],
    ["ending", "ending"]], state.colour, again("colour", "curves")),
  DATA.labels.length > 1 ? tick("panel per variant", state.panels,
    again("panels", "curves")) : "",
  tick("running median", state.trend, again("trend", "curves")),
  tick("events and verdicts", state.marks, again("marks", "curves")),
  tick("logarithmic", state.log, again("log", "curves")),
  button("PNG", () => savePng("curves")), button("CSV", csvOfCurves));
  put("runs-controls", button("CSV", csvOfRuns), button("Compare none", () => {
    state.picked.clear();
    renewAll();
  }));
  document.querySelectorAll("[data-png]").forEach((heading) =>
    heading.append(button("PNG", () => savePng(heading.dataset.png))));
  filters();
  stabilityTable();
  problems();
  const click = (event) => {
    const point = event.points[0];
    const id = [point.customdata, point.data.customdata].flat().find(known);
    if (known(id)) choose(id, true);
  };
  figure("rates", () => ratesFigure(shownRuns(), state), click);
  figure("curves", () => curvesFigure(comparedRuns(), state), click);
  figure("growth", () => theRun() && growthFigure(theRun(), state));
  figure("attention", () => theRun() && attentionFigures(theRun()));
  figure("norms", () => theRun() && normsFigure(theRun()));
  figure("updates", () => theRun() && updatesFigure(theRun()));
  // The run that says most: lost, with tables.
  const rich = RUNS.filter((run) => run.growths.first);
  const first = rich.find((run) => lost(run)) || rich[0] || RUNS[0];
  state.run = first.id;
  if (first.growths.tenth) state.reference = "tenth";
  renewAll();
  oneRun();
  let width = narrow();
  window.addEventListener("resize", () => {
    if (narrow() !== width) {
      width = narrow();
      renew();
    }
  });
  window.addEventListener("beforeprint",
    () => window.stabilityReport.drawAll());
}

begin();

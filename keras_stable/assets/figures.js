// The figures: functions of the state, which give traces and a layout.

const FONT = {family: 'system-ui, -apple-system, "Segoe UI", Roboto, ' +
  '"Open Sans", "Liberation Sans", sans-serif', size: 12, color: "#1d232b"};
const GRID = {gridcolor: "#eceff2", zerolinecolor: "#dfe3e8",
  linecolor: "#9aa3ad", ticks: "outside", tickcolor: "#c4cbd3",
  automargin: true};

const narrow = () => window.innerWidth < 640;

function layoutOf(more) {
  return {
    font: FONT, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
    margin: {l: 56, r: 12, t: 28, b: 44}, hovermode: "closest",
    hoverlabel: {bgcolor: "#fff", bordercolor: "#9aa3ad", font: FONT,
      align: "left"},
    legend: {orientation: "h", y: -0.18, yanchor: "top", x: 0, font: FONT},
    // A finger scrolls the page, a mouse zooms.
    dragmode: narrow() ? false : "zoom", ...more,
  };
}

const axis = (title, more = {}) =>
  ({...GRID, title: {text: title, standoff: 8}, ...more});

// A grid of panels: domains from the top left, each with a title.
function panels(count, columns, {gap = 0.07, rowGap = 0.12} = {}) {
  const rows = Math.ceil(count / columns);
  const width = (1 - gap * (columns - 1)) / columns;
  const height = (1 - rowGap * (rows - 1)) / rows;
  return Array.from({length: count}, (_, i) => {
    const left = (i % columns) * (width + gap);
    const top = 1 - Math.floor(i / columns) * (height + rowGap);
    return {x: [left, Math.min(1, left + width)],
      y: [Math.max(0, top - height), top], suffix: i ? String(i + 1) : ""};
  });
}

const panelTitle = (panel, text) => ({text, x: panel.x[0], y: panel.y[1],
  xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom",
  showarrow: false, font: {...FONT, size: 13}});

const lost = (run) => !["converged", "spiked", "degraded"].includes(run.ending);

// A lost run counts as l_0, as in the LR sensitivity.
function height(run) {
  if (!lost(run) && known(run.loss)) {
    return known(run.initial) ? Math.min(run.loss, run.initial) : run.loss;
  }
  return known(run.initial) ? run.initial : null;
}

function ratesFigure(runs, state) {
  const ended = runs.filter((run) => known(run.rate) && height(run) !== null &&
    DATA.endings.includes(run.ending));
  const labels = DATA.labels.filter((l) => ended.some((r) => r.label === l));
  if (!labels.length) return null;
  const apart = state.layout === "panels" ||
    (state.layout === "auto" && labels.length > 4);
  const columns = apart ? (narrow() ? 1 : Math.min(3, labels.length)) : 1;
  const count = apart ? labels.length : 1;
  const grid = panels(count, columns, {rowGap: narrow() ? 0.05 : 0.09});
  const rows = Math.ceil(count / columns);
  const layout = layoutOf({
    height: apart ? 90 + rows * (narrow() ? 230 : 240) : 440,
    showlegend: !apart && labels.length > 1, annotations: [],
  });
  const heights = ended.map(height);
  const low = Math.min(...heights), high = Math.max(...heights);
  const margin = Math.max(0.05 * (high - low), 0.02);
  const rates = [...new Set(ended.map((r) => r.rate))].sort((a, b) => a - b);
  const exponents = rates.map(Math.log10);
  grid.forEach((panel, i) => {
    const last = i >= count - columns;
    layout[`xaxis${panel.suffix}`] = axis(last ? "learning rate" : "", {
      type: "log", domain: panel.x, anchor: `y${panel.suffix}`,
      range: [exponents[0] - 0.12, exponents[exponents.length - 1] + 0.12],
      tickvals: rates.length <= 8 ? rates : undefined, tickangle: 0,
      ticktext: rates.length <= 8 ? rates.map((r) => showRate(r)) : undefined,
      tickfont: {size: apart ? 10 : 12}});
    layout[`yaxis${panel.suffix}`] = axis(
      i % columns ? "" : "validation loss",
      {domain: panel.y, anchor: `x${panel.suffix}`,
        range: [low - margin, high + margin]});
  });
  const traces = [];
  labels.forEach((label, i) => {
    const panel = grid[apart ? i : 0];
    const mine = ended.filter((run) => run.label === label);
    const axes = {xaxis: `x${panel.suffix}`, yaxis: `y${panel.suffix}`};
    const own = [...new Set(mine.map((r) => r.rate))].sort((a, b) => a - b);
    const mean = own.map((rate) => {
      const values = mine.filter((r) => r.rate === rate).map(height);
      return values.reduce((a, b) => a + b, 0) / values.length;
    });
    const colour = variantColour(label);
    if (apart) {
      layout.annotations.push(panelTitle(panel, plain(label)));
    }
    traces.push({...axes, x: own, y: mean, type: "scatter",
      mode: mine.length > 1 ? "lines" : "markers", name: plain(label),
      legendgroup: label, hoverinfo: "skip",
      marker: {size: 0.1, color: colour},
      line: {color: colour, width: 2, dash: variantDash(label)}});
    for (const gone of [false, true]) {
      const points = mine.filter((run) => lost(run) === gone);
      if (!points.length) continue;
      traces.push({...axes, x: points.map((r) => r.rate),
        y: points.map(height), type: "scatter", mode: "markers",
        legendgroup: label, showlegend: false, name: plain(label),
        customdata: points.map((r) => r.id),
        text: points.map((r) => `<b>${plain(nameOf(r))}</b><br>${r.ending}, ` +
          `loss ${show(r.loss)}, l<sub>0</sub> ${show(r.initial)}`),
        hovertemplate: "%{text}<extra></extra>",
        marker: {color: colour, size: gone ? 9 : 7, opacity: 0.85,
          symbol: gone ? "x-thin" : variantSymbol(label),
          line: {width: gone ? 2 : 0.5, color: gone ? colour : "#fff"}}});
    }
  });
  return {traces, layout};
}

function colourOf(run, by) {
  if (by === "ending") return ENDING_COLOURS[run.ending];
  return by === "rate" ? rateColour(run.rate) : variantColour(run.label);
}

function curvesFigure(runs, state) {
  const name = state.curve === "loss" && state.trend ? "trend" : state.curve;
  const drawn = runs.filter((run) => run.curves[name]);
  if (!drawn.length) return null;
  const traces = [], seen = new Set();
  const texts = {loss: "training loss", gradient_norm: "gradient norm",
    update_norm: "update norm", max_logit: "largest attention logit"};
  let high = -Infinity, low = Infinity;
  const marks = {event: {x: [], y: [], text: [], id: [], color: []},
    verdict: {x: [], y: [], text: [], id: [], color: []}};
  for (const run of drawn) {
    const x = unpack(run.curves[name].x), y = unpack(run.curves[name].y);
    const colour = colourOf(run, state.colour);
    const key = {variant: run.label, rate: showRate(run.rate),
      ending: run.ending}[state.colour];
    const here = run.id === state.run;
    const legend = !seen.has(key);
    seen.add(key);
    traces.push({x, y, type: "scatter", mode: "lines", name: plain(key),
      legendgroup: key, showlegend: legend, customdata: [run.id],
      opacity: here ? 1 : drawn.length > 12 ? 0.55 : 0.85,
      line: {color: colour, width: here ? 2.6 : 1.2, simplify: true,
        dash: state.colour === "variant" ? variantDash(run.label) : "solid"},
      hovertemplate: `<b>${plain(nameOf(run))}</b><br>${run.ending}, step ` +
        "%{x}: %{y:.4~g}<extra></extra>"});
    for (const v of y) if (Number.isFinite(v)) low = Math.min(low, v);
    if (known(run.initial)) high = Math.max(high, run.initial);
    if (!state.marks) continue;
    // The value at a step: the last point drawn before it.
    const at = (step) => {
      let i = 0;
      while (i + 1 < x.length && x[i + 1] <= step) i++;
      while (i > 0 && !Number.isFinite(y[i])) i--;
      return y[i];
    };
    const mark = (kind, step, text) => {
      const into = marks[kind];
      into.x.push(step);
      into.y.push(at(step));
      into.id.push(run.id);
      into.color.push(colour);
      into.text.push(`<b>${plain(nameOf(run))}</b><br>step ${step}: ` +
        plain(text));
    };
    for (const [step, , detector, series, , detail] of run.events) {
      if (known(step)) mark("event", step, `${detector}, ${series}: ${detail}`);
    }
    for (const [step, verdict] of run.verdicts) {
      if (known(step)) mark("verdict", step, verdict);
    }
  }
  for (const [kind, into] of Object.entries(marks)) {
    if (!into.x.length) continue;
    traces.push({x: into.x, y: into.y, text: into.text, customdata: into.id,
      type: "scatter", mode: "markers", showlegend: false,
      hovertemplate: "%{text}<extra></extra>",
      marker: {color: kind === "event" ? "#fff" : into.color, size: 8,
        symbol: kind === "event" ? "triangle-down" : "square",
        line: {color: into.color, width: 1.5}}});
  }
  const y = axis(texts[state.curve], {type: state.log ? "log" : "linear"});
  if (state.curve === "loss" && !state.log && high > low) {
    // Not what a diverged run rose to: a double click shows it.
    y.range = [low - 0.03 * (high - low), high + 0.08 * (high - low)];
  }
  return {traces, layout: layoutOf({height: narrow() ? 420 : 480,
    xaxis: axis("step"), yaxis: y,
    legend: {...layoutOf().legend, traceorder: "normal"}})};
}

// Heat maps beside each other, on one colour scale.
function heatmaps(maps, {scale, zmin, zmax, zmid, ticks, columns, unit}) {
  const wide = narrow() ? 1 : Math.min(columns, maps.length);
  const tallest = Math.max(...maps.map((map) => map.z.length));
  const rows = Math.ceil(maps.length / wide);
  const one = Math.min(420, Math.max(130, tallest * 13 + 50));
  const grid = panels(maps.length, wide, {gap: 0.1,
    rowGap: Math.min(0.5, 62 / (rows * (one + 60)))});
  const layout = layoutOf({height: rows * (one + 60) + 60, annotations: [],
    margin: {l: 70, r: 12, t: 34, b: 44},
    coloraxis: {colorscale: scale, cmin: zmin, cmax: zmax, cmid: zmid,
      colorbar: {thickness: 12, len: 1, outlinewidth: 0, ticklen: 3,
        title: {text: unit, side: narrow() ? "top" : "right"},
        ...(narrow() ? {orientation: "h", y: 1.0, yanchor: "bottom",
          ypad: 28} : {}), ...ticks}}});
  if (narrow()) layout.margin.t = 110;
  const traces = maps.map((map, i) => {
    const panel = grid[i];
    const every = Math.ceil(map.names.length / (one / 15));
    const tickvals = map.ticks || map.names.map((_, j) => j)
      .filter((j) => j % every === 0);
    layout[`xaxis${panel.suffix}`] = axis(
      i >= maps.length - wide ? "step" : "", {domain: panel.x,
        anchor: `y${panel.suffix}`, showgrid: false});
    layout[`yaxis${panel.suffix}`] = axis("", {domain: panel.y,
      anchor: `x${panel.suffix}`, autorange: "reversed", showgrid: false,
      tickvals, ticktext: tickvals.map((j) => plain(
        map.ticktext ? map.ticktext[tickvals.indexOf(j)]
          : short(map.names[j], 22))), tickfont: {size: 10}});
    layout.annotations.push(panelTitle(panel, plain(map.title)));
    return {type: "heatmap", x: Array.from(map.x), z: map.z,
      coloraxis: "coloraxis", hoverongaps: false,
      xaxis: `x${panel.suffix}`, yaxis: `y${panel.suffix}`,
      text: map.z.map((row, j) => row.map(
        (v, k) => `${plain(map.names[j])}<br>step ${map.x[k]}: ${map.say(v)}`)),
      hovertemplate: "%{text}<extra></extra>"};
  });
  return {traces, layout};
}

function growthFigure(run, state) {
  const growth = run.growth[state.reference] || run.growth.first;
  if (!growth) return null;
  const maps = Object.entries(growth.kinds)
    .filter(([kind]) => kind !== "Other" || state.others ||
      Object.keys(growth.kinds).length === 1)
    .map(([kind, map]) => ({
      title: kind === "Other" ? "Embedding, stream, head, others" : kind,
      x: growth.steps, names: map.names, z: rowsOf(map.z),
      say: (v) => `${v > 0 ? "+" : ""}${show(v, 3)} octaves, ` +
        `${show(2 ** v, 3)} times`}));
  return heatmaps(maps, {scale: DIVERGING, zmin: -4, zmax: 4, columns: 2,
    unit: "log<sub>2</sub> growth",
    ticks: {tickvals: [-4, -2, 0, 1, 2, 4],
      ticktext: ["≤ −4", "−2", "0", "1", "2", "≥ 4"]}});
}

function attentionFigures(run) {
  const attention = run.attention;
  if (!attention) return null;
  const names = [], ticks = [], ticktext = [];
  const every = Math.ceil(attention.layers.length / 20);
  attention.layers.forEach(([layer, heads], i) => {
    if (i % every === 0) {
      ticks.push(names.length + (heads - 1) / 2);
      ticktext.push(short(layer.replace(/\/(self_)?attention$/, ""), 16));
    }
    for (let head = 0; head < heads; head++) {
      names.push(`${layer}, head ${head}`);
    }
  });
  const common = {x: attention.steps, names, ticks, ticktext};
  const logits = heatmaps([{...common, title: "largest logit, before any cap",
    z: rowsOf(attention.max_logit, (v) => Math.log10(
      Math.max(Math.sinh(v), 0.1))),
    say: (v) => show(10 ** v)}],
  {scale: "Viridis", zmin: 0, zmax: 4, columns: 1, unit: "",
    ticks: {tickvals: [0, 1, 2, 3, 4],
      ticktext: ["≤ 1", "10", "100", "1000", "≥ 10⁴"]}});
  const entropy = heatmaps([{...common, title: "entropy / log of the keys seen",
    z: rowsOf(attention.entropy), say: (v) => show(v)}],
  {scale: "Cividis", zmin: 0, zmax: 1, columns: 1, unit: "",
    ticks: {tickvals: [0, 0.1, 0.5, 1]}});
  return [logits, entropy];
}

function normsFigure(run) {
  const names = {gradient_norm: "gradient norm", update_norm: "update norm",
    max_logit: "largest attention logit"};
  const drawn = Object.keys(names).filter((name) => run.curves[name]);
  if (!drawn.length) return null;
  const columns = narrow() ? 1 : drawn.length;
  const grid = panels(drawn.length, columns, {gap: 0.08, rowGap: 0.12});
  const rows = Math.ceil(drawn.length / columns);
  const layout = layoutOf({height: rows * 220 + 60, showlegend: false,
    annotations: []});
  const traces = drawn.map((name, i) => {
    const panel = grid[i];
    layout[`xaxis${panel.suffix}`] = axis(
      i >= drawn.length - columns ? "step" : "",
      {domain: panel.x, anchor: `y${panel.suffix}`});
    layout[`yaxis${panel.suffix}`] = axis("", {type: "log", domain: panel.y,
      anchor: `x${panel.suffix}`, exponentformat: "power"});
    layout.annotations.push(panelTitle(panel, names[name]));
    const {x, y} = run.curves[name];
    return {x: unpack(x), y: unpack(y), type: "scatter", mode: "lines",
      xaxis: `x${panel.suffix}`, yaxis: `y${panel.suffix}`,
      line: {color: variantColour(run.label), width: 1.1},
      hovertemplate: "step %{x}: %{y:.4~g}<extra></extra>"};
  });
  return {traces, layout};
}

function updatesFigure(run) {
  const updates = run.updates;
  if (!updates) return null;
  return heatmaps([{title: "log10 of update / weight", x: updates.steps,
    names: updates.names, z: rowsOf(updates.ratio),
    say: (v) => `update / weight = ${show(10 ** v, 3)}`}],
  {scale: "Viridis", zmin: -5, zmax: -1, columns: 1, unit: "",
    ticks: {tickvals: [-5, -4, -3, -2, -1],
      ticktext: ["≤ 10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "≥ 10⁻¹"]}});
}

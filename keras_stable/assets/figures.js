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

// On a logarithmic axis: decades alone, if there are some. On less than one,
// ticks as of a linear axis, which Plotly finds itself.
function logTicks(values) {
  const positive = values.filter((v) => v > 0);
  const decades = Math.log10(Math.max(...positive) / Math.min(...positive));
  return {type: "log", tickformat: "~g",
    dtick: decades > 6 ? 2 : decades > 1.5 ? 1 : decades > 0.7 ? "D2"
      : undefined};
}

// A run without an ending is neither.
const lost = (run) => DATA.endings.includes(run.ending) &&
  !["converged", "spiked", "degraded"].includes(run.ending);

// A degraded run is not lost, and not stable either.
const markOf = (run) => lost(run) ? "cross" :
  run.ending === "degraded" ? "hollow" : "filled";

// min(loss, l_0), as in the LR sensitivity; l_0 for a loss that is none.
function height(run) {
  const values = [run.loss, run.initial].filter(known);
  return values.length ? Math.min(...values) : null;
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
  const rows = Math.ceil(count / columns);
  const tall = rows * 230;
  const grid = panels(count, columns, {gap: 0.06, rowGap: 52 / tall});
  const layout = layoutOf({
    height: apart ? tall + 90 : 440,
    showlegend: !apart && labels.length > 1, annotations: [],
  });
  const heights = ended.map(height);
  const low = Math.min(...heights), high = Math.max(...heights);
  const margin = Math.max(0.05 * (high - low), 0.02);
  const rates = [...new Set(ended.map((r) => r.rate))].sort((a, b) => a - b);
  const exponents = rates.map(Math.log10);
  // Of rates too near for their names, one in two is named.
  const near = (exponents[exponents.length - 1] - exponents[0] + 0.24) /
    (apart ? 8 : narrow() ? 7 : 20);
  let named = -Infinity;
  const ticktext = rates.map((rate, i) => {
    if (exponents[i] - named < near) return "";
    named = exponents[i];
    return showRate(rate);
  });
  grid.forEach((panel, i) => {
    const last = i >= count - columns;
    layout[`xaxis${panel.suffix}`] = axis(last ? "learning rate" : "", {
      type: "log", domain: panel.x, anchor: `y${panel.suffix}`,
      range: [exponents[0] - 0.12, exponents[exponents.length - 1] + 0.12],
      tickvals: rates, ticktext, tickangle: 0,
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
    for (const mark of ["filled", "hollow", "cross"]) {
      const points = mine.filter((run) => markOf(run) === mark);
      if (!points.length) continue;
      // Beside each other, not upon.
      const aside = apart ? 1 : 1.025 ** (i - (labels.length - 1) / 2);
      traces.push({...axes, x: points.map((r) => r.rate * aside),
        y: points.map(height), type: "scatter", mode: "markers",
        legendgroup: label, showlegend: false, name: plain(label),
        customdata: points.map((r) => r.id),
        text: points.map((r) => `<b>${plain(nameOf(r, 40))}</b><br>` +
          `${r.ending}, loss ${show(r.loss)}, l<sub>0</sub> ` +
          show(r.initial)),
        hovertemplate: "%{text}<extra></extra>",
        marker: {color: mark === "hollow" ? "#fff" : colour,
          size: mark === "filled" ? 7 : 9,
          opacity: mark === "hollow" ? 1 : 0.85,
          symbol: mark === "cross" ? "x-thin" : variantSymbol(label),
          line: {width: {filled: 0.5, hollow: 1.5, cross: 2}[mark],
            color: mark === "filled" ? "#fff" : colour}}});
    }
  });
  return {traces, layout};
}

function colourOf(run, by) {
  if (by === "ending") return ENDING_COLOURS[run.ending];
  return by === "rate" ? rateColour(run.rate) : variantColour(run.label);
}

const CURVES = {loss: "training loss", gradient_norm: "gradient norm",
  update_norm: "update norm", max_logit: "largest attention logit"};

function curvesFigure(runs, state) {
  const name = state.curve === "loss" && state.trend ? "trend" : state.curve;
  const drawn = runs.filter((run) => run.curves[name]);
  if (!drawn.length) return null;
  const labels = DATA.labels.filter((l) => drawn.some((r) => r.label === l));
  const apart = state.panels && labels.length > 1;
  const count = apart ? labels.length : 1;
  const columns = apart ? (narrow() ? 1 : Math.min(3, count)) : 1;
  const rows = Math.ceil(count / columns);
  const tall = 250 * rows;
  const grid = panels(count, columns, {gap: 0.05, rowGap: 45 / tall});
  const traces = [], seen = new Set(), all = [];
  let high = -Infinity, low = Infinity;
  const marks = [];
  const order = {variant: DATA.labels, rate: DATA.rates, ending: DATA.present};
  const keyOf = (run) => run[{variant: "label"}[state.colour] || state.colour];
  const ranked = [...drawn].sort((a, b) => order[state.colour].indexOf(keyOf(a))
    - order[state.colour].indexOf(keyOf(b)));
  for (const run of ranked) {
    const panel = grid[apart ? labels.indexOf(run.label) : 0];
    const axes = {xaxis: `x${panel.suffix}`, yaxis: `y${panel.suffix}`};
    const x = unpack(run.curves[name].x), y = unpack(run.curves[name].y);
    const colour = colourOf(run, state.colour);
    const key = state.colour === "rate" ? showRate(run.rate) : keyOf(run);
    const here = run.id === state.run;
    if (!seen.has(key)) {
      traces.push({...axes, x: [null], y: [null], type: "scatter",
        mode: "lines", name: plain(key), legendgroup: key,
        line: {color: colour, width: 2}});
    }
    traces.push({...axes, x, y, type: "scatter", mode: "lines",
      legendgroup: key, showlegend: false, customdata: [run.id], opacity: here ? 1 : drawn.length > 30 ? 0.6 : 0.85,
      line: {color: colour, width: here ? 2.6 : 1.2, simplify: true,
        dash: state.colour === "variant" ? variantDash(run.label) : "solid"},
      hovertemplate: `<b>${plain(nameOf(run, 40))}</b><br>${run.ending}, ` +
        "step %{x}: %{y:.4~g}<extra></extra>"});
    seen.add(key);
    for (const v of y) {
      if (!Number.isFinite(v)) continue;
      low = Math.min(low, v);
      all.push(v);
    }
    if (known(run.initial)) high = Math.max(high, run.initial);
    if (!state.marks) continue;
    // The value at a step: the last point drawn before it.
    const at = (step) => {
      let i = 0;
      while (i + 1 < x.length && x[i + 1] <= step) i++;
      while (i > 0 && !Number.isFinite(y[i])) i--;
      return y[i];
    };
    const found = [
      ["triangle-down", run.events.filter(([step]) => known(step)).map(
        ([step, , detector, series, , detail]) =>
          [step, `${detector}, ${series}: ${detail}`])],
      ["square", run.verdicts.filter(([step]) => known(step))]];
    for (const [symbol, steps] of found.filter(([, s]) => s.length)) {
      marks.push({...axes, x: steps.map(([step]) => step),
        y: steps.map(([step]) => at(step)), type: "scatter", mode: "markers",
        legendgroup: key, showlegend: false, customdata: steps.map(() => run.id),
        text: steps.map(([step, text]) =>
          `<b>${plain(nameOf(run, 40))}</b><br>step ${step}: ${plain(text)}`),
        hovertemplate: "%{text}<extra></extra>",
        marker: {color: symbol === "square" ? colour : "#fff", size: 8, symbol,
          line: {color: colour, width: 1.5}}});
    }
  }
  const layout = layoutOf({height: apart ? tall + 110 : narrow() ? 420 : 480,
    annotations: apart ? grid.map((panel, i) => panelTitle(panel,
      plain(labels[i]))) : []});
  layout.legend.y = apart ? -45 / tall : -0.15;
  layout.legend.traceorder = "normal";
  const last = Math.max(...drawn.map((run) => run.steps_done || 0));
  grid.forEach((panel, i) => {
    layout[`xaxis${panel.suffix}`] = axis(i >= count - columns ? "step" : "",
      {domain: panel.x, anchor: `y${panel.suffix}`, range: [0, last * 1.01],
        ...(apart && i ? {matches: "x"} : {})});
    const y = axis(i % columns ? "" : CURVES[state.curve],
      {domain: panel.y, anchor: `x${panel.suffix}`,
        ...(state.log && all.length ? logTicks(all) : {}),
        ...(apart && i ? {matches: "y"} : {})});
    if (state.curve === "loss" && !state.log && high > low) {
      // Not what a diverged run rose to: a double click shows it.
      y.range = [low - 0.03 * (high - low), high + 0.08 * (high - low)];
    }
    layout[`yaxis${panel.suffix}`] = y;
  });
  return {traces: [...traces, ...marks], layout};
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
        // Above a bar it would push the axes' titles into the figure.
        title: {text: narrow() ? "" : unit, side: "right"},
        ...(narrow() ? {orientation: "h", y: 1.0, yanchor: "bottom",
          ypad: 28} : {}), ...ticks}}});
  const traces = maps.map((map, i) => {
    const panel = grid[i];
    const every = Math.ceil(map.names.length / (one / 15));
    const tickvals = map.ticks || map.names.map((_, j) => j)
      .filter((j) => j % every === 0);
    layout[`xaxis${panel.suffix}`] = axis(
      i >= maps.length - wide ? "step" : "", {domain: panel.x,
        anchor: `y${panel.suffix}`, showgrid: false, automargin: false});
    layout[`yaxis${panel.suffix}`] = axis("", {domain: panel.y,
      anchor: `x${panel.suffix}`, autorange: "reversed", showgrid: false,
      tickvals, ticktext: tickvals.map((j) => plain(
        map.ticktext ? map.ticktext[tickvals.indexOf(j)]
          : layerName(map.names[j], narrow() ? 18 : 30))), tickfont: {size: 10}});
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
  const growth = run.growths[state.reference] || run.growths.first;
  if (!growth) return null;
  const maps = Object.entries(growth.kinds)
    .filter(([kind]) => kind !== "Other" || state.others ||
      Object.keys(growth.kinds).length === 1)
    .map(([kind, map]) => ({
      title: kind === "Other" ? "Embedding, stream, head, others" : kind,
      x: growth.steps, names: map.names, z: rowsOf(map.z),
      say: (v) => `${v > 0 ? "+" : ""}${show(v, 3)} octaves, ` +
        `${show(2 ** v, 3)} times`}));
  // As many octaves as there are, even ones: 2 to 12.
  const sizes = maps.flatMap((map) => map.z.flat()).filter(Number.isFinite)
    .map(Math.abs).sort((a, b) => a - b);
  const most = sizes[Math.floor(0.99 * (sizes.length - 1))] || 0;
  const end = Math.min(12, Math.max(2, 2 * Math.ceil(most / 2)));
  return heatmaps(maps, {scale: DIVERGING, zmin: -end, zmax: end, columns: 2,
    unit: "log<sub>2</sub> growth",
    ticks: {tickvals: [-end, -end / 2, 0, end / 2, end],
      ticktext: [`≤ −${end}`, `−${end / 2}`, "0", `${end / 2}`, `≥ ${end}`]}});
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
  const drawn = Object.keys(CURVES).filter(
    (name) => name !== "loss" && run.curves[name]);
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
    const x = unpack(run.curves[name].x), y = unpack(run.curves[name].y);
    layout[`yaxis${panel.suffix}`] = axis("", {domain: panel.y,
      anchor: `x${panel.suffix}`, ...logTicks(Array.from(y))});
    layout.annotations.push(panelTitle(panel, CURVES[name]));
    return {x, y, type: "scatter", mode: "lines",
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

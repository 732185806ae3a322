"use strict";
// The data, numbers as text, and colours.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;

// Okabe and Ito's colours, which also the colour-blind tell apart, darkened
// where they are lines on white; after ten, the dashes change.
const COLOURS = ["#1d232b", "#0072b2", "#d55e00", "#009e73", "#b0569b",
  "#c98a00", "#3a9bd1", "#7f3c8d", "#8c6d31", "#7a8590"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up",
  "triangle-down", "pentagon", "hexagon", "star", "hexagram", "bowtie"];
const ENDING_COLOURS = {converged: "#0a6640", spiked: "#7a5b00",
  degraded: "#9a4200", collapsed: "#7d2e4e", diverged: "#a61b29",
  nonfinite: "#6f1d86", failed: "#444b54", unreadable: "#444b54",
  unknown: "#444b54", unfinished: "#0b5cad"};
const VIRIDIS = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187",
  "#4ac16d", "#a0da39"];
// White is no change; blue and orange are told apart by all.
const DIVERGING = [[0, "#053061"], [0.125, "#2166ac"], [0.25, "#4393c3"],
  [0.375, "#a8d0e4"], [0.5, "#f7f7f7"], [0.625, "#fdcb9b"],
  [0.75, "#ef8a3c"], [0.875, "#c5500b"], [1, "#6e2405"]];

const variantColour = (label) =>
  COLOURS[DATA.labels.indexOf(label) % COLOURS.length];
const variantDash = (label) =>
  DASHES[Math.floor(DATA.labels.indexOf(label) / COLOURS.length) % 4];
const variantSymbol = (label) =>
  SYMBOLS[DATA.labels.indexOf(label) % SYMBOLS.length];

function rateColour(rate) {
  const rates = DATA.rates;
  const place = rates.length < 2 ? 0 : rates.indexOf(rate) / (rates.length - 1);
  const at = Math.max(0, place) * (VIRIDIS.length - 1);
  const low = Math.floor(at);
  const high = Math.min(low + 1, VIRIDIS.length - 1);
  const mix = (i) => Math.round(
    parseInt(VIRIDIS[low].slice(i, i + 2), 16) * (1 - at + low) +
    parseInt(VIRIDIS[high].slice(i, i + 2), 16) * (at - low));
  return `rgb(${mix(1)}, ${mix(3)}, ${mix(5)})`;
}

// What Python packed: float32, or multiples of a scale in 16 bits.
function unpack(packed) {
  if (!packed) return new Float32Array(0);
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  if (packed.kind === "f4") return new Float32Array(bytes.buffer);
  const whole = new Int16Array(bytes.buffer);
  return Float32Array.from(whole, (v) => v === -32768 ? NaN : v * packed.scale);
}

function rowsOf(packed, change = (v) => v) {
  const flat = unpack(packed).map(change);
  const [rows, columns] = packed.shape;
  return Array.from({length: rows},
    (_, i) => Array.from(flat.subarray(i * columns, (i + 1) * columns)));
}

const known = (value) => typeof value === "number" && Number.isFinite(value);

function show(value, digits = 4) {
  if (!known(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) {
    return value.toExponential(2).replace("e+", "e");
  }
  return String(Number(value.toPrecision(digits)));
}

const whole = (value) => known(value) ? value.toLocaleString("en") : "–";
const showRate = (value) => known(value) ? show(value, 3) : "–";
const short = (text, most = 40) =>
  text.length > most ? text.slice(0, most - 1) + "…" : text;

// Plotly reads a little HTML in texts: labels are not to be read so.
const plain = (text) => short(String(text), 60).replace(/&/g, "&amp;")
  .replace(/</g, "&lt;").replace(/>/g, "&gt;");

// The end of a layer's name says most.
function layerName(name, most) {
  const text = name.replace(/\/(kernel|embeddings)$/, "");
  return text.length > most ? "…" + text.slice(1 - most) : text;
}

// Of a long name the label is cut, not what tells its runs apart.
const nameOf = (run, most = Infinity) =>
  `${short(run.label, most)}, ${showRate(run.rate)}` +
  (known(run.seed) ? `, seed ${run.seed}` : "");

// Elements are made of texts, never of HTML.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) {
      element.setAttribute(key, value === true ? "" : value);
    }
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function put(id, ...children) {
  document.getElementById(id).replaceChildren(...children);
}

const pill = (ending, text = ending) =>
  make("span", {class: `pill ${ending}`}, text);

// A text that begins as a formula would run in a spreadsheet.
function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  let text = String(value);
  if (/^\s*[=+\-@|%]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}

function download(name, rows) {
  const text = rows.map((row) => row.map(csvCell).join(",")).join("\r\n");
  const url = URL.createObjectURL(new Blob([text + "\r\n"],
    {type: "text/csv"}));
  const link = make("a", {href: url, download: name});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

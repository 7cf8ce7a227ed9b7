// The plan as columns, the words and units people read, and small helpers for the document.
const data = JSON.parse(document.getElementById("plan").textContent);
const { digest, buffers, ops, instructions, residences, engines, palette, words } = data;
const KINDS = ["run", "load", "store", "recompute", "collective", "wait"];
const CATEGORIES = Object.keys(palette.categories);
const ROLES = Object.keys(palette.roles);
const counts = { residences: residences.buffer.length, instructions: instructions.kind.length };
const timed = data.timed;
const placed = residences.offset.some((offset) => offset !== null);
const capacity = digest.machine.capacity_bytes;

// Whether the step is about an operator: executes it, for the first time or again, or waits for it.
function executes(step) {
  return KINDS[instructions.kind[step]] !== "load" && KINDS[instructions.kind[step]] !== "store";
}

function category(step) {
  const kind = instructions.kind[step];
  if (executes(step)) return CATEGORIES.indexOf(KINDS[kind]);
  return 2 * kind - (instructions.additional[step] > 0 ? 0 : 1); // in the order of palette.categories
}

function additional(buffer) {
  return buffers.loaded[buffer] + buffers.stored[buffer] + buffers.streamed[buffer] - buffers.compulsory[buffer];
}

// Which steps touch each buffer, and where each operator runs.
const touching = buffers.name.map(() => []);
const stepsOfOp = ops.name.map(() => []);
const residencesOf = buffers.name.map(() => []);
for (let step = 0; step < counts.instructions; step++) {
  const subject = instructions.subject[step];
  if (executes(step)) {
    stepsOfOp[subject].push(step);
    for (const buffer of new Set([...ops.inputs[subject], ...ops.outputs[subject]])) touching[buffer].push(step);
  } else touching[subject].push(step);
}
residences.buffer.forEach((buffer, index) => residencesOf[buffer].push(index));

function significant(value) {
  const size = Math.abs(value);
  if (size >= 999.5) return Math.round(value).toLocaleString("en-US");
  return value.toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2);
}

function formatBytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let power = 0;
  while (Math.abs(value) >= (power ? 1023.5 : 1024) && power < units.length - 1) {
    value /= 1024;
    power++;
  }
  return power ? `${significant(value)} ${units[power]}` : `${value} B`;
}

function formatSeconds(value) {
  if (value === null || value === undefined) return "";
  if (value === 0) return "0 s";
  for (const [factor, unit] of [[1, "s"], [1e3, "ms"], [1e6, "us"]]) {
    if (Math.abs(value) * factor >= 0.9995) return `${significant(value * factor)} ${unit}`;
  }
  return `${significant(value * 1e9)} ns`;
}

function formatCount(value) {
  return value.toLocaleString("en-US");
}

function formatExact(value) {
  return value < 1024 ? `${value} B` : `${formatBytes(value)} (${formatCount(value)} B)`;
}

function formatPercent(fraction) {
  if (fraction > 0 && fraction < 0.0001) return "<0.01 %";
  return `${(fraction * 100).toFixed(fraction < 0.1 ? 2 : 1)} %`;
}

function formatFlops(value) {
  const prefixes = ["", "k", "M", "G", "T", "P", "E"];
  let power = 0;
  while (value >= 999.5 && power < prefixes.length - 1) {
    value /= 1000;
    power++;
  }
  return `${power ? significant(value) : value} ${prefixes[power]}FLOP`;
}

// Names come from a model: they enter the document as text, never as markup.
function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  const { style, dataset, on, ...attributes } = options;
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === undefined) continue;
    made.setAttribute(name, value === true ? "" : value);
  }
  Object.assign(made.style, style || {});
  for (const [event, handler] of Object.entries(on || {})) made.addEventListener(event, handler);
  made.append(...children.filter((child) => child !== null && child !== undefined).map((c) => (c.nodeType ? c : String(c))));
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

function swatch(colour) {
  return element("span", { class: "swatch", style: { background: colour } });
}

function factList(pairs) {
  const list = element("dl", { class: "facts" });
  for (const [name, value] of pairs) {
    if (value === "" || value === null || value === undefined) continue;
    list.append(element("dt", {}, name), element("dd", {}, value));
  }
  return list;
}

function roleWord(role) {
  return ROLES[role].replace(/_/g, " ");
}

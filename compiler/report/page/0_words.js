// Units as people read them, and small helpers for the document; every page has them.
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

// Ticks, colours and text on a canvas; every page has them.
const theme = {};

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["card", "ink", "quiet", "line", "grid", "accent", "bad", "select", "shade"]) {
    theme[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

// Round steps for an axis: 1, 2, 5 times a power of ten, or powers of two for bytes.
function tickStep(span, most, binary) {
  const rough = Math.max(span / most, Number.MIN_VALUE);
  if (binary) return Math.max(1, 2 ** Math.ceil(Math.log2(rough)));
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999999);
}

const BYTE_UNITS = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"], [1, "B"]];
const TIME_UNITS = [[1, "s"], [1e-3, "ms"], [1e-6, "us"], [1e-9, "ns"]];

// `value` on an axis whose ticks lie `step` apart and whose largest value is `top`: all ticks in one unit, exactly.
function axisLabel(value, step, top, kind) {
  if (kind === "step") return formatCount(Math.round(value));
  const units = kind === "bytes" ? BYTE_UNITS : TIME_UNITS;
  const [size, unit] = units.find(([s]) => s <= Math.max(top, step) * 1.000001) || units[3];
  let digits = 0;
  while (digits < 9 && Math.abs((step / size) * 10 ** digits - Math.round((step / size) * 10 ** digits)) > 1e-6) digits++;
  return `${(value / size).toFixed(digits)} ${unit}`;
}

function outlined(context, text, x, y, colour) {
  context.lineWidth = 3;
  context.lineJoin = "round";
  context.strokeStyle = theme.card;
  context.strokeText(text, x, y);
  context.fillStyle = colour;
  context.fillText(text, x, y);
}

// Dark ink on pale colours, white on the others.
function inkOn(colour) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#10202c" : "#ffffff";
}

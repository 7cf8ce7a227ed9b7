// What part of the plan is in sight: one horizontal range for all charts, one range of addresses for the memory map.
const view = { mode: timed ? "time" : "step", x0: 0, x1: 1, full: 1, y0: 0, y1: 1, fullY: 1, scale: null };
const selection = { buffer: -1, step: -1 };
const used = residences.offset.reduce((most, offset, r) => Math.max(most, offset === null ? 0 : offset + buffers.nbytes[residences.buffer[r]]), 0);
const scales = {};

// Horizontal extents of instructions and residences, and the live bytes between changes, in one of the two modes.
function makeScale(mode) {
  const byTime = mode === "time";
  const barBegin = byTime ? instructions.start : instructions.kind.map((_, step) => step);
  const barEnd = byTime ? instructions.finish : instructions.kind.map((_, step) => step + 1);
  const boxBegin = byTime ? residences.start : residences.begin;
  const boxEnd = byTime ? residences.finish : residences.end;
  const full = (byTime ? barEnd.reduce((a, b) => Math.max(a, b), 0) : counts.instructions) || 1;
  return { barBegin, barEnd, boxBegin, boxEnd, full, live: makeLive(boxBegin, boxEnd, full) };
}

function makeLive(begin, end, full) {
  const times = [...new Set([0, ...begin, ...end].map((x) => Math.min(Math.max(x, 0), full)))].sort((a, b) => a - b);
  const position = new Map(times.map((x, index) => [x, index]));
  const at = (x) => position.get(Math.min(Math.max(x, 0), full));
  const roles = ROLES.map(() => new Float64Array(times.length));
  for (let r = 0; r < counts.residences; r++) {
    if (!(begin[r] < end[r])) continue;
    const column = roles[buffers.role[residences.buffer[r]]];
    column[at(begin[r])] += buffers.nbytes[residences.buffer[r]];
    column[at(end[r])] -= buffers.nbytes[residences.buffer[r]];
  }
  const total = new Float64Array(times.length);
  for (const column of roles) {
    for (let i = 1; i < column.length; i++) column[i] += column[i - 1];
    for (let i = 0; i < column.length; i++) total[i] += column[i];
  }
  let peak = 0;
  for (let i = 1; i < total.length; i++) if (total[i] > total[peak]) peak = i;
  return { times, roles, total, peak };
}

function scaleOf(mode) {
  scales[mode] = scales[mode] || makeScale(mode);
  return scales[mode];
}

function setMode(mode) {
  // Keep the instructions in sight in sight: the range moves to where the same steps are in the other mode.
  const before = view.scale;
  const whole = !before || (view.x0 <= 0 && view.x1 >= view.full);
  let first = -1;
  let last = -1;
  if (!whole) {
    for (let step = 0; step < counts.instructions; step++) {
      if (before.barEnd[step] > view.x0 && before.barBegin[step] < view.x1) {
        if (first < 0) first = step;
        last = step;
      }
    }
  }
  view.mode = mode;
  view.scale = scaleOf(mode);
  view.full = view.scale.full;
  view.fullY = Math.max(capacity, used) * 1.04;
  if (whole || first < 0) {
    view.x0 = 0;
    view.x1 = view.full;
  } else setRange(view.scale.barBegin[first], view.scale.barEnd[last]);
  if (!before) fitY();
  byId("mode-time").setAttribute("aria-pressed", String(mode === "time"));
  byId("mode-step").setAttribute("aria-pressed", String(mode === "step"));
}

function setRange(x0, x1) {
  const least = view.mode === "step" ? 2 : view.full * 1e-7;
  const width = Math.min(Math.max(x1 - x0, least), view.full);
  const middle = (x0 + x1) / 2;
  view.x0 = Math.min(Math.max(middle - width / 2, 0), view.full - width);
  view.x1 = view.x0 + width;
}

function setRangeY(y0, y1) {
  const height = Math.min(Math.max(y1 - y0, 64), view.fullY);
  const middle = (y0 + y1) / 2;
  view.y0 = Math.min(Math.max(middle - height / 2, 0), view.fullY - height);
  view.y1 = view.y0 + height;
}

// The whole scratchpad; only the part in use when that is little, and not all a wrong plan may reach for.
function fitY() {
  view.y0 = 0;
  view.y1 = topFor(used);
}

function topFor(bytes) {
  return bytes > 0 && bytes < capacity / 4 ? bytes * 1.15 : Math.max(capacity, Math.min(bytes, 2 * capacity)) * 1.04;
}

function fit() {
  view.x0 = 0;
  view.x1 = view.full;
  fitY();
}

// Zoom by `factor` (below 1: closer), leaving the point at `share` of the width where it is.
function zoom(factor, share = 0.5) {
  const width = view.x1 - view.x0;
  const fixed = view.x0 + width * share;
  const next = Math.min(width * factor, view.full);
  setRange(fixed - next * share, fixed + next * (1 - share));
}

function zoomY(factor, share = 0.5) {
  const height = view.y1 - view.y0;
  const fixed = view.y0 + height * share;
  const next = Math.min(height * factor, view.fullY);
  setRangeY(fixed - next * share, fixed + next * (1 - share));
}

function pan(share) {
  const width = view.x1 - view.x0;
  const moved = Math.min(Math.max(view.x0 + width * share, 0), view.full - width);
  view.x0 = moved;
  view.x1 = moved + width;
}

function panY(share) {
  const height = view.y1 - view.y0;
  const moved = Math.min(Math.max(view.y0 + height * share, 0), view.fullY - height);
  view.y0 = moved;
  view.y1 = moved + height;
}

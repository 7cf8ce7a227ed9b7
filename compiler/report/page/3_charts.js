// The canvases. Each chart fills `drawn` with what it really put on its canvas; the page's own check reads it there.
const LEFT = 104;
const RIGHT = 12;
const AXIS = 20;
const drawn = { bars: {}, regions: {}, live: {} };
const charts = {};
const lanes = timed ? engines.map((_, index) => index) : KINDS.map((_, kind) => kind).filter((kind) => instructions.kind.includes(kind));
const laneNames = lanes.map((lane) => (timed ? engines[lane] : KINDS[lane]));

function makeChart(id, height, draw) {
  const canvas = byId(id);
  const chart = { id, canvas, context: canvas.getContext("2d"), height, draw, width: 0, plot: null };
  canvas.style.height = `${height}px`;
  charts[id] = chart;
  return chart;
}

function resize(chart) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(320, chart.canvas.clientWidth);
  if (chart.width === width && chart.ratio === ratio) return;
  chart.width = width;
  chart.ratio = ratio;
  chart.canvas.width = Math.round(width * ratio);
  chart.canvas.height = Math.round(chart.height * ratio);
  const bottom = chart.id === "overview" ? 0 : AXIS;
  chart.plot = { left: LEFT, right: width - RIGHT, top: 4, bottom: chart.height - bottom - 2 };
}

function drawAll() {
  for (const chart of Object.values(charts)) {
    resize(chart);
    chart.context.setTransform(chart.ratio, 0, 0, chart.ratio, 0, 0);
    chart.context.clearRect(0, 0, chart.width, chart.height);
    chart.context.font = '12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif';
    chart.draw(chart);
  }
  const shown = (x) => (view.mode === "step" ? formatCount(Math.round(x)) : formatSeconds(x));
  const whole = view.x0 <= 0 && view.x1 >= view.full;
  const width = view.mode === "step" ? `${formatCount(Math.round(view.x1 - view.x0))} steps` : formatSeconds(view.x1 - view.x0);
  byId("range").textContent = whole ? `all of ${width}` : `${shown(view.x0)} to ${shown(view.x1)} (${width})`;
}

let pending = 0;
function redraw() {
  if (!pending) pending = requestAnimationFrame(() => ((pending = 0), drawAll()));
}

function toX(chart, x) {
  return chart.plot.left + ((x - view.x0) / (view.x1 - view.x0)) * (chart.plot.right - chart.plot.left);
}

function fromX(chart, pixel) {
  return view.x0 + ((pixel - chart.plot.left) / (chart.plot.right - chart.plot.left)) * (view.x1 - view.x0);
}

function addressToY(chart, address) {
  return chart.plot.bottom - ((address - view.y0) / (view.y1 - view.y0)) * (chart.plot.bottom - chart.plot.top);
}

function clipped(chart, paint) {
  const { context, plot } = chart;
  context.save();
  context.beginPath();
  context.rect(plot.left, plot.top, plot.right - plot.left, plot.bottom - plot.top);
  context.clip();
  paint();
  context.restore();
}

function drawXAxis(chart) {
  const { context, plot } = chart;
  const step = Math.max(tickStep(view.x1 - view.x0, Math.max(2, (plot.right - plot.left) / 110), false), view.mode === "step" ? 1 : 0);
  context.textAlign = "center";
  context.textBaseline = "top";
  for (let k = Math.max(0, Math.ceil(view.x0 / step - 1e-9)); k * step <= view.x1 * (1 + 1e-12); k++) {
    const x = toX(chart, k * step);
    context.fillStyle = theme.grid;
    context.fillRect(Math.round(x), plot.top, 1, plot.bottom - plot.top);
    context.fillStyle = theme.quiet;
    if (x > plot.left - 1 && x < plot.right - 8) context.fillText(axisLabel(k * step, step, view.x1, view.mode), x, plot.bottom + 5);
  }
}

function drawBytesAxis({ context, plot }, low, high) {
  const step = tickStep(high - low, Math.max(2, (plot.bottom - plot.top) / 42), true);
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (let k = Math.ceil(low / step); k * step <= high; k++) {
    const y = plot.bottom - ((k * step - low) / (high - low)) * (plot.bottom - plot.top);
    context.fillStyle = theme.grid;
    context.fillRect(plot.left, Math.round(y), plot.right - plot.left, 1);
    context.fillStyle = theme.quiet;
    if (y > plot.top + 4) context.fillText(axisLabel(k * step, step, high, "bytes"), plot.left - 7, Math.min(y, plot.bottom - 6));
  }
}

function drawLimit({ context, plot }, y, label) {
  if (y > plot.bottom) return;
  if (y < plot.top) {
    context.textAlign = "right";
    context.textBaseline = "top";
    return outlined(context, `${label} is above`, plot.right - 4, plot.top + 3, theme.bad);
  }
  context.fillStyle = theme.bad;
  context.fillRect(plot.left, Math.round(y) - 1, plot.right - plot.left, 1.5);
  context.textAlign = "right";
  context.textBaseline = "bottom";
  if (y - plot.top < 15) context.textBaseline = "top";
  outlined(context, label, plot.right - 4, y - plot.top < 15 ? y + 3 : y - 2, theme.bad);
}

// The part of a box inside the plot: a label there is seen however far the box reaches out of sight.
function visible({ plot }, x, y, width, height) {
  const left = Math.max(x, plot.left);
  const top = Math.max(y, plot.top);
  return [left, top, Math.min(x + width, plot.right) - left, Math.min(y + height, plot.bottom) - top];
}

function label(context, text, x, y, width, height, colour) {
  if (width < 46 || height < 13) return;
  const room = Math.floor((width - 6) / 6.3);
  const short = text.length <= room ? text : `${text.slice(0, Math.max(1, room - 1))}\u2026`;
  context.fillStyle = inkOn(colour);
  context.textAlign = "left";
  context.textBaseline = "middle";
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.fillText(short, x + 4, y + height / 2);
  context.restore();
}

function nothing({ context, plot }, text) {
  context.fillStyle = theme.quiet;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(text, (plot.left + plot.right) / 2, (plot.top + plot.bottom) / 2);
}

// --- engines ---------------------------------------------------------------------------------------------------------

function laneOf(step) {
  return timed ? instructions.engine[step] : lanes.indexOf(instructions.kind[step]);
}

function laneBox(chart, lane) {
  const pitch = (chart.plot.bottom - chart.plot.top) / Math.max(laneNames.length, 1);
  return [chart.plot.top + lane * pitch + 3, pitch - 6];
}

function subjectName(step) {
  const subject = instructions.subject[step];
  return executes(step) ? ops.name[subject] : buffers.name[subject];
}

function drawEngines(chart) {
  const { context, plot } = chart;
  drawXAxis(chart);
  context.textAlign = "right";
  context.textBaseline = "middle";
  laneNames.forEach((name, lane) => {
    const [top, height] = laneBox(chart, lane);
    context.fillStyle = theme.ink;
    context.fillText(name.length > 14 ? `${name.slice(0, 13)}\u2026` : name, plot.left - 7, top + height / 2);
  });
  const colours = CATEGORIES.map((name) => palette.categories[name]);
  const marked = new Set(selection.buffer >= 0 ? touching[selection.buffer] : selection.step >= 0 ? [selection.step] : []);
  const count = CATEGORIES.map(() => 0);
  clipped(chart, () => {
    const open = laneNames.map(() => null);
    const flush = (lane) => {
      if (!open[lane]) return;
      const { begin, end, kind } = open[lane];
      const [top, height] = laneBox(chart, lane);
      context.fillStyle = colours[kind];
      context.fillRect(begin, top, end - begin > 3 ? end - begin - 0.7 : Math.max(end - begin, 0.4), height);
      open[lane] = null;
    };
    for (let step = 0; step < counts.instructions; step++) {
      const x = toX(chart, view.scale.barBegin[step]);
      const end = toX(chart, view.scale.barEnd[step]);
      if (end < plot.left || x > plot.right) continue;
      const lane = laneOf(step);
      const kind = category(step);
      count[kind]++;
      // Slivers that touch are drawn as one: the canvas would blend their edges into a pattern that means nothing.
      const before = open[lane];
      if (before && end - x <= 3 && before.kind === kind && before.thin && Math.abs(x - before.end) < 0.25) before.end = end;
      else {
        flush(lane);
        open[lane] = { begin: x, end, kind, thin: end - x <= 3 };
      }
      if (end - x > 46) {
        flush(lane);
        const [top, height] = laneBox(chart, lane);
        label(context, subjectName(step), ...visible(chart, x, top, end - x, height), colours[kind]);
      }
    }
    laneNames.forEach((_, lane) => flush(lane));
    context.strokeStyle = theme.select;
    context.lineWidth = 2;
    for (const step of marked) {
      const [top, height] = laneBox(chart, laneOf(step));
      const x = toX(chart, view.scale.barBegin[step]);
      context.strokeRect(x, top - 1, Math.max(toX(chart, view.scale.barEnd[step]) - x, 1), height + 2);
    }
  });
  if (!counts.instructions) nothing(chart, "the plan has no instructions");
  drawn.bars = { count: count.reduce((a, b) => a + b, 0), categories: Object.fromEntries(CATEGORIES.map((c, i) => [c, count[i]])) };
}

function barAt(chart, px, py) {
  let best = -1;
  let nearest = 3;
  for (let step = 0; step < counts.instructions; step++) {
    const [top, height] = laneBox(chart, laneOf(step));
    if (py < top - 2 || py > top + height + 2) continue;
    const left = toX(chart, view.scale.barBegin[step]);
    const right = toX(chart, view.scale.barEnd[step]);
    const distance = px < left ? left - px : px > right ? px - right : 0;
    if (distance < nearest) {
      nearest = distance;
      best = step;
      if (distance === 0) break;
    }
  }
  return best;
}

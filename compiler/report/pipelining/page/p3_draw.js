// The diagrams: a canvas a schedule, a row a rank. Each fills `drawn` with what it really put on its canvas.
const LEFT = 84;
const RIGHT = 12;
const AXIS = 20;
const BESIDE = 7;
const GAP = 7;
const drawn = { charts: [] };
const charts = [];

// Heights of a row's parts: lower rows for more ranks, so that all of them stay in reach.
function layoutOf(schedule) {
  const ranks = schedule.rows.length;
  const box = ranks <= 8 ? 26 : ranks <= 16 ? 20 : ranks <= 32 ? 15 : 11;
  const messages = view.messages ? 6 : 0;
  const copies = schedule.rows.some((row) => row.copies.kind.length) ? BESIDE : 0;
  const reduces = schedule.reduced.some((lines) => lines.length) ? BESIDE : 0;
  const memory = view.memory ? (ranks <= 8 ? 34 : ranks <= 16 ? 26 : ranks <= 32 ? 20 : 13) : 0;
  const pitch = box + messages + copies + reduces + (memory ? memory + 3 : 0) + GAP;
  return { box, messages, copies, reduces, memory, pitch, height: 6 + pitch * ranks + AXIS };
}

function makeChart(schedule, canvas) {
  const chart = { schedule, canvas, context: canvas.getContext("2d"), width: 0, height: 0, ratio: 0 };
  charts.push(chart);
  return chart;
}

function resize(chart) {
  const ratio = window.devicePixelRatio || 1;
  chart.layout = layoutOf(chart.schedule);
  const width = Math.max(320, chart.canvas.clientWidth);
  if (chart.width !== width || chart.ratio !== ratio || chart.height !== chart.layout.height) {
    Object.assign(chart, { width, ratio, height: chart.layout.height });
    chart.canvas.style.height = `${chart.height}px`;
    chart.canvas.width = Math.round(width * ratio);
    chart.canvas.height = Math.round(chart.height * ratio);
  }
  chart.plot = { left: LEFT, right: width - RIGHT, top: 4, bottom: chart.height - AXIS - 2 };
}

// Where the parts of a rank's row begin.
function rowOf(chart, rank) {
  const { box, messages, copies, reduces, pitch, memory } = chart.layout;
  const top = chart.plot.top + rank * pitch;
  return { computes: top, messages: top + box, copies: top + box + messages, reduces: top + box + messages + copies, memory: top + box + messages + copies + reduces + 3, end: top + pitch - GAP, memoryHeight: memory };
}

function toX(chart, time) {
  return chart.plot.left + ((time - view.x0) / (view.x1 - view.x0)) * (chart.plot.right - chart.plot.left);
}

function fromX(chart, pixel) {
  return view.x0 + ((pixel - chart.plot.left) / (chart.plot.right - chart.plot.left)) * (view.x1 - view.x0);
}

// On the edge of a pixel: boxes that touch would else shine through where their edges are blended.
function snapped(chart, x) {
  return Math.round(x * chart.ratio) / chart.ratio;
}

let pending = 0;
function redraw() {
  if (!pending) pending = requestAnimationFrame(() => ((pending = 0), drawAll()));
}

function drawAll() {
  drawn.charts = charts.map((chart) => drawChart(chart));
  const whole = view.x0 <= 0 && view.x1 >= view.full;
  const width = formatTime(view.x1 - view.x0);
  byId("range").textContent = whole ? `all of ${width}` : `${formatTime(view.x0)} to ${formatTime(view.x1)} (${width})`;
}

function drawChart(chart) {
  resize(chart);
  const { context, plot, schedule } = chart;
  context.setTransform(chart.ratio, 0, 0, chart.ratio, 0, 0);
  context.clearRect(0, 0, chart.width, chart.height);
  context.font = '12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif';
  drawTimeAxis(chart);
  drawLabels(chart);
  const seen = { kinds: kinds.map(() => 0), reduces: 0, messages: 0, peaks: [], checksum: 0 };
  context.save();
  context.beginPath();
  context.rect(plot.left, 0, plot.right - plot.left, plot.bottom + 1);
  context.clip();
  context.globalAlpha = followed.microbatch === null ? 1 : 0.4;
  schedule.rows.forEach((row, rank) => {
    for (const lane of LANES) drawBoxes(chart, rank, lane, seen);
    drawReduces(chart, rank, seen);
    if (view.memory) seen.peaks.push(drawMemory(chart, rank));
  });
  context.globalAlpha = 1;
  if (view.messages) drawMessages(chart, seen);
  if (followed.microbatch !== null) drawFollowed(chart);
  context.restore();
  return seen;
}

function drawTimeAxis(chart) {
  const { context, plot } = chart;
  const scale = 1e-9;
  const step = tickStep((view.x1 - view.x0) * scale, Math.max(2, (plot.right - plot.left) / 110), false);
  context.textAlign = "center";
  context.textBaseline = "top";
  for (let k = Math.max(0, Math.ceil((view.x0 * scale) / step - 1e-9)); k * step <= view.x1 * scale * (1 + 1e-12); k++) {
    const x = toX(chart, (k * step) / scale);
    context.fillStyle = theme.grid;
    context.fillRect(Math.round(x), plot.top, 1, plot.bottom - plot.top);
    context.fillStyle = theme.quiet;
    if (x > plot.left - 1 && x < plot.right - 8) context.fillText(axisLabel(k * step, step, view.x1 * scale, "time"), x, plot.bottom + 5);
  }
}

function drawLabels(chart) {
  const { context, plot, layout, schedule } = chart;
  context.textAlign = "right";
  context.textBaseline = "middle";
  schedule.facts.ranks.forEach((facts, rank) => {
    const row = rowOf(chart, rank);
    context.fillStyle = theme.ink;
    context.fillText(`rank ${rank}`, plot.left - 7, row.computes + layout.box / 2);
    if (layout.memory < 10) return;
    const over = facts.limit_bytes !== null && facts.peak_bytes > facts.limit_bytes;
    context.fillStyle = over ? theme.bad : theme.quiet;
    context.save();
    context.font = '10.5px system-ui, "Segoe UI", "DejaVu Sans", sans-serif';
    context.fillText(formatBytes(facts.peak_bytes), plot.left - 7, row.memory + layout.memory / 2);
    context.restore();
  });
}

function colourOf(schedule, kind, stage) {
  return palette.shades[kind][isShard(kind) ? 0 : schedule.stages.chunk[stage]];
}

// Left, top, width and height of an action's box.
function boxOf(chart, place) {
  const { start, finish } = columnsAt(chart.schedule, place);
  const row = rowOf(chart, place.rank);
  const x = toX(chart, start[place.index]);
  return [x, row[place.lane], toX(chart, finish[place.index]) - x, place.lane === "computes" ? chart.layout.box : BESIDE - 2];
}

function drawBoxes(chart, rank, lane, seen) {
  const { context, schedule } = chart;
  const { kind, stage, microbatch, start, finish } = schedule.rows[rank][lane];
  const height = lane === "computes" ? chart.layout.box : BESIDE - 2;
  const top = rowOf(chart, rank)[lane];
  let current = null;
  for (let index = firstAfter(finish, view.x0 - 1); index < kind.length && start[index] <= view.x1; index++) {
    const x = snapped(chart, toX(chart, start[index]));
    const width = snapped(chart, toX(chart, finish[index])) - x;
    const colour = colourOf(schedule, kind[index], stage[index]);
    if (colour !== current) context.fillStyle = current = colour;
    context.fillRect(x, top, width > 3.5 ? width - 1 / chart.ratio : Math.max(width, 0.5), height);
    seen.kinds[kind[index]]++;
    seen.checksum = (seen.checksum * 31 + rank * 7 + kind[index] * 5 + stage[index] * 3 + microbatch[index] + (start[index] % 65521)) % 2147483647;
    const text = String(microbatch[index]);
    if (lane === "computes" && height >= 11 && width > 5 + 7 * text.length) {
      boxText(context, text, x, top, width, height, inkOn(colour));
      current = null;
    }
  }
}

function boxText(context, text, x, y, width, height, ink) {
  context.fillStyle = ink;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(text, x + width / 2 - 0.4, y + height / 2 + 0.5);
}

function drawReduces(chart, rank, seen) {
  const { context, schedule } = chart;
  const top = rowOf(chart, rank).reduces;
  context.fillStyle = palette.reduce;
  for (const [, start, finish] of schedule.reduced[rank]) {
    if (finish < view.x0 || start > view.x1) continue;
    const x = toX(chart, start);
    context.fillRect(x, top, Math.max(toX(chart, finish) - x - 0.5, 0.4), BESIDE - 2);
    seen.reduces++;
  }
}

// What the height of a schedule's curves means: its highest limit or peak, not far above what is held.
function topOf(schedule) {
  if (schedule.top) return schedule.top;
  const peak = schedule.facts.peak_bytes;
  const limits = schedule.facts.ranks.map((rank) => rank.limit_bytes || 0).filter((limit) => limit < 4 * peak);
  schedule.top = Math.max(1, peak, ...limits);
  return schedule.top;
}

// Returns the highest point in sight. Changes that share a pixel become one column, as high as the highest of them.
function drawMemory(chart, rank) {
  const { context, schedule, plot, layout } = chart;
  const [times, held] = schedule.curves[rank];
  const top = rowOf(chart, rank).memory;
  const bottom = top + layout.memory;
  const limit = schedule.facts.ranks[rank].limit_bytes;
  const scale = layout.memory / Math.max(...schedules.map(topOf));
  const end = toX(chart, schedule.facts.makespan_ns);
  context.fillStyle = palette.held;
  let highest = 0;
  let from = Math.max(0, firstAfter(times, view.x0) - 1);
  for (let index = from; index < times.length && times[index] <= view.x1; index++) {
    highest = Math.max(highest, held[index]);
  }
  while (from < times.length && times[from] <= view.x1) {
    const left = snapped(chart, Math.max(plot.left, toX(chart, times[from])));
    let most = held[from];
    let next = from + 1;
    while (next < times.length && toX(chart, times[next]) < left + 0.5) most = Math.max(most, held[next++]);
    const right = snapped(chart, Math.min(next < times.length ? toX(chart, times[next]) : end, plot.right));
    const over = limit !== null ? Math.max(0, most - limit) : 0;
    if (right > left) {
      context.fillRect(left, bottom - (most - over) * scale, right - left, (most - over) * scale);
      if (over) {
        context.fillStyle = palette.limit;
        context.fillRect(left, bottom - most * scale, right - left, over * scale);
        context.fillStyle = palette.held;
      }
    }
    from = next;
  }
  if (limit !== null && limit * scale <= layout.memory) {
    context.fillStyle = palette.limit;
    context.fillRect(plot.left, Math.round(bottom - limit * scale) - 0.5, Math.min(end, plot.right) - plot.left, 1);
  }
  context.fillStyle = theme.line;
  context.fillRect(plot.left, bottom, plot.right - plot.left, 1);
  return highest;
}

// Under the sender's boxes a thin bar while the message is on its way; arrows when there are few enough to follow.
function drawMessages(chart, seen) {
  const { context, schedule } = chart;
  const inSight = messagesOf(schedule).filter((m) => m.arrives >= view.x0 && m.leaves <= view.x1);
  seen.messages = inSight.length;
  context.fillStyle = palette.message;
  for (const message of inSight) {
    const x = toX(chart, message.leaves);
    context.fillRect(x, rowOf(chart, message.from.rank).messages + 1, Math.max(toX(chart, message.arrives) - x, 0.6), 3);
  }
  if (inSight.length > 400) return;
  context.strokeStyle = palette.message;
  context.lineWidth = 1;
  for (const message of inSight) drawArrow(chart, message.from, message.to);
}

function drawArrow(chart, from, to) {
  const { context } = chart;
  const [x0, y0, w0, h0] = boxOf(chart, from);
  const [x1, y1, , h1] = boxOf(chart, to);
  const down = to.rank > from.rank;
  const begin = [x0 + w0, y0 + (to.rank === from.rank ? h0 / 2 : down ? h0 : 0)];
  const end = [x1, y1 + (to.rank === from.rank ? h1 / 2 : down ? 0 : h1)];
  context.beginPath();
  context.moveTo(...begin);
  context.lineTo(...end);
  const angle = Math.atan2(end[1] - begin[1], end[0] - begin[0]);
  for (const turn of [-0.45, 0.45]) {
    context.moveTo(...end);
    context.lineTo(end[0] - 6 * Math.cos(angle + turn), end[1] - 6 * Math.sin(angle + turn));
  }
  context.stroke();
}

function drawFollowed(chart) {
  const { context, schedule } = chart;
  const { actions, links } = pathOf(schedule, followed.microbatch);
  for (const place of actions) {
    const { kind, stage, microbatch } = columnsAt(schedule, place);
    const [x, y, width, height] = boxOf(chart, place);
    const colour = colourOf(schedule, kind[place.index], stage[place.index]);
    context.fillStyle = colour;
    context.fillRect(x, y, Math.max(width, 2), height);
    context.strokeStyle = theme.select;
    context.lineWidth = 1.5;
    context.strokeRect(x, y, Math.max(width, 2), height);
    const text = `${stage[place.index]}${kinds[kind[place.index]]}${microbatch[place.index]}`;
    if (width > 4 + 7 * text.length && height >= 11) boxText(context, text, x, y, width, height, inkOn(colour));
  }
  context.strokeStyle = theme.select;
  context.lineWidth = 1.2;
  for (const { from, to } of links) if (from.rank !== to.rank) drawArrow(chart, from, to);
}

// What lies under the pointer, and the ways to move by pointer and keyboard.
function rankAt(chart, py) {
  const rank = Math.floor((py - chart.plot.top) / chart.layout.pitch);
  return rank >= 0 && rank < chart.schedule.rows.length ? rank : -1;
}

// The action nearest to the pointer in its lane, within 3 pixels; or the row's bytes, or an all-reduce.
function hitTest(chart, px, py) {
  const rank = px < chart.plot.left || px > chart.plot.right ? -1 : rankAt(chart, py);
  if (rank < 0) return null;
  const row = rowOf(chart, rank);
  const { layout, schedule } = chart;
  if (py < row.computes + layout.box) return actionAt(chart, rank, "computes", px);
  if (layout.copies && py >= row.copies && py < row.copies + layout.copies) return actionAt(chart, rank, "copies", px);
  if (layout.reduces && py >= row.reduces && py < row.reduces + layout.reduces) {
    const line = schedule.reduced[rank].find(([, start, finish]) => px >= toX(chart, start) - 2 && px <= toX(chart, finish) + 2);
    return line ? { what: "reduce", rank, line } : null;
  }
  if (layout.memory && py >= row.memory - 2 && py <= row.memory + layout.memory + 2) return { what: "memory", rank, time: fromX(chart, px) };
  return null;
}

function actionAt(chart, rank, lane, px) {
  const { start, finish } = chart.schedule.rows[rank][lane];
  const after = firstAfter(start, fromX(chart, px));
  let best = null;
  let nearest = 3;
  for (const index of [after - 1, after]) {
    if (index < 0 || index >= start.length) continue;
    const left = toX(chart, start[index]);
    const right = toX(chart, finish[index]);
    const distance = px < left ? left - px : px > right ? px - right : 0;
    if (distance < nearest) {
      nearest = distance;
      best = { what: "action", rank, place: { rank, lane, index } };
    }
  }
  return best;
}

function tipOf(chart, hit) {
  const { schedule } = chart;
  if (hit.what === "memory") {
    const facts = schedule.facts.ranks[hit.rank];
    const held = heldAt(schedule, hit.rank, hit.time);
    const share = facts.limit_bytes ? `${formatPercent(held / facts.limit_bytes)} of ${formatBytes(facts.limit_bytes)}` : "";
    return [`rank ${hit.rank} holds ${formatExact(held)}`, [["at", formatTime(hit.time)], ["of the limit", share], ["peak", formatExact(facts.peak_bytes)], ["resident", facts.resident_bytes ? formatExact(facts.resident_bytes) : ""]]];
  }
  if (hit.what === "reduce") {
    const [stage, start, finish] = hit.line;
    return [`all-reduce of stage ${stage}`, [["rank", hit.rank], ["time", `${formatTime(start)} to ${formatTime(finish)}`], ["takes", formatTime(finish - start)]]];
  }
  const { kind, stage, microbatch, start, finish } = columnsAt(schedule, hit.place);
  const { index } = hit.place;
  const idle = idleBefore(schedule, hit.place);
  const shard = isShard(kind[index]);
  return [nameAt(schedule, hit.place), [
    ["does", data.words[kinds[kind[index]]]],
    ["microbatch", microbatch[index]],
    [shard ? "shard of rank" : "stage", stage[index]],
    ["rank", hit.rank],
    ["chunk", shard || schedule.stages.chunk.every((chunk) => !chunk) ? "" : schedule.stages.chunk[stage[index]]],
    ["time", `${formatTime(start[index])} to ${formatTime(finish[index])}`],
    ["takes", formatTime(finish[index] - start[index])],
    ["idle before", idle ? formatTime(idle) : ""],
  ]];
}

function showTip(event, chart) {
  const tip = byId("tip");
  const hit = hitTest(chart, ...inside(event, chart));
  tip.hidden = !hit;
  if (!hit) return;
  const [title, facts] = tipOf(chart, hit);
  tip.replaceChildren(element("b", {}, title), factList(facts));
  const left = event.clientX + 16 + tip.offsetWidth > window.innerWidth ? event.clientX - tip.offsetWidth - 12 : event.clientX + 16;
  const top = event.clientY + 16 + tip.offsetHeight > window.innerHeight ? event.clientY - tip.offsetHeight - 12 : event.clientY + 16;
  Object.assign(tip.style, { left: `${Math.max(4, left)}px`, top: `${Math.max(4, top)}px` });
}

function inside(event, chart) {
  const bounds = chart.canvas.getBoundingClientRect();
  return [event.clientX - bounds.left, event.clientY - bounds.top];
}

function click(event, chart) {
  const hit = hitTest(chart, ...inside(event, chart));
  follow(hit && hit.what === "action" ? columnsAt(chart.schedule, hit.place).microbatch[hit.place.index] : null);
  redraw();
}

function listenTo(chart) {
  const { canvas } = chart;
  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    drag = { x: event.clientX, y: event.clientY, moved: false, zoom: event.shiftKey };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) return showTip(event, chart);
    byId("tip").hidden = true;
    const dx = event.clientX - drag.x;
    if (!drag.moved && Math.hypot(dx, event.clientY - drag.y) < 4) return;
    drag.moved = true;
    if (drag.zoom) return markZoom(chart, drag, event);
    canvas.classList.add("dragging");
    pan(-dx / (chart.plot.right - chart.plot.left));
    drag.x = event.clientX;
    redraw();
  });
  canvas.addEventListener("pointerup", (event) => {
    canvas.classList.remove("dragging");
    if (drag && !drag.moved) click(event, chart);
    else if (drag && drag.zoom) finishZoom(chart, drag, event);
    drag = null;
  });
  canvas.addEventListener("pointercancel", () => (drag = null));
  canvas.addEventListener("pointerleave", () => (byId("tip").hidden = true));
  canvas.addEventListener("dblclick", (event) => (click(event, chart), zoomToFollowed(), redraw()));
  canvas.addEventListener("wheel", (event) => wheel(event, chart), { passive: false });
  canvas.addEventListener("keydown", keydown);
}

function markZoom(chart, drag, event) {
  drawAll();
  const left = chart.canvas.getBoundingClientRect().left;
  const { context, plot } = chart;
  context.fillStyle = theme.shade;
  context.fillRect(drag.x - left, plot.top, event.clientX - drag.x, plot.bottom - plot.top);
  context.strokeStyle = theme.accent;
  context.strokeRect(drag.x - left, plot.top, event.clientX - drag.x, plot.bottom - plot.top);
}

function finishZoom(chart, drag, event) {
  const left = chart.canvas.getBoundingClientRect().left;
  const ends = [drag.x, event.clientX].map((x) => fromX(chart, x - left)).sort((a, b) => a - b);
  setRange(...ends);
  redraw();
}

// A plain wheel scrolls the page, as everywhere; with Ctrl (which a pinch on a touchpad also sends) it zooms.
function wheel(event, chart) {
  const share = (inside(event, chart)[0] - chart.plot.left) / (chart.plot.right - chart.plot.left);
  if (event.ctrlKey || event.metaKey) zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY / 200))), Math.min(1, Math.max(0, share)));
  else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan(event.deltaX / 1000);
  else if (event.shiftKey) pan(event.deltaY / 1000);
  else return;
  event.preventDefault();
  redraw();
}

const KEYS = {
  ArrowLeft: () => pan(-0.1),
  ArrowRight: () => pan(0.1),
  "+": () => zoom(1 / 1.5),
  "=": () => zoom(1 / 1.5),
  "-": () => zoom(1.5),
  0: fit,
  Home: () => pan(-view.full / (view.x1 - view.x0)),
  End: () => pan(view.full / (view.x1 - view.x0)),
  Enter: zoomToFollowed,
  Escape: () => follow(null),
  ",": () => followNext(-1),
  ".": () => followNext(1),
};

function keydown(event) {
  const action = KEYS[event.key];
  if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  action();
  redraw();
}

// Moving by pointer, wheel and keyboard.
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
    const dy = event.clientY - drag.y;
    if (!drag.moved && Math.hypot(dx, dy) < 4) return;
    drag.moved = true;
    if (drag.zoom) return markZoom(chart, drag, event);
    canvas.classList.add("dragging");
    pan(-dx / (chart.plot.right - chart.plot.left));
    if (chart.id === "memory") panY(dy / (chart.plot.bottom - chart.plot.top));
    Object.assign(drag, { x: event.clientX, y: event.clientY });
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
  canvas.addEventListener("dblclick", (event) => (click(event, chart), zoomToSelection()));
  canvas.addEventListener("wheel", (event) => wheel(event, chart), { passive: false });
  canvas.addEventListener("keydown", keydown);
}

function inside(event, chart) {
  const bounds = chart.canvas.getBoundingClientRect();
  return [event.clientX - bounds.left, event.clientY - bounds.top];
}

function click(event, chart) {
  const [px, py] = inside(event, chart);
  const hit = hitTest(chart.id, px, py);
  if (!hit) select(null);
  else if (hit.kind === "instruction") select({ step: hit.index });
  else select({ buffer: residences.buffer[hit.index] });
}

function markZoom(chart, drag, event) {
  drawAll();
  const bounds = chart.canvas.getBoundingClientRect();
  const from = drag.x - bounds.left;
  const to = event.clientX - bounds.left;
  const box = chart.id === "memory" ? [drag.y - bounds.top, event.clientY - bounds.top] : [chart.plot.top, chart.plot.bottom];
  chart.context.fillStyle = theme.shade;
  chart.context.fillRect(from, box[0], to - from, box[1] - box[0]);
  chart.context.strokeStyle = theme.accent;
  chart.context.strokeRect(from, box[0], to - from, box[1] - box[0]);
}

function finishZoom(chart, drag, event) {
  const bounds = chart.canvas.getBoundingClientRect();
  const ends = [drag.x, event.clientX].map((x) => fromX(chart, x - bounds.left)).sort((a, b) => a - b);
  if (chart.id === "memory") {
    const { plot } = chart;
    const address = (y) => view.y0 + ((plot.bottom - (y - bounds.top)) / (plot.bottom - plot.top)) * (view.y1 - view.y0);
    const [low, high] = [drag.y, event.clientY].map(address).sort((a, b) => a - b);
    setRangeY(low, high);
  }
  setRange(ends[0], ends[1]);
  redraw();
}

// A plain wheel scrolls the page, as everywhere; with Ctrl (which a pinch on a touchpad also sends) it zooms.
function wheel(event, chart) {
  const [px, py] = inside(event, chart);
  const { plot } = chart;
  const factor = Math.exp(Math.max(-1, Math.min(1, event.deltaY / 200)));
  if (event.ctrlKey || event.metaKey) zoom(factor, Math.min(1, Math.max(0, (px - plot.left) / (plot.right - plot.left))));
  else if (event.altKey && chart.id === "memory") zoomY(factor, Math.min(1, Math.max(0, (plot.bottom - py) / (plot.bottom - plot.top))));
  else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan(event.deltaX / 1000);
  else if (event.shiftKey) pan(event.deltaY / 1000);
  else return;
  event.preventDefault();
  redraw();
}

const KEYS = {
  ArrowLeft: () => pan(-0.1),
  ArrowRight: () => pan(0.1),
  ArrowUp: () => panY(0.1),
  ArrowDown: () => panY(-0.1),
  "+": () => zoom(1 / 1.5),
  "=": () => zoom(1 / 1.5),
  "-": () => zoom(1.5),
  0: fit,
  Home: () => pan(-view.full),
  End: () => pan(view.full / Math.max(view.x1 - view.x0, 1e-30)),
  Enter: zoomToSelection,
  Escape: () => select(null),
  ",": () => goToStep(Math.max(0, (selection.step < 0 ? stepInSight() : selection.step) - 1)),
  ".": () => goToStep(Math.min(counts.instructions - 1, selection.step < 0 ? stepInSight() : selection.step + 1)),
};

function stepInSight() {
  const step = view.scale.barEnd.findIndex((end) => end > view.x0);
  return Math.max(0, step);
}

function keydown(event) {
  const action = KEYS[event.key];
  if (!action || event.ctrlKey || event.metaKey || event.altKey || !counts.instructions) return;
  event.preventDefault();
  action();
  redraw();
}

function listenToOverview(chart) {
  let grip = null;
  const at = (event) => ((inside(event, chart)[0] - chart.plot.left) / (chart.plot.right - chart.plot.left)) * view.full;
  chart.canvas.addEventListener("pointerdown", (event) => {
    chart.canvas.setPointerCapture(event.pointerId);
    const x = at(event);
    grip = x >= view.x0 && x <= view.x1 ? x - view.x0 : (view.x1 - view.x0) / 2;
    setRange(x - grip, x - grip + view.x1 - view.x0);
    redraw();
  });
  chart.canvas.addEventListener("pointermove", (event) => {
    if (grip === null) return;
    const x0 = at(event) - grip;
    setRange(x0, x0 + view.x1 - view.x0);
    redraw();
  });
  chart.canvas.addEventListener("pointerup", () => (grip = null));
}

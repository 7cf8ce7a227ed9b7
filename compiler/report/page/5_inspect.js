// What lies under the pointer, what is selected, and the ways to move by pointer and keyboard.
function shapeOf(buffer) {
  return `${buffers.dtype[buffer]}[${buffers.shape[buffer].join(", ")}]`;
}

function bufferFacts(buffer) {
  return [
    ["role", element("span", {}, swatch(palette.roles[ROLES[buffers.role[buffer]]]), roleWord(buffers.role[buffer]))],
    ["type", shapeOf(buffer)],
    ["size", formatExact(buffers.nbytes[buffer])],
  ];
}

function residenceFacts(index) {
  const buffer = residences.buffer[index];
  const offset = residences.offset[index];
  const span = `${formatCount(residences.begin[index])} to ${formatCount(residences.end[index] - 1)}`;
  return [
    ...bufferFacts(buffer),
    ["address", offset === null ? "" : `${formatCount(offset)} to ${formatCount(offset + buffers.nbytes[buffer] - 1)} (0x${offset.toString(16)})`],
    ["steps", span],
    ["time", timed ? `${formatSeconds(residences.start[index])} to ${formatSeconds(residences.finish[index])}` : ""],
    ["additional", additional(buffer) > 0 ? formatExact(additional(buffer)) : ""],
  ];
}

function stepTitle(step) {
  return `${KINDS[instructions.kind[step]]} ${subjectName(step)}`;
}

function stepFacts(step) {
  const subject = instructions.subject[step];
  const facts = [["step", formatCount(step)]];
  if (timed) {
    facts.push(["engine", engines[instructions.engine[step]]]);
    facts.push(["time", `${formatSeconds(instructions.start[step])} to ${formatSeconds(instructions.finish[step])}`]);
    facts.push(["takes", formatSeconds(instructions.finish[step] - instructions.start[step])]);
  }
  if (!executes(step)) {
    const why = instructions.additional[step] > 0 ? "additional" : "compulsory";
    return [...facts, ["moves", `${formatExact(buffers.nbytes[subject])}, ${why}`], ...bufferFacts(subject).slice(0, 2)];
  }
  const names = (list) => list.map((b) => `${buffers.name[b]} (${formatBytes(buffers.nbytes[b])})`).slice(0, 8).join(", ");
  facts.push(["calls", ops.body[subject]], ["reads", names(ops.inputs[subject])], ["writes", names(ops.outputs[subject])]);
  facts.push(["arithmetic", ops.flops[subject] ? formatFlops(ops.flops[subject]) : ""]);
  return [...facts, ["streams", instructions.nbytes[step] ? formatExact(instructions.nbytes[step]) : ""], ["from", ops.origin[subject]]];
}

function hitTest(id, px, py) {
  const chart = charts[id];
  if (!chart || px < chart.plot.left || px > chart.plot.right || py < chart.plot.top || py > chart.plot.bottom) return null;
  const index = id === "engines" ? barAt(chart, px, py) : id === "memory" ? residenceAt(chart, px, py) : -1;
  return index < 0 ? null : { kind: id === "engines" ? "instruction" : "residence", index };
}

function showTip(event, chart) {
  const tip = byId("tip");
  const bounds = chart.canvas.getBoundingClientRect();
  const px = event.clientX - bounds.left;
  const hit = hitTest(chart.id, px, event.clientY - bounds.top);
  let content = null;
  if (hit && hit.kind === "instruction") content = [stepTitle(hit.index), stepFacts(hit.index)];
  else if (hit) content = [buffers.name[residences.buffer[hit.index]], residenceFacts(hit.index)];
  else if (chart.id === "live" && counts.residences && px >= chart.plot.left && px <= chart.plot.right) content = liveFacts(fromX(chart, px));
  tip.hidden = !content;
  if (!content) return;
  tip.replaceChildren(element("b", {}, content[0]), factList(content[1]));
  const left = event.clientX + 16 + tip.offsetWidth > window.innerWidth ? event.clientX - tip.offsetWidth - 12 : event.clientX + 16;
  const top = event.clientY + 16 + tip.offsetHeight > window.innerHeight ? event.clientY - tip.offsetHeight - 12 : event.clientY + 16;
  Object.assign(tip.style, { left: `${Math.max(4, left)}px`, top: `${Math.max(4, top)}px` });
}

function liveFacts(x) {
  const { times, roles, total } = view.scale.live;
  const at = Math.max(0, firstAfter(times, x) - 1);
  const parts = ROLES.map((_, role) => [roleWord(role), roles[role][at] > 0 ? formatExact(roles[role][at]) : ""]);
  const where = view.mode === "step" ? `step ${formatCount(Math.floor(x))}` : formatSeconds(x);
  return [`${formatBytes(total[at])} held at ${where}`, [["of the capacity", formatPercent(total[at] / capacity)], ...parts]];
}

// --- selection -------------------------------------------------------------------------------------------------------

// Show all addresses again when the selection lies above or below those in sight.
function showSelected() {
  const inSight = (r) => residences.offset[r] < view.y1 && residences.offset[r] + buffers.nbytes[residences.buffer[r]] > view.y0;
  if ((selection.buffer >= 0 || selection.step >= 0) && !selectedResidences().every(inSight)) fitY();
}

function select(what) {
  selection.buffer = what && what.buffer !== undefined ? what.buffer : -1;
  selection.step = what && what.step !== undefined ? what.step : -1;
  const details = byId("details");
  details.hidden = selection.buffer < 0 && selection.step < 0;
  details.replaceChildren();
  if (selection.buffer >= 0) {
    const buffer = selection.buffer;
    const stays = residencesOf[buffer].map((r) => residenceLink(r));
    const facts = [...bufferFacts(buffer), ["moved", movedText(buffer)], ["resident", links(stays)], ["touched by", links(touching[buffer].map(stepLink))]];
    details.append(element("h3", {}, buffers.name[buffer]), factList(facts));
  } else if (selection.step >= 0) {
    const operands = buffersAt(selection.step).map(bufferLink);
    details.append(element("h3", {}, stepTitle(selection.step)), factList([...stepFacts(selection.step), ["operands", links(operands)]]));
  }
  redraw();
}

function movedText(buffer) {
  const ways = [["loaded", "loaded"], ["stored", "stored"], ["streamed", "streamed"]].filter(([way]) => buffers[way][buffer] > 0);
  return ways.map(([way, word]) => `${formatBytes(buffers[way][buffer])} ${word}`).join(", ") || "nothing";
}

function links(made) {
  if (!made.length) return null;
  const shown = made.slice(0, 24);
  if (made.length > shown.length) shown.push(element("span", { class: "quiet" }, `and ${made.length - shown.length} more`));
  return element("span", { class: "links" }, ...shown);
}

function link(text, action) {
  return element("button", { class: "link", type: "button", on: { click: action } }, text);
}

function bufferLink(buffer) {
  return link(buffers.name[buffer], () => select({ buffer }));
}

function stepLink(step) {
  return link(`${formatCount(step)} ${stepTitle(step)}`, () => goToStep(step));
}

function residenceLink(index) {
  const text = `steps ${formatCount(residences.begin[index])} to ${formatCount(residences.end[index] - 1)}`;
  return link(text, () => (zoomTo(view.scale.boxBegin[index], view.scale.boxEnd[index], 0.25), redraw()));
}

function zoomTo(x0, x1, margin) {
  const extra = Math.max((x1 - x0) * margin, view.full * 0.002);
  setRange(x0 - extra, x1 + extra);
}

function goToStep(step) {
  const begin = view.scale.barBegin[step];
  const end = view.scale.barEnd[step];
  if (begin < view.x0 || end > view.x1) {
    const width = Math.min(view.x1 - view.x0, Math.max((end - begin) * 40, view.full / 50));
    setRange((begin + end - width) / 2, (begin + end + width) / 2);
  }
  select({ step });
  showSelected();
}

function zoomToSelection() {
  if (selection.step >= 0) zoomTo(view.scale.barBegin[selection.step], view.scale.barEnd[selection.step], 6);
  else if (selection.buffer >= 0) {
    const stays = residencesOf[selection.buffer];
    const uses = touching[selection.buffer]; // all there is to see of a buffer that is streamed
    const begins = [...stays.map((r) => view.scale.boxBegin[r]), ...uses.map((step) => view.scale.barBegin[step])];
    const ends = [...stays.map((r) => view.scale.boxEnd[r]), ...uses.map((step) => view.scale.barEnd[step])];
    if (begins.length) zoomTo(begins.reduce((x, y) => Math.min(x, y)), ends.reduce((x, y) => Math.max(x, y)), 0.25);
  }
  showSelected();
  redraw();
}

function find(text) {
  const buffer = buffers.name.indexOf(text);
  if (buffer >= 0) return select({ buffer }), zoomToSelection();
  const op = ops.name.indexOf(text);
  if (op >= 0 && stepsOfOp[op].length) goToStep(stepsOfOp[op][0]);
}

// A name that contains the text, for what was typed and not chosen from the list.
function findLoosely(text) {
  const needle = text.toLowerCase();
  if (!needle || buffers.name.includes(text) || ops.name.includes(text)) return find(text);
  const name = [...buffers.name, ...ops.name].find((n) => n.toLowerCase().includes(needle));
  if (name !== undefined) find(name);
}

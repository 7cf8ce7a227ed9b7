// Live bytes against the capacity, the memory map, and the overview that moves the range in sight.
function liveTop() {
  const { total, peak } = view.scale.live;
  return topFor(total.length ? total[peak] : 0) * 1.02;
}

function drawLive(chart) {
  const { context, plot } = chart;
  const { times, roles, total, peak } = view.scale.live;
  const top = liveTop();
  const toY = (bytes) => plot.bottom - (bytes / top) * (plot.bottom - plot.top);
  drawXAxis(chart);
  drawBytesAxis(chart, 0, top);
  let tallest = 0;
  clipped(chart, () => {
    let index = Math.max(0, firstAfter(times, view.x0) - 1);
    for (let x = plot.left; x < plot.right; ) {
      // The most held while this pixel lasts; a span of several pixels in one go.
      const until = fromX(chart, x + 1);
      let most = index;
      while (index + 1 < times.length && times[index + 1] < until) {
        index++;
        if (total[index] > total[most]) most = index;
      }
      const next = index + 1 < times.length ? Math.max(x + 1, Math.floor(toX(chart, times[index + 1]))) : plot.right;
      const width = most === index ? next - x : 1;
      let y = plot.bottom;
      for (let role = 0; role < ROLES.length; role++) {
        const height = (roles[role][most] / top) * (plot.bottom - plot.top);
        if (height <= 0) continue;
        context.fillStyle = palette.roles[ROLES[role]];
        context.fillRect(x, y - height, width, height);
        y -= height;
      }
      tallest = Math.max(tallest, total[most]);
      x += width;
    }
  });
  drawLimit(chart, toY(capacity), `capacity ${formatBytes(capacity)}`);
  if (counts.residences) {
    const x = toX(chart, times[peak]);
    if (x >= plot.left && x <= plot.right) {
      context.textAlign = x > (plot.left + plot.right) / 2 ? "right" : "left";
      context.textBaseline = "top";
      outlined(context, `peak ${formatBytes(total[peak])}`, x, toY(total[peak]) + 3, theme.ink);
    }
  } else nothing(chart, "no residences are decided yet");
  drawn.live = { highest: tallest, capacity };
}

// Index of the first of the ascending `values` that lies above `x`.
function firstAfter(values, x) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > x) high = middle;
    else low = middle + 1;
  }
  return low;
}

// Left, top, width and height in pixels of a residence on the memory map; null when it has no address.
function boxOf(chart, index) {
  const offset = residences.offset[index];
  if (offset === null) return null;
  const x = toX(chart, view.scale.boxBegin[index]);
  const y = addressToY(chart, offset + buffers.nbytes[residences.buffer[index]]);
  return [x, y, Math.max(toX(chart, view.scale.boxEnd[index]) - x, 0.5), Math.max(addressToY(chart, offset) - y, 0.5)];
}

function drawMemory(chart) {
  const { context, plot } = chart;
  drawXAxis(chart);
  drawBytesAxis(chart, view.y0, view.y1);
  const sums = { count: 0, checksum: 0, nbytes: 0 };
  let last = "";
  clipped(chart, () => {
    for (let index = 0; index < counts.residences; index++) {
      const box = boxOf(chart, index);
      if (!box) continue;
      const [x, y, width, height] = box;
      if (x > plot.right || x + width < plot.left || y > plot.bottom || y + height < plot.top) continue;
      const buffer = residences.buffer[index];
      const colour = palette.roles[ROLES[buffers.role[buffer]]];
      if (colour !== last) context.fillStyle = last = colour; // setting it is dearer than drawing
      context.fillRect(x, y, width > 4 ? width - 0.8 : width, height > 4 ? height - 0.8 : height);
      const mark = beginsAgain(residences.begin[index]);
      if (width > 3 && mark) {
        context.fillStyle = last = palette.categories[mark];
        context.fillRect(x, y, Math.min(3, width / 3), height);
      }
      if (width > 46 && height > 13) {
        label(context, buffers.name[buffer], ...visible(chart, x, y, width, height), colour);
        last = "";
      }
      sums.count++;
      sums.nbytes += buffers.nbytes[buffer];
      sums.checksum = (sums.checksum + rectangleHash(index)) % 2147483647;
    }
    drawSelected(chart);
  });
  drawLimit(chart, addressToY(chart, capacity), `capacity ${formatBytes(capacity)}`);
  if (!placed) nothing(chart, "no addresses are decided yet");
  drawn.regions = sums;
}

function rectangleHash(index) {
  const prime = 2147483647;
  const values = [residences.begin[index], residences.end[index], residences.offset[index], buffers.nbytes[residences.buffer[index]]];
  return values.reduce((hash, value) => (hash * 31 + (value % prime)) % prime, 7);
}

function drawSelected(chart) {
  if (selection.buffer < 0 && selection.step < 0) return;
  const { context } = chart;
  context.strokeStyle = theme.select;
  for (const index of selectedResidences()) {
    const box = boxOf(chart, index);
    if (!box) continue;
    context.lineWidth = 2;
    context.strokeRect(box[0], box[1], box[2], box[3]);
  }
  if (selection.step >= 0) {
    const x = toX(chart, view.scale.barBegin[selection.step]);
    context.fillStyle = theme.shade;
    context.fillRect(x, chart.plot.top, Math.max(toX(chart, view.scale.barEnd[selection.step]) - x, 1), chart.plot.bottom - chart.plot.top);
  }
}

// How a residence came back after its buffer was dropped: the category of the step that begins it, if it is such a one.
function beginsAgain(step) {
  const name = CATEGORIES[category(step)];
  return name === "additional load" || name === "recompute" ? name : "";
}

// All residences of the selected buffer; of a selected instruction, the operands it finds there.
function selectedResidences() {
  if (selection.buffer >= 0) return residencesOf[selection.buffer];
  const step = selection.step;
  return buffersAt(step).flatMap((b) => residencesOf[b].filter((r) => residences.begin[r] <= step && step < residences.end[r]));
}

function buffersAt(step) {
  const subject = instructions.subject[step];
  if (!executes(step)) return [subject];
  return [...new Set([...ops.inputs[subject], ...ops.outputs[subject]])];
}

function residenceAt(chart, px, py) {
  let best = -1;
  let nearest = 3;
  for (let index = counts.residences - 1; index >= 0; index--) {
    const box = boxOf(chart, index);
    if (!box) continue;
    const dx = Math.max(box[0] - px, 0, px - box[0] - box[2]);
    const dy = Math.max(box[1] - py, 0, py - box[1] - box[3]);
    const distance = Math.max(dx, dy);
    if (distance < nearest) {
      nearest = distance;
      best = index;
      if (distance === 0) break;
    }
  }
  return best;
}

function drawOverview(chart) {
  const { context, plot } = chart;
  const { times, total } = view.scale.live;
  const top = liveTop();
  const wide = plot.right - plot.left;
  context.fillStyle = theme.grid;
  context.fillRect(plot.left, plot.top, wide, plot.bottom - plot.top);
  context.fillStyle = theme.quiet;
  for (let i = 0, x = plot.left; i < times.length; ) {
    // As wide as the value lasts, but at least a pixel, with the most that is held within it.
    let most = 0;
    let end = x;
    while (i < times.length && end < x + 1) {
      most = Math.max(most, total[i++]);
      end = i < times.length ? plot.left + (times[i] / view.full) * wide : plot.right;
    }
    const height = (most / top) * (plot.bottom - plot.top);
    context.fillRect(x, plot.bottom - height, end - x, height);
    x = end;
  }
  const from = plot.left + (view.x0 / view.full) * wide;
  const width = Math.max(((view.x1 - view.x0) / view.full) * wide, 3);
  context.fillStyle = theme.shade;
  context.fillRect(from, plot.top, width, plot.bottom - plot.top);
  context.strokeStyle = theme.accent;
  context.lineWidth = 1.5;
  context.strokeRect(from + 0.75, plot.top + 0.75, Math.max(width - 1.5, 1), plot.bottom - plot.top - 1.5);
}

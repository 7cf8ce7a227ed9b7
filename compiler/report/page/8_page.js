// Fills the page, draws it, and checks that what was drawn is what the plan says.
function makeHeader() {
  byId("title").textContent = `${digest.model.name} on ${digest.machine.name}`;
  const decided = words.levels[digest.level];
  byId("subtitle").textContent = `${formatCount(digest.model.operators)} operators, ${formatCount(counts.instructions)} instructions; ${decided}`;
  const good = digest.verified;
  const verdict = good ? "\u2713 verified" : `\u2717 ${formatCount(digest.faults.length)} ${digest.faults.length === 1 ? "fault" : "faults"}`;
  byId("verdict").append(element("span", { class: `pill ${good ? "good" : "bad"}` }, verdict));
}

function makeFaults() {
  byId("faults").hidden = digest.verified;
  byId("faults-title").textContent = "This plan is wrong";
  for (const fault of digest.faults) {
    const where = fault.step === null ? null : link(`at step ${formatCount(fault.step)}`, () => reveal(() => goToStep(Math.min(fault.step, counts.instructions - 1))));
    byId("fault-list").append(element("li", {}, element("b", {}, fault.fault), where ? " " : "", where, `: ${fault.message}`));
  }
  drawn.faults = byId("fault-list").children.length;
}

function tile(name, value, more, parts) {
  const meter = parts ? element("div", { class: "meter" }, ...parts.map(([share, colour]) => element("i", { style: { width: `${100 * Math.min(1, share)}%`, background: colour } }))) : null;
  byId("tiles").append(element("div", { class: "tile" }, element("div", { class: "name" }, name), element("div", { class: "value" }, value), meter, element("div", { class: "more" }, more)));
}

function makeTiles() {
  const { traffic, time } = digest;
  const proof = digest.certificates.filter((c) => c.objective === "additional_traffic_bytes" && c.stands).sort((a, b) => a.gap - b.gap)[0];
  const quality = proof ? (proof.gap === 0 ? "optimal" : `at most ${formatPercent(proof.gap)} of it could be saved,`) : "";
  if (digest.level === "order") tile("additional traffic", "not decided", "the plan has decided its order only");
  else tile("additional traffic", formatBytes(traffic.additional_bytes), proof ? `${quality} ${words.scopes[proof.scope]}` : "no bound was proven");
  const total = traffic.total_bytes || 1;
  const split = [[traffic.compulsory_bytes / total, palette.traffic.compulsory], [traffic.additional_bytes / total, palette.traffic.additional]];
  tile("off-chip traffic in all", formatBytes(traffic.total_bytes), `${formatBytes(traffic.compulsory_bytes)} of it compulsory`, split);
  const share = digest.peak_bytes / capacity;
  const word = digest.level === "order" ? "peak without spilling" : `peak in ${digest.machine.scratchpad}`;
  tile(word, formatBytes(digest.peak_bytes), `${formatPercent(share)} of ${formatBytes(capacity)}`, [[share, share > 1 ? palette.capacity : palette.roles.activation]]);
  if (!time) return;
  tile("simulated latency", formatSeconds(time.latency_s), `${formatPercent(time.bound_s / (time.latency_s || 1))} of the roofline (${formatSeconds(time.bound_s)}, set by ${time.bound_by})`, [[time.bound_s / (time.latency_s || 1), palette.categories.run]]);
  for (const engine of time.engines) {
    const colour = engine.kind === "compute" ? palette.categories.run : palette.categories["additional load"];
    tile(`${engine.name} busy`, formatPercent(engine.utilisation), formatSeconds(engine.busy_s), [[engine.utilisation, colour]]);
  }
}

function makeLegends() {
  const present = new Set(buffers.role.filter((_, b) => residencesOf[b].length));
  byId("roles-legend").append(...[...present].sort((a, b) => a - b).map((role) => element("span", {}, swatch(palette.roles[ROLES[role]]), roleWord(role))));
  for (const name of CATEGORIES) {
    const count = drawn.bars.categories[name];
    if (count) byId("engines-legend").append(element("span", {}, swatch(palette.categories[name]), `${name} (${formatCount(count)})`));
  }
  byId("live-title").textContent = `Bytes held in ${digest.machine.scratchpad}`;
  byId("memory-title").textContent = `Memory map of ${digest.machine.scratchpad}`;
  byId("memory-note").textContent = placed ? `${formatCount(counts.residences)} residences, coloured by role; a dark left edge: fetched or computed again${used > 2 * capacity ? `; some lie above, up to ${formatBytes(used)}` : ""}` : "";
}

/** Over what a bound holds; orders are compared by peak and arena without what a residency does. */
function scopeOf(c) {
  const unspilled = c.scope === "order" && (c.objective === "peak_bytes" || c.objective === "arena_bytes");
  return unspilled ? words.unspilled : words.scopes[c.scope];
}

function makePasses() {
  const place = byId("passes");
  if (!digest.passes.length) return place.append(element("span", { class: "quiet" }, "no passes are recorded"));
  const names = ["pass", "seconds", "objective", "value", "proven bound", "gap", "scope", "remark"];
  const numbers = new Set([1, 3, 4]);
  const head = element("tr", {}, ...names.map((name, i) => element("th", { scope: "col", class: numbers.has(i) ? "number" : "" }, name)));
  const rows = data.passes.map(({ name, seconds, note, certificate: c }) => {
    const remark = [c && !c.stands ? "of the plan before later passes" : "", note].filter(Boolean).join("; ");
    const cells = [name, seconds.toFixed(2), "", "", "", "", "", remark];
    if (c) cells.splice(2, 5, words.objectives[c.objective], formatExact(c.value), formatExact(c.bound), gapCell(c), scopeOf(c));
    return element("tr", {}, ...cells.map((cell, i) => element("td", { class: numbers.has(i) ? "number" : "" }, cell)));
  });
  place.append(element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows))));
}

function gapCell(c) {
  const proven = element("span", { class: "gap", title: "green: the part of the value that is proven necessary" }, element("i", { style: { width: `${100 * (1 - c.gap)}%` } }));
  return element("span", {}, proven, c.gap === 0 ? "optimal" : formatPercent(c.gap), element("span", { class: "quiet" }, ` by ${words.provers[c.proved_by]}`));
}

function connect() {
  byId("mode-time").disabled = !timed;
  byId("mode-time").addEventListener("click", () => (setMode("time"), redraw()));
  byId("mode-step").addEventListener("click", () => (setMode("step"), redraw()));
  byId("zoom-in").addEventListener("click", () => (zoom(1 / 1.6), redraw()));
  byId("zoom-out").addEventListener("click", () => (zoom(1.6), redraw()));
  byId("zoom-fit").addEventListener("click", () => (fit(), redraw()));
  byId("find").addEventListener("change", (event) => findLoosely(event.target.value));
  byId("find").addEventListener("focus", fillNames, { once: true });
  byId("help-toggle").addEventListener("click", (event) => {
    byId("help").hidden = !byId("help").hidden;
    event.target.setAttribute("aria-expanded", String(!byId("help").hidden));
  });
  for (const id of ["engines", "live", "memory"]) listenTo(charts[id]);
  listenToOverview(charts.overview);
  new ResizeObserver(redraw).observe(byId("engines"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (readTheme(), redraw()));
}

function fillNames() {
  byId("find-names").append(...[...buffers.name, ...ops.name].slice(0, 4000).map((name) => element("option", { value: name })));
}

// --- the page's own check --------------------------------------------------------------------------------------------

// Looks up what lies inside the first residences large enough, by hit test and by the colour on the canvas.
function probe() {
  const chart = charts.memory;
  const range = [view.x0, view.x1, view.y0, view.y1];
  const result = { tested: 0, hits: 0, colours: 0, boxes: [], plot: chart.plot, range };
  const { width, height } = chart.canvas;
  const pixels = chart.context.getImageData(0, 0, width, height).data;
  for (let index = 0; placed && index < counts.residences && result.tested < 200; index++) {
    const box = boxOf(chart, index);
    if (!box || box[2] < 6 || box[3] < 6) continue;
    const [px, py] = [box[0] + box[2] * 0.7, box[1] + box[3] - 2.5]; // below the label
    const hit = hitTest("memory", px, py);
    const at = 4 * (Math.floor(py * chart.ratio) * width + Math.floor(px * chart.ratio));
    const colour = palette.roles[ROLES[buffers.role[residences.buffer[index]]]];
    result.tested++;
    result.boxes.push([index, ...box]);
    if (hit && residences.buffer[hit.index] === residences.buffer[index]) result.hits++;
    if ([1, 3, 5].every((digit, i) => Math.abs(parseInt(colour.slice(digit, digit + 2), 16) - pixels[at + i]) < 40)) result.colours++;
  }
  return result;
}

function check() {
  const seen = {};
  for (const mode of timed ? ["step", "time"] : ["step"]) {
    setMode(mode);
    fit();
    drawAll();
    seen[mode] = { bars: drawn.bars, regions: drawn.regions, live: drawn.live };
    if (mode === "step") seen.probe = probe(); // once: reading a canvas back again and again makes it slow for good
  }
  return seen;
}

readTheme();
makeChart("overview", 34, drawOverview);
makeChart("engines", 26 + 46 * laneNames.length, drawEngines);
makeChart("live", 150, drawLive);
makeChart("memory", placed ? 430 : 80, drawMemory);
makeHeader();
makeFaults();
makeTiles();
makeCollectives();
makeTraffic();
makeOperators();
makePasses();
const seen = check();
makeLegends();
connect();
Object.assign(drawn, seen, { charts: Object.keys(charts).length, peak_bytes: scaleOf("step").live.total.reduce((a, b) => Math.max(a, b), 0) });
byId("drawn").textContent = JSON.stringify(drawn);
window.opweave = { drawn, hitTest, view, setMode, setRange, drawAll, select, find };

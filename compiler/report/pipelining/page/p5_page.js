// Fills the page, draws it, and checks that what was drawn is what the schedules say.
function makeHeader() {
  byId("title").textContent = schedules.map((schedule) => schedule.facts.title).join(" and ");
  const { facts, rows } = schedules[0];
  byId("subtitle").textContent = `${formatCount(rows.length)} ranks, ${formatCount(facts.stages)} stages, ${formatCount(facts.microbatches)} microbatches, ${formatCount(facts.actions)} actions`;
}

function tile(name, value, more) {
  byId("tiles").append(element("div", { class: "tile" }, element("div", { class: "name" }, name), element("div", { class: "value" }, value), element("div", { class: "more" }, more)));
}

function formatBubble(fraction) {
  return `${(100 * fraction).toFixed(2)} %`;
}

function makeTiles() {
  const { facts } = schedules[0];
  const against = (field, form) => (schedules.length > 1 ? `; ${schedules[1].facts.method || "the other"}: ${form(schedules[1].facts[field])}` : "");
  tile("makespan", formatPrecise(facts.makespan_ns), `until all is done, gradients reduced${against("makespan_ns", formatPrecise)}`);
  tile("bubble", formatBubble(facts.bubble), `of the makespan, on the rank with most work${against("bubble", formatBubble)}`);
  tile("span", formatPrecise(facts.span_ns), `bubble ${formatBubble(facts.span_bubble)}; what counts if no rank waits for others between steps${against("span_ns", formatPrecise)}`);
  const limit = facts.ranks.find((rank) => rank.limit_bytes !== null);
  const verdict = !limit ? "no limit was set" : facts.within ? "within the limit" : "over the limit";
  tile("highest peak", formatBytes(facts.peak_bytes), `${verdict}${against("peak_bytes", formatBytes)}`);
  if (facts.gap === null) return;
  const prover = data.provers[facts.proved_by] || facts.proved_by;
  tile("proven gap", facts.gap === 0 ? "optimal" : formatPercent(facts.gap), `${facts.objective} at least ${formatPrecise(facts.bound)} by ${prover}`);
}

function makeLegend() {
  const present = kinds.map((_, kind) => schedules.some((s) => s.rows.some((row) => LANES.some((lane) => row[lane].kind.includes(kind)))));
  const shades = (list) => element("span", { class: "shades" }, ...list.map((colour) => element("i", { style: { background: colour } })));
  kinds.forEach((kind, index) => {
    if (present[index]) byId("legend").append(element("span", {}, shades(isShard(index) ? palette.shades[index].slice(0, 1) : palette.shades[index]), `${kind} ${data.words[kind]}`));
  });
  const others = [["all-reduce of gradients", palette.reduce, schedules.some((s) => s.reduced.some((lines) => lines.length))], ["bytes held", palette.held, true], ["limit", palette.limit, schedules.some((s) => s.facts.ranks.some((r) => r.limit_bytes !== null))], ["message on its way", palette.message, true]];
  for (const [word, colour, there] of others) if (there) byId("legend").append(element("span", {}, swatch(colour), word));
  if (palette.shades[0].length > 1) byId("legend").append(element("span", {}, "paler: later chunks of a rank"));
}

function makeDiagrams() {
  for (const schedule of schedules) {
    const { facts } = schedule;
    const over = facts.ranks.filter((rank) => rank.limit_bytes !== null && rank.peak_bytes > rank.limit_bytes).length;
    const caption = element("figcaption", {}, element("b", {}, schedule.facts.title), element("span", { class: "quiet" }, `makespan ${formatPrecise(facts.makespan_ns)}, bubble ${formatBubble(facts.bubble)}, peak ${formatBytes(facts.peak_bytes)}`), over ? element("span", { class: "over" }, `over the limit on ${over} of ${facts.ranks.length} ranks`) : null);
    const canvas = element("canvas", { tabindex: "0", role: "application", "aria-roledescription": "chart", "aria-describedby": "help", "aria-label": `Diagram of ${schedule.facts.title}` });
    byId("diagrams").append(element("figure", {}, caption, canvas));
    listenTo(makeChart(schedule, canvas));
  }
}

function table(names, rows, numbers) {
  const head = element("tr", {}, ...names.map((name, i) => element("th", { scope: "col", class: numbers(i) ? "number" : "" }, name)));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell, i) => (cell && cell.tagName === "TD" ? cell : element("td", { class: numbers(i) ? "number" : "" }, cell)))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}

function makeRanks() {
  const any = (field) => schedules.some((schedule) => schedule.facts.ranks.some((rank) => rank[field]));
  const columns = [
    ["rank", (r) => r.rank],
    ["stages", (r) => r.stages.join(" ")],
    ["work", (r) => formatTime(r.work_ns)],
    ["idle", (r) => formatTime(r.idle_ns)],
    ["of it waiting for transfers", (r) => formatTime(r.wait_ns)],
    ["span", (r) => formatTime(r.span_ns)],
    ...(any("copy_ns") ? [["copies", (r) => formatTime(r.copy_ns)]] : []),
    ...(any("reduce_ns") ? [["all-reduce", (r) => formatTime(r.reduce_ns)]] : []),
    ["peak", (r) => formatBytes(r.peak_bytes)],
    ["limit", (r) => (r.limit_bytes === null ? "none" : formatBytes(r.limit_bytes))],
    ["messages sent", (r) => formatCount(r.sent)],
    ["bytes sent", (r) => formatBytes(r.sent_bytes)],
  ];
  for (const schedule of schedules) {
    if (schedules.length > 1) byId("ranks").append(element("h3", {}, schedule.facts.title));
    byId("ranks").append(table(columns.map(([name]) => name), schedule.facts.ranks.map((rank) => columns.map(([, cell]) => cell(rank))), (i) => i !== 1));
  }
}

function makeDifferences() {
  if (schedules.length < 2) return;
  byId("differences-section").hidden = false;
  const [a, b] = schedules.map((schedule) => schedule.facts);
  const forms = { time: formatPrecise, share: formatBubble, bytes: formatBytes, count: formatCount };
  const rows = data.differences.map(([name, field, kind]) => {
    const change = kind === "share" ? `${signed(100 * (a[field] - b[field]))} points` : b[field] ? `${signed(100 * (a[field] / b[field] - 1))} %` : a[field] ? "from none" : "";
    const judged = a[field] === b[field] ? "" : a[field] < b[field] ? " better" : " worse";
    return [name, forms[kind](a[field]), forms[kind](b[field]), element("td", { class: `number${judged}` }, change)];
  });
  byId("differences").append(table(["", ...schedules.map((schedule) => schedule.facts.title), "difference"], rows, (i) => i > 0));
  drawn.differences = rows.length;
}

function signed(value) {
  return `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(2)}`;
}

function makeAttempts() {
  const tried = schedules.flatMap((schedule) => schedule.facts.attempts.map((attempt) => [schedule, attempt]));
  byId("attempts-section").hidden = !tried.length;
  const rows = tried.map(([schedule, { method, value, seconds }]) => [schedule.facts.title, method, schedule.facts.objective, value === null ? "nothing found" : formatPrecise(value), formatSeconds(seconds)]);
  byId("attempts").append(table(["schedule", "method", "objective", "reached", "took"], rows, (i) => i > 2));
}

function connect() {
  byId("zoom-in").addEventListener("click", () => (zoom(1 / 1.6), redraw()));
  byId("zoom-out").addEventListener("click", () => (zoom(1.6), redraw()));
  byId("zoom-fit").addEventListener("click", () => (fit(), redraw()));
  for (const what of ["memory", "messages"]) {
    byId(`show-${what}`).addEventListener("click", (event) => {
      view[what] = !view[what];
      event.target.setAttribute("aria-pressed", String(view[what]));
      redraw();
    });
  }
  byId("find").addEventListener("change", (event) => (follow(microbatchIn(event.target.value)), redraw()));
  byId("help-toggle").addEventListener("click", (event) => {
    byId("help").hidden = !byId("help").hidden;
    event.target.setAttribute("aria-expanded", String(!byId("help").hidden));
  });
  new ResizeObserver(redraw).observe(byId("diagrams"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (readTheme(), redraw()));
}

// --- the page's own check --------------------------------------------------------------------------------------------

// Looks up what lies inside boxes that are large enough, by hit test; and which colour is at their left and right ends.
function probe(chart) {
  const result = { tested: 0, hits: 0, boxes: [], plot: chart.plot };
  const { width, height } = chart.canvas;
  const pixels = chart.context.getImageData(0, 0, width, height).data;
  chart.schedule.rows.forEach((row, rank) => {
    for (let index = 0; index < row.computes.kind.length && index < 40; index++) {
      const place = { rank, lane: "computes", index };
      const [x, y, w, h] = boxOf(chart, place);
      if (w < 5) continue;
      const hit = hitTest(chart, x + w / 2, y + 2.5);
      const at = (px) => 4 * (Math.floor((y + 2.5) * chart.ratio) * width + Math.floor(px * chart.ratio));
      const ends = [at(x + 1), at(x + w - 2.5)].map((pixel) => [...pixels.slice(pixel, pixel + 3)]);
      result.tested++;
      if (hit && hit.what === "action" && samePlace(hit.place, place)) result.hits++;
      result.boxes.push([rank, index, x, y, w, h, ends]);
    }
  });
  return result;
}

function check() {
  drawAll();
  const began = performance.now();
  drawAll(); // the second time, as when it is moved
  const seen = { milliseconds: performance.now() - began, charts: drawn.charts, probes: charts.map(probe) };
  view.messages = true;
  followed.microbatch = 0;
  drawAll();
  seen.messages = drawn.charts.map((chart) => chart.messages);
  seen.path = schedules.map((schedule) => pathOf(schedule, 0).actions.map((place) => nameAt(schedule, place)));
  view.messages = false;
  followed.microbatch = null;
  drawAll();
  return seen;
}

readTheme();
fit();
makeHeader();
makeTiles();
makeLegend();
makeDiagrams();
makeDifferences();
makeRanks();
makeAttempts();
const seen = check();
connect();
byId("drawn").textContent = JSON.stringify({ ...drawn, ...seen });
window.opweave = { drawn, hitTest, view, setRange, drawAll, follow, charts };

// Tables that sort, filter, and show as many rows as one wants to see.
const PAGE_ROWS = 50;

// `columns` are { name, value(row), show(row), number }; `rows` any values; `text(row)` is what the filter looks in.
function makeTable(place, { columns, rows, sort, text, filterName, empty, ascending = !columns[sort].number, key = [] }) {
  const state = { sort, ascending, filter: "", limit: PAGE_ROWS };
  const head = element("tr");
  const body = element("tbody");
  const counter = element("span", { class: "quiet" });
  const more = element("button", { type: "button", on: { click: () => ((state.limit *= 4), fill()) } }, "show more");
  const input = element("input", { type: "search", placeholder: filterName, "aria-label": filterName, spellcheck: "false" });
  input.addEventListener("input", () => ((state.filter = input.value.toLowerCase()), (state.limit = PAGE_ROWS), fill()));
  columns.forEach((column, index) => {
    const button = element("button", { type: "button", on: { click: () => sortBy(index) } }, column.name);
    head.append(element("th", { scope: "col", class: column.number ? "number" : "" }, column.plain ? column.name : button));
  });
  const table = element("table", {}, element("thead", {}, head), body);
  place.replaceChildren(element("div", { class: "table-bar" }, input, counter, more, ...key), element("div", { class: "scroll" }, table));

  function sortBy(index) {
    state.ascending = state.sort === index ? !state.ascending : !columns[index].number;
    state.sort = index;
    fill();
  }

  function fill() {
    const { value } = columns[state.sort];
    const direction = state.ascending ? 1 : -1;
    const found = rows.filter((row) => !state.filter || text(row).toLowerCase().includes(state.filter));
    const keyed = found.map((row, position) => [value(row), position, row]);
    keyed.sort(([a, i], [b, j]) => (a < b ? -direction : a > b ? direction : i - j));
    const shown = keyed.slice(0, state.limit).map(([, , row]) => row);
    body.replaceChildren(...shown.map((row) => tableRow(columns, row)));
    [...head.children].forEach((cell, index) => {
      if (index === state.sort) cell.setAttribute("aria-sort", state.ascending ? "ascending" : "descending");
      else cell.removeAttribute("aria-sort");
    });
    more.hidden = shown.length === found.length;
    counter.textContent = found.length ? `${formatCount(shown.length)} of ${formatCount(found.length)} shown` : empty;
    return found.length;
  }
  return fill();
}

function tableRow(columns, row) {
  const cells = columns.map((column) => element("td", { class: column.number ? "number" : column.wide ? "" : "name" }, column.show(row)));
  return element("tr", {}, ...cells);
}

function bytesColumn(name, of) {
  return { name, number: true, value: of, show: (row) => (of(row) ? formatBytes(of(row)) : "") };
}

function makeTraffic() {
  const total = (b) => buffers.loaded[b] + buffers.stored[b] + buffers.streamed[b];
  const rows = buffers.name.map((_, index) => index).filter((b) => total(b) > 0);
  rows.sort((a, b) => additional(b) - additional(a) || total(b) - total(a));
  const most = rows.reduce((top, b) => Math.max(top, total(b)), 1);
  const bar = (b) => {
    const parts = [["compulsory", total(b) - Math.max(0, additional(b))], ["additional", Math.max(0, additional(b))]];
    const made = parts.map(([kind, n]) => element("i", { style: { width: `${(100 * n) / most}%`, background: palette.traffic[kind] } }));
    return element("div", { class: "stack" }, ...made);
  };
  const columns = [
    { name: "tensor", value: (b) => buffers.name[b], show: (b) => link(buffers.name[b], () => reveal(() => find(buffers.name[b]))) },
    { name: "role", value: (b) => roleWord(buffers.role[b]), show: (b) => bufferFacts(b)[0][1] },
    bytesColumn("size", (b) => buffers.nbytes[b]),
    bytesColumn("additional", additional),
    bytesColumn("compulsory", (b) => buffers.compulsory[b]),
    bytesColumn("loaded", (b) => buffers.loaded[b]),
    bytesColumn("stored", (b) => buffers.stored[b]),
    bytesColumn("streamed", (b) => buffers.streamed[b]),
    { name: "", plain: true, wide: true, value: total, show: bar },
  ];
  const settings = { columns, rows, sort: 3, text: (b) => `${buffers.name[b]} ${roleWord(buffers.role[b])}`, filterName: "filter tensors" };
  const key = Object.entries(palette.traffic).map(([kind, colour]) => element("span", { class: "quiet" }, swatch(colour), kind));
  drawn.tensors = makeTable(byId("traffic"), { ...settings, empty: "nothing is moved", key });
  drawn.moved = { compulsory: 0, additional: 0 };
  for (const b of rows) {
    drawn.moved.compulsory += buffers.compulsory[b];
    drawn.moved.additional += additional(b);
  }
}

function makeOperators() {
  const rows = instructions.kind.map((_, step) => step).filter((step) => executes(step) && KINDS[instructions.kind[step]] !== "wait");
  const op = (step) => instructions.subject[step];
  const takes = (step) => (timed ? instructions.finish[step] - instructions.start[step] : 0);
  const held = (step) => buffersAt(step).reduce((sum, b) => sum + (buffers.is_streamed[b] ? 0 : buffers.nbytes[b]), 0);
  const columns = [
    { name: "step", number: true, value: (s) => s, show: (s) => formatCount(s) },
    { name: "operator", value: (s) => ops.name[op(s)], show: (s) => link(KINDS[instructions.kind[s]] === "recompute" ? `${ops.name[op(s)]}, again` : ops.name[op(s)], () => reveal(() => goToStep(s))) },
    { name: "calls", value: (s) => ops.target[op(s)], show: (s) => ops.target[op(s)] },
    { name: "arithmetic", number: true, value: (s) => ops.flops[op(s)], show: (s) => (ops.flops[op(s)] ? formatFlops(ops.flops[op(s)]) : "") },
    bytesColumn("working set", held),
    bytesColumn("streamed", (s) => instructions.nbytes[s]),
  ];
  if (timed) {
    columns.push({ name: "start", number: true, value: (s) => instructions.start[s], show: (s) => formatSeconds(instructions.start[s]) });
    columns.push({ name: "takes", number: true, value: takes, show: (s) => formatSeconds(takes(s)) });
    columns.push({ name: "of latency", number: true, value: takes, show: (s) => formatPercent(takes(s) / (scaleOf("time").full || 1)) });
  }
  const text = (s) => `${ops.name[op(s)]} ${ops.body[op(s)]} ${ops.origin[op(s)]}`;
  const settings = { columns, rows, sort: 0, ascending: true, text, filterName: "search operators", empty: "no operators" };
  drawn.operators = makeTable(byId("operators"), settings);
}

function makeCollectives() {
  const rows = data.collectives;
  byId("collectives-section").hidden = rows.length === 0;
  if (!rows.length) return;
  const seconds = (name, of) => ({ name, number: true, value: of, show: (row) => formatSeconds(of(row)) });
  const words = (name, of) => ({ name, value: of, show: of });
  const columns = [
    { name: "collective", value: (row) => row.op, show: (row) => link(row.op, () => reveal(() => find(row.op))) },
    words("kind", (row) => row.kind),
    words("group", (row) => row.group),
    bytesColumn("message", (row) => row.nbytes),
    ...(data.is_compared ? [seconds("exposed before", (row) => row.exposed_before_s)] : []),
    seconds(data.is_compared ? "exposed after" : "exposed", (row) => row.exposed_after_s),
    words("done by", (row) => row.mode),
    words("hidden by", (row) => row.hidden_by),
    words("left alone because", (row) => row.reason),
  ];
  const text = (row) => `${row.op} ${row.kind} ${row.group} ${row.mode} ${row.reason}`;
  const sort = data.is_compared ? 5 : 4;
  drawn.collectives = makeTable(byId("collectives"), { columns, rows, sort, text, filterName: "search collectives", empty: "none" });
}

// Act on the charts and bring them into sight.
function reveal(action) {
  action();
  byId("weave-title").scrollIntoView({ behavior: "smooth", block: "start" });
}

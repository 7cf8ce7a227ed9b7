// Schedules as columns by rank, where each action lies, and what follows what. Times are in the problem's unit (ns).
const data = JSON.parse(document.getElementById("plan").textContent);
const { kinds, palette, schedules } = data;
const KIND = Object.fromEntries(kinds.map((kind, index) => [kind, index]));
const LANES = ["computes", "copies"];

// The first index whose value is above `x`; the length if there is none.
function firstAfter(sorted, x) {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] > x) high = middle;
    else low = middle + 1;
  }
  return low;
}

function keyOf(kind, stage, microbatch) {
  return `${stage}${kinds[kind]}${microbatch}`;
}

// Where each action is, by its name; a whole backward also by the names of its halves, which it does.
function placesOf(schedule) {
  if (schedule.places) return schedule.places;
  schedule.places = new Map();
  schedule.rows.forEach((row, rank) => {
    for (const lane of LANES) {
      const { kind, stage, microbatch } = row[lane];
      for (let index = 0; index < kind.length; index++) {
        const halves = kind[index] === KIND.B ? [KIND.B, KIND.I, KIND.W] : [kind[index]];
        for (const half of halves) schedule.places.set(keyOf(half, stage[index], microbatch[index]), { rank, lane, index });
      }
    }
  });
  return schedule.places;
}

function routeOf(schedule, microbatch) {
  return schedule.routes.find((route) => microbatch >= route.first && microbatch < route.first + route.microbatches);
}

function columnsAt(schedule, place) {
  return schedule.rows[place.rank][place.lane];
}

function nameAt(schedule, place) {
  const { kind, stage, microbatch } = columnsAt(schedule, place);
  return keyOf(kind[place.index], stage[place.index], microbatch[place.index]);
}

function samePlace(a, b) {
  return a.rank === b.rank && a.lane === b.lane && a.index === b.index;
}

// Of one microbatch: its actions, and what each follows, as pairs of places with the time that passes between them.
function pathOf(schedule, microbatch) {
  const route = routeOf(schedule, microbatch);
  const places = placesOf(schedule);
  const path = { actions: [], links: [] };
  if (!route) return path;
  const seen = new Set();
  for (const [kind, stage, , after] of route.tasks) {
    const to = places.get(keyOf(kind, stage, microbatch));
    if (!seen.has(to)) path.actions.push(to);
    seen.add(to);
    for (const [before, lag] of after) {
      const [beforeKind, beforeStage] = route.tasks[before];
      const from = places.get(keyOf(beforeKind, beforeStage, microbatch));
      if (!samePlace(from, to)) path.links.push({ from, to, lag, shard: isShard(kind) || isShard(beforeKind) });
    }
  }
  path.actions = path.actions.filter((place, index) => path.actions.findIndex((other) => samePlace(place, other)) === index);
  return path;
}

function isShard(kind) {
  return kind === KIND.S || kind === KIND.T;
}

// Activations and their gradients from rank to rank, in the order in which they leave.
function messagesOf(schedule) {
  if (schedule.messages) return schedule.messages;
  schedule.messages = [];
  const total = schedule.facts.microbatches;
  for (let microbatch = 0; microbatch < total; microbatch++) {
    for (const { from, to, lag, shard } of pathOf(schedule, microbatch).links) {
      if (shard || from.rank === to.rank) continue;
      const leaves = columnsAt(schedule, from).finish[from.index];
      schedule.messages.push({ from, to, leaves, arrives: leaves + lag, microbatch });
    }
  }
  schedule.messages.sort((a, b) => a.leaves - b.leaves);
  return schedule.messages;
}

// Bytes that a rank holds at a time.
function heldAt(schedule, rank, time) {
  const [times, held] = schedule.curves[rank];
  return held[Math.max(0, firstAfter(times, time) - 1)];
}

// How long the rank has idled before this action; of copies nothing is said.
function idleBefore(schedule, place) {
  if (place.lane !== "computes") return null;
  const { start, finish } = columnsAt(schedule, place);
  return start[place.index] - (place.index ? finish[place.index - 1] : 0);
}

// "7" and "3F7" both mean microbatch 7; null for anything else, or a microbatch that there is not.
function microbatchIn(text) {
  const match = /^\s*(?:\d+(?:OFFLOAD|RELOAD|[FIWBST]))?(\d+)\s*$/i.exec(text);
  const number = match ? Number(match[1]) : -1;
  return schedules.some((schedule) => number >= 0 && number < schedule.facts.microbatches) ? number : null;
}

function formatTime(time) {
  return formatSeconds(time * 1e-9);
}

// The same to five digits: what is compared differs by little.
function formatPrecise(time) {
  const [size, unit] = [[1e9, "s"], [1e6, "ms"], [1e3, "us"]].find(([least]) => time >= least) || [1, "ns"];
  return `${(time / size).toFixed(size === 1 ? 0 : Math.max(0, 5 - String(Math.floor(time / size)).length))} ${unit}`;
}

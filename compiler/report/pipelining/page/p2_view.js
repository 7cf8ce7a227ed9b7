// What part of the time is in sight, the same for all diagrams; what is shown; which microbatch is followed.
const view = { x0: 0, x1: 1, full: 1, memory: true, messages: false };
const followed = { microbatch: null };

function setRange(x0, x1) {
  const width = Math.min(Math.max(x1 - x0, Math.max(view.full * 1e-7, 1e-3)), view.full);
  const middle = (x0 + x1) / 2;
  view.x0 = Math.min(Math.max(middle - width / 2, 0), view.full - width);
  view.x1 = view.x0 + width;
}

function fit() {
  view.full = Math.max(1, ...schedules.map((schedule) => schedule.facts.makespan_ns));
  view.x0 = 0;
  view.x1 = view.full;
}

// Zoom by `factor` (below 1: closer), leaving the point at `share` of the width where it is.
function zoom(factor, share = 0.5) {
  const width = view.x1 - view.x0;
  const fixed = view.x0 + width * share;
  const next = Math.min(width * factor, view.full);
  setRange(fixed - next * share, fixed + next * (1 - share));
}

function pan(share) {
  const width = view.x1 - view.x0;
  view.x0 = Math.min(Math.max(view.x0 + width * share, 0), view.full - width);
  view.x1 = view.x0 + width;
}

function follow(microbatch) {
  followed.microbatch = microbatch;
  const details = byId("details");
  details.hidden = microbatch === null;
  details.replaceChildren();
  if (microbatch === null) return;
  details.append(element("h3", {}, `microbatch ${formatCount(microbatch)}`));
  for (const schedule of schedules) {
    const { actions } = pathOf(schedule, microbatch);
    if (!actions.length) continue;
    const [start, finish] = extentOf(schedule, actions);
    const busy = actions.reduce((sum, place) => sum + columnsAt(schedule, place).finish[place.index] - columnsAt(schedule, place).start[place.index], 0);
    const facts = [
      ["in flight", `${formatTime(start)} to ${formatTime(finish)} (${formatTime(finish - start)})`],
      ["worked on", formatTime(busy)],
      ["actions", actions.map((place) => nameAt(schedule, place)).slice(0, 64).join(" ") + (actions.length > 64 ? ` and ${actions.length - 64} more` : "")],
    ];
    details.append(element("b", {}, schedule.facts.title), factList(facts));
  }
}

function extentOf(schedule, actions) {
  const starts = actions.map((place) => columnsAt(schedule, place).start[place.index]);
  const finishes = actions.map((place) => columnsAt(schedule, place).finish[place.index]);
  return [starts.reduce((a, b) => Math.min(a, b)), finishes.reduce((a, b) => Math.max(a, b))];
}

function zoomToFollowed() {
  if (followed.microbatch === null) return;
  const ends = schedules.map((schedule) => [schedule, pathOf(schedule, followed.microbatch).actions]).filter(([, a]) => a.length).map(([s, a]) => extentOf(s, a));
  if (!ends.length) return;
  const start = Math.min(...ends.map(([x]) => x));
  const finish = Math.max(...ends.map(([, x]) => x));
  const margin = (finish - start) * 0.05;
  setRange(start - margin, finish + margin);
}

function followNext(step) {
  const most = Math.max(...schedules.map((schedule) => schedule.facts.microbatches));
  const next = followed.microbatch === null ? 0 : followed.microbatch + step;
  follow(Math.min(Math.max(next, 0), most - 1));
}

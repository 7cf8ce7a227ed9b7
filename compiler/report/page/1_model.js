// The plan as columns, the words and units people read, and small helpers for the document.
const data = JSON.parse(document.getElementById("plan").textContent);
const { digest, buffers, ops, instructions, residences, engines, palette, words } = data;
const KINDS = ["run", "load", "store", "recompute", "collective", "wait"];
const CATEGORIES = Object.keys(palette.categories);
const ROLES = Object.keys(palette.roles);
const counts = { residences: residences.buffer.length, instructions: instructions.kind.length };
const timed = data.timed;
const placed = residences.offset.some((offset) => offset !== null);
const capacity = digest.machine.capacity_bytes;

// Whether the step is about an operator: executes it, for the first time or again, or waits for it.
function executes(step) {
  return KINDS[instructions.kind[step]] !== "load" && KINDS[instructions.kind[step]] !== "store";
}

function category(step) {
  const kind = instructions.kind[step];
  if (executes(step)) return CATEGORIES.indexOf(KINDS[kind]);
  return 2 * kind - (instructions.additional[step] > 0 ? 0 : 1); // in the order of palette.categories
}

function additional(buffer) {
  return buffers.loaded[buffer] + buffers.stored[buffer] + buffers.streamed[buffer] - buffers.compulsory[buffer];
}

// Which steps touch each buffer, and where each operator runs.
const touching = buffers.name.map(() => []);
const stepsOfOp = ops.name.map(() => []);
const residencesOf = buffers.name.map(() => []);
for (let step = 0; step < counts.instructions; step++) {
  const subject = instructions.subject[step];
  if (executes(step)) {
    stepsOfOp[subject].push(step);
    for (const buffer of new Set([...ops.inputs[subject], ...ops.outputs[subject]])) touching[buffer].push(step);
  } else touching[subject].push(step);
}
residences.buffer.forEach((buffer, index) => residencesOf[buffer].push(index));

function roleWord(role) {
  return ROLES[role].replace(/_/g, " ");
}

// The kernels of each kind of step on a line, and the longest of them in a table.

const WIDTH = 1200;
const LANE = 26;
const LONGEST = 12;

function kernelText(kernel) {
  const facts = [
    kernel.name,
    kernel.library ? "library call" : "generated",
    kernel.phases.join(" and ") || "phase not marked",
    kernel.flops ? scaled(kernel.flops, "FLOP") : "",
    scaled(kernel.bytes, "B"),
    duration(kernel.seconds),
    kernel.nodes.slice(0, 12).join(", ") + (kernel.nodes.length > 12 ? ", ..." : ""),
  ];
  return facts.filter(Boolean).join("\n");
}

// A kernel of several phases is in the lane of the first, with a stripe of each colour.
function kernelBar(kernel, lane, x) {
  const phases = kernel.phases.length ? kernel.phases : [""];
  const group = drawing("g", { class: "kernel" });
  const height = (LANE - 6) / phases.length;
  phases.forEach((phase, i) => {
    const place = { x, y: lane * LANE + 3 + i * height, width: Math.max(kernel.width * (WIDTH - 90), 0.8), height };
    group.append(drawing("rect", { ...place, fill: color(phase) }));
  });
  group.append(drawing("title", {}, kernelText(kernel)));
  return group;
}

function axis(line, lanes) {
  const group = drawing("g", { class: "axis" });
  for (let i = 0; i <= 4; i += 1) {
    const x = 80 + (i / 4) * (WIDTH - 90);
    const value = (line.total * i) / 4;
    const anchor = i === 4 ? "end" : i === 0 ? "start" : "middle";
    group.append(drawing("line", { x1: x, x2: x, y1: 0, y2: lanes * LANE }));
    group.append(drawing("text", { x, y: lanes * LANE + 15, "text-anchor": anchor }, line.measured ? duration(value) : scaled(value, "B")));
  }
  return group;
}

function lanesOf(line) {
  const first = new Set(line.bars.map((kernel) => kernel.phases[0] || ""));
  return [...content.phases, ""].filter((phase) => first.has(phase));
}

function timelineDrawing(line) {
  const lanes = lanesOf(line);
  const height = lanes.length * LANE + 22;
  const made = drawing("svg", { viewBox: `0 0 ${WIDTH} ${height}`, class: "timeline", role: "img" });
  made.append(axis(line, lanes.length));
  lanes.forEach((phase, i) => made.append(drawing("text", { x: 0, y: i * LANE + 17 }, phase || "not marked")));
  for (const kernel of line.bars) {
    made.append(kernelBar(kernel, lanes.indexOf(kernel.phases[0] || ""), 80 + kernel.start * (WIDTH - 90)));
  }
  return made;
}

function kernelRow(kernel) {
  return element(
    "tr",
    {},
    element("td", {}, element("code", {}, kernel.name), kernel.library ? element("small", {}, " library") : ""),
    element("td", {}, ...kernel.phases.map((phase) => chip(phase))),
    element("td", { class: "number" }, counted(kernel.nodes.length, "node")),
    element("td", { class: "number" }, kernel.flops ? scaled(kernel.flops, "FLOP") : ""),
    element("td", { class: "number" }, scaled(kernel.bytes, "B")),
    element("td", { class: "number" }, duration(kernel.seconds)),
  );
}

function longest(line) {
  const sorted = [...line.bars].sort((one, other) => other.width - one.width).slice(0, LONGEST);
  const body = element("tbody", {}, ...sorted.map(kernelRow));
  const word = line.measured ? "longest" : "largest";
  return details([`the ${word} kernels`], () => [element("div", { class: "scroll" }, element("table", {}, body))]);
}

function timelineCard(line) {
  const total = line.measured ? duration(line.total) : scaled(line.total, "B");
  const note = line.measured
    ? `${counted(line.bars.length, "kernel")} in ${total}, as measured`
    : `${counted(line.bars.length, "kernel")}; not measured: widths are bytes read and written, ${total} in all, in order`;
  const title = element("h3", {}, `${line.kind} step `, element("small", {}, note));
  return element("div", { class: "card", "data-kind": line.kind }, title, timelineDrawing(line), longest(line));
}

function showTimelines() {
  if (!content.kernels.length) return;
  show("kernels");
  document.getElementById("timelines").append(...content.kernels.map(timelineCard));
}

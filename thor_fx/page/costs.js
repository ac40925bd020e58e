// What each kind of step costs, by phase.

function sum(lines, key) {
  return lines.some((line) => line[key] === null) ? null : lines.reduce((total, line) => total + line[key], 0);
}

function bar(value, longest, ink) {
  if (value === null) return element("td", { class: "number" }, "");
  const width = longest ? (100 * value) / longest : 0;
  return element("td", { class: "number" }, duration(value), element("i", { class: "share", style: `width:${width}%;background:${ink}` }));
}

function costRow(line, longest) {
  return element(
    "tr",
    {},
    element("td", {}, line.phase === null ? "all" : chip(line.phase)),
    element("td", { class: "number" }, scaled(line.flops, "FLOP")),
    element("td", { class: "number" }, scaled(line.bytes, "B")),
    bar(line.floor, longest, line.phase === null ? "transparent" : color(line.phase)),
    bar(line.seconds, longest, line.phase === null ? "transparent" : color(line.phase)),
  );
}

function costTable(step) {
  const lines = step.phases;
  const all = { phase: null };
  for (const key of ["flops", "bytes", "floor", "seconds"]) all[key] = sum(lines, key);
  const longest = Math.max(...lines.flatMap((line) => [line.floor || 0, line.seconds || 0]));
  const heads = ["phase", "arithmetic", "traffic", "at best", "measured"];
  const head = heads.map((text, i) => element("th", i ? { class: "number" } : {}, text));
  const body = [...lines, all].map((line) => costRow(line, longest));
  const memory = `at most ${scaled(step.peak, "B")} alive at once; forward keeps ${scaled(step.saved, "B")} for backward`;
  return element(
    "div",
    { class: "card" },
    element("h3", {}, `${step.kind} step`),
    element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body)),
    element("p", {}, memory),
  );
}

function showCosts() {
  if (!content.steps.length) return;
  show("costs");
  document.getElementById("steps").append(...content.steps.map(costTable));
}

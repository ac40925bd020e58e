// The tree of modules, with the operators in them.

const modules = []; // {module, details, parent}, parents first

function phaseBar(phases) {
  const total = Object.values(phases).reduce((sum, count) => sum + count, 0);
  const bar = element("span", { class: "phases" });
  for (const phase of [...content.phases, ""]) {
    if (!phases[phase]) continue;
    const title = `${phase || "phase not marked"}: ${counted(phases[phase], "operator")}`;
    const width = (100 * phases[phase]) / total;
    bar.append(element("i", { title, style: `width:${width}%;background:${color(phase)}` }));
  }
  return [bar, element("small", {}, counted(total, "operator"))];
}

function operatorRow([name, operator, shape, dtype, phase, flops, bytes, kernel]) {
  return element(
    "tr",
    {},
    element("td", {}, element("i", { class: "dot", title: phase, style: `background:${color(phase)}` }), element("code", {}, name)),
    element("td", {}, operator),
    element("td", { class: "number" }, shape),
    element("td", {}, dtype),
    element("td", { class: "number" }, flops ? scaled(flops, "FLOP") : ""),
    element("td", { class: "number" }, bytes ? scaled(bytes, "B") : ""),
    element("td", {}, element("code", {}, kernel)),
  );
}

function operatorTable(operators) {
  const heads = ["node", "operator", "shape", "dtype", "FLOP", "bytes", "kernel"];
  const numbers = new Set(["shape", "FLOP", "bytes"]);
  const cells = heads.map((head) => element("th", numbers.has(head) ? { class: "number" } : {}, head));
  const body = element("tbody", {}, ...operators.map(operatorRow));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...cells)), body);
  return element("div", { class: "scroll" }, table);
}

function moduleDetails(module, parent) {
  const site = module.layers.some((layer) => content.preconditioned.has(layer));
  const summary = [
    element("code", { class: "name" }, module.name),
    site ? element("span", { class: "site", title: "has Kronecker factors" }, "◆") : null,
    ...phaseBar(module.phases),
    element("small", {}, module.flops ? scaled(module.flops, "FLOP") : ""),
  ].filter((part) => part !== null);
  const made = element("details", { "data-path": module.path }, element("summary", {}, ...summary));
  const entry = { module, details: made, parent };
  modules.push(entry);
  made.append(...module.modules.map((child) => moduleDetails(child, entry)));
  if (module.operators.length) {
    const title = module.modules.length ? "its own operators" : "operators";
    const many = [title, " ", element("small", {}, String(module.operators.length))];
    made.append(details(many, () => [operatorTable(module.operators)], { class: "operators" }));
  }
  return made;
}

function matches(module, query) {
  return [module.path, ...module.layers].some((name) => name.toLowerCase().includes(query));
}

// A module stays if it, one above it or one below it has the name. Those above the first that has it are opened.
function filterTree(query) {
  for (const entry of modules) {
    const around = Boolean(entry.parent && entry.parent.inside);
    entry.first = query !== "" && !around && matches(entry.module, query);
    entry.inside = around || entry.first;
    entry.above = false;
  }
  for (const entry of modules.filter((one) => one.first)) {
    for (let up = entry.parent; up; up = up.parent) up.above = true;
  }
  for (const { details: made, inside, above, parent } of modules) {
    made.hidden = query !== "" && !inside && !above;
    if (query) made.open = above;
    else if (!parent) made.open = true;
  }
}

function setAll(open) {
  for (const entry of modules) entry.details.open = open || !entry.parent;
}

function showTree() {
  if (!content.tree.modules.length && !content.tree.operators.length) return;
  show("graph");
  content.preconditioned = new Set(
    content.rows.filter((row) => row[4].startsWith("preconditioned")).map((row) => row[0]),
  );
  document.getElementById("tree").append(moduleDetails(content.tree, null));
  document.getElementById("legend").append(...content.phases.map((phase) => chip(phase)));
  document.getElementById("expand").addEventListener("click", () => setAll(true));
  document.getElementById("collapse").addEventListener("click", () => setAll(false));
  filterTree("");
}

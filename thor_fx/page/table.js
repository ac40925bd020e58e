// The table of parameters, and its search.

function treatmentClass(text) {
  return ["preconditioned", "elementwise", "first-order", "frozen"].find((word) => text.startsWith(word)) || "other";
}

function treatment(text) {
  const [first, ...rest] = text.split(":");
  const label = element("b", { class: `treatment ${treatmentClass(text)}` }, first);
  return element("td", {}, label, rest.length ? `:${rest.join(":")}` : "");
}

function tableRow(row) {
  const [parameter, shape, bytes, mflop, how] = row;
  const made = element(
    "tr",
    { "data-layer": parameter },
    element("td", {}, element("code", {}, parameter)),
    ...[shape, bytes, mflop].map((cell) => element("td", { class: "number" }, cell)),
    treatment(how),
  );
  made.name = parameter.toLowerCase();
  return made;
}

const rows = content.rows.map(tableRow);

function filterTable(query) {
  let shown = 0;
  for (const row of rows) {
    row.hidden = !row.name.includes(query);
    shown += !row.hidden;
  }
  const total = counted(rows.length, "parameter");
  document.getElementById("parameters-count").textContent = query ? `${shown} of ${total}` : total;
}

function showTable() {
  if (!rows.length) return;
  show("parameters");
  document.getElementById("rows").append(...rows);
  filterTable("");
}

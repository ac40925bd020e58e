// The passes, each with the diff of the graph's code.

function signed(count) {
  return count > 0 ? `+${count}` : count < 0 ? `−${-count}` : "±0";
}

function diffLine([mark, before, after, text]) {
  const kind = { "-": "gone", "+": "new", " ": "" }[mark];
  const numbers = [before, after].map((number) => element("td", { class: "line" }, number === null ? "" : String(number)));
  return element("tr", { class: kind }, ...numbers, element("td", { class: "mark" }, mark), element("td", { class: "code" }, text));
}

function diff(pieces) {
  const bodies = pieces.map((lines) => element("tbody", {}, ...lines.map(diffLine)));
  return element("div", { class: "scroll diff" }, element("table", {}, ...bodies));
}

function changes(stage) {
  const chips = [
    ...stage.added.map(([operator, count]) => element("span", { class: "change new" }, `+${count} ${operator}`)),
    ...stage.removed.map(([operator, count]) => element("span", { class: "change gone" }, `−${count} ${operator}`)),
  ];
  if (stage.moved) chips.push(element("span", { class: "change" }, `${counted(stage.moved, "operator")} moved`));
  return element("p", { class: "changes" }, ...chips);
}

function stageDetails(stage) {
  const summary = [
    element("code", { class: "name" }, stage.name),
    element("small", {}, `${signed(stage.difference)} operators`),
    element("small", {}, duration(stage.seconds)),
    element("small", {}, stage.pieces.length ? "" : "code unchanged"),
  ];
  const code = () => (stage.pieces.length ? [diff(stage.pieces)] : [element("p", {}, "The code is as it was.")]);
  return details(summary, () => [changes(stage), ...code()], { class: "stage" });
}

function showStages() {
  if (!content.stages.length) return;
  show("passes");
  document.getElementById("stages").append(...content.stages.map(stageDetails));
}

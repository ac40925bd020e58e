// Elements, and numbers in words. All text goes in as text, never as markup.

const content = JSON.parse(document.getElementById("content").textContent);

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") made.className = value;
    else if (key === "style") made.style.cssText = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function drawing(tag, attributes = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

function scaled(count, unit) {
  const prefixes = ["", "k", "M", "G", "T", "P"];
  let place = 0;
  while (count >= 999.5 && place < prefixes.length - 1) {
    count /= 1000;
    place += 1;
  }
  return `${Number(count.toPrecision(3))} ${prefixes[place]}${unit}`;
}

function duration(seconds) {
  if (seconds === null) return "";
  if (seconds === 0) return "0 s";
  const [factor, unit] = seconds < 1e-3 ? [1e6, "µs"] : seconds < 1 ? [1e3, "ms"] : [1, "s"];
  return `${Number((seconds * factor).toPrecision(3))} ${unit}`;
}

function counted(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

function color(phase) {
  return content.colors[phase || ""];
}

function chip(phase, text = null) {
  const dot = element("i", { style: `background:${color(phase)}` });
  return element("span", { class: "chip" }, dot, text === null ? phase || "phase not marked" : text);
}

// The content of a <details> is made when it is opened first.
function details(summary, fill, properties = {}) {
  const made = element("details", properties, element("summary", {}, ...summary));
  let empty = true;
  made.fill = () => {
    if (empty) made.append(...fill());
    empty = false;
  };
  made.addEventListener("toggle", () => made.open && made.fill());
  return made;
}

function show(id) {
  document.getElementById(id).hidden = false;
  const name = id[0].toUpperCase() + id.slice(1);
  document.getElementById("nav").append(element("a", { href: `#${id}` }, name));
}

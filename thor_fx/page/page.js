// Puts everything into its place.

function showPlots() {
  if (!content.plots.length) return;
  show("plots");
  const figures = content.plots.map(({ title, image }) =>
    element("figure", { class: "card" }, element("figcaption", {}, title), element("img", { src: image, alt: title })),
  );
  document.getElementById("figures").append(...figures);
}

document.getElementById("title").textContent = content.title;
document.getElementById("summary").textContent = content.summary;
showTable();
showTree();
showStages();
showCosts();
showTimelines();
showPlots();

document.getElementById("search").addEventListener("input", (event) => {
  const query = event.target.value.trim().toLowerCase();
  filterTable(query);
  filterTree(query);
});

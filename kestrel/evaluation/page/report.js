"use strict";
(() => {
  const list = document.getElementById("list");
  if (!list) return;
  const [search, order, filter] = ["search", "order", "filter"].map((id) => document.getElementById(id));
  const dialogues = [...list.children].map((element) => ({
    element,
    text: element.textContent.toLowerCase(),
    score: Number(element.dataset.score),
    gap: Number(element.dataset.gap),
    place: Number(element.dataset.place),
    labels: new Set([
      `chosen:${element.dataset.chosen}`,
      ...element.dataset.flags.split("|").map((flag) => `flag:${flag}`),
    ]),
  }));
  const orders = {
    best: (a, b) => b.score - a.score,
    worst: (a, b) => a.score - b.score,
    gap: (a, b) => b.gap - a.gap,
    file: (a, b) => a.place - b.place,
  };
  const update = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const dialogue of dialogues) {
      const matches =
        words.every((word) => dialogue.text.includes(word)) && (!filter.value || dialogue.labels.has(filter.value));
      dialogue.element.hidden = !matches;
      shown += matches;
    }
    document.getElementById("count").textContent = `${shown} of ${dialogues.length}`;
    document.getElementById("nothing").hidden = shown > 0;
  };
  const sort = () => {
    list.append(...dialogues.sort(orders[order.value]).map((dialogue) => dialogue.element));
  };
  search.addEventListener("input", update);
  filter.addEventListener("change", update);
  order.addEventListener("change", sort);
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  // A browser that reloads the page keeps what was chosen.
  sort();
  update();
})();

"use strict";
(() => {
  const list = document.getElementById("list");
  if (!list) return;
  const control = (id) => document.getElementById(id);
  const [search, persona, metric, system, order, filter] = ["search", "persona", "metric", "system", "order", "filter"].map(control);
  const systems = [...system.options].map((option) => option.value);
  const dialogues = [...list.children].map((element) => ({
    element,
    text: element.textContent.toLowerCase(),
    persona: (element.querySelector(".persona")?.textContent ?? "").toLowerCase(),
    scores: JSON.parse(element.dataset.scores),
    shown: element.querySelectorAll(".score data"),
    place: Number(element.dataset.place),
    labels: new Set([
      `chosen:${element.dataset.chosen}`,
      ...element.dataset.flags.split("|").map((flag) => `flag:${flag}`),
    ]),
  }));
  const words = (input) => input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const update = () => {
    let shown = 0;
    for (const dialogue of dialogues) {
      const matches =
        words(search).every((word) => dialogue.text.includes(word)) &&
        words(persona).every((word) => dialogue.persona.includes(word)) &&
        (!filter.value || dialogue.labels.has(filter.value));
      dialogue.element.hidden = !matches;
      shown += matches;
    }
    control("count").textContent = `${shown} of ${dialogues.length}`;
    control("nothing").hidden = shown > 0;
  };
  const score = (dialogue, name) => dialogue.scores[metric.value][name] ?? NaN;
  const sort = () => {
    const sign = metric.selectedOptions[0].dataset.better === "lower" ? -1 : 1;
    const others = systems.filter((name) => name !== system.value);
    const lead = (d) => sign * score(d, system.value) - Math.max(...others.map((name) => sign * score(d, name)));
    const advantage = {
      best: (d) => sign * score(d, system.value),
      worst: (d) => -sign * score(d, system.value),
      ahead: lead,
      behind: (d) => -lead(d),
      file: (d) => -d.place,
    }[order.value];
    const key = (dialogue) => (Number.isNaN(advantage(dialogue)) ? -Infinity : advantage(dialogue));
    dialogues.sort((a, b) => key(b) - key(a) || a.place - b.place);
    list.append(...dialogues.map((dialogue) => dialogue.element));
    for (const dialogue of dialogues)
      dialogue.shown.forEach((place, index) => {
        const value = score(dialogue, systems[index]);
        place.textContent = Number.isNaN(value) ? "–" : value.toFixed(Math.abs(value) < 10 ? 2 : 1);
      });
  };
  for (const input of [search, persona]) input.addEventListener("input", update);
  filter.addEventListener("change", update);
  for (const select of [metric, system, order]) select.addEventListener("change", sort);
  control("controls").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { j: 1, k: -1 }[event.key];
    if (event.key === "/") search.focus();
    else if (step) {
      const shown = dialogues.filter((dialogue) => !dialogue.element.hidden);
      const here = shown.findIndex((dialogue) => dialogue.element.contains(document.activeElement));
      const next = shown[here < 0 ? 0 : Math.min(Math.max(here + step, 0), shown.length - 1)];
      if (!next) return;
      next.element.open = true;
      next.element.querySelector("summary").focus();
      next.element.scrollIntoView({ block: "start" });
    } else return;
    event.preventDefault();
  });
  // A browser that reloads the page keeps what was chosen.
  sort();
  update();
})();

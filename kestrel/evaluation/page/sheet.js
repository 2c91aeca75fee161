"use strict";
(() => {
  const form = document.getElementById("sheet");
  const items = [...form.querySelectorAll(".item")];
  const place = `kestrel-sheet-${form.dataset.sheet}`;
  let saved = { judge: "", choices: {} };
  try {
    saved = JSON.parse(localStorage.getItem(place)) || saved;
  } catch {
    // A page opened from a file may have no storage; then the choices last as long as the page.
  }
  const judge = document.getElementById("judge");
  judge.value = saved.judge;
  for (const item of items) {
    const choice = item.querySelector(`[value="${saved.choices[item.dataset.item]}"]`);
    if (choice) choice.checked = true;
  }
  const collect = () => {
    const choices = {};
    for (const item of items) {
      const chosen = item.querySelector("input:checked");
      if (chosen) choices[item.dataset.item] = chosen.value;
    }
    return { sheet: form.dataset.sheet, judge: judge.value.trim(), choices };
  };
  const update = () => {
    const state = collect();
    document.getElementById("count").textContent = `${Object.keys(state.choices).length} of ${items.length} judged`;
    try {
      localStorage.setItem(place, JSON.stringify(state));
    } catch {
      // as above
    }
  };
  form.addEventListener("input", update);
  document.addEventListener("keydown", (event) => {
    if (event.target === judge || event.ctrlKey || event.metaKey || event.altKey) return;
    const here = Math.max(0, items.findIndex((item) => item.contains(document.activeElement)));
    const go = (index) => {
      items[index]?.focus();
      items[index]?.scrollIntoView({ block: "start" });
    };
    const choice = { 1: "left", 2: "tie", 3: "right" }[event.key];
    if (choice) {
      items[here].querySelector(`[value="${choice}"]`).checked = true;
      update();
      go(here + 1);
    } else if (event.key === "ArrowDown") go(here + 1);
    else if (event.key === "ArrowUp") go(here - 1);
    else return;
    event.preventDefault();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const link = document.createElement("a");
    const content = new Blob([JSON.stringify(collect(), null, 1)], { type: "application/json" });
    link.href = URL.createObjectURL(content);
    link.download = `judgements-${judge.value.trim().replace(/[^\p{L}\p{N}]+/gu, "-")}.json`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  update();
})();

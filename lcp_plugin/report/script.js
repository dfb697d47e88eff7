"use strict";
(() => {
  const root = document.documentElement;
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  let theme = "auto";
  const paint = () => {
    if (theme === "auto") root.removeAttribute("data-theme");
    else root.setAttribute("data-theme", theme);
    button.textContent = "Colours: " + theme;
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    paint();
  });
  paint();

  for (const run of document.querySelectorAll("[data-run]")) {
    const slider = run.querySelector("input[type=range]");
    if (!slider) continue;
    const output = run.querySelector("output");
    const show = () => {
      const label = run.querySelectorAll("[data-stage-name]")[Number(slider.value)];
      const stage = Number(label.dataset.stageIndex);
      output.textContent = label.dataset.stageName;
      slider.setAttribute("aria-valuetext", label.dataset.stageName);
      for (const row of run.querySelectorAll(".row")) {
        const learned = Number(row.dataset.index);
        row.classList.toggle("before", stage < learned);
        const state = row.querySelector(".state");
        if (stage < learned) state.textContent = "not learned yet";
        else if (stage === learned) state.textContent = "just learned";
        else state.textContent = (stage - learned) + (stage - learned === 1 ? " task ago" : " tasks ago");
        for (const cell of row.querySelectorAll(".cell")) {
          cell.hidden = Number(cell.dataset.stage) !== stage;
          if (!cell.hidden && cell.dataset.lost) state.textContent += " · " + cell.dataset.lost;
        }
      }
    };
    slider.addEventListener("input", show);
    show();
  }

  const choose = document.getElementById("choose-run");
  if (choose) {
    const pick = () => {
      for (const run of document.querySelectorAll("[data-run]")) run.hidden = run.dataset.run !== choose.value;
    };
    choose.addEventListener("change", pick);
    pick();
  }
})();

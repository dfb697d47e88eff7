"use strict";
(() => {
  const LIVELY = 2000, HIDDEN = 15000, SETTLED = 8000; // milliseconds between two looks
  const parts = new Map();
  for (const place of document.querySelectorAll("[data-part]")) parts.set(place.dataset.part, { place, html: null });
  const contact = document.getElementById("contact");
  let timer = 0;

  // What a reader has done to a part outlives its renewal: how far it is scrolled, what is open.
  const renew = (place, html) => {
    const scrolled = [...place.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
    const open = [...place.querySelectorAll("details")].map((box) => box.open);
    place.innerHTML = html;
    place.querySelectorAll(".scroll").forEach((box, i) => { box.scrollLeft = scrolled[i] ?? 0; });
    place.querySelectorAll("details").forEach((box, i) => { box.open = open[i] ?? false; });
  };

  const look = async () => {
    clearTimeout(timer);
    let pause = LIVELY;
    try {
      const answer = await fetch("live", { cache: "no-store" });
      if (!answer.ok) throw new Error(await answer.text());
      const found = await answer.json();
      document.title = found.title;
      for (const [name, part] of parts) {
        if (part.html !== found[name]) renew(part.place, found[name]);
        part.html = found[name];
      }
      contact.textContent = "";
      if (!found.goes_on) pause = SETTLED;
    } catch (error) {
      contact.textContent = error instanceof TypeError ? "lcp watch has ended; this page stands still." : error.message;
    }
    timer = setTimeout(look, document.hidden ? HIDDEN : pause);
  };

  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
  timer = setTimeout(look, LIVELY);
})();

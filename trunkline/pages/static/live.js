// Asks for the page again and again while it says how often, and puts in the parts that changed.
"use strict";
(() => {
  const PATIENCE_MS = 30000;
  const root = document.documentElement;
  const checked = document.getElementById("checked");
  const told = document.getElementById("told");
  const partsOf = (page) => [...page.querySelectorAll("[data-part]")];
  const shown = new Map(partsOf(document).map((part) => [part.id, part.innerHTML]));
  let tag = "";
  let misses = 0;

  function say(text) {
    if (told.textContent !== text) told.textContent = text;
  }

  function put(fresh) {
    const old = document.getElementById(fresh.id);
    const open = [...old.querySelectorAll("details[open][id]")].map((one) => one.id);
    const places = [...old.querySelectorAll(".scroll[id]")].map((one) => [one.id, one.scrollLeft, one.scrollTop]);
    const focused = old.contains(document.activeElement) ? document.activeElement : null;
    const within = focused?.closest("details[id]")?.id;
    old.replaceWith(document.adoptNode(fresh));
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    for (const [id, left, top] of places) document.getElementById(id)?.scrollTo({ left, top, behavior: "instant" });
    const again = focused?.id ? document.getElementById(focused.id) : document.getElementById(within)?.querySelector("summary");
    if (focused) again?.focus({ preventScroll: true });
  }

  function take(text) {
    const page = new DOMParser().parseFromString(text, "text/html");
    if (partsOf(page).some((fresh) => !document.getElementById(fresh.id))) {
      location.reload(); // another kind of page than the one that is shown, such as one that told of a problem
      return;
    }
    const before = document.getElementById("status")?.textContent;
    for (const fresh of partsOf(page)) {
      const html = fresh.innerHTML;
      if (shown.get(fresh.id) !== html) {
        shown.set(fresh.id, html);
        put(fresh);
      }
    }
    document.title = page.title;
    root.dataset.refreshS = page.documentElement.dataset.refreshS ?? "0";
    const after = document.getElementById("status")?.textContent;
    if (before !== after) say(`it is ${after} now`);
  }

  async function look() {
    const answer = await fetch(location.pathname, {
      headers: tag ? { "If-None-Match": tag } : {},
      cache: "no-store",
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
    if (answer.status !== 304) {
      const text = await answer.text();
      if (!answer.ok) throw new Error(`answered ${answer.status}`);
      tag = answer.headers.get("ETag") ?? "";
      take(text);
    }
    checked.textContent = `checked ${new Date().toISOString().slice(11, 19)} UTC`;
  }

  async function turn() {
    if (!document.hidden) {
      try {
        await look();
        if (misses) say("");
        misses = 0;
      } catch (error) {
        misses += 1;
        say(`the dashboard does not answer (${error.message}); trying again`);
      }
    }
    const every = Number(root.dataset.refreshS) || 0;
    if (every) setTimeout(turn, 1000 * Math.min(every * 2 ** misses, 60));
  }

  const every = Number(root.dataset.refreshS) || 0;
  if (every) setTimeout(turn, 1000 * every);
})();

"use strict";
(() => {
  const root = document.documentElement, find = (q, from = document) => [...from.querySelectorAll(q)];
  const clipboard = (text, done) => navigator.clipboard?.writeText(text).then(done, () => {});

  // theme: what the address says, then what was chosen here, then the system's
  const themes = ["auto", "light", "dark"], button = document.getElementById("theme");
  const store = (value) => { try { return value ? localStorage.setItem("g2kit-theme", value) : localStorage.getItem("g2kit-theme"); } catch { return null; } };
  const show = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = "Theme: " + theme;
  };
  let theme = new URLSearchParams(location.search).get("theme") || store() || "auto";
  if (!themes.includes(theme)) theme = "auto";
  show(theme);
  button.addEventListener("click", () => { theme = themes[(themes.indexOf(theme) + 1) % 3]; store(theme); show(theme); });

  // the document this page was made from
  document.getElementById("save").addEventListener("click", () => {
    const text = document.getElementById("document").textContent;
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: "report.json" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  for (const b of find("[data-copy]")) b.addEventListener("click", () => clipboard(b.dataset.copy, () => { b.textContent = "Copied"; }));

  // what is under the pointer in a plot
  const tip = document.getElementById("tip");
  document.addEventListener("pointermove", (e) => {
    const text = e.target.closest?.("[data-tip]")?.dataset.tip;
    tip.style.visibility = text ? "visible" : "hidden";
    if (!text) return;
    tip.textContent = text.split(" | ").join("\n");
    const half = tip.offsetWidth / 2, width = root.clientWidth;
    tip.style.left = Math.min(Math.max(e.clientX, half + 8), width - half - 8) - half + "px";
    tip.style.top = e.pageY - tip.offsetHeight - 16 + "px";
  });

  // tables sort by the values behind the cells, and filter by their text
  const value = (row, i) => { const c = row.cells[i], v = c.dataset.v; return v === undefined ? c.textContent : v === "" ? null : Number(v); };
  for (const th of find("th[aria-sort]")) {
    th.firstChild.addEventListener("click", () => {
      const i = th.cellIndex, body = th.closest("table").tBodies[0];
      const up = th.ariaSort !== "ascending";
      for (const other of find("th[aria-sort]", th.parentNode)) other.ariaSort = "none";
      th.ariaSort = up ? "ascending" : "descending";
      const rows = [...body.rows].sort((a, b) => {
        const x = value(a, i), y = value(b, i);
        if (x === null || y === null) return (x === null) - (y === null);
        return (typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true })) * (up ? 1 : -1);
      });
      body.append(...rows);
    });
  }
  for (const box of find("input[data-filter]")) box.addEventListener("input", () => {
    const wanted = box.value.toLowerCase();
    for (const row of document.getElementById(box.dataset.filter).tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });

  // the section that is being read
  const links = new Map(find(".toc a").map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    for (const e of entries) if (e.isIntersecting) for (const [id, a] of links) a.ariaCurrent = id === e.target.id ? "true" : null;
  }, { rootMargin: "-10% 0px -75% 0px" });
  for (const s of find("main > section")) seen.observe(s);
})();

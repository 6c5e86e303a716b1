// Tables that sort, the filter of the settings, figures made large.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value, numeric = text => text.trim() !== "" && !Number.isNaN(Number(text));
    const order = (a, b) => numeric(a) && numeric(b) ? Number(a) - Number(b) : numeric(a) ? -1 : numeric(b) ? 1 : a.localeCompare(b, "en", { numeric: true });
    body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(value(a), value(b))));
  }));
}

if (at("setting-words")) {
  const rows = [...at("settings").rows].map(row => [row, row.textContent.toLowerCase()]);
  at("setting-words").addEventListener("input", event => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const [row, text] of rows) { row.hidden = !words.every(word => text.includes(word)); shown += !row.hidden; }
    at("setting-count").textContent = `${shown} of ${rows.length}`;
  });
}

if (at("large")) {
  const large = at("large"), room = large.querySelector("div");
  for (const button of document.querySelectorAll(".picture")) {
    button.addEventListener("click", () => {
      const copy = button.firstElementChild.cloneNode();
      room.replaceChildren(copy);
      large.setAttribute("aria-label", copy.alt);
      large.showModal();
    });
  }
  at("close").addEventListener("click", () => large.close());
  large.addEventListener("click", event => { if (event.target === large) large.close(); });
}

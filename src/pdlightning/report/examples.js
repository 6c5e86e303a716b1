// The example browser of a language model: one site at a time, or whatever a search finds in all of them.
if (payload.examples) {
  const { sites, has_text: hasText, threshold } = payload.examples, most = 60;
  const space = hasText ? "" : " ";
  const textOf = new Map();  // of a subcomponent: all its examples in lower case, made when first searched

  const plain = words => words.toLowerCase().replaceAll("·", " ");  // a space that stands alone is shown as a dot

  const text = c => {
    if (!textOf.has(c)) textOf.set(c, plain(c.examples.map(e => e.tokens.join(space)).join("\n")));
    return textOf.get(c);
  };

  const example = e => {
    const row = element("li", { title: `row ${e.row}, position ${e.position}` }, element("i", { textContent: e.ci[e.peak].toFixed(2) }));
    e.tokens.forEach((token, i) => {
      if (i && space) row.append(space);
      if (e.ci[i] < .005) return row.append(token);
      const mark = element("mark", { textContent: token, title: e.ci[i].toFixed(3), className: i === e.peak ? "peak" : "" });
      mark.style.setProperty("--c", `${Math.round(100 * e.ci[i])}%`);
      row.append(mark);
    });
    return row;
  };

  const subcomponent = (site, c, named) => element("details", { className: "example", open: true },
    element("summary", {}, element("b", { textContent: named ? `${site.path} ${c.index}` : c.index }),
      element("span", { textContent: `mean ci ${number(c.mean_ci)} (rank ${c.ranks[0]})` }),
      element("span", { textContent: `at the peaks ${number(c.peak)} (rank ${c.ranks[1]})` }),
      element("span", { textContent: `fires at ${number(100 * c.density)} % (ci > ${threshold})` })),
    element("ol", {}, ...c.examples.map(example)));

  const show = () => {
    const words = plain(at("example-words").value).trim(), chosen = sites[at("example-site").value];
    const found = words
      ? sites.flatMap(site => site.subcomponents.filter(c => String(c.index) === words || text(c).includes(words)).map(c => [site, c]))
      : chosen.subcomponents.map(c => [chosen, c]);
    at("example-list").replaceChildren(...found.slice(0, most).map(([site, c]) => subcomponent(site, c, Boolean(words))));
    const further = found.length > most ? `, the first ${most} shown` : "";
    at("example-count").textContent = words
      ? `${found.length} subcomponents${further}`
      : `${chosen.n_firing} of ${chosen.C} subcomponents fire; ${found.length} shown`;
  };
  at("example-site").addEventListener("change", () => { at("example-words").value = ""; show(); });
  at("example-words").addEventListener("input", show);
  if (sites.length) show();
}
document.documentElement.dataset.ready = "";

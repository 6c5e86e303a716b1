// Curves: log or linear, a legend that switches them, values at the pointer, zoom along an x-axis that charts share.
const ROWS = 4;  // of names under an x-axis; of more names some are left out
const LONG = 8;  // entries of a legend that are shown without being asked for
const groups = {};  // the charts that share their x-axis, its zoom and its reading line

class LineChart {
  constructor(figure, spec) {
    this.figure = figure; this.spec = spec; this.log = spec.scale === "log";
    this.logX = spec.x === "rank" ? Math.max(...spec.series.map(s => s.x.at(-1))) > 100 : this.spansDecades();
    const key = spec.points ? spec.id : spec.x;
    this.group = groups[key] ??= { charts: [], zoom: null, cursor: null };
    this.group.charts.push(this);
    const n = spec.series.length;
    this.series = spec.series.map((s, i) => ({ ...s, on: true, colour: this.colourOf(s, i, n), dashed: n <= 20 && i >= 10 }));
    this.buttons();
    this.svg = drawn("svg", { tabindex: 0, role: "img", "aria-label": this.described() });
    this.goalNames = element("p", { className: "goals-of", hidden: true });
    figure.append(this.svg, this.goalNames);
    this.legend();
    this.listen();
    new ResizeObserver(() => this.draw()).observe(figure);
  }

  colourOf(s, i, n) {
    if ("verdict" in s) return `var(--${s.verdict === true ? "good" : s.verdict === false ? "bad" : "series-0"})`;
    return s.strong ? "var(--ink)" : seriesColour(i, n);
  }

  // As learning rates of a search, or coefficients: the small ones would be one point.
  spansDecades() {
    const xs = this.spec.series.flatMap(s => s.x), least = Math.min(...xs);
    return Boolean(this.spec.points) && !this.spec.ticks && least > 0 && Math.max(...xs) >= 10 * least;
  }

  described() {
    const keys = `Left and right arrows read values${this.spec.points ? "" : ", plus and minus zoom"}.`;
    return `${this.spec.title} against ${this.spec.x}. ${this.spec.said ?? this.saidOfValues()} ${keys}`;
  }

  saidOfValues() {
    const shown = this.series.slice(0, 12), ends = s => apart([Math.min(...s.y), Math.max(...s.y)]);
    const jobs = s => `${s.name}: ${s.y.length} ${s.y.length === 1 ? "job" : "jobs"}, ${ends(s).join(" to ")}`;
    if (this.spec.points) return `${shown.map(jobs).join("; ")}.`;
    const last = apart(shown.map(s => s.y.at(-1)));
    return `Last values: ${shown.map((s, i) => `${s.name} ${last[i]}`).join(", ")}.`;
  }

  buttons() {
    this.scale = quietButton("log", () => { this.log = !this.log; this.draw(); });
    this.scale.setAttribute("aria-label", `Logarithmic scale of ${this.spec.title}`);
    this.reset = quietButton("Reset zoom", () => this.zoom(null), { hidden: true, className: "quiet-button reset" });
    const push = element("span", { className: "push" }, this.reset);
    if (this.spec.x === "rank") {
      const across = quietButton("log rank", () => { this.logX = !this.logX; across.setAttribute("aria-pressed", this.logX); this.draw(); });
      across.setAttribute("aria-pressed", this.logX);
      push.append(across);
    }
    push.append(this.scale);
    this.figure.querySelector("figcaption").append(push);
  }

  legend() {
    if (this.series.length < 2 && !this.spec.points) return;
    const list = element("ul", { className: "legend" });
    list.setAttribute("aria-label", `Curves of ${this.spec.title}`);
    const set = [];
    const show = () => { set.forEach((button, i) => button.setAttribute("aria-pressed", this.series[i].on)); this.draw(); };
    if (this.series.length > 5) {
      for (const [word, on] of [["all", true], ["none", false]]) {
        list.append(element("li", {}, quietButton(word, () => { this.series.forEach(s => { s.on = on; }); show(); })));
      }
    }
    for (const s of this.series) {
      const swatch = element("i");
      swatch.style.borderColor = s.colour;
      if (s.dashed) swatch.style.borderTopStyle = "dashed";
      const button = element("button", { type: "button", "aria-pressed": "true" }, swatch, s.name);
      button.addEventListener("click", () => { s.on = !s.on; show(); });
      set.push(button);
      list.append(element("li", {}, button));
    }
    this.figure.append(list);
    if (this.series.length <= LONG) return;
    list.classList.add("cut");
    this.list = list;
    this.more = quietButton(`Show all ${this.series.length} names`, () => { list.classList.remove("cut"); this.more.hidden = true; });
    this.figure.append(this.more);
  }

  // --- where a value stands
  visible() { return this.series.filter(s => s.on); }

  domain() {
    const xs = this.group.charts.flatMap(chart => chart.series.flatMap(s => [s.x[0], s.x.at(-1)]));
    const all = this.spec.points ? this.series.flatMap(s => s.x) : xs;
    let low = Math.min(...all), high = Math.max(...all);
    if (this.spec.ticks) return [-.5, this.spec.ticks.length - .5];  // each name has a band of its own
    if (this.logX && this.spec.points) { const room = (high / low) ** .06; return [low / room, high * room]; }
    if (this.spec.points) { const room = (high - low) * .06 || .5; low -= room; high += room; }
    return low === high ? [low - .5, high + .5] : [low, high];
  }

  measure() {
    const width = this.figure.clientWidth, height = 270;
    const [x0, x1] = this.group.zoom ?? this.domain();
    let low = Infinity, high = -Infinity, lost = 0;
    for (const s of this.visible()) {
      s.x.forEach((x, i) => {
        const y = s.y[i];
        if (x < x0 || x > x1) return;
        if (this.log && !(y > 0)) { lost++; return; }
        low = Math.min(low, y); high = Math.max(high, y);
      });
    }
    const crossings = this.spec.points ? [] : this.visible().flatMap(s => this.crossings(s, [x0, x1]));
    for (const y of [...crossings, ...this.bounds()]) { low = Math.min(low, y); high = Math.max(high, y); }
    if (low > high) [low, high] = this.log ? [1e-3, 1] : [0, 1];
    if (low === high) [low, high] = this.log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) * .1, high + (Math.abs(high) || 1) * .1];
    if (!this.log && low > 0 && low < high * .5) low = 0;
    const value = this.log ? Math.log10 : y => y;
    let bottom = value(low), top = value(high);
    const room = (top - bottom) * .05;
    top += room; if (!(low === 0 && !this.log)) bottom -= room;
    const [least, most] = this.log ? [10 ** bottom, 10 ** top] : [bottom, top];
    const ticks = ticksOf(least, most, this.log, 5).map(y => Number(y.toPrecision(10))), words = apart(ticks);
    const left = Math.max(62, 26 + Math.max(0, ...words.map(widthOf)));
    const box = { left, right: width - 12, top: lost ? 22 : 10, bottom: height - 36, width, height };
    const across = this.logX ? Math.log10 : x => x;
    const [a, b] = [across(x0), across(x1)];
    this.at = {
      ...box, x0, x1, lost, ticks: ticks.map((y, i) => [y, words[i]]),
      px: x => box.left + (across(x) - a) / (b - a || 1) * (box.right - box.left),
      py: y => box.bottom - (value(y) - bottom) / (top - bottom) * (box.bottom - box.top),
      x: px => { const t = a + (px - box.left) / (box.right - box.left) * (b - a); return this.logX ? 10 ** t : t; },
    };
  }

  // How high a curve is where it enters what is shown, and where it leaves it: between two points it is seen too.
  crossings(s, edges) {
    return edges.flatMap(edge => {
      const i = s.x.findIndex(x => x > edge), [a, b] = [s.y[i - 1], s.y[i]];
      if (i < 1 || this.log && !(a > 0 && b > 0)) return [];
      const part = (edge - s.x[i - 1]) / (s.x[i] - s.x[i - 1]);
      return [this.log ? a ** (1 - part) * b ** part : a + (b - a) * part];
    });
  }

  goals() { return this.spec.goals.filter(goal => this.series.some(s => s.on && s.name === goal.name)); }

  // Where the lines of the goals stand.
  bounds() {
    const all = this.goals().flatMap(goal => [goal.min, goal.max]).filter(bound => bound !== undefined);
    return [...new Set(all)].filter(bound => !this.log || bound > 0);
  }

  // Under the plot, for there no curve runs through it: the curves that share a goal, and the goal.
  nameGoals() {
    const shared = new Map();
    for (const { name, min, max } of this.goals()) {
      const wanted = [...(min === undefined ? [] : [`≥ ${number(min)}`]), ...(max === undefined ? [] : [`≤ ${number(max)}`])];
      const words = wanted.join(" and ") + (this.log && Math.min(min ?? 1, max ?? 1) <= 0 ? " (not on a log scale)" : "");
      shared.set(words, [...(shared.get(words) ?? []), name]);
    }
    this.goalNames.hidden = !shared.size;
    const said = ([words, names]) => element("span", {}, element("i"), `goal: ${names.join(", ")} ${words}`);
    this.goalNames.replaceChildren(...[...shared].map(said));
  }

  // What stands under the x-axis: [where, word].
  ticksAcross() {
    const { x0, x1, left, right } = this.at;
    if (this.spec.ticks) return this.spec.ticks.map((word, i) => [i, word]);
    const whole = this.spec.points && this.series.every(s => s.x.every(Number.isInteger));
    const fits = x => x >= x0 && x <= x1 && (!whole || Number.isInteger(x));
    const all = ticksOf(x0, x1, this.logX, clamp((right - left) / 90, 2, 8)).filter(fits);
    const words = apart(all.map(x => Number(x.toPrecision(10))));
    return all.map((x, i) => [x, words[i]]);
  }

  draw() {
    if (!this.figure.clientWidth) return;  // folded away
    this.measure();
    const { width, left, right, top, bottom, px, py, ticks, lost } = this.at;
    this.scale.setAttribute("aria-pressed", this.log);
    this.reset.hidden = !this.group.zoom;
    const parts = [];
    for (const [y, word] of ticks) {
      parts.push(drawn("line", { class: "grid", x1: left, x2: right, y1: py(y), y2: py(y) }),
        drawn("text", { x: left - 7, y: py(y) + 4, "text-anchor": "end" }, word));
    }
    const across = this.ticksAcross(), widest = Math.max(0, ...across.map(([, word]) => widthOf(word))) + 10;
    const needed = this.spec.ticks ? Math.ceil(widest / ((right - left) / across.length)) : 1;
    const rows = Math.min(needed, ROWS), every = Math.ceil(needed / ROWS), height = this.at.height + 14 * (rows - 1);
    across.forEach(([x, word], i) => {
      parts.push(drawn("line", { class: "axis", x1: px(x), x2: px(x), y1: bottom, y2: bottom + 4 }));
      if (i % every) return;
      const half = widthOf(word) / 2, middle = clamp(px(x), half + 1, width - half - 1);
      parts.push(drawn("text", { class: "across", x: middle, y: bottom + 17 + 14 * (i / every % rows), "text-anchor": "middle" }, word));
    });
    const unit = drawn("text", { x: 0, y: 0, transform: `translate(11 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, this.spec.y);
    parts.push(drawn("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }), unit,
      drawn("text", { x: right, y: height - 3, "text-anchor": "end" }, this.spec.x));
    if (lost) parts.push(drawn("text", { x: right, y: 11, "text-anchor": "end" }, `${number(lost)} ${lost === 1 ? "value" : "values"} at 0 or below: not on a log scale`));
    const clip = `clip-${this.spec.id}`;
    parts.push(drawn("clipPath", { id: clip }, drawn("rect", { x: left - 3, y: top - 3, width: Math.max(0, right - left + 6), height: bottom - top + 6 })));
    const inside = drawn("g", { "clip-path": `url(#${CSS.escape(clip)})` });
    for (const bound of this.bounds()) inside.append(drawn("line", { class: "goal", x1: left, x2: right, y1: py(bound), y2: py(bound) }));
    this.nameGoals();
    for (const s of [...this.visible()].sort((a, b) => a.strong - b.strong)) inside.append(...this.curve(s));
    this.reading = drawn("g");
    parts.push(inside, this.reading);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    this.svg.replaceChildren(...parts);
    this.drawReading();
    if (this.more) this.more.hidden = !this.list.classList.contains("cut") || this.list.scrollHeight <= this.list.clientHeight + 2;
  }

  curve(s) {
    const { px, py } = this.at;
    let path = "", gap = true, shown = 0, last = null;
    const dots = [];
    s.x.forEach((x, i) => {
      if (this.log && !(s.y[i] > 0)) { gap = true; return; }
      last = [px(x), py(s.y[i])];
      path += `${gap ? "M" : "L"}${last[0].toFixed(1)} ${last[1].toFixed(1)}`;
      gap = false; shown++;
      if (this.spec.points || s.x.length <= 12) dots.push(last);
    });
    const style = { stroke: s.colour, "stroke-width": s.strong ? 2.4 : 1.6, ...(s.dashed ? { "stroke-dasharray": "5 3" } : {}) };
    const marks = (shown === 1 && !dots.length ? [last] : dots).map(([cx, cy]) =>
      drawn("circle", { cx, cy, r: this.spec.points ? 4.5 : 2.4, fill: s.colour, "fill-opacity": this.spec.points ? .75 : 1 }));
    return this.spec.points || !path ? marks : [drawn("path", { d: path, ...style }), ...marks];
  }

  // --- reading and zooming
  listen() {
    const inside = event => (event.clientX - this.svg.getBoundingClientRect().left) * this.at.width / this.svg.getBoundingClientRect().width;
    this.svg.addEventListener("pointermove", event => {
      const px = clamp(inside(event), this.at.left, this.at.right);
      if (this.from !== undefined && Math.abs(px - this.from) > 4) this.drawZoom(px);
      this.read(this.at.x(px), event.clientX, event.clientY);
    });
    this.svg.addEventListener("pointerleave", () => { if (this.from === undefined) this.read(null); });
    this.svg.addEventListener("pointerdown", event => {
      if (event.button || event.pointerType === "touch" || this.spec.points) return;
      this.svg.setPointerCapture(event.pointerId);
      this.from = clamp(inside(event), this.at.left, this.at.right);
    });
    this.svg.addEventListener("pointerup", event => {
      if (this.from === undefined) return;
      const [a, b] = [this.from, clamp(inside(event), this.at.left, this.at.right)].sort((x, y) => x - y).map(px => this.at.x(px));
      const drag = Math.abs(this.from - inside(event)) > 6;
      this.from = undefined;
      if (drag) this.zoom([a, b]); else this.drawReading();
    });
    this.svg.addEventListener("dblclick", () => this.zoom(null));
    this.svg.addEventListener("keydown", event => this.key(event));
    this.svg.addEventListener("blur", () => this.read(null));
  }

  key(event) {
    const xs = [...new Set(this.visible().flatMap(s => s.x))].filter(x => x >= this.at.x0 && x <= this.at.x1).sort((a, b) => a - b);
    const now = this.group.cursor === null ? -1 : nearest(xs, this.group.cursor);
    const stride = event.shiftKey ? Math.max(1, Math.round(xs.length / 20)) : 1;
    const to = { ArrowRight: now + stride, ArrowLeft: now < 0 ? xs.length - 1 : now - stride, Home: 0, End: xs.length - 1 }[event.key];
    if (to !== undefined && xs.length) {
      const x = xs[clamp(to, 0, xs.length - 1)], box = this.svg.getBoundingClientRect();
      this.read(x, box.left + this.at.px(x) * box.width / this.at.width, box.top + box.height / 2);
      live.textContent = tip.textContent;
    } else if ("+=-".includes(event.key) && !this.spec.points) {
      const middle = this.group.cursor ?? (this.at.x0 + this.at.x1) / 2, wide = (this.at.x1 - this.at.x0) * (event.key === "-" ? 2 : .5);
      const [low, high] = this.domain(), first = clamp(middle - wide / 2, low, Math.max(low, high - wide));
      this.zoom(wide >= high - low ? null : [first, first + wide]);
    } else if (event.key === "Escape") { this.zoom(null); this.read(null); } else return;
    event.preventDefault();
  }

  zoom(range) {
    this.group.zoom = range;
    this.group.charts.forEach(chart => chart.draw());
  }

  drawZoom(px) {
    this.range?.remove();
    this.range = drawn("rect", { class: "zoomed", x: Math.min(px, this.from), y: this.at.top, width: Math.abs(px - this.from), height: this.at.bottom - this.at.top });
    this.svg.append(this.range);
  }

  read(x, clientX, clientY) {
    this.group.cursor = x;
    this.group.charts.forEach(chart => chart.drawReading());
    if (x === null || !this.found?.length) return hideTip();
    const most = 14, read = [...this.found].sort((a, b) => b.y - a.y).slice(0, most), values = apart(read.map(spot => spot.y));
    const rows = read.map(({ s, x: own, i }, place) => {
      const swatch = element("i");
      swatch.style.borderColor = s.colour;
      const which = s.index ? ` (${this.spec.points ? "job " : ""}${s.index[i]})` : own !== this.found.x && !this.spec.points ? ` (at ${number(own)})` : "";
      return element("tr", {}, element("td", {}, swatch, ` ${s.name}${which} `), element("td", { textContent: `${values[place]} ` }));
    });
    if (this.found.length > most) rows.push(element("tr", {}, element("td", { textContent: `and ${this.found.length - most} lower` })));
    const word = this.spec.ticks?.[this.found.x] ?? number(Number(this.found.x.toPrecision(6)));
    showTip(clientX, clientY, element("b", { textContent: `${this.spec.x} ${word} ` }), element("table", {}, ...rows));
  }

  drawReading() {
    const x = this.group.cursor;
    this.found = [];
    if (!this.reading) return;
    if (x === null || x < this.at.x0 || x > this.at.x1) return this.reading.replaceChildren();
    const fits = s => !(this.log && !(s.y > 0)), spots = [];
    for (const s of this.visible()) {
      if (!s.x.length) continue;
      if (this.spec.points) s.x.forEach((own, i) => spots.push({ s, i, x: own, y: s.y[i] }));
      else { const i = nearest(s.x, x); spots.push({ s, i, x: s.x[i], y: s.y[i] }); }
    }
    if (!spots.length) return this.reading.replaceChildren();
    const closest = spots.reduce((a, b) => Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a).x;
    this.found = this.spec.points ? spots.filter(spot => spot.x === closest) : spots;
    this.found.x = closest;
    const { px, py, top, bottom } = this.at;
    this.reading.replaceChildren(drawn("line", { class: "now", x1: px(closest), x2: px(closest), y1: top, y2: bottom }),
      ...this.found.filter(spot => fits(spot) && spot.x >= this.at.x0 && spot.x <= this.at.x1).map(({ s, x: own, y }) => drawn("circle", { cx: px(own), cy: py(y), r: 3.5, fill: s.colour })));
  }
}

const charts = new Map(payload.charts.map(spec => [spec.id, spec]));
for (const figure of document.querySelectorAll("[data-chart]")) new LineChart(figure, charts.get(figure.dataset.chart));

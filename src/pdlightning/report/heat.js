// Heat maps on canvas: of the cells under one pixel the strongest is shown, so that none is lost; drag looks closer.
const RAMPS = {
  ci: {
    light: ["#ffffff", "#fde3c3", "#fcb285", "#f1705c", "#cd4071", "#932b80", "#5b187f", "#251255", "#000004"],
    dark: ["#15171b", "#251255", "#5b187f", "#932b80", "#cd4071", "#f1705c", "#fca36c", "#fdd49a", "#fcfdbf"],
  },
  weight: {
    light: ["#0a3a70", "#2b74b3", "#6aaed2", "#c0dcec", "#ffffff", "#fbd0b9", "#ec8a6c", "#c23b3c", "#75041f"],
    dark: ["#a8d4ff", "#6aaef0", "#3776b8", "#234468", "#15171b", "#6a3029", "#b44a3c", "#ee8068", "#ffc6b0"],
  },
};

// float16, little-endian, in base64: browsers that know Float16Array are too new to count on.
function halves(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0)), bits = new Uint16Array(bytes.buffer);
  return Float32Array.from(bits, h => {
    const size = h & 0x3ff, power = (h >> 10) & 0x1f, sign = h >> 15 ? -1 : 1;
    return sign * (power === 0 ? size * 2 ** -24 : power === 31 ? Infinity : (1 + size / 1024) * 2 ** (power - 15));
  });
}

function rampOf(name) {
  const stops = RAMPS[name][isDark() ? "dark" : "light"].map(hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)));
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const place = i / 255 * (stops.length - 1), k = Math.min(Math.floor(place), stops.length - 2), f = place - k;
    const [r, g, b] = stops[k].map((from, c) => Math.round(from + f * (stops[k + 1][c] - from)));
    return 0xff000000 | b << 16 | g << 8 | r;
  });
}

class HeatMap {
  constructor(figure, spec) {
    this.figure = figure; this.spec = spec;
    this.rows = spec.n_rows; this.columns = spec.columns.length;
    this.view = this.whole();
    this.reset = quietButton("Reset zoom", () => this.look(this.whole()), { hidden: true, className: "quiet-button reset" });
    figure.querySelector("figcaption").append(element("span", { className: "push" }, this.reset));
    this.canvas = element("canvas", { tabIndex: 0, role: "img", "aria-label": `${spec.title}: ${this.rows} ${spec.rows}s by ${this.columns} subcomponents. Arrows read cells, plus and minus zoom.` });
    this.height = Math.round(clamp(this.rows * 26, 120, 380));
    this.key = element("canvas", { width: 128, height: 1 });
    const ends = spec.colours === "ci" ? ["0", "1"] : [number(-spec.limit), number(spec.limit)];
    this.words = element("span");
    figure.append(this.canvas, element("div", { className: "axes" }, this.words, element("span", { className: "key" }, ends[0], this.key, ends[1])));
    this.listen();
    new ResizeObserver(() => this.draw()).observe(figure);
    painters.push(() => this.draw());
  }

  whole() { return { r0: 0, c0: 0, r1: this.rows, c1: this.columns }; }

  look(view, cell = null) { this.view = view; this.cell = cell; hideTip(); this.draw(); }

  isWhole() { const { r0, c0, r1, c1 } = this.view; return r1 - r0 === this.rows && c1 - c0 === this.columns; }

  draw() {
    const shown = this.figure.clientWidth;
    if (!shown) return;
    const { spec, canvas } = this, { r0, c0, r1, c1 } = this.view;
    this.values ??= halves(spec.values);  // here, so that the page is ready before
    const sharp = Math.min(devicePixelRatio || 1, 2);
    canvas.style.height = `${this.height}px`;
    const width = canvas.width = Math.round(shown * sharp), height = canvas.height = Math.round(this.height * sharp);
    const ramp = rampOf(spec.colours), low = spec.colours === "ci" ? 0 : -spec.limit, scale = 255 / (spec.limit - low);
    const context = canvas.getContext("2d"), image = context.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const edge = (first, last, size) => Uint32Array.from({ length: size + 1 }, (_, i) => first + Math.floor(i * (last - first) / size));
    const rows = edge(r0, r1, height), columns = edge(c0, c1, width);
    const line = new Uint32Array(width);
    for (let y = 0, before = -1; y < height; y++) {
      const top = rows[y], bottom = Math.max(rows[y + 1], top + 1);
      if (top !== before || bottom - top > 1) {
        for (let x = 0; x < width; x++) {
          const right = Math.max(columns[x + 1], columns[x] + 1);
          let strongest = 0;
          for (let r = top; r < bottom; r++) for (let c = columns[x]; c < right; c++) {
            const value = this.values[r * this.columns + c];
            if (Math.abs(value) > Math.abs(strongest)) strongest = value;
          }
          line[x] = ramp[clamp(Math.round((strongest - low) * scale), 0, 255)];
        }
        before = top;
      }
      pixels.set(line, y * width);
    }
    context.putImageData(image, 0, 0);
    this.grid(context, width, height);
    this.mark(context);
    const key = this.key.getContext("2d");
    const band = key.createImageData(128, 1), bandPixels = new Uint32Array(band.data.buffer);
    for (let i = 0; i < 128; i++) bandPixels[i] = ramp[i * 2];
    key.putImageData(band, 0, 0);
    this.reset.hidden = this.isWhole();
    const part = this.isWhole() ? "" : `; shown: ${spec.rows}s ${r0} to ${r1 - 1}, columns ${c0} to ${c1 - 1}`;
    this.words.textContent = `${number(this.rows)} ${spec.rows}s ↓  ${number(this.columns)} subcomponents →${part}`;
  }

  // Lines between cells that are wide enough to bear them.
  grid(context, width, height) {
    const { r0, c0, r1, c1 } = this.view, wide = width / (c1 - c0), high = height / (r1 - r0);
    if (Math.min(wide, high) < 9) return;
    context.fillStyle = colour("line");
    for (let c = 1; c < c1 - c0; c++) context.fillRect(Math.ceil(c * wide), 0, 1, height);
    for (let r = 1; r < r1 - r0; r++) context.fillRect(0, Math.ceil(r * high), width, 1);
  }

  mark(context) {
    const { r0, c0, r1, c1 } = this.view, { width, height } = this.canvas, box = this.range ?? (this.cell && { r0: this.cell[0], c0: this.cell[1], r1: this.cell[0] + 1, c1: this.cell[1] + 1 });
    if (!box) return;
    const x = (box.c0 - c0) * width / (c1 - c0), y = (box.r0 - r0) * height / (r1 - r0);
    const w = Math.max(3, (box.c1 - box.c0) * width / (c1 - c0)), h = Math.max(3, (box.r1 - box.r0) * height / (r1 - r0));
    for (const [name, thick] of [["paper", 5], ["accent", 2.5]]) {
      context.strokeStyle = colour(name); context.lineWidth = thick; context.strokeRect(x, y, w, h);
    }
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect(), { r0, c0, r1, c1 } = this.view;
    return [
      clamp(r0 + Math.floor((event.clientY - box.top) / box.height * (r1 - r0)), r0, r1 - 1),
      clamp(c0 + Math.floor((event.clientX - box.left) / box.width * (c1 - c0)), c0, c1 - 1),
    ];
  }

  said([r, c]) {
    const value = this.values[r * this.columns + c];
    return [element("b", { textContent: `${number(value)} ` }), `${this.spec.rows} ${r}, subcomponent ${this.spec.columns[c]} (column ${c})`];
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointermove", event => {
      const cell = this.cellAt(event);
      if (this.from) {
        const [a, b] = [this.from, cell];
        this.range = { r0: Math.min(a[0], b[0]), c0: Math.min(a[1], b[1]), r1: Math.max(a[0], b[0]) + 1, c1: Math.max(a[1], b[1]) + 1 };
        this.draw();
      }
      showTip(event.clientX, event.clientY, ...this.said(cell));
    });
    canvas.addEventListener("pointerleave", hideTip);
    canvas.addEventListener("pointerdown", event => {
      if (event.button || event.pointerType === "touch") return;
      canvas.setPointerCapture(event.pointerId);
      this.from = this.cellAt(event);
    });
    canvas.addEventListener("pointerup", () => {
      const { range } = this;
      this.from = this.range = null;
      if (range && (range.r1 - range.r0 > 1 || range.c1 - range.c0 > 1)) this.look(range); else this.draw();
    });
    canvas.addEventListener("dblclick", () => this.look(this.whole()));
    canvas.addEventListener("blur", () => { this.cell = null; hideTip(); this.draw(); });
    canvas.addEventListener("keydown", event => this.keyed(event));
  }

  // The value of the cell that the keys have chosen, beside it and to a screen reader.
  tell() {
    const { r0, c0, r1, c1 } = this.view, [r, c] = this.cell, box = this.canvas.getBoundingClientRect();
    showTip(box.left + (c + .5 - c0) / (c1 - c0) * box.width, box.top + (r + .5 - r0) / (r1 - r0) * box.height, ...this.said(this.cell));
    live.textContent = tip.textContent;
  }

  keyed(event) {
    const { r0, c0, r1, c1 } = this.view, [r, c] = this.cell ?? [r0, c0 - (event.key === "ArrowRight")];
    const stride = event.shiftKey ? 10 : 1;
    const to = {
      ArrowUp: [r - stride, c], ArrowDown: [r + stride, c], ArrowLeft: [r, c - stride], ArrowRight: [r, c + stride],
      Home: [r, c0], End: [r, c1 - 1],
    }[event.key];
    if (to) {
      this.cell = [clamp(to[0], r0, r1 - 1), clamp(to[1], c0, c1 - 1)];
      this.draw();
      this.tell();
    } else if ("+=-".includes(event.key)) {
      const times = event.key === "-" ? 2 : .5, [mr, mc] = this.cell ?? [(r0 + r1) >> 1, (c0 + c1) >> 1];
      const high = clamp(Math.round((r1 - r0) * times), Math.min(2, this.rows), this.rows), wide = clamp(Math.round((c1 - c0) * times), Math.min(2, this.columns), this.columns);
      const top = clamp(mr - (high >> 1), 0, this.rows - high), first = clamp(mc - (wide >> 1), 0, this.columns - wide);
      this.look({ r0: top, c0: first, r1: top + high, c1: first + wide }, this.cell);
      if (this.cell) this.tell();
    } else if (event.key === "Escape") this.look(this.whole()); else return;
    event.preventDefault();
  }
}

const maps = new Map(payload.maps.map(spec => [spec.id, spec]));
for (const figure of document.querySelectorAll("[data-map]")) new HeatMap(figure, maps.get(figure.dataset.map));

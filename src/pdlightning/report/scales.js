// Of every plot of lines: colours of its series, ticks of its axes, the measured point next to a place.
function seriesColour(i, n) {
  return n <= 20 ? `var(--series-${i % 10})` : `color-mix(in oklch longer hue, var(--first), var(--last) ${(100 * i / (n - 1)).toFixed(1)}%)`;
}

function ticksOf(low, high, log, count) {
  if (log) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    if (last - first >= 1) {
      const step = Math.ceil((last - first + 1) / count);
      return Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i)).filter((_, i) => i % step === 0);
    }
    const fine = [];
    for (let power = first - 1; power <= last; power++) {
      for (const k of [1, 2, 5]) if (k * 10 ** power >= low && k * 10 ** power <= high) fine.push(k * 10 ** power);
    }
    if (fine.length >= 2) return fine;
  }
  const raw = (high - low) / count, size = 10 ** Math.floor(Math.log10(raw));
  const step = size * [1, 2, 5, 10].find(k => k * size >= raw);
  const start = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.max(0, Math.floor(high / step + 1e-9) - start + 1) }, (_, i) => (start + i) * step);
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle; else high = middle; }
  return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
}

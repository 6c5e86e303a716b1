// What all parts share: the data, elements, numbers, colours, the floating tip, the switch of the scheme.
const payload = JSON.parse(document.getElementById("payload").textContent);
const at = id => document.getElementById(id);
const tip = at("tip"), live = at("live");

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("aria-") || key === "role") made.setAttribute(key, value); else made[key] = value;
  }
  made.append(...children);
  return made;
}

function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Four digits that matter: a tiny number is never 0.
function number(value, digits = 4) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en");
  return size >= 1e-4 && size < 1e6 ? String(Number(value.toPrecision(digits))) : value.toExponential(digits - 1).replace(/\.?0+e/, "e");
}

// Values that are read side by side: in as many digits as tell them apart, up to eight.
function apart(values) {
  const words = digits => values.map(value => number(value, digits)), looks = digits => new Set(words(digits)).size;
  let digits = 4;
  while (digits < 8 && looks(digits) < looks(8)) digits++;
  return words(digits);
}

// --- colours of the scheme in use
const dark = matchMedia("(prefers-color-scheme: dark)");
const painters = [];  // called again when the scheme changes

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : dark.matches;
}

const themes = ["system", "light", "dark"];

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  at("theme").textContent = `Colours: ${theme}`;
  painters.forEach(paint => paint());
}

function remembered() {
  try { return localStorage.getItem("pdlightning-theme"); } catch { return null; }  // a file may have no storage
}

at("theme").addEventListener("click", () => {
  const next = themes[(themes.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % themes.length];
  try { localStorage.setItem("pdlightning-theme", next); } catch { /* it holds for this page */ }
  setTheme(next);
});
dark.addEventListener("change", () => painters.forEach(paint => paint()));
if (themes.includes(remembered())) setTheme(remembered());

// --- the tip beside the pointer, or beside a plot that is read by keyboard
function showTip(x, y, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth ? Math.max(4, x - 16 - width) : x + 16;
  tip.style.left = `${left}px`;
  tip.style.top = `${Math.max(4, Math.min(y - height / 2, innerHeight - height - 4))}px`;
}

function hideTip() { tip.hidden = true; }

function quietButton(text, act, properties = {}) {
  const made = element("button", { type: "button", className: "quiet-button", textContent: text, ...properties });
  made.addEventListener("click", act);
  return made;
}

let ruler = null;

// Of a text in a plot, in pixels.
function widthOf(text) {
  if (!ruler) {
    ruler = document.createElement("canvas").getContext("2d");
    ruler.font = `11px ${getComputedStyle(document.body).fontFamily}`;  // as in the style sheet
  }
  return ruler.measureText(text).width;
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

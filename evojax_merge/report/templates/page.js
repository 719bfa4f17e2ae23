// Draws the charts of the page in the colours of its style, again where the reader's system turns light or dark.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const specs = read("specs");
const frames = read("frames");
const views = new Map();

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A string that is the name of a variable of the style stands for its value.
function coloured(value) {
  if (Array.isArray(value)) return value.map(coloured);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, coloured(part)]));
  }
  const variable = typeof value === "string" && /^var\((--[a-z0-9-]+)\)$/.exec(value);
  return variable ? colour(variable[1]) : value;
}

// The configuration of a chart of so many pixels.
function theme(width) {
  const [ink, soft, line] = ["--ink", "--soft", "--line"].map(colour);
  const font = getComputedStyle(document.body).fontFamily;
  return {
    background: "transparent",
    font,
    autosize: { type: "fit-x", contains: "padding" },
    view: { stroke: null },
    axis: {
      labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 12,
      titleFontSize: 12, titleFontWeight: "normal", titlePadding: 10, labelPadding: 6, tickCount: 5, labelSeparation: 6,
    },
    legend: {
      labelColor: ink, titleColor: soft, labelFontSize: 12.5, titleFontSize: 12.5, titleFontWeight: "normal",
      labelLimit: 240, padding: 4, columns: width < 620 ? 2 : 0,
    },
    title: { color: ink, fontSize: 13, fontWeight: 550, anchor: "start", offset: 10, limit: 320 },
    text: { color: soft, fontSize: 12 },
  };
}

function rows(number, frame) {
  const { rows, columns, values } = frames.maps[number];
  return values[frame].map((value, place) => ({
    row: rows[Math.floor(place / columns.length)], column: columns[place % columns.length], value,
  }));
}

function show(frame) {
  document.querySelector(".slider output").textContent = frames.labels[frame];
  frames.maps.forEach((_, number) => views.get(`map-${number}`)?.data(`cells${number}`, rows(number, frame)).run());
}

const slider = document.querySelector(".slider input");
slider?.addEventListener("input", () => show(Number(slider.value)));

async function draw() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  for (const place of document.querySelectorAll("[data-chart]")) {
    const config = theme(place.clientWidth);
    const options = { actions: false, renderer: "svg", config, tooltip: { theme: dark ? "dark" : "light" } };
    const spec = coloured(specs[place.dataset.chart]);
    const map = /^map-(\d+)$/.exec(place.dataset.chart);
    // The room for the names of rows is measured once.
    if (map) spec.datasets = { [`cells${map[1]}`]: rows(Number(map[1]), Number(slider.value)) };
    const { view } = await vegaEmbed(place, spec, options);
    views.set(place.dataset.chart, view);
  }
  if (slider) show(Number(slider.value));
  document.documentElement.dataset.drawn = "true";
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

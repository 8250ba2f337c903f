"use strict";
// Draws the plots of the page from the JSON in it. Texts only ever become text nodes.

const plots = JSON.parse(document.getElementById("plots").textContent);
const charts = new Map(); // number of a plot -> its chart, once it was drawn
const hidden = plots.map(() => new Set()); // names of curves that the reader has switched off
const root = document.documentElement;

const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
const hue = (number) => color(`hue-${number % 8}`);

function mixed(one, other, share) {
  const parts = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  const [from, to] = [parts(one), parts(other)];
  return `rgb(${from.map((part, i) => Math.round(part + share * (to[i] - part))).join(",")})`;
}

function toned(tone) {
  if (tone === null) return color("soft");
  const half = tone < 0.5 ? 0 : 1;
  return mixed(color(`tone-${half}`), color(`tone-${half + 1}`), 2 * tone - half);
}

const paintOf = (curve) => curve.tone === null ? hue(curve.hue) : toned(curve.tone);

function shown(value) {
  if (typeof value !== "number") return String(value ?? "");
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en");
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

function element(kind, text = "", name = "") {
  const made = document.createElement(kind);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function tip(title, lines) {
  const box = element("div", "", "tip");
  box.append(element("div", title));
  for (const [name, value] of lines) {
    const line = element("div");
    line.append(element("span", name), element("b", shown(value)));
    box.append(line);
  }
  return box;
}

// --- what ECharts is told -------------------------------------------------------------------------

function common() {
  return {
    animation: false,
    textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, fontSize: 11 },
    grid: { left: 8, right: 14, top: 14, bottom: 4, containLabel: true },
    tooltip: {
      confine: true,
      backgroundColor: color("card"),
      borderColor: color("line"),
      padding: [6, 10],
      textStyle: { color: color("ink"), fontSize: 12 },
      extraCssText: "box-shadow: 0 2px 10px rgba(0,0,0,.12)",
    },
  };
}

function axis(told, extra = {}) {
  const made = {
    type: told.options && told.options.length ? "category" : told.log ? "log" : "value",
    name: told.name,
    nameLocation: "middle",
    nameGap: 24,
    nameTextStyle: { color: color("soft"), fontSize: 11 },
    axisLabel: { color: color("soft"), fontSize: 11, hideOverlap: true, formatter: shown },
    axisLine: { show: false, lineStyle: { color: color("line") } },
    axisTick: { show: false },
    splitLine: { lineStyle: { color: color("grid") } },
    ...extra,
  };
  if (made.type === "category") made.data = told.options;
  else made.scale = true;
  if (told.ends) {
    [made.min, made.max] = roomy(told);
    Object.assign(made.axisLabel, { showMinLabel: false, showMaxLabel: false });
  }
  return made;
}

// The ends of an axis with a little room: values at them, and outside of them, must be seen.
function roomy({ log, ends: [low, high] }) {
  const room = (log ? Math.log(high / low) : high - low) * 0.06;
  const [from, to] = log ? [low / Math.exp(room), high * Math.exp(room)] : [low - room, high + room];
  return [({ min }) => Math.min(from, min), ({ max }) => Math.max(to, max)];
}

function band(points, ends, paint) {
  const data = points.map(([x], i) => [x, ends[i][0], ends[i][1]]);
  return {
    type: "custom",
    silent: true,
    clip: true,
    z: 1,
    tooltip: { show: false },
    encode: { x: 0, y: [1, 2] },
    data,
    renderItem: (params, api) => {
      if (params.dataIndexInside) return null;
      const upper = data.map(([x, , high]) => api.coord([x, high]));
      const lower = data.map(([x, low]) => api.coord([x, low])).reverse();
      return { type: "polygon", shape: { points: [...upper, ...lower] }, style: { fill: paint, opacity: 0.13 } };
    },
  };
}

// The part of a curve from one x to another, with a neighbour on each side.
function between(points, from, to) {
  const first = points.findIndex(([x]) => x >= from);
  const after = points.findIndex(([x]) => x > to);
  return [Math.max(0, first < 0 ? points.length : first - 1), after < 0 ? points.length : after + 1];
}

function lines(plot, number) {
  const zoom = plot.zooms ? zoomOf(number) : null;
  const series = [];
  for (const curve of plot.curves) {
    if (hidden[number].has(curve.name)) continue;
    const [begin, end] = zoom ? between(curve.points, zoom.from, zoom.to) : [0, curve.points.length];
    const points = curve.points.slice(begin, end);
    const paint = paintOf(curve);
    if (curve.band.length) series.push(band(points, curve.band.slice(begin, end), paint));
    if (curve.means.length) {
      const [first, after] = zoom ? between(curve.means, zoom.from, zoom.to) : [0, curve.means.length];
      series.push({ type: "line", data: curve.means.slice(first, after), showSymbol: false, silent: true, tooltip: { show: false }, z: 4, color: paint, lineStyle: { width: 1.8 } });
    }
    series.push({
      type: "line",
      name: curve.name,
      data: points,
      step: plot.in_stairs ? "end" : false,
      areaStyle: plot.in_stairs ? { opacity: 0.12 } : null,
      showSymbol: points.length < (curve.held_out ? 60 : 2),
      symbol: "circle",
      symbolSize: 6,
      z: curve.held_out ? 3 : 2,
      color: paint,
      lineStyle: { width: curve.held_out || plot.in_stairs ? 2 : 1.2, opacity: faintness(curve, plot), type: curve.hue > 7 ? "dashed" : "solid" },
      emphasis: { disabled: true },
    });
  }
  const drawn = series.find((each) => each.type === "line" && each.name);
  if (drawn && plot.marks.length) drawn.markLine = marked(plot.marks);
  const made = common();
  const whole = plot.zooms ? wholeOf(number) : null;
  const ends = zoom ?? whole;
  return {
    ...made,
    grid: { ...made.grid, bottom: 20, top: plot.marks.length ? 24 : 14 },
    tooltip: {
      ...made.tooltip,
      trigger: "axis",
      axisPointer: { type: "line", lineStyle: { color: color("soft"), width: 1 } },
      formatter: ([first]) => {
        const seen = plot.curves.filter((curve) => !hidden[number].has(curve.name));
        return tip(`${plot.x_name} ${shown(first.axisValue)}`, seen.map((curve) => near(curve, first.axisValue)));
      },
    },
    xAxis: axis({ name: plot.x_name }, { splitLine: { show: false }, ...(ends ? { min: ends.from, max: ends.to } : {}) }),
    yAxis: axis({ name: "" }),
    series,
  };
}

// The name and the value of a curve at the point that is nearest to an x.
function near(curve, x) {
  let [low, high] = [0, curve.points.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (curve.points[middle][0] <= x) low = middle;
    else high = middle;
  }
  const [at, value] = Math.abs(curve.points[high][0] - x) < Math.abs(curve.points[low][0] - x) ? curve.points[high] : curve.points[low];
  return [at === x ? curve.name : `${curve.name}, at ${shown(at)}`, value];
}

function faintness(curve, plot) {
  if (curve.held_out || plot.in_stairs) return 1;
  return curve.means.length ? 0.25 : 0.6;
}

function marked(marks) {
  return {
    silent: true,
    symbol: "none",
    lineStyle: { color: color("soft"), type: "dashed", width: 1 },
    label: { color: color("soft"), fontSize: 10, position: "end", distance: 5, formatter: (mark) => mark.name },
    data: marks.map((mark) => ({ name: mark.text, xAxis: mark.x })),
  };
}

function dots(plot) {
  const place = (dot) => [dot.x, dot.y];
  const series = [
    {
      type: "scatter",
      z: 3,
      data: plot.dots.map((dot) => ({
        value: place(dot),
        dot,
        symbol: dot.look === "cross" ? "path://M0,0L10,10M10,0L0,10" : "circle",
        symbolSize: { best: 16, plain: 11, small: 7, cross: 9 }[dot.look],
        itemStyle: {
          color: toned(dot.tone),
          borderColor: dot.look === "best" ? color("alarm") : color("card"),
          borderWidth: dot.look === "best" ? 2.5 : 1,
          ...(dot.look === "cross" ? { borderColor: color("soft"), borderWidth: 2 } : {}),
        },
        label: {
          show: dot.look === "best" || !plot.tones,
          formatter: () => dot.name,
          position: "top",
          color: color("ink"),
          fontSize: 11,
          width: 110,
          overflow: "truncate",
        },
      })),
      labelLayout: { hideOverlap: true },
    },
  ];
  if (plot.path.length) {
    series.push({ type: "line", data: plot.path, showSymbol: false, silent: true, z: 2, color: color("soft"), lineStyle: { width: 1.5, type: "dashed" } });
  }
  const ranges = plot.dots.filter((dot) => dot.range_x || dot.range_y);
  if (ranges.length) series.push(bars(ranges));
  const made = common();
  const sides = (told) => ({ boundaryGap: told.options.length ? true : ["6%", "6%"] });
  return {
    ...made,
    grid: { ...made.grid, bottom: 20, top: 26, right: 26 },
    tooltip: {
      ...made.tooltip,
      formatter: ({ data }) => data.dot ? tip(data.dot.name, [[plot.x.name, data.dot.x], [plot.y.name, data.dot.y], ...data.dot.told]) : "",
    },
    xAxis: axis(plot.x, sides(plot.x)),
    yAxis: axis(plot.y, { nameLocation: "end", nameGap: 8, nameTextStyle: { color: color("soft"), fontSize: 11, align: "left" }, ...sides(plot.y) }),
    series,
  };
}

// Intervals of dots, in x or in y.
function bars(ranges) {
  return {
    type: "custom",
    silent: true,
    z: 1,
    tooltip: { show: false },
    data: ranges.map((dot) => [dot.x, dot.y]),
    renderItem: (params, api) => {
      const dot = ranges[params.dataIndex];
      const line = (from, to) => {
        const [[x1, y1], [x2, y2]] = [api.coord(from), api.coord(to)];
        return { type: "line", shape: { x1, y1, x2, y2 }, style: { stroke: color("soft"), lineWidth: 1.5 } };
      };
      const children = [];
      if (dot.range_x) children.push(line([dot.range_x[0], dot.y], [dot.range_x[1], dot.y]));
      if (dot.range_y) children.push(line([dot.x, dot.range_y[0]], [dot.x, dot.range_y[1]]));
      return { type: "group", children };
    },
  };
}

function intervals(plot, number) {
  const names = plot.rows.map((row) => row.name);
  const made = common();
  const width = Math.min(220, plotOf(number).clientWidth / 2.5);
  return {
    ...made,
    grid: { ...made.grid, bottom: 20 },
    tooltip: {
      ...made.tooltip,
      formatter: ({ dataIndex }) => {
        const row = plot.rows[dataIndex];
        const ends = row.low === null ? [] : [["from", row.low], ["to", row.high]];
        return tip(row.name, [[plot.x_name, row.value], ...ends]);
      },
    },
    xAxis: axis({ name: plot.x_name }, plot.from_zero ? { min: 0 } : {}),
    yAxis: axis({ name: "", options: names }, {
      inverse: true,
      splitLine: { show: false },
      axisLabel: { color: color("ink"), fontSize: 11, width, overflow: "truncate", interval: 0 },
    }),
    series: [
      {
        type: "custom",
        silent: true,
        encode: { x: [1, 2], y: 0 },
        data: plot.rows.map((row, i) => [i, row.low ?? row.value, row.high ?? row.value]),
        renderItem: (params, api) => {
          const [left, y] = api.coord([api.value(1), api.value(0)]);
          const [right] = api.coord([api.value(2), api.value(0)]);
          const stroke = { stroke: hue(0), lineWidth: 2, opacity: 0.6 };
          return { type: "line", shape: { x1: left, y1: y, x2: right, y2: y }, style: stroke };
        },
      },
      { type: "scatter", symbolSize: 9, color: hue(0), data: plot.rows.map((row, i) => [row.value, i]) },
    ],
  };
}

function parallel(plot) {
  const made = common();
  return {
    ...made,
    parallel: { left: 40, right: 50, top: 34, bottom: 18 },
    parallelAxis: plot.axes.map((told, dim) => ({
      ...axis(told),
      dim,
      nameLocation: "end",
      nameGap: 10,
      nameTruncate: { maxWidth: 110 },
      axisLine: { show: true, lineStyle: { color: color("line") } },
    })),
    tooltip: {
      ...made.tooltip,
      formatter: ({ data }) => data.strand ? tip(data.strand.name, plot.axes.map((told, i) => [told.name, data.strand.values[i]])) : "",
    },
    series: [
      {
        type: "parallel",
        smooth: false,
        emphasis: { lineStyle: { width: 4 } },
        data: plot.strands.map((strand) => ({
          value: strand.values.map((value) => value ?? "-"),
          strand,
          lineStyle: { color: toned(strand.tone), width: strand.is_best ? 3.5 : 1.5, opacity: strand.is_best ? 1 : 0.8 },
        })),
      },
    ],
  };
}

const kinds = { lines, dots, intervals, parallel };

// --- drawing --------------------------------------------------------------------------------------

const figureOf = (number) => document.querySelector(`[data-plot="${number}"]`);
const plotOf = (number) => figureOf(number).querySelector(".plot");
const panelOf = (number) => figureOf(number).closest(".panel");
const zooms = new Map(); // panel -> {from, to} that the reader chose
const zoomOf = (number) => zooms.get(panelOf(number)) ?? null;
const wholes = new Map(); // panel -> the first and last x of all its plots

function wholeOf(number) {
  const panel = panelOf(number);
  if (!wholes.has(panel)) {
    const ends = plots.flatMap((plot, other) =>
      plot.kind === "lines" && plot.zooms && panelOf(other) === panel
        ? plot.curves.filter((curve) => curve.points.length).flatMap(({ points }) => [points[0][0], points[points.length - 1][0]])
        : []);
    wholes.set(panel, ends.length ? { from: Math.min(...ends), to: Math.max(...ends) } : null);
  }
  return wholes.get(panel);
}

function draw(number) {
  const plot = plots[number];
  const place = plotOf(number);
  if (!place.clientWidth) return; // on a tab that is not shown
  if (!charts.has(number)) {
    if (plot.kind === "intervals") place.style.height = `${Math.max(7, 3 + 1.7 * plot.rows.length)}rem`;
    charts.set(number, echarts.init(place, null, { renderer: "svg" }));
    new ResizeObserver(() => before === null && fit(number)).observe(place);
    if (plot.kind === "lines" && plot.zooms) drawsToZoom(number);
  }
  fit(number);
  charts.get(number).setOption(kinds[plot.kind](plot, number), { notMerge: true });
  legend(number);
}

// A plot on a tab that is not shown keeps its size: it has none now, but may go on paper.
function fit(number) {
  const chart = charts.get(number);
  const { clientWidth: width, clientHeight: height } = plotOf(number);
  if (width && (width !== chart.getWidth() || height !== chart.getHeight())) chart.resize();
}

const drawAll = () => plots.forEach((_, number) => draw(number));

function legend(number) {
  const plot = plots[number];
  const list = figureOf(number).querySelector(".legend");
  if (plot.kind === "lines" && !plot.tones) {
    list.replaceChildren(...plot.curves.map((curve) => {
      const button = element("button");
      const line = element("i", "", curve.held_out || plot.in_stairs ? "" : "thin");
      line.style.borderColor = paintOf(curve);
      button.type = "button";
      button.append(line, curve.name);
      button.setAttribute("aria-pressed", String(!hidden[number].has(curve.name)));
      button.addEventListener("click", () => {
        if (!hidden[number].delete(curve.name)) hidden[number].add(curve.name);
        draw(number);
      });
      const item = element("li");
      item.append(button);
      return item;
    }));
  } else if (plot.tones) {
    const [name, low, high] = plot.tones;
    list.replaceChildren(...[[0, low], [0.5, (low + high) / 2], [1, high]].map(([tone, value], place) => {
      const item = element("li", "", "note");
      const dot = element("b", "\u25cf ");
      dot.style.color = toned(tone);
      item.append(dot, `${place ? "" : `${name} `}${shown(value)}`);
      return item;
    }));
  }
}

// --- zoom -----------------------------------------------------------------------------------------

function zoomTo(panel, from, to) {
  if (from === null) zooms.delete(panel);
  else zooms.set(panel, { from: Math.min(from, to), to: Math.max(from, to) });
  plots.forEach((plot, number) => {
    if (plot.kind === "lines" && plot.zooms && panelOf(number) === panel) draw(number);
  });
  const first = plots.findIndex((plot, number) => plot.kind === "lines" && plot.zooms && panelOf(number) === panel);
  const now = zooms.get(panel) ?? (first < 0 ? null : wholeOf(first));
  const form = panel.querySelector(".zoom");
  if (form && now) [form.elements.from.value, form.elements.to.value] = [now.from, now.to];
}

// A mouse that draws over a part of a plot zooms all plots of the tab to it.
function drawsToZoom(number) {
  const chart = charts.get(number);
  const place = plotOf(number);
  const shade = element("div");
  shade.style.cssText = "position:absolute;top:0;bottom:0;pointer-events:none;opacity:.15;display:none";
  place.append(shade);
  let begun = null;
  const at = (event) => event.clientX - place.getBoundingClientRect().left;
  place.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "mouse" && event.button === 0) begun = at(event);
  });
  window.addEventListener("pointermove", (event) => {
    if (begun === null) return;
    const [left, right] = [begun, at(event)].sort((a, b) => a - b);
    Object.assign(shade.style, { display: "block", left: `${left}px`, width: `${right - left}px`, background: color("accent") });
  });
  window.addEventListener("pointerup", (event) => {
    if (begun === null) return;
    const ends = [begun, at(event)].map((x) => chart.convertFromPixel({ xAxisIndex: 0 }, x));
    const wide = Math.abs(at(event) - begun) > 8;
    begun = null;
    shade.style.display = "none";
    const whole = wholeOf(number);
    const [from, to] = ends.map((x) => Math.round(Math.min(whole.to, Math.max(whole.from, x))));
    if (wide && from !== to) zoomTo(panelOf(number), from, to);
  });
  place.addEventListener("dblclick", () => zoomTo(panelOf(number), null));
}

for (const form of document.querySelectorAll(".zoom")) {
  const panel = form.closest(".panel");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", () => {
    const [from, to] = [form.elements.from, form.elements.to].map((input) => input.valueAsNumber);
    if (Number.isFinite(from) && Number.isFinite(to) && from !== to) zoomTo(panel, from, to);
  });
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    zoomTo(panel, null);
  });
}

// --- numbers --------------------------------------------------------------------------------------

const tables = {
  lines: (plot) => [
    [plot.x_name, ...plot.curves.flatMap((curve) => curve.band.length ? [curve.name, "from", "to"] : [curve.name])],
    [...new Set(plot.curves.flatMap((curve) => curve.points.map(([x]) => x)))].sort((a, b) => a - b).map((x) => [
      x,
      ...plot.curves.flatMap((curve) => {
        const at = indexOf(curve).get(x);
        const value = at === undefined ? null : curve.points[at][1];
        return curve.band.length ? [value, ...(at === undefined ? [null, null] : curve.band[at])] : [value];
      }),
    ]),
  ],
  dots: (plot) => [
    ["", plot.x.name, plot.y.name, ...(plot.dots[0]?.told ?? []).map(([name]) => name)],
    plot.dots.map((dot) => [dot.name, dot.x, dot.y, ...dot.told.map(([, value]) => value)]),
  ],
  intervals: (plot) => [["", plot.x_name, "from", "to"], plot.rows.map((row) => [row.name, row.value, row.low, row.high])],
  parallel: (plot) => [["", ...plot.axes.map((told) => told.name)], plot.strands.map((strand) => [strand.name, ...strand.values])],
};

const indexes = new Map();
function indexOf(curve) {
  if (!indexes.has(curve)) indexes.set(curve, new Map(curve.points.map(([x], at) => [x, at])));
  return indexes.get(curve);
}

function table([columns, rows]) {
  const made = element("table");
  const head = made.createTHead().insertRow();
  columns.forEach((column, at) => head.append(element("th", column, at ? "number" : "")));
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const value of row) line.append(element("td", value === null ? "" : shown(value), typeof value === "number" ? "number" : ""));
  }
  const wide = element("div", "", "wide");
  wide.append(made);
  return wide;
}

for (const details of document.querySelectorAll(".numbers")) {
  details.addEventListener("toggle", () => {
    const plot = plots[Number(details.closest("figure").dataset.plot)];
    if (details.open && details.childElementCount === 1) details.append(table(tables[plot.kind](plot)));
  });
}

// --- tabs, light and dark, print ------------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];
const panels = [...document.querySelectorAll(".panel")];

function show(number) {
  tabs.forEach((tab, at) => tab.setAttribute("aria-selected", String(at === number)));
  panels.forEach((panel, at) => { panel.hidden = at !== number; });
  drawAll();
}

tabs.forEach((tab, number) => tab.addEventListener("click", () => show(number)));

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const follow = () => { root.dataset.theme = dark.matches ? "dark" : "light"; };
dark.addEventListener("change", () => { follow(); drawAll(); });
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  drawAll();
});

const paper = window.matchMedia("print");
let before = null; // what the screen showed, while the page is on paper

// A browser lays pages out for paper after it has said so: the pictures are drawn before, on all
// tabs, and get a viewBox, with which the style sheet makes them as wide as their place on paper.
function toPaper(on) {
  if (on === (before !== null)) return;
  if (on) {
    before = { theme: root.dataset.theme, shown: panels.findIndex((panel) => !panel.hidden) };
    for (const panel of panels) panel.hidden = false;
    root.dataset.theme = "light";
    drawAll();
    for (const svg of document.querySelectorAll(".plot svg")) {
      svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${svg.getAttribute("height")}`);
    }
    return;
  }
  const { theme, shown } = before;
  before = null;
  root.dataset.theme = theme;
  for (const svg of document.querySelectorAll(".plot svg")) svg.removeAttribute("viewBox");
  show(shown);
}

paper.addEventListener("change", ({ matches }) => toPaper(matches));
window.addEventListener("beforeprint", () => toPaper(true));
window.addEventListener("afterprint", () => toPaper(false));

follow();
drawAll();
for (const panel of panels) zoomTo(panel, null);
root.dataset.drawn = "yes";

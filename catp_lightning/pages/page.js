"use strict";

// Tables: a click on a column's head sorts by it, a second click the other way round. Cells that begin with a number
// are sorted by it, empty ones come last.
function sorted(table, column, descending) {
  const body = table.tBodies[0];
  const key = (row) => {
    const text = row.cells[column].textContent.trim();
    return { text, number: parseFloat(text.replace(/,/g, "").replace(/^\+/, "")) };
  };
  const rows = [...body.rows].map((row) => ({ row, ...key(row) }));
  const numbers = rows.every(({ text, number }) => text === "" || text === "-" || !Number.isNaN(number));
  rows.sort((one, other) => {
    const empty = (cell) => cell.text === "" || cell.text === "-";
    if (empty(one) || empty(other)) return empty(one) - empty(other);
    const order = numbers ? one.number - other.number : one.text.localeCompare(other.text);
    return descending ? -order : order;
  });
  body.append(...rows.map(({ row }) => row));
}

for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sorted(table, column, descending);
    });
  });
}

// Examples: one at a time, of one kind at a time.
const examples = document.getElementById("examples");
if (examples !== null) {
  const all = [...examples.querySelectorAll(".example")];
  const kinds = [...examples.querySelectorAll("button[data-kind]")];
  let kind = kinds[0].dataset.kind;
  let place = 0;
  const show = () => {
    const own = all.filter((example) => example.dataset.kind === kind);
    place = (place + own.length) % own.length;
    all.forEach((example) => { example.hidden = example !== own[place]; });
    kinds.forEach((button) => button.setAttribute("aria-pressed", button.dataset.kind === kind));
    examples.querySelector("output").textContent = `${place + 1} of ${own.length}`;
  };
  kinds.forEach((button) => button.addEventListener("click", () => { kind = button.dataset.kind; place = 0; show(); }));
  for (const button of examples.querySelectorAll("button[data-step]"))
    button.addEventListener("click", () => { place += Number(button.dataset.step); show(); });
  show();
}

// Plots: drawn by Bokeh from the numbers in the page. A click on a name in the legend hides what it names.
const SANS = "system-ui, sans-serif";
const TARGET = 24; // pixels around a point in which it is pointed at: a finger is no needle
const MARKS = {
  circle: "●", square: "■", triangle: "▲", inverted_triangle: "▼", diamond: "◆", plus: "✚", x: "✕", star: "★", hex: "⬢",
};

function axis(model, { label, ticks }) {
  model.axis_label = label.length > 40 ? label.replace(/, (?!\n)|,\n/, ",\n") : label;
  model.ticker = new Bokeh.FixedTicker({ ticks: ticks.map(([place]) => place) });
  model.major_label_overrides = new Map(ticks);
  model.major_label_text_font = model.axis_label_text_font = SANS;
  model.axis_label_text_font_style = "normal";
  model.major_label_policy = new Bokeh.NoOverlap();
}

function column(points, place) {
  return points.map((point) => point[place]);
}

const f = (field) => ({ field });

// Returns the renderers of one series, and among them those that are hovered over.
function draw(plot, series, x) {
  const { name, color, dash, width } = series;
  if (series.at !== undefined) {
    const line = { x: x.range, y: [series.at, series.at], text: [series.text, series.text], name: [name, name] };
    const source = new Bokeh.ColumnDataSource({ data: line });
    const look = { source, line_color: color, line_dash: dash, line_width: width };
    return { all: [plot.line(f("x"), f("y"), look)], hovered: [] };
  }
  const names = series.texts.map(() => name);
  if (series.cells !== undefined) {
    const [xs, ys, w, h, c] = [0, 1, 2, 3, 4].map((place) => column(series.cells, place));
    const source = new Bokeh.ColumnDataSource({ data: { x: xs, y: ys, w, h, c, text: series.texts, name: names } });
    const cells = plot.rect(f("x"), f("y"), f("w"), f("h"), { source, fill_color: f("c"), line_color: f("c") });
    return { all: [cells], hovered: [cells] };
  }
  const [xs, ys, low, high] = [0, 1, 2, 3].map((place) => column(series.points, place));
  const source = new Bokeh.ColumnDataSource({ data: { x: xs, y: ys, low, high, text: series.texts, name: names } });
  const all = [plot.segment(f("x"), f("low"), f("x"), f("high"), { source, line_color: color, line_width: 1.2 })];
  if (dash) all.push(plot.line(f("x"), f("y"), { source, line_color: color, line_dash: dash, line_width: width }));
  const look = { source, marker: series.marker || "circle", size: series.marker ? 9 : 4, color };
  const points = plot.scatter(f("x"), f("y"), look);
  const around = plot.scatter(f("x"), f("y"), { source, size: TARGET, fill_alpha: 0, line_alpha: 0 });
  return { all: [...all, points, around], hovered: [around] };
}

function drawn(panel, place, shown) {
  const plot = Bokeh.Plotting.figure({
    tools: [], toolbar_location: null, sizing_mode: "stretch_both", title: panel.title || null,
    x_range: panel.x.range, y_range: panel.y.range, background_fill_color: null, border_fill_color: null,
    outline_line_color: null,
  });
  axis(plot.xaxis, panel.x);
  axis(plot.yaxis, panel.y);
  const hovered = [];
  for (const series of panel.series) {
    const found = draw(plot, series, panel.x);
    hovered.push(...found.hovered);
    const mark = MARKS[series.marker] ?? "—";
    if (series.name) shown.push({ name: series.name, color: series.color, mark, renderers: found.all });
  }
  const tooltips = [["", "@name"], ["", "@text"]];
  plot.add_tools(new Bokeh.HoverTool({ renderers: hovered, tooltips, limit: 5 }));
  return Bokeh.Plotting.show(plot, place);
}

function legend(place, shown) {
  const names = [...new Set(shown.map(({ name }) => name))];
  for (const name of names) {
    const own = shown.filter((one) => one.name === name);
    const button = document.createElement("button");
    const mark = document.createElement("i");
    mark.style.color = own[0].color;
    mark.append(own[0].mark);
    button.type = "button";
    button.append(mark, name);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const visible = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", visible);
      own.forEach(({ renderers }) => renderers.forEach((one) => { one.visible = visible; }));
    });
    place.append(button);
  }
}

const figures = JSON.parse(document.getElementById("plots").textContent);
for (const place of document.querySelectorAll("[data-figure]")) {
  const shown = [];
  const [grid, names] = ["panels", "legend"].map((kind) => {
    const made = document.createElement("div");
    made.className = kind;
    place.append(made);
    return made;
  });
  for (const panel of figures[place.dataset.figure]) {
    const box = document.createElement("div");
    grid.append(box);
    drawn(panel, box, shown);
  }
  legend(names, shown);
}

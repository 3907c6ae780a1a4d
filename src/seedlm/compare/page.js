// The charts and lists of the report, drawn from the comparison in #data for the models that are ticked.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const models = data.models;
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#3E9BD4"]; // after Okabe and Ito; yellow darkened
const SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"];
const SYMBOLS = ["●", "■", "▲", "◆", "✚", "▼"]; // the same, in text
const DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 3], [4, 4]];
const PAGE = 25; // items in a list before "more"
const boxes = [...document.querySelectorAll("[data-model]")];
const original = models[0] && models[0].original ? models[0] : null;
const slots = new Map(); // model -> its colour and symbol, kept while it stays ticked

// Names for charts: long ones keep their ends, which tell runs apart, unless two would then be equal.
const cut = models.map(({ label }) => (label.length > 20 ? `${label.slice(0, 7)}…${label.slice(-12)}` : label));
const names = cut.map((name, model) => (cut.indexOf(name) === cut.lastIndexOf(name) ? name : models[model].label));

const byId = (id) => document.getElementById(id);
const ticked = () => [...slots.keys()].sort((a, b) => a - b);

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function key(model) {
  const slot = slots.get(model);
  const node = make("span", "key", slot === undefined ? "" : SYMBOLS[slot]);
  if (slot !== undefined) node.style.color = COLOURS[slot];
  return node;
}

// ---- charts ----

const CONFIG = {
  font: "system-ui, sans-serif", background: "white", view: { stroke: null },
  axis: { labelColor: "#1a1a1a", titleColor: "#1a1a1a", titleFontWeight: "normal", gridColor: "#e6e6e6", labelFontSize: 12, titleFontSize: 12 },
  legend: { labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" },
};

function draw(place, spec, values, onClick) {
  const node = typeof place === "string" ? byId(place) : place;
  if (!values.length) return node.replaceChildren(make("p", "none", "Not recorded for these models."));
  const whole = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container", autosize: { type: "fit-x", contains: "padding" }, data: { values }, config: CONFIG, ...spec };
  return vegaEmbed(node, whole, { actions: false, renderer: "svg", ast: true }).then(({ view }) => onClick && view.addEventListener("click", (_, item) => onClick(item && item.datum)));
}

// Colour and shape by model, for those that are ticked.
function scales(chosen, symbolStrokeWidth) {
  const domain = chosen.map((model) => names[model]);
  const range = (list) => chosen.map((model) => list[slots.get(model)]);
  const legend = { title: null, orient: "top", columns: document.body.clientWidth < 600 ? 2 : 3, labelLimit: 150, symbolStrokeWidth };
  return {
    color: { field: "name", type: "nominal", scale: { domain, range: range(COLOURS) }, legend },
    shape: { field: "name", type: "nominal", scale: { domain, range: range(SHAPES) }, legend },
    dash: { field: "name", type: "nominal", scale: { domain, range: range(DASHES) }, legend },
  };
}

const METRICS = [
  ["kl", "KL divergence, nats", "log"], ["perplexity", "perplexity", "log"],
  ["top1_agreement", "same top token", "linear"], ["tasks", "mean accuracy of tasks", "linear"],
].filter(([name]) => data.fronts[name].bits_per_weight.length);

function estimate(row, metric) {
  return metric === "tasks" ? row.tasks_mean : row.metrics[metric];
}

function drawQuality() {
  const [name, title, scale] = METRICS.find(([each]) => each === byId("metric").value) || METRICS[0];
  for (const [place, field, axis, unit] of [["by-bits", "bits_per_weight", "bits per compressed weight", 1], ["by-bytes", "bytes", "MB of weight files", 1e6]]) {
    const values = [];
    models.forEach((row, model) => {
      const found = estimate(row, name);
      if (row.original || !found || found.mean === null || row[field] === null) return;
      const error = found.standard_error || 0;
      values.push({
        model: row.label, name: names[model], method: row.method, place: model, x: row[field] / unit, y: found.mean, error,
        low: scale === "log" ? Math.max(found.mean - error, found.mean / 10) : found.mean - error, high: found.mean + error, ticked: slots.has(model),
      });
    });
    const front = data.fronts[name][field].map((model) => values.find((value) => value.place === model));
    const middle = values.reduce((sum, value) => Math.max(sum, value.x), -Infinity) / 2 + values.reduce((sum, value) => Math.min(sum, value.x), Infinity) / 2;
    const x = { field: "x", type: "quantitative", title: axis, scale: { zero: false, padding: 30, nice: false }, axis: { tickCount: 6, ...(new Set(values.map((value) => value.x)).size > 1 ? {} : { format: ".3~g" }) } };
    const y = { field: "y", type: "quantitative", title, scale: { type: scale, ...(scale === "log" ? {} : { zero: false }), padding: 20, nice: false }, axis: { tickCount: 6, labelOverlap: true } };
    const tooltip = [{ field: "model" }, { field: "method" }, { field: "x", title: axis, format: ".4~g" }, { field: "y", title, format: ".4~g" }, { field: "error", title: "standard error", format: ".2~g" }];
    const { color, shape } = scales(ticked(), 0);
    const labelled = apart(values.filter((value) => values.length <= 8 || value.ticked || front.includes(value)), middle, scale);
    const layer = [
      { data: { values: front }, mark: { type: "line", interpolate: "step-after", color: "#999", strokeDash: [4, 3] }, encoding: { x, y } },
      { mark: { type: "rule", color: "#555" }, encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" } } },
      { data: { values: values.filter((value) => !value.ticked) }, mark: { type: "point", filled: true, size: 45, color: "#8a8a8a" }, encoding: { x, y, tooltip } },
      { data: { values: values.filter((value) => value.ticked) }, mark: { type: "point", filled: true, size: 110, opacity: 1 }, encoding: { x, y, tooltip, color: { ...color, legend: null }, shape: { ...shape, legend: null } } },
      ...[["left", 8], ["right", -8]].map(([align, dx]) => ({ // of a point on the right half: on its left
        data: { values: labelled.filter((value) => (value.x > middle) === (align === "right")) },
        mark: { type: "text", align, dx, dy: -8, fontSize: 12, limit: 140 }, encoding: { x, y, text: { field: "name" }, color: { value: "#1a1a1a" } },
      })),
    ].filter((each) => !each.data || each.data.values.length);
    const known = original && estimate(original, name);
    if (known && known.mean !== null && name !== "kl") {
      layer.unshift(
        { data: { values: [{ y: known.mean }] }, mark: { type: "rule", color: "#1a1a1a", strokeDash: [2, 2] }, encoding: { y } },
        { data: { values: [{ y: known.mean, text: `original ${known.mean.toPrecision(4)}` }] }, mark: { type: "text", align: "left", x: 4, dy: -6, fontSize: 12 }, encoding: { y, text: { field: "text" } } },
      );
    }
    draw(place, { height: 300, description: `${title} against ${axis}, a point for every model`, layer }, values, (datum) => {
      if (datum && datum.place !== undefined) tick(datum.place, !slots.has(datum.place)), drawAll();
    });
  }
}

// Points whose names can stand beside each other: ticked ones first, then those that are nowhere near one named before.
function apart(values, middle, scale) {
  const heights = values.map(({ y }) => (scale === "log" ? Math.log(y) : y));
  const share = (list, value) => (value - Math.min(...list)) / (Math.max(...list) - Math.min(...list) || 1);
  const places = values.map((value, n) => ({ value, right: value.x > middle, x: share(values.map((each) => each.x), value.x), y: share(heights, heights[n]) }));
  const kept = [];
  for (const place of places.sort((a, b) => b.value.ticked - a.value.ticked)) {
    const reach = place.right ? place.x - 0.35 : place.x + 0.35; // a name is about a third of the chart wide
    const meets = (other) => Math.abs(other.y - place.y) < 0.07 && Math.min(other.x, other.reach) < Math.max(place.x, reach) && Math.min(place.x, reach) < Math.max(other.x, other.reach);
    if (!kept.some(meets)) kept.push({ ...place, reach });
  }
  return kept.map(({ value }) => value);
}

// "model.layers.3.mlp.up_proj" -> layer 3, "mlp.up_proj"
function locate(module) {
  const found = module.match(/^(?:.*?\.)?(\d+)\.(.+)$/);
  return found ? { layer: Number(found[1]), kind: found[2] } : { layer: null, kind: module };
}

function drawLayers() {
  const chosen = ticked().filter((model) => data.layers[model]);
  const hidden = chosen.flatMap((model) => (data.layers[model].hidden || []).map((error, layer) => ({ model: models[model].label, name: names[model], layer, error })));
  const { color, dash, shape } = scales(chosen, 0);
  draw("hidden", {
    height: 240, description: "Relative error of the hidden state after each decoder layer, a line for every ticked model",
    layer: [{ mark: { type: "line", strokeWidth: 2 }, encoding: { strokeDash: dash } }, { mark: { type: "point", filled: true, size: 50, opacity: 1 }, encoding: { shape } }],
    encoding: {
      x: { field: "layer", type: "quantitative", title: "decoder layer", scale: { nice: false }, axis: { tickMinStep: 1, format: "d" } },
      y: { field: "error", type: "quantitative", title: "relative error", scale: { zero: true } },
      color, tooltip: [{ field: "model" }, { field: "layer" }, { field: "error", format: ".3~g" }],
    },
  }, hidden);

  const which = byId("layer-error").value;
  const all = data.layers.flatMap((layers) => Object.values((layers && layers[which]) || {})).filter((error) => error > 0);
  const most = all.reduce((a, b) => Math.max(a, b), -Infinity);
  const domain = [Math.max(most / 20, all.reduce((a, b) => Math.min(a, b), Infinity)), most]; // a rounded head must not take all colours
  const mapped = chosen.filter((model) => (data.layers[model] || {})[which]);
  if (!mapped.length) return byId("maps").replaceChildren(make("p", "none", "Not recorded for these models."));
  byId("maps").replaceChildren(...mapped.map((model) => {
    const values = Object.entries(data.layers[model][which]).map(([module, error]) => ({ module, error, ...locate(module) })).filter((value) => value.layer !== null || value.error > 0);
    values.forEach((value) => { if (value.layer === null) value.layer = "–"; });
    const kinds = [...new Set(values.map((value) => value.kind))];
    const chart = make("div", "chart");
    const figure = make("figure", "", make("figcaption", "", key(model), models[model].label), chart);
    requestAnimationFrame(() => draw(chart, {
      height: 20 * kinds.length, description: `${which.replace("_", " ")} of every linear layer of ${models[model].label}`,
      mark: { type: "rect" },
      encoding: {
        x: { field: "layer", type: "ordinal", title: "decoder layer", axis: { labelAngle: 0, labelOverlap: true, labelSeparation: 6 } },
        y: { field: "kind", type: "ordinal", title: null, sort: kinds, axis: { labelLimit: 130 } },
        color: {
          condition: { test: "!(datum.error > 0)", value: "#e0e0e0" }, field: "error", type: "quantitative", title: null,
          scale: { type: "log", scheme: "viridis", domain, nice: false, clamp: true }, legend: { orient: "bottom", format: ".2~g", gradientLength: 200, gradientThickness: 10, tickCount: 4, labelOverlap: "greedy", labelSeparation: 8 },
        },
        tooltip: [{ field: "module" }, { field: "error", format: ".3~g" }],
      },
    }, values));
    return figure;
  }));
}

function drawDistributions() {
  const chosen = ticked().filter((model) => data.distributions[model]);
  const { color, dash } = scales(chosen, 2);
  for (const [place, name, title, scale] of [["kl", "kl", "KL divergence of a prediction, nats", "log"], ["nll", "nll_change", "change, nats (right: worse)", "linear"]]) {
    const values = chosen.flatMap((model) => {
      const found = data.distributions[model][name];
      if (!found) return [];
      const total = found.counts.reduce((a, b) => a + b, 0);
      const bins = found.counts.map((count, bin) => ({ model: models[model].label, name: names[model], from: found.edges[bin], to: found.edges[bin + 1], share: count / total }));
      return [...bins, { ...bins[bins.length - 1], from: found.edges[found.edges.length - 1] }]; // gives the last bin its width
    });
    draw(place, {
      height: 240, description: `Share of predictions by ${title}`,
      mark: { type: "line", interpolate: "step-after", strokeWidth: 2 },
      encoding: {
        x: { field: "from", type: "quantitative", title, scale: { type: scale, nice: false }, axis: { format: "~g", tickCount: 8, labelOverlap: "greedy", labelSeparation: 10, grid: false } },
        y: { field: "share", type: "quantitative", title: "share of predictions", axis: { format: "%" } },
        color, strokeDash: dash, tooltip: [{ field: "model" }, { field: "from", format: ".2~g" }, { field: "to", format: ".2~g" }, { field: "share", format: ".2%" }],
      },
    }, values);
  }
}

// ---- lists ----

const shown = { prompts: PAGE, tokens: PAGE, questions: PAGE };

function token(text, right) {
  return make("span", right ? "token right" : "token", text.replaceAll("\n", "⏎") || "∅");
}

function onOneLine(text) {
  return text.replace(/\s*\n\s*/g, " ⏎ ");
}

function bar(probability) {
  const node = make("span", "bar");
  node.style.width = `calc(${probability} * var(--bar))`;
  return make("span", "share", node, probability >= 0.0005 ? `${(100 * probability).toFixed(1)} %` : "< 0.1 %");
}

function rows(head, lines) {
  const table = make("table", "", head && make("thead", "", make("tr", "", ...head.map((text) => make("th", "", text)))));
  table.append(make("tbody", "", ...lines.map(([first, ...rest]) => make("tr", "", make("th", "", ...first), ...rest.map((cell) => make("td", "", cell))))));
  return table;
}

const LISTS = {
  prompts: {
    items: data.prompts,
    texts: (item, chosen) => [item.prompt, item.original, ...chosen.map((model) => item.models[model])],
    rank: () => 0,
    is: (item, chosen) => chosen.some((model) => item.models[model] !== null && item.models[model] !== item.original),
    render: (item, chosen) => {
      const written = (text) => {
        if (text === null || text === undefined) return make("span", "none", "not recorded");
        let same = 0;
        const other = item.original || "";
        while (same < text.length && text[same] === other[same]) same += 1;
        if (same < text.length) same = Math.max(0, text.lastIndexOf(" ", same)); // whole words
        return make("span", "written", make("span", "same", text.slice(0, same)), text.slice(same));
      };
      const lines = item.original === null ? [] : [[["original"], make("span", "written", item.original)]];
      return make("article", "item", make("p", "text", make("mark", "", item.prompt)), rows(null, lines.concat(chosen.map((model) => [[key(model), models[model].label], written(item.models[model])]))));
    },
  },
  tokens: {
    items: data.tokens,
    texts: (item, chosen) => [item.before + item.token + item.after, item.original.top, ...chosen.map((model) => (item.models[model] || {}).top)],
    rank: (item, chosen) => Math.max(0, ...chosen.map((model) => (item.models[model] || {}).kl || 0)),
    is: (item, chosen, kind) => {
      const first = item.original.top === item.token;
      const tops = chosen.map((model) => item.models[model]).filter(Boolean).map((found) => found.top);
      if (kind === "lost") return first && tops.some((top) => top !== item.token);
      if (kind === "gained") return !first && tops.some((top) => top === item.token);
      return tops.some((top) => top !== item.original.top);
    },
    render: (item, chosen) => {
      const line = (name, found) => found ? [name, token(found.top, found.top === item.token), bar(found.probability), typeof found.kl === "number" ? found.kl.toPrecision(2) : ""] : [name, make("span", "none", "not recorded"), "", ""];
      return make("article", "item",
        make("p", "text", `… ${onOneLine(item.before)}`, make("mark", "", item.token.replaceAll("\n", "⏎")), make("span", "after", `${onOneLine(item.after)} …`), " ", make("span", "where", `window ${item.window}, token ${item.place}`)),
        rows(["", "most likely next", "probability of what came", "KL"], [line(["original"], item.original), ...chosen.map((model) => line([key(model), models[model].label], item.models[model]))]));
    },
  },
  questions: {
    items: data.questions.items,
    texts: (item) => [item.task, item.question, ...item.choices],
    rank: (item, chosen) => Math.max(0, ...chosen.map((model) => item.models[model]).filter(Boolean).map((found) => Math.abs(found.probability - ((item.models[0] || found).probability)))),
    is: (item, chosen, kind) => {
      const first = original && item.models[0];
      const answers = chosen.map((model) => item.models[model]).filter(Boolean).map((found) => found.chosen);
      if (!first) return false;
      if (kind === "lost") return first.chosen === item.right && answers.some((answer) => answer !== item.right);
      if (kind === "gained") return first.chosen !== item.right && answers.some((answer) => answer === item.right);
      return answers.some((answer) => answer !== first.chosen);
    },
    render: (item, chosen) => make("article", "item", make("p", "text", make("span", "where", `${item.task} ${item.id} `), item.question),
      make("ul", "choices", ...item.choices.map((choice, place) => {
        const who = chosen.filter((model) => item.models[model] && item.models[model].chosen === place);
        const names = who.map((model) => make("span", "who", key(model), `${models[model].label} (${(100 * item.models[model].probability).toFixed(0)} %)`));
        if (original && item.models[0] && item.models[0].chosen === place) names.unshift(make("span", "who", `original (${(100 * item.models[0].probability).toFixed(0)} %)`));
        return make("li", "", place === item.right ? make("span", "tick", "✓ right: ") : "○ ", choice, ...names);
      }))),
  },
};

function drawList(name) {
  const { items, texts, rank, is, render } = LISTS[name];
  const chosen = ticked();
  const wanted = byId("search").value.toLowerCase();
  const kind = byId("kind").value;
  const ranked = items.map((item) => [rank(item, chosen), item]).sort((a, b) => b[0] - a[0]).map(([, item]) => item);
  const found = ranked.filter((item) => (kind === "all" || is(item, chosen, kind)) && (!wanted || texts(item, chosen).some((text) => text && text.toLowerCase().includes(wanted))));
  byId(`${name}-count`).textContent = items.length ? `${found.length} of ${items.length}` : "";
  const nodes = found.slice(0, shown[name]).map((item) => render(item, chosen));
  if (!items.length) nodes.push(make("p", "none", "Not recorded in these runs."));
  if (found.length > shown[name]) {
    const more = make("button", "more", `${found.length - shown[name]} more`);
    more.addEventListener("click", () => { shown[name] += 4 * PAGE; drawList(name); });
    nodes.push(more);
  }
  byId(name).replaceChildren(...nodes);
}

function drawLists() {
  Object.keys(LISTS).forEach(drawList);
}

// ---- choosing models ----

function tick(model, on) {
  const free = SHAPES.map((_, slot) => slot).find((slot) => ![...slots.values()].includes(slot));
  if (on && free !== undefined) slots.set(model, free);
  if (!on) slots.delete(model);
}

function drawAll() {
  boxes.forEach((box) => {
    const model = Number(box.dataset.model);
    box.checked = slots.has(model);
    box.disabled = !box.checked && slots.size >= SHAPES.length;
  });
  document.querySelectorAll("[data-key]").forEach((node) => node.replaceChildren(key(Number(node.dataset.key))));
  if (METRICS.length) drawQuality();
  drawLayers();
  drawDistributions();
  drawLists();
}

// At first: four, of which at most three are ours, from the largest to the smallest.
function spread(list, count) {
  return list.length <= count ? list : Array.from({ length: count }, (_, n) => list[Math.round(n * (list.length - 1) / Math.max(1, count - 1))]);
}
const candidates = boxes.map((box) => Number(box.dataset.model));
const others = candidates.filter((model) => models[model].method !== "SeedLM");
const ours = spread(candidates.filter((model) => !others.includes(model)), others.length ? 3 : 4);
[...ours, ...spread(others, 4 - ours.length)].sort((a, b) => a - b).forEach((model) => tick(model, true));
boxes.forEach((box) => box.addEventListener("change", () => { tick(Number(box.dataset.model), box.checked); drawAll(); }));
METRICS.forEach(([name, title]) => byId("metric").append(new Option(title, name)));
byId("metric").addEventListener("change", drawQuality);
byId("layer-error").addEventListener("change", drawLayers);
byId("search").addEventListener("input", () => { Object.keys(shown).forEach((name) => { shown[name] = PAGE; }); drawLists(); });
byId("kind").addEventListener("change", drawLists);
drawAll();

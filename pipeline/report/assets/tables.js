"use strict";
/* The sortable tables of results and labels, and the chart with the curves of one label. */

gmpipe.tables = (() => {
  const { element, chooser, checkbox, fixed, signed, count, tablePlace } = gmpipe;
  const overview = gmpipe.data("overview");

  /** Make a header cell whose button sorts by `key`; `state` holds `key` and `descending`. */
  function sorter(title, key, state, redraw, attributes = {}) {
    const current = state.key === key;
    const sort = current ? (state.descending ? "descending" : "ascending") : "none";
    const button = element("button", {
      type: "button",
      click: () => {
        state.descending = current ? !state.descending : !["name", "group"].includes(key);
        state.key = key;
        redraw();
        // The table was drawn again: keep the keyboard focus where it was.
        const again = [...document.querySelectorAll(`#${state.table} th button`)];
        again.find((one) => one.dataset.key === key)?.focus();
      },
    }, title, element("span", { class: "arrow", "aria-hidden": "true" },
      sort === "none" ? "" : state.descending ? " \u25be" : " \u25b4"));
    button.dataset.key = key;
    return element("th", { scope: "col", "aria-sort": sort, ...attributes }, button);
  }

  /** Compare two values for sorting. Missing values come last in both directions. */
  function inOrder(a, b, descending) {
    if (a === null || a === undefined) return b === null || b === undefined ? 0 : 1;
    if (b === null || b === undefined) return -1;
    const sign = descending ? -1 : 1;
    return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
  }

  // Results ---------------------------------------------------------------------------------------

  const results = { table: "results-table", key: null, descending: true, seeds: true, paper: true,
    forced: false };

  function numberCell(cell, key) {
    if (!cell) return element("td", { class: "number none" }, "\u2013");
    const [value, spread, ends] = cell;
    const show = key === "difference" ? signed : fixed;
    return element("td", { class: "number" }, show(value),
      spread === null ? null : element("span", { class: "spread" }, ` \u00b1 ${fixed(spread)}`),
      ends ? element("span", { class: overview.interval_is_weak ? "ends few" : "ends" },
        `${show(ends[0])} to ${show(ends[1])}${overview.interval_is_weak ? " \u26a0" : ""}`) : null);
  }

  function drawResults() {
    const top = results.forced ? "Top-3, always three" : "Top-3";
    const groups = ["", "All", top, "Fitted thresholds"];
    const columns = overview.columns.filter((column) => groups.includes(column.group));
    const rows = overview.rows.filter((row) =>
      (row.kind !== "seed" || results.seeds) && (row.kind !== "paper" || results.paper));
    const heads = rows.filter((row) => row.kind !== "seed");
    if (results.key) {
      const value = (row) => results.key === "name" ? row.name : row.cells[results.key]?.[0];
      heads.sort((a, b) => inOrder(value(a), value(b), results.descending));
    }
    const body = element("tbody");
    for (const head of heads) {
      const seeds = rows.filter((row) => row.kind === "seed" && row.of === head.name
        && head.kind === "variant");
      for (const row of [head, ...seeds]) {
        body.append(element("tr", { class: row.kind },
          element("th", { scope: "row" }, row.name,
            row.kind === "paper" ? element("span", { class: "tag" }, "paper") : null),
          ...columns.map((column) => numberCell(row.cells[column.key], column.key))));
      }
    }
    const head = (column, attributes) =>
      sorter(column.title, column.key, results, drawResults, { class: "number", ...attributes });
    const [alone, ...grouped] = groups.map((group) => columns.filter((c) => c.group === group))
      .filter((members) => members.length);
    document.getElementById("results-table").replaceChildren(
      element("thead", {},
        element("tr", {}, sorter("network", "name", results, drawResults, { rowspan: 2 }),
          ...alone.map((column) => head(column, { rowspan: 2 })),
          ...grouped.map((members) => element("th", { scope: "colgroup", class: "group",
            colspan: members.length }, element("span", {}, members[0].group)))),
        element("tr", {}, ...grouped.flat().map((column) => head(column)))),
      body);
  }

  function startResults() {
    const kinds = new Set(overview.rows.map((row) => row.kind));
    const change = (name) => (value) => { results[name] = value; drawResults(); };
    const controls = document.getElementById("results-controls");
    if (kinds.has("seed")) controls.append(checkbox("Show each seed", true, change("seeds")));
    if (kinds.has("paper")) controls.append(checkbox("Show the paper's rows", true, change("paper")));
    controls.append(checkbox("For top-3, always count three labels, even those under 0.5", false,
      change("forced")));
    document.getElementById("results-note").append(
      element("li", {}, "All numbers are in percent."
        + (kinds.has("seed") ? " \u00b1 gives the sample standard deviation over the seeds." : "")),
      element("li", {}, `The small numbers are the ${overview.interval}.`),
      element("li", {}, overview.top3));
    document.getElementById("results-place").append(
      tablePlace("Table of results", element("table", { id: "results-table" })));
    drawResults();
    if (overview.paper) {
      document.getElementById("paper-differences").append(
        element("h3", {}, `Comparison with the paper: ${overview.paper.title}`),
        element("p", {}, "What differs:"),
        element("ul", {}, ...overview.paper.differences.map((line) => element("li", {}, line))));
    }
  }

  // Labels ----------------------------------------------------------------------------------------

  const others = overview.variants.filter((name) => name !== overview.base);
  const labels = { table: "labels-table", key: "base", descending: true, against: others[0] };

  /** The key of another variant's column; a variant may be called as another column is. */
  const ofVariant = (name) => `variant ${name}`;

  /** The AP of a label; null without a positive, and for a network that does not rank images. */
  const apOf = (variant, label) => overview.ap[variant][label]?.[0] ?? null;

  function bars(label) {
    const bar = element("div", { class: "bars", "aria-hidden": "true" });
    const fill = element("div", { class: "fill" });
    fill.style.width = `${apOf(overview.base, label) ?? 0}%`;
    fill.style.background = gmpipe.look(overview.base).colour;
    bar.append(fill);
    for (const name of others) {
      const ap = apOf(name, label);
      if (ap === null) continue;
      const mark = element("div", { class: "mark", title: `${name}: ${fixed(ap)}` });
      mark.style.left = `${ap}%`;
      mark.style.background = gmpipe.look(name).colour;
      bar.append(mark);
    }
    return bar;
  }

  function drawLabels() {
    const paper = overview.paper?.ap;
    const rows = overview.labels.map((name, label) => {
      const value = { name, group: overview.groups?.[label],
        positives: overview.positives[label], threshold: overview.thresholds?.[label],
        base: apOf(overview.base, label), paper: paper ? paper[label] : null };
      for (const other of others) value[ofVariant(other)] = apOf(other, label);
      const against = labels.against ? value[ofVariant(labels.against)] : null;
      value.difference = value.base === null || against === null ? null : against - value.base;
      return { label, value };
    });
    rows.sort((a, b) => inOrder(a.value[labels.key], b.value[labels.key], labels.descending));
    const head = (title, key, number = true) =>
      sorter(title, key, labels, drawLabels, number ? { class: "number" } : {});
    const cell = (variant, label) => numberCell(overview.ap[variant][label], variant);
    document.getElementById("labels-table").replaceChildren(
      element("thead", {}, element("tr", {}, head("label", "name", false),
        head(overview.base, "base"), ...others.map((name) => head(name, ofVariant(name))),
        labels.against ? head(`${labels.against} \u2212 ${overview.base}`, "difference") : null,
        paper ? head("paper", "paper") : null, head("positives", "positives"),
        overview.thresholds ? head(`threshold of ${overview.base}`, "threshold") : null,
        overview.groups ? head("group", "group", false) : null,
        element("th", { scope: "col", class: "wide" }, "AP as bars"))),
      element("tbody", {}, ...rows.map(({ label, value }) => element("tr", {},
        element("th", { scope: "row" }, value.name),
        cell(overview.base, label), ...others.map((name) => cell(name, label)),
        labels.against ? differenceCell(value.difference) : null,
        paper ? numberCell(paper[label] === null ? null : [paper[label], null], "paper") : null,
        element("td", { class: "number" }, value.positives > 0 && value.positives < overview.few
          ? element("span", { class: "few", title: "too few for a reliable number" },
            `${value.positives} \u26a0`)
          : count(value.positives)),
        overview.thresholds ? numberCell([value.threshold, null], "threshold") : null,
        overview.groups ? element("td", {}, value.group) : null,
        element("td", { class: "wide" }, value.positives ? bars(label) : "no positives")))));
  }

  function swatch(variant) {
    const made = element("span", { class: "swatch" });
    made.style.background = gmpipe.look(variant).colour;
    return made;
  }

  function differenceCell(value) {
    if (value === null) return numberCell(null);
    const kind = value > 0.05 ? "gain" : value < -0.05 ? "loss" : "";
    return element("td", { class: `number ${kind}` }, signed(value));
  }

  function describeLabels() {
    const few = overview.positives.filter((number) => number > 0 && number < overview.few).length;
    document.getElementById("labels-note").replaceChildren(
      "Average precision (AP) in percent, averaged over the seeds. Bars: ",
      element("span", { class: "key" }, swatch(overview.base), overview.base),
      others.length ? "Marks: " : "",
      ...others.map((name) => element("span", { class: "key" }, swatch(name), name)),
      few ? element("span", { class: "few" }, `\u26a0 ${few} of ${overview.labels.length} labels `
        + `${few === 1 ? "has" : "have"} fewer than ${overview.few} positives among the test images. The `
        + "numbers of such labels are unreliable, and so are means and intervals over many of them.") : "");
  }

  function startLabels() {
    describeLabels();
    if (others.length) {
      document.getElementById("labels-controls").append(
        chooser(`Difference from ${overview.base} for`, others.map((name) => [name, name]),
          (value) => { labels.against = value; drawLabels(); }, labels.against),
        element("button", { type: "button", click: () => byDifference(false) }, "Largest losses first"),
        element("button", { type: "button", click: () => byDifference(true) }, "Largest gains first"));
    }
    document.getElementById("labels-place").append(
      tablePlace("Average precision by label", element("table", { id: "labels-table" }), true));
    drawLabels();
  }

  function byDifference(descending) {
    Object.assign(labels, { key: "difference", descending });
    drawLabels();
  }

  // One label's precision and recall --------------------------------------------------------------

  function drawCurve(label) {
    const curves = gmpipe.data("curves")[label];
    const title = overview.labels[label];
    const size = { left: 44, top: 8, width: 430, height: 300 };
    const x = (recall) => size.left + recall * size.width;
    const y = (precision) => size.top + (1 - precision) * size.height;
    const chart = element("svg", { viewBox: "0 0 490 350", role: "img", class: "chart",
      "aria-label": `Precision against recall of ${title} for ${Object.keys(curves).length} networks` });
    for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
      chart.append(
        element("line", { class: "grid", x1: x(0), x2: x(1), y1: y(tick), y2: y(tick) }),
        element("line", { class: "grid", x1: x(tick), x2: x(tick), y1: y(0), y2: y(1) }),
        element("text", { x: x(0) - 6, y: y(tick) + 4, "text-anchor": "end" }, String(100 * tick)),
        element("text", { x: x(tick), y: y(0) + 16, "text-anchor": "middle" }, String(100 * tick)));
    }
    chart.append(
      element("text", { x: x(0.5), y: 346, "text-anchor": "middle" }, "recall (%)"),
      element("text", { x: 0, y: 0, "text-anchor": "middle",
        transform: `translate(11 ${y(0.5)}) rotate(-90)` }, "precision (%)"));
    const legend = element("ul", { class: "legend" });
    for (const name of overview.variants) {
      if (!Object.hasOwn(curves, name)) continue; // a network that does not rank images
      const { colour, dash } = gmpipe.look(name);
      const line = { stroke: colour, "stroke-dasharray": dash || null };
      const [recall, precision] = curves[name];
      const points = recall.map((r, i) => `${x(r).toFixed(1)} ${y(precision[i]).toFixed(1)}`);
      chart.append(element("path", { d: `M${points.join("L")}`, fill: "none", "stroke-width": 2,
        ...line }));
      const ap = overview.ap[name][label][0];
      legend.append(element("li", {},
        element("svg", { viewBox: "0 0 34 8", class: "sample", "aria-hidden": "true" },
          element("line", { x1: 0, x2: 34, y1: 4, y2: 4, "stroke-width": 3, ...line })),
        `${name}: AP ${fixed(ap)}`));
    }
    document.getElementById("curve-chart").replaceChildren(chart, legend);
  }

  function startCurve() {
    const curves = gmpipe.data("curves");
    const known = [...overview.labels.keys()].filter((label) => curves[label] !== null);
    const note = document.getElementById("curve-note");
    if (!known.length) {
      note.textContent = "No network of this page ranks the images for a label, so there are no curves.";
      return;
    }
    const seed = overview.gallery.seed;
    note.textContent =
      `The curves are for seed ${seed}, with at most 100 points each. AP is averaged over the seeds.`;
    document.getElementById("curve-controls").append(
      chooser("Label", known.map((label) => [String(label), overview.labels[label]]),
        (chosen) => drawCurve(Number(chosen)), String(known[0])));
    drawCurve(known[0]);
  }

  return { start() { startResults(); startLabels(); startCurve(); } };
})();

"use strict";
/* The tables of results and of labels, which can be sorted, and the chart of one label's curves. */

gmpipe.tables = (() => {
  const { element, chooser, checkbox, fixed, signed } = gmpipe;
  const overview = gmpipe.data("overview");

  /** A header cell whose button sorts by `key`; `state` has key and descending. */
  function sorter(title, key, state, redraw, attributes = {}) {
    const current = state.key === key;
    const sort = current ? (state.descending ? "descending" : "ascending") : "none";
    const button = element("button", {
      type: "button",
      click: () => {
        state.descending = current ? !state.descending : !["name", "group"].includes(key);
        state.key = key;
        redraw();
        // The table was drawn anew: keep the keyboard where it was.
        const again = [...document.querySelectorAll(`#${state.table} th button`)];
        again.find((one) => one.dataset.key === key)?.focus();
      },
    }, title, element("span", { class: "arrow", "aria-hidden": "true" },
      sort === "none" ? "" : state.descending ? " \u25be" : " \u25b4"));
    button.dataset.key = key;
    return element("th", { scope: "col", "aria-sort": sort, ...attributes }, button);
  }

  /** Compare for sorting: what is missing comes last, either way. */
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
      ends ? element("span", { class: "ends" }, `${show(ends[0])} to ${show(ends[1])}`) : null);
  }

  function drawResults() {
    const groups = results.forced ? ["", "All", "Top-3, always three"] : ["", "All", "Top-3"];
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
    const spans = groups.map((group) => columns.filter((c) => c.group === group).length);
    document.getElementById("results-table").replaceChildren(
      element("thead", {},
        element("tr", {}, element("td", {}), ...groups.map((group, place) =>
          group ? element("th", { scope: "colgroup", colspan: spans[place] }, group)
            : element("td", { colspan: spans[place] }))),
        element("tr", {}, sorter("network", "name", results, drawResults),
          ...columns.map((c) => sorter(c.title, c.key, results, drawResults, { class: "number" })))),
      body);
  }

  function startResults() {
    const kinds = new Set(overview.rows.map((row) => row.kind));
    const change = (name) => (value) => { results[name] = value; drawResults(); };
    const controls = document.getElementById("results-controls");
    if (kinds.has("seed")) controls.append(checkbox("each seed", true, change("seeds")));
    if (kinds.has("paper")) controls.append(checkbox("the paper's rows", true, change("paper")));
    controls.append(checkbox("top-3: always three labels, also under 0.5", false, change("forced")));
    document.getElementById("results-note").textContent =
      `In percent; \u00b1 is the sample standard deviation over the seeds, small numbers are the ${overview.interval}.`;
    drawResults();
    if (overview.paper) {
      document.getElementById("paper-differences").append(
        element("h3", {}, `Beside the paper: ${overview.paper.title}`),
        element("p", {}, "What differs:"),
        element("ul", {}, ...overview.paper.differences.map((line) => element("li", {}, line))));
    }
  }

  // Labels ----------------------------------------------------------------------------------------

  const others = overview.variants.filter((name) => name !== overview.base);
  const labels = { table: "labels-table", key: "base", descending: true, against: others[0] };

  function bars(place) {
    const bar = element("div", { class: "bars", "aria-hidden": "true" });
    const base = overview.ap[overview.base][place];
    const fill = element("div", { class: "fill" });
    fill.style.width = `${base[0]}%`;
    bar.append(fill);
    for (const name of others) {
      const mark = element("div", { class: "mark", title: `${name}: ${fixed(overview.ap[name][place][0])}` });
      mark.style.left = `${overview.ap[name][place][0]}%`;
      mark.style.background = gmpipe.colour(overview.variants.indexOf(name));
      bar.append(mark);
    }
    return bar;
  }

  function drawLabels() {
    const base = overview.ap[overview.base];
    const paper = overview.paper?.ap;
    const rows = overview.labels.map((label, place) => {
      const known = base[place] !== null;
      const value = { name: label, group: overview.groups[label] ?? "",
        positives: overview.positives[place],
        base: known ? base[place][0] : null, paper: paper ? paper[place] : null };
      for (const name of others) value[name] = known ? overview.ap[name][place][0] : null;
      value.difference = known && labels.against ? value[labels.against] - value.base : null;
      return { place, value };
    });
    rows.sort((a, b) => inOrder(a.value[labels.key], b.value[labels.key], labels.descending));
    const head = (title, key, number = true) =>
      sorter(title, key, labels, drawLabels, number ? { class: "number" } : {});
    const cell = (variant, place) => numberCell(overview.ap[variant][place], variant);
    document.getElementById("labels-table").replaceChildren(
      element("thead", {}, element("tr", {}, head("label", "name", false),
        head("group", "group", false), head("positives", "positives"),
        element("th", { scope: "col", class: "wide" }, "AP"), head(overview.base, "base"),
        ...others.map((name) => head(name, name)),
        labels.against ? head(`${labels.against} \u2212 ${overview.base}`, "difference") : null,
        paper ? head("paper", "paper") : null)),
      element("tbody", {}, ...rows.map(({ place, value }) => element("tr", {},
        element("th", { scope: "row" }, value.name),
        element("td", {}, value.group),
        element("td", { class: "number" }, value.positives < overview.few
          ? element("span", { class: "few", title: "too few to tell" }, `${value.positives} \u26a0`)
          : String(value.positives)),
        element("td", { class: "wide" }, value.base === null ? "no positive" : bars(place)),
        cell(overview.base, place), ...others.map((name) => cell(name, place)),
        labels.against ? differenceCell(value.difference) : null,
        paper ? numberCell(paper[place] === null ? null : [paper[place], null], "paper") : null))));
  }

  function swatch(place) {
    const made = element("span", { class: "swatch" });
    made.style.background = gmpipe.colour(place);
    return made;
  }

  function differenceCell(value) {
    if (value === null) return numberCell(null);
    const kind = value > 0.05 ? "gain" : value < -0.05 ? "loss" : "";
    return element("td", { class: `number ${kind}` }, signed(value));
  }

  function describeLabels() {
    const few = overview.positives.filter((count) => count < overview.few).length;
    document.getElementById("labels-note").replaceChildren(
      "Average precision in percent, mean over the seeds. Bar: ",
      element("span", { class: "key" }, swatch(0), overview.base), others.length ? "Marks: " : "",
      ...others.map((name) => element("span", { class: "key" },
        swatch(overview.variants.indexOf(name)), name)),
      few ? element("span", { class: "few" }, `\u26a0 ${few} of ${overview.labels.length} labels have fewer `
        + `than ${overview.few} positives among the test images: their numbers, and means and intervals `
        + "that hold many of them, say little.") : "");
  }

  function startLabels() {
    describeLabels();
    if (others.length) {
      document.getElementById("labels-controls").append(
        chooser(`Difference to ${overview.base} of`, others.map((name) => [name, name]),
          (value) => { labels.against = value; drawLabels(); }, labels.against),
        element("button", { type: "button", click: () => byDifference(false) }, "Most lost first"),
        element("button", { type: "button", click: () => byDifference(true) }, "Most gained first"));
    }
    drawLabels();
  }

  function byDifference(descending) {
    Object.assign(labels, { key: "difference", descending });
    drawLabels();
  }

  // One label's precision and recall --------------------------------------------------------------

  function drawCurve(label) {
    const curves = gmpipe.data("curves")[label];
    const size = { left: 44, top: 8, width: 430, height: 300 };
    const x = (recall) => size.left + recall * size.width;
    const y = (precision) => size.top + (1 - precision) * size.height;
    const chart = element("svg", { viewBox: "0 0 490 350", role: "img", class: "chart",
      "aria-label": `Precision against recall of ${label} for ${Object.keys(curves).length} networks` });
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
    overview.variants.forEach((name, place) => {
      const [recall, precision] = curves[name];
      const points = recall.map((r, i) => `${x(r).toFixed(1)} ${y(precision[i]).toFixed(1)}`);
      chart.append(element("path", { d: `M${points.join("L")}`, fill: "none", "stroke-width": 2,
        stroke: gmpipe.colour(place), "stroke-dasharray": gmpipe.dash(place) || null }));
      const ap = overview.ap[name][overview.labels.indexOf(label)][0];
      legend.append(element("li", {},
        element("svg", { viewBox: "0 0 34 8", class: "sample", "aria-hidden": "true" },
          element("line", { x1: 0, x2: 34, y1: 4, y2: 4, "stroke-width": 3,
            stroke: gmpipe.colour(place), "stroke-dasharray": gmpipe.dash(place) || null })),
        `${name}: AP ${fixed(ap)}`));
    });
    document.getElementById("curve-chart").replaceChildren(chart, legend);
  }

  function startCurve() {
    const known = Object.keys(gmpipe.data("curves"));
    document.getElementById("curve-controls").append(
      chooser("Label", known.map((label) => [label, label]), drawCurve, known[0]));
    const seed = overview.gallery.seed;
    document.getElementById("curve-note").textContent =
      `Curves of seed ${seed}, at most 100 points each; AP is the mean over the seeds.`;
    drawCurve(known[0]);
  }

  return { start() { startResults(); startLabels(); startCurve(); } };
})();

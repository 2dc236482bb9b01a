"use strict";
/* The gallery: test images with their regions, filters, and two networks side by side. Pointing at
   a label lights up the region that its score comes from; pointing at a region lists its labels.
   Not every network can say this of regions, and not every one decides which labels an image has. */

gmpipe.gallery = (() => {
  const { element, chooser, options, unpack, percent, count, isolated, HALF, STEPS } = gmpipe;
  const overview = gmpipe.data("overview");
  const ON_A_PAGE = 24;
  const TOP = 3; // as in the paper's Figure 3

  let images; // the arrays that are the same for all networks
  const networks = new Map(); // variant -> its arrays, once they are loaded
  const state = { shown: overview.base, beside: "", label: "", outcome: "any", order: "listed",
    name: "", from: 0, to: 100, page: 0 };
  let matches = []; // numbers of the images that match the filters, in order
  let opened = null; // index in `matches` of the image in the dialog

  async function network(variant) {
    if (!networks.has(variant)) {
      const number = overview.variants.indexOf(variant);
      const { scores, winners } = await gmpipe.load(`scores-${number}`);
      networks.set(variant, { scores: unpack(scores), winners: unpack(winners), regions: null,
        attribution: overview.gallery.attributions[number], decides: overview.gallery.decides[number] });
    }
    return networks.get(variant);
  }

  /** The best labels of each region, loaded when somebody points at a region. */
  async function regionsOf(variant) {
    const of = await network(variant);
    if (of.regions === null) {
      const { labels, scores } = await gmpipe.load(`regions-${overview.variants.indexOf(variant)}`);
      of.regions = { labels: unpack(labels), scores: unpack(scores) };
    }
    return of.regions;
  }

  // What is right and wrong -----------------------------------------------------------------------

  /** "right", "wrong", "missed", "absent" (correctly not predicted) or "ignored"; "true" or "untrue"
      if the network only ranks labels. */
  function outcome(truth, score, decides) {
    if (truth < 0) return "ignored";
    if (!decides) return truth ? "true" : "untrue";
    if (score > HALF) return truth ? "right" : "wrong";
    return truth ? "missed" : "absent";
  }

  const MARKS = {
    right: ["\u2713", "correct"], wrong: ["\u2717", "false positive"],
    missed: ["\u25cb", "missed (false negative)"], absent: ["\u00b7", "correctly not predicted"],
    ignored: ["?", "neither true nor false in this data set"],
    true: ["\u25cf", "a true label"], untrue: ["\u00b7", "not a true label"],
  };

  // Filters ---------------------------------------------------------------------------------------

  const OUTCOMES = [["any", "all"], ["true", "true label"], ["right", "correct"], ["wrong", "false positive"],
    ["missed", "false negative"]];

  /** The choices of "Show"; for two networks, one of them is where they differ. */
  function outcomes() {
    return state.beside ? [...OUTCOMES, ["differs", `differs from ${state.beside}`]] : OUTCOMES;
  }

  /** The score that an image is sorted by, or null if it does not match the filters. */
  function confidence(number, of, beside) {
    const truth = images.truth.row(number);
    const scores = of.scores.row(number);
    const others = beside ? beside.scores.row(number) : scores;
    const decided = of.decides && (state.outcome !== "differs" || beside.decides);
    if (!["any", "true"].includes(state.outcome) && !decided) return null;
    const passes = (label) => {
      if (state.outcome === "any") return true;
      if (state.outcome === "true") return truth[label] === 1;
      if (state.outcome !== "differs") {
        return outcome(truth[label], scores[label], true) === state.outcome;
      }
      return truth[label] >= 0 && (scores[label] > HALF) !== (others[label] > HALF);
    };
    if (state.label !== "") {
      const label = Number(state.label);
      return passes(label) ? scores[label] : null;
    }
    let best = null;
    for (let label = 0; label < scores.length; label++) {
      if (state.outcome === "right") { // an image is correct if all its labels are
        if (["wrong", "missed"].includes(outcome(truth[label], scores[label], true))) return null;
      } else if (!passes(label)) continue;
      if (best === null || scores[label] > best) best = scores[label];
    }
    return best;
  }

  function mistake(number, of) {
    const truth = images.truth.row(number);
    const scores = of.scores.row(number);
    let worst = 0;
    for (let label = 0; label < scores.length; label++) {
      if (truth[label] >= 0 && (state.label === "" || Number(state.label) === label)) {
        worst = Math.max(worst, truth[label] ? STEPS - scores[label] : scores[label]);
      }
    }
    return worst;
  }

  async function filter() {
    const of = await network(state.shown);
    const beside = state.beside ? await network(state.beside) : null;
    const key = new Map();
    matches = [];
    for (let number = 0; number < images.ids.length; number++) {
      if (!images.ids[number].toLowerCase().includes(state.name)) continue;
      const score = confidence(number, of, beside);
      if (score === null) continue;
      const share = 100 * score / STEPS;
      if (share < state.from || share > state.to) continue;
      matches.push(number);
      key.set(number, state.order === "worst" ? mistake(number, of) : score);
    }
    const sign = { listed: 0, highest: -1, lowest: 1, worst: -1 }[state.order];
    if (sign) matches.sort((a, b) => sign * (key.get(a) - key.get(b)));
    state.page = 0;
    draw();
  }

  // One image as one network sees it --------------------------------------------------------------

  const weight = (steps) => (steps / STEPS).toFixed(3);

  function detectorSays(number, region) {
    const detected = images.classes.row(number)[region];
    const names = overview.gallery.classes;
    const name = names && detected < names.length ? isolated(names[detected]) : `class ${detected},`;
    return `${name} ${percent(images.scores.row(number)[region])} %`;
  }

  /** The picture with its regions; light(region) highlights one, light(null) none. */
  function picture(number, variant, say) {
    const [width, height] = images.sizes.row(number);
    const frame = element("div", { class: "picture" });
    frame.style.setProperty("--ratio", width ? width / height : 4 / 3);
    const truth = overview.labels.filter((_, label) => images.truth.row(number)[label] === 1);
    const alt = `${images.ids[number]}, with ${truth.join(", ") || "no label"}`;
    if (images.pictures.row(number)[0]) {
      frame.append(element("img", { src: `pictures/${number}.jpg`, alt, loading: "lazy" }));
    } else {
      frame.classList.add("bare");
      frame.append(element("p", {}, "no photograph"));
    }
    const drawing = element("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none",
      "aria-hidden": "true" });
    const boxes = images.boxes.row(number);
    const sides = (region) => [0, 1, 2, 3].map((i) => 1000 * boxes[4 * region + i] / STEPS);
    const area = (region) => {
      const [x0, y0, x1, y1] = sides(region);
      return (x1 - x0) * (y1 - y0);
    };
    const order = [...Array(images.count.row(number)[0]).keys()];
    order.sort((a, b) => area(b) - area(a)); // small ones on top, where the pointer reaches them
    const drawn = new Map();
    for (const region of order) {
      const [x0, y0, x1, y1] = sides(region);
      const box = element("rect", { x: x0, y: y0, width: Math.max(1, x1 - x0),
        height: Math.max(1, y1 - y0), "data-region": region,
        pointerenter: () => { light(region); sayRegion(number, variant, region, say); },
        pointerleave: () => { light(null); say(""); } });
      drawn.set(region, box);
      drawing.append(box);
    }
    function light(region) {
      drawing.classList.toggle("lit", region !== null);
      for (const [one, box] of drawn) box.classList.toggle("on", one === region);
    }
    frame.append(drawing);
    return { frame, light };
  }

  async function sayRegion(number, variant, region, say) {
    const what = `region ${region} (detector: ${detectorSays(number, region)})`;
    const { attribution } = networks.get(variant);
    if (attribution === null) {
      say(`${what}: ${variant} does not tell regions apart`);
      return;
    }
    const isLatest = say(what);
    const { labels, scores } = await regionsOf(variant);
    if (!isLatest()) return; // the pointer has moved on while the data were loaded
    const best = labels.shape[2];
    if (region >= labels.shape[1]) {
      say(`${what}: not used by ${variant}`);
      return;
    }
    const of = labels.row(number);
    const at = scores.row(number);
    const shown = attribution === "weights" ? weight : percent;
    const listed = [...Array(best).keys()].map((i) => region * best + i)
      .map((i) => `${isolated(overview.labels[of[i]])} ${shown(at[i])}`);
    say(`${what}: ${attribution === "weights" ? "its weight for " : ""}${listed.join(", ")}`);
  }

  function chip(number, variant, label, score, winner, light, say) {
    const { attribution, decides } = networks.get(variant);
    const kind = outcome(images.truth.row(number)[label], score, decides);
    const [mark, meaning] = MARKS[kind];
    const region = winner < 0 ? "the whole image" : `region ${winner}`;
    const from = winner < 0 ? `from ${region}`
      : `${attribution === "weights" ? "with most weight on" : "from"} ${region} `
        + `(detector: ${detectorSays(number, winner)})`;
    const on = () => {
      light(winner < 0 ? null : winner);
      say(`${isolated(overview.labels[label])} ${percent(score)} %, ${meaning}, ${from}`);
    };
    const off = () => { light(null); say(""); };
    return element("button", { type: "button", class: `chip ${kind}`, "data-label": label,
      "aria-label": `${overview.labels[label]}, ${percent(score)} percent, ${meaning}, ${region}`,
      pointerenter: on, pointerleave: off, focus: on, blur: off },
    element("span", { class: "mark", "aria-hidden": "true" }, mark),
    element("bdi", {}, overview.labels[label]),
    element("span", { class: "score" }, percent(score)));
  }

  let last = 0;

  /** Make a function that shows a text after `prefix`; it returns whether that is still the latest. */
  function speaker(info, prefix) {
    return (text) => {
      const turn = ++last;
      info.textContent = text && prefix + text;
      return () => turn === last;
    };
  }

  /** Picture, best labels and other true ones; if `whole`, all labels, all true ones, all regions. */
  function pane(number, variant, whole) {
    const of = networks.get(variant);
    const scores = of.scores.row(number);
    const winners = of.winners.row(number);
    const truth = images.truth.row(number);
    // A card has no room for what is said about it: it stands at the bottom of the window.
    const info = whole ? element("p", { class: "info", "aria-live": "polite" })
      : document.getElementById("gallery-info");
    const say = speaker(info, !whole && state.beside ? `${variant}: ` : "");
    const { frame, light } = picture(number, variant, say);
    const ranked = [...scores.keys()].filter((label) => whole || truth[label] >= 0)
      .sort((a, b) => scores[b] - scores[a]);
    const chips = (list) => element("ul", { class: "chips" }, ...list.map((label) =>
      element("li", {}, chip(number, variant, label, scores[label], winners[label], light, say))));
    const positive = [...truth.keys()].filter((label) => truth[label] === 1);
    const heading = whole ? "h3" : "h4"; // below the dialog's h2, or a card's h3
    const best = whole ? ranked : ranked.slice(0, TOP);
    const others = whole ? positive : positive.filter((label) => !best.includes(label));
    const made = element("div", { class: "pane" },
      whole || state.beside ? element("p", { class: "network" }, variant) : null, frame,
      whole ? info : null,
      element(heading, {}, whole ? "All labels" : best.length < TOP ? "Labels" : `Top ${TOP}`),
      chips(best));
    if (whole || others.length) {
      made.append(element(heading, {}, whole ? "Truth" : "Other true labels"),
        others.length ? chips(others) : element("p", { class: "none" }, "no label"));
    }
    if (whole) {
      const regions = [...Array(images.count.row(number)[0]).keys()];
      made.append(element(heading, {}, "Regions"), element("ul", { class: "chips" },
        ...regions.map((region) => {
          const on = () => { light(region); sayRegion(number, variant, region, say); };
          const off = () => { light(null); say(""); };
          return element("li", {}, element("button", { type: "button", class: "chip region",
            "data-region": region, pointerenter: on, pointerleave: off, focus: on, blur: off },
          `${region}: ${detectorSays(number, region)}`));
        })));
    }
    return made;
  }

  function panes(number, whole) {
    return [state.shown, state.beside].filter((variant) => variant)
      .map((variant) => pane(number, variant, whole));
  }

  // Cards -----------------------------------------------------------------------------------------

  function draw() {
    const first = state.page * ON_A_PAGE;
    const shown = matches.slice(first, first + ON_A_PAGE);
    const pages = Math.max(1, Math.ceil(matches.length / ON_A_PAGE));
    const cards = document.getElementById("cards");
    cards.classList.toggle("pairs", state.beside !== "");
    cards.replaceChildren(...shown.map((number, index) => element("article", { class: "card",
      "data-image": number },
    element("h3", {}, element("button", { type: "button", class: "open",
      click: () => open(first + index), title: "Open this image with all labels and regions" },
    images.ids[number])),
    element("div", { class: "panes" }, ...panes(number, false)))));
    if (!shown.length) cards.append(element("p", { class: "none" }, "No image matches the filters."));
    const at = `page ${count(state.page + 1)} of ${count(pages)}`;
    document.getElementById("gallery-count").textContent =
      `${count(matches.length)} of ${count(images.ids.length)} images, ${at}`;
    document.getElementById("page-below").textContent = at;
    Object.assign(document.getElementById("page"), { value: state.page + 1, max: pages });
    for (const end of ["", "-below"]) {
      document.getElementById(`previous${end}`).disabled = state.page === 0;
      document.getElementById(`next${end}`).disabled = state.page >= pages - 1;
    }
  }

  /** Show a page, from 0, or the nearest that there is. */
  function turnTo(page) {
    const pages = Math.ceil(matches.length / ON_A_PAGE);
    state.page = Math.max(0, Math.min(page, pages - 1));
    draw();
    document.getElementById("gallery-pages").scrollIntoView();
  }

  function startPages() {
    for (const [id, step] of [["previous", -1], ["next", 1]]) {
      const above = document.getElementById(id);
      above.addEventListener("click", () => turnTo(state.page + step));
      document.getElementById(`${id}-below`).addEventListener("click", () => {
        turnTo(state.page + step);
        above.focus({ preventScroll: true }); // so that the next Tab comes to the new cards
      });
    }
    const field = document.getElementById("page");
    field.addEventListener("change", () => turnTo(Math.trunc(Number(field.value) || 1) - 1));
  }

  // The dialog ------------------------------------------------------------------------------------

  const dialog = document.getElementById("detail");

  function open(index) {
    if (index < 0 || index >= matches.length) return;
    opened = index;
    const number = matches[index];
    document.getElementById("detail-title").textContent = images.ids[number];
    document.getElementById("detail-count").textContent =
      `${count(index + 1)} of ${count(matches.length)}`;
    document.getElementById("detail-panes").replaceChildren(...panes(number, true));
    document.getElementById("detail-previous").disabled = index === 0;
    document.getElementById("detail-next").disabled = index === matches.length - 1;
    if (!dialog.open) dialog.showModal();
    // The arrow keys reach the dialog only from a part of it that has the focus.
    const focused = document.activeElement;
    if (!dialog.contains(focused) || focused.disabled) document.getElementById("detail-close").focus();
  }

  function startDialog() {
    const at = (id, act) => document.getElementById(id).addEventListener("click", act);
    at("detail-close", () => dialog.close());
    at("detail-previous", () => open(opened - 1));
    at("detail-next", () => open(opened + 1));
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") open(opened - 1);
      if (event.key === "ArrowRight") open(opened + 1);
    });
    dialog.addEventListener("close", () => {
      const page = Math.floor(opened / ON_A_PAGE);
      if (page !== state.page) turnTo(page);
      document.querySelector(`.card[data-image="${matches[opened]}"] .open`).focus();
    });
  }

  // Start -----------------------------------------------------------------------------------------

  function percentInput(title, name) {
    const input = element("input", { type: "number", min: 0, max: 100, step: 1, value: state[name],
      change: () => change(name)(Math.min(100, Math.max(0, Number(input.value) || 0))) });
    return element("label", {}, `${title} `, input, " %");
  }

  const change = (name) => (value) => { state[name] = value; return filter(); };

  function changeBeside(variant) {
    state.beside = variant;
    if (!variant && state.outcome === "differs") state.outcome = "any";
    document.getElementById("show").replaceChildren(...options(outcomes(), state.outcome));
    return filter();
  }

  function startControls() {
    const variants = overview.variants.map((name) => [name, name]);
    document.getElementById("gallery-controls").append(
      chooser("Network", variants, change("shown"), state.shown),
      chooser("Compare with", [["", "none"], ...variants], changeBeside, ""),
      chooser("Label", [["", "any"], ...overview.labels.map((name, i) => [String(i), name])],
        change("label"), ""),
      chooser("Show", outcomes(), change("outcome"), "any", "show"),
      percentInput("Confidence from", "from"), percentInput("to", "to"),
      element("label", {}, "Name contains ", element("input", { type: "search",
        input: (event) => change("name")(event.target.value.trim().toLowerCase()) })),
      chooser("Order", [["listed", "as listed"], ["highest", "highest confidence first"],
        ["lowest", "lowest confidence first"], ["worst", "worst mistake first"]],
      change("order"), "listed"));
  }

  /** Sentences on what the gallery shows and how to read it, one list item each. */
  function describe() {
    const about = overview.gallery;
    const { origin, problem } = about.photographs;
    const sample = about.images < about.of
      ? `A random sample of ${count(about.images)} of the ${count(about.of)} test images (the report's `
        + "option --images shows more)"
      : `All ${count(about.images)} test images`;
    const ranking = overview.variants.filter((_, number) => !about.decides[number]);
    const difficult = images.truth.values.includes(-1);
    return [
      `${sample}, as predicted with seed ${about.seed}. ${origin}`,
      "Point at a label to see the region that its score comes from, or at a region to see its best "
        + "labels. Click the name of an image to open it."
        + (about.classes ? "" : " The detector's classes are numbers, because their names are not known."),
      "\u2713 marks a correct label, \u2717 a false positive and \u25cb a false negative. A label is "
        + "predicted if its probability is over 50 %"
        + (overview.thresholds ? " before calibration; the fitted thresholds are not used here." : ".")
        + (difficult ? " ? marks a difficult label, which counts as neither true nor false; only an opened "
          + "image shows these." : "")
        + (ranking.length ? ` The scores of ${ranking.join(" and ")} only rank labels, so no label of `
          + `${ranking.length === 1 ? "this network" : "these networks"} is predicted; \u25cf marks a `
          + "true one." : ""),
      "The confidence is the score of the chosen label or, for any label, the highest score among the "
        + "labels that match.",
    ].map((text) => element("li", {}, text))
      .concat(problem ? element("li", { class: "few" }, problem) : []);
  }

  async function start() {
    const raw = await gmpipe.load("images");
    images = { ids: raw.ids };
    for (const name of Object.keys(raw)) if (name !== "ids") images[name] = unpack(raw[name]);
    document.getElementById("gallery-about").append(...describe());
    startControls();
    startPages();
    startDialog();
    await filter();
  }

  return { start };
})();

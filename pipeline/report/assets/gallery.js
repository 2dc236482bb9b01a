"use strict";
/* The gallery: test images with their regions, labels that light up the region that won them,
   regions that list their best labels, filters, and two networks side by side. */

gmpipe.gallery = (() => {
  const { element, chooser, options, unpack, percent, HALF, STEPS } = gmpipe;
  const overview = gmpipe.data("overview");
  const ON_A_PAGE = 24;
  const TOP = 3; // as in the paper's Figure 3

  let images; // what is the same for all networks
  const networks = new Map(); // variant -> its arrays, once they are loaded
  const state = { shown: overview.base, beside: "", label: "", outcome: "any", order: "listed",
    from: 0, to: 100, page: 0 };
  let found = []; // numbers of the images that pass the filters, in order
  let opened = null; // place in `found` of the image in the dialog

  async function network(variant) {
    if (!networks.has(variant)) {
      const { scores, winners } = await gmpipe.load(`scores-${overview.variants.indexOf(variant)}`);
      networks.set(variant, { scores: unpack(scores), winners: unpack(winners), regions: null });
    }
    return networks.get(variant);
  }

  /** Best labels of each region: wanted when somebody points at one. */
  async function regionsOf(variant) {
    const of = await network(variant);
    if (of.regions === null) {
      const { labels, scores } = await gmpipe.load(`regions-${overview.variants.indexOf(variant)}`);
      of.regions = { labels: unpack(labels), scores: unpack(scores) };
    }
    return of.regions;
  }

  // What is right and wrong -----------------------------------------------------------------------

  /** "right", "wrong", "missed", "absent" (rightly not predicted) or "ignored". */
  function outcome(truth, score) {
    if (truth < 0) return "ignored";
    if (score > HALF) return truth ? "right" : "wrong";
    return truth ? "missed" : "absent";
  }

  const MARKS = {
    right: ["\u2713", "right"], wrong: ["\u2717", "false positive"],
    missed: ["\u25cb", "missed (false negative)"], absent: ["\u00b7", "rightly not predicted"],
    ignored: ["?", "neither true nor false in this data set"],
  };

  // Filters ---------------------------------------------------------------------------------------

  const OUTCOMES = [["any", "all"], ["right", "correct"], ["wrong", "false positive"],
    ["missed", "false negative"]];

  /** What can be shown; of two networks also where they differ. */
  function outcomes() {
    return state.beside ? [...OUTCOMES, ["differs", `differs from ${state.beside}`]] : OUTCOMES;
  }

  /** The score that decides where an image stands, or null if the filters leave it out. */
  function confidence(number, of, beside) {
    const truth = images.truth.row(number);
    const scores = of.scores.row(number);
    const others = beside ? beside.scores.row(number) : scores;
    const passes = (label) => {
      if (state.outcome === "any") return true;
      if (state.outcome !== "differs") return outcome(truth[label], scores[label]) === state.outcome;
      return truth[label] >= 0 && (scores[label] > HALF) !== (others[label] > HALF);
    };
    if (state.label !== "") {
      const label = Number(state.label);
      return passes(label) ? scores[label] : null;
    }
    let best = null;
    for (let label = 0; label < scores.length; label++) {
      if (state.outcome === "right") { // of an image: nothing is wrong
        if (["wrong", "missed"].includes(outcome(truth[label], scores[label]))) return null;
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
    found = [];
    for (let number = 0; number < images.ids.length; number++) {
      const score = confidence(number, of, beside);
      if (score === null) continue;
      const share = 100 * score / STEPS;
      if (share < state.from || share > state.to) continue;
      found.push(number);
      key.set(number, state.order === "worst" ? mistake(number, of) : score);
    }
    const sign = { listed: 0, highest: -1, lowest: 1, worst: -1 }[state.order];
    if (sign) found.sort((a, b) => sign * (key.get(a) - key.get(b)));
    state.page = 0;
    draw();
  }

  // One image as one network sees it --------------------------------------------------------------

  function detectorSays(number, region) {
    const number_ = images.classes.row(number)[region];
    const names = overview.gallery.classes;
    const name = names && number_ < names.length ? names[number_] : `class ${number_}`;
    return `${name} ${percent(images.scores.row(number)[region])} %`;
  }

  /** The picture with its regions; light(region) shows one, light(null) all. */
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
    order.sort((a, b) => area(b) - area(a)); // small ones on top, or the pointer can't reach them
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
    say(what);
    const { labels, scores } = await regionsOf(variant);
    const best = labels.shape[2];
    if (region >= labels.shape[1]) {
      say(`${what}: not used by ${variant}`);
      return;
    }
    const of = labels.row(number);
    const at = scores.row(number);
    const listed = [...Array(best).keys()].map((i) => region * best + i)
      .map((i) => `${overview.labels[of[i]]} ${percent(at[i])}`);
    say(`${what}: ${listed.join(", ")}`);
  }

  function chip(number, variant, label, score, winner, light, say) {
    const kind = outcome(images.truth.row(number)[label], score);
    const [mark, meaning] = MARKS[kind];
    const on = () => {
      light(winner);
      say(`${overview.labels[label]} ${percent(score)} %, ${meaning}: won by region ${winner} `
        + `(detector: ${detectorSays(number, winner)})`);
    };
    const off = () => { light(null); say(""); };
    return element("button", { type: "button", class: `chip ${kind}`, "data-label": label,
      "aria-label": `${overview.labels[label]}, ${percent(score)} percent, ${meaning}, region ${winner}`,
      pointerenter: on, pointerleave: off, focus: on, blur: off },
    element("span", { class: "mark", "aria-hidden": "true" }, mark),
    overview.labels[label], element("span", { class: "score" }, percent(score)));
  }

  /** Picture, best labels, truth. `whole`: all labels and a list of the regions, too. */
  function pane(number, variant, whole) {
    const of = networks.get(variant);
    const scores = of.scores.row(number);
    const winners = of.winners.row(number);
    const truth = images.truth.row(number);
    const info = element("p", { class: "info", "aria-live": "polite" });
    let later = 0;
    const say = (text) => {
      // An answer that comes late must not overwrite a later question's.
      const turn = ++later;
      info.textContent = text;
      return turn;
    };
    const { frame, light } = picture(number, variant, say);
    const ranked = [...scores.keys()].filter((label) => truth[label] >= 0)
      .sort((a, b) => scores[b] - scores[a]);
    const chips = (list) => element("ul", { class: "chips" }, ...list.map((label) =>
      element("li", {}, chip(number, variant, label, scores[label], winners[label], light, say))));
    const positive = [...truth.keys()].filter((label) => truth[label] === 1);
    const heading = whole ? "h3" : "h4"; // below the dialog's h2, or a card's h3
    const made = element("div", { class: "pane" },
      element("p", { class: "network" }, variant), frame, info,
      element(heading, {}, whole ? "All labels" : `Top ${TOP}`),
      chips(whole ? ranked : ranked.slice(0, TOP)),
      element(heading, {}, "Truth"),
      positive.length ? chips(positive) : element("p", { class: "none" }, "no label"));
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
    const shown = found.slice(first, first + ON_A_PAGE);
    const pages = Math.max(1, Math.ceil(found.length / ON_A_PAGE));
    const cards = document.getElementById("cards");
    cards.classList.toggle("pairs", state.beside !== "");
    cards.replaceChildren(...shown.map((number, place) => element("article", { class: "card",
      "data-image": number },
    element("h3", {}, element("button", { type: "button", class: "open",
      click: () => open(first + place), title: "Show it large, with all labels and regions" },
    images.ids[number])),
    element("div", { class: "panes" }, ...panes(number, false)))));
    if (!shown.length) cards.append(element("p", { class: "none" }, "No image passes the filters."));
    document.getElementById("gallery-count").textContent =
      `${found.length} of ${images.ids.length} images, page ${state.page + 1} of ${pages}`;
    document.getElementById("previous").disabled = state.page === 0;
    document.getElementById("next").disabled = state.page >= pages - 1;
  }

  function turn(step) {
    state.page += step;
    draw();
    document.getElementById("gallery-title").scrollIntoView();
  }

  // The dialog ------------------------------------------------------------------------------------

  const dialog = document.getElementById("detail");

  function open(place) {
    if (place < 0 || place >= found.length) return;
    opened = place;
    const number = found[place];
    document.getElementById("detail-title").textContent = images.ids[number];
    document.getElementById("detail-panes").replaceChildren(...panes(number, true));
    document.getElementById("detail-previous").disabled = place === 0;
    document.getElementById("detail-next").disabled = place === found.length - 1;
    if (!dialog.open) dialog.showModal();
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
      const card = document.querySelector(`.card[data-image="${found[opened]}"] .open`);
      if (card) card.focus();
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
      chooser("beside", [["", "none"], ...variants], changeBeside, ""),
      chooser("Label", [["", "any"], ...overview.labels.map((name, i) => [String(i), name])],
        change("label"), ""),
      chooser("Show", outcomes(), change("outcome"), "any", "show"),
      percentInput("Confidence from", "from"), percentInput("to", "to"),
      chooser("Order", [["listed", "as listed"], ["highest", "highest confidence first"],
        ["lowest", "lowest confidence first"], ["worst", "worst mistake first"]],
      change("order"), "listed"));
    document.getElementById("previous").addEventListener("click", () => turn(-1));
    document.getElementById("next").addEventListener("click", () => turn(1));
  }

  async function start() {
    const about = overview.gallery;
    const some = about.images < about.of ? `A random sample of ${about.images} of the ${about.of}`
      : `The ${about.images}`;
    const bare = about.images - about.pictures;
    document.getElementById("gallery-about").textContent = `${some} test images, seed ${about.seed}. `
      + "Point at a label to see the region that won it, at a region to see its best labels; open an "
      + "image by its name. \u2713 right, \u2717 false positive, \u25cb false negative; a label is "
      + "predicted over 50 %. Confidence: the score of the chosen label; for any label, the highest "
      + "score of those that are shown."
      + (bare ? ` ${bare} photographs are not at hand: their regions are drawn on empty ground.` : "");
    const raw = await gmpipe.load("images");
    images = { ids: raw.ids };
    for (const name of Object.keys(raw)) if (name !== "ids") images[name] = unpack(raw[name]);
    startControls();
    startDialog();
    await filter();
  }

  return { start };
})();

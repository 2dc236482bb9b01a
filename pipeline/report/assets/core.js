"use strict";
/* Shared by the other scripts: data that arrive as scripts, elements, arrays, numbers. */

const gmpipe = (() => {
  const received = new Map();

  /** Called by each script in data/. */
  function receive(name, value) {
    received.set(name, value);
  }

  /** The value that a script in data/ delivered; null if none did. */
  function data(name) {
    return received.has(name) ? received.get(name) : null;
  }

  const loading = new Map();

  /** Load data/<name>.js once. A page that was opened from disk can't fetch, but can add scripts. */
  function load(name) {
    if (received.has(name)) return Promise.resolve(received.get(name));
    if (!loading.has(name)) {
      loading.set(name, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = `data/${name}.js`;
        script.onload = () => resolve(received.get(name));
        script.onerror = () => reject(new Error(`data/${name}.js is missing from the page's folder`));
        document.head.append(script);
      }));
    }
    return loading.get(name);
  }

  const kinds = { uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int16: Int16Array,
    int32: Int32Array };

  /** Unpack an array that folder.py packed; row(i) is the i-th entry of its first axis. */
  function unpack(packed) {
    const text = atob(packed.base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const values = new kinds[packed.type](bytes.buffer);
    const width = packed.shape.slice(1).reduce((a, b) => a * b, 1);
    return { values, shape: packed.shape, row: (i) => values.subarray(i * width, (i + 1) * width) };
  }

  const STEPS = 65534; // as in folder.py
  const HALF = STEPS / 2; // probability 0.5

  /** Make an element. Attributes that are functions become event listeners; null ones are skipped. */
  function element(tag, attributes = {}, ...children) {
    const made = document.createElementNS(
      ["svg", "rect", "path", "line", "text", "g"].includes(tag)
        ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml", tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === false || value === undefined) continue;
      if (typeof value === "function") made.addEventListener(name, value);
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  /** Make the <option>s for a list of choices [value, text]. */
  function options(choices, chosen) {
    return choices.map(([value, text]) =>
      element("option", { value, selected: value === chosen }, text));
  }

  /** Make a labelled <select>. */
  function chooser(title, choices, onChange, chosen, id = null) {
    const select = element("select", { id, change: () => onChange(select.value) },
      ...options(choices, chosen));
    return element("label", {}, `${title} `, select);
  }

  function checkbox(title, checked, onChange) {
    const box = element("input", { type: "checkbox", checked, change: () => onChange(box.checked) });
    return element("label", { class: "check" }, box, ` ${title}`);
  }

  /** A text to put into a sentence. One that is written from right to left does not reorder the rest. */
  function isolated(text) {
    return /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]/.test(text) ? `\u2068${text}\u2069` : text;
  }

  /** Put content that may be too wide in a place that scrolls, with a shadow where more follows. */
  function scroller(content, attributes = {}) {
    const inner = element("div", { class: "scroll", ...attributes }, content);
    const outer = element("div", { class: "edges" }, inner);
    const look = () => {
      const rest = inner.scrollWidth - inner.clientWidth - inner.scrollLeft;
      outer.classList.toggle("more-left", inner.scrollLeft > 1);
      outer.classList.toggle("more-right", rest > 1);
    };
    inner.addEventListener("scroll", look, { passive: true });
    const sizes = new ResizeObserver(look);
    sizes.observe(inner);
    sizes.observe(content);
    return outer;
  }

  /** A table that may be too wide, with a name for those who can't see it. */
  function tablePlace(title, table, tall = false) {
    return scroller(table, { class: tall ? "scroll tall" : "scroll", tabindex: 0, role: "region",
      "aria-label": title });
  }

  return {
    receive, data, load, unpack, element, options, chooser, checkbox, scroller, tablePlace,
    isolated, STEPS, HALF,
    /** How the figures draw a variant: its colour, and the dashes of its line. */
    look: (variant) => data("overview").looks[variant],
    fixed: (value) => value.toFixed(1),
    count: (value) => value.toLocaleString("en-US"),
    signed(value) {
      const digits = Math.abs(value).toFixed(1);
      return (digits === "0.0" ? "" : value > 0 ? "+" : "\u2212") + digits;
    },
    percent: (steps) => (100 * steps / STEPS).toFixed(1),
  };
})();

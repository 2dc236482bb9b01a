"use strict";
/* Fills the page. */

(() => {
  const { element } = gmpipe;

  function figure(about) {
    const file = (folder, kind) => `${folder}/${about.name}.${kind}`;
    const links = [["figures", "svg"], ["figures", "png"], ["tables", "csv"]];
    const image = element("img", { src: file("figures", "svg"), alt: about.alt, loading: "lazy",
      load: () => { image.style.maxWidth = `${1.5 * image.naturalWidth}px`; } }); // letters stay small
    return element("figure", { id: `figure-${about.name}` },
      element("h3", {}, about.title),
      gmpipe.scroller(element("a", { href: file("figures", "svg") }, image)),
      element("figcaption", {}, about.note, " ",
        ...links.flatMap(([folder, kind], index) => [index ? " \u00b7 " : "",
          element("a", { href: file(folder, kind), download: `${about.name}.${kind}` },
            kind.toUpperCase())])));
  }

  function table(title, head, rows, kind = null) {
    return element("div", {}, element("h3", {}, title), gmpipe.tablePlace(title,
      element("table", { class: kind },
        head ? element("thead", {}, element("tr", {},
          ...head.map((name) => element("th", { scope: "col" }, name)))) : null,
        element("tbody", {}, ...rows.map(([name, ...cells]) => element("tr", {},
          element("th", { scope: "row" }, name),
          ...cells.map((cell) => element("td", {}, cell))))))));
  }

  function startRun(run, times) {
    const facts = document.getElementById("run-facts");
    facts.append(table("Data and runs", null, run.facts, "facts"));
    if (times && times.length) {
      facts.append(table("Time of each stage", ["stage", "for", "seconds", "finished (UTC)"], times));
    }
    facts.append(table("Package versions when this page was made", null, run.packages),
      element("details", {}, element("summary", {}, "Settings"), element("pre", {}, run.settings.join("\n"))));
  }

  function start() {
    const overview = gmpipe.data("overview");
    document.title = `${overview.dataset} \u2013 gmpipe report`;
    document.getElementById("title").textContent = overview.dataset;
    document.getElementById("caption").textContent =
      `${overview.caption}. The regions were made by ${overview.detector}.`;
    if (overview.missing_letters) {
      const note = document.getElementById("figures-note");
      note.textContent = overview.missing_letters;
      note.hidden = false;
    }
    for (const about of overview.figures) {
      const section = about.name === "gains-and-losses" ? "labels-figures" : "curves-figures";
      document.getElementById(section).append(figure(about));
    }
    gmpipe.tables.start();
    gmpipe.doubts.start();
    startRun(overview.run, gmpipe.data("times"));
    return gmpipe.gallery.start();
  }

  function complain(error) {
    const problem = document.getElementById("problem");
    problem.textContent = `This page is incomplete: ${error.message}. Make the report again.`;
    problem.hidden = false;
  }

  try {
    start().catch(complain);
  } catch (error) {
    complain(error);
    throw error;
  }
})();

"use strict";
/* The most doubtful labels with their photographs: those that are given, and those that are not. */

gmpipe.doubts = (() => {
  const { element } = gmpipe;

  const KINDS = [["present", "Given, but looks absent"], ["absent", "Not given, but looks present"]];

  function card(doubt) {
    const { image_id: id, split, label, score, rank, duplicate_of: copies, picture, size } = doubt;
    const frame = { class: picture ? "picture" : "picture bare",
      style: `--ratio: ${size[0] && size[1] ? size[0] / size[1] : 1}` };
    return element("article", { class: "card", "data-rank": rank },
      element("h4", {}, `${rank}. `, element("bdi", {}, label)),
      element("div", frame, picture
        ? element("img", { src: picture, alt: `Image ${id}`, loading: "lazy" })
        : element("p", {}, "no photograph")),
      element("p", { class: "network" }, element("bdi", {}, id), ` (${split})`),
      element("p", { class: "network" }, `probability that it has the label: ${score.toFixed(3)}`),
      copies.length ? element("p", { class: "network" }, "same file as ",
        element("bdi", {}, copies.join(", "))) : null);
  }

  function start() {
    const { doubts } = gmpipe.data("overview");
    if (doubts === null) return;
    document.getElementById("doubts").hidden = false;
    document.getElementById("doubts-link").hidden = false;
    document.getElementById("doubts-about").append(
      ...doubts.about.map((sentence) => element("li", {}, sentence)));
    for (const [given, title] of KINDS) {
      const { count, shown } = doubts[given];
      document.getElementById("doubts-place").append(
        element("h3", {}, `${title}: ${gmpipe.count(count)}`
          + (shown.length < count ? `, of which ${shown.length} are shown` : "")),
        element("div", { class: "doubts" }, ...shown.map(card)));
    }
  }

  return { start };
})();

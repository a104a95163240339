"use strict";
(() => {
const live = JSON.parse(document.getElementById("live").textContent);
const byId = (id) => document.getElementById(id);
document.documentElement.classList.add("live");

function made(tag, words, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, words);
  element.append(...children);
  return element;
}

// Tables: a button in every head sorts, one field filters.
const number = (text) => parseFloat(text.replace("−", "-").replace(/,/g, ""));

function compare(a, b) {
  const [x, y] = [number(a), number(b)];
  if (!isNaN(x) && !isNaN(y)) return x - y;
  if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
  return a.localeCompare(b);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = made("button", {type: "button", className: "sort", textContent: head.textContent});
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const cell = (row) => row.cells[column].textContent;
      rows.sort((a, b) => (rising ? 1 : -1) * compare(cell(a), cell(b)));
      body.append(...rows);
    });
  });
  if (rows.length < 8) continue;
  const input = made("input", {type: "search"});
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
  table.parentElement.before(made("label", {className: "filter js"}, "Only rows with ", input));
}

// Pictures that several places show.
function picture({picture: at, image, place}, words, name) {
  const img = made("img", {src: live.pictures[at], alt: `${words} on image ${image}`, loading: "lazy"});
  const shown = made("figcaption", {}, words, made("br"));
  const there = place !== undefined && byId(`image-${place}`);
  shown.append(there ? made("a", {href: `#image-${place}`, textContent: image}) : image);
  return made("figure", {className: name}, img, shown);
}

// Precision and recall: a slider over the scores of one class and head.
function explore() {
  const plot = byId("plot"), slider = byId("slider"), head = byId("head"), one = byId("class");
  const x = (recall) => 40 + 310 * recall, y = (precision) => 290 - 280 * precision;
  const draw = (tag, words, text) => {
    const element = document.createElementNS(plot.namespaceURI, tag);
    for (const [key, value] of Object.entries(words)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    plot.append(element);
    return element;
  };
  const own = () => live.curves[head.value][one.value];
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  let dot;

  function move() {
    const {points, thumbnails, n_objects, threshold} = own();
    const strip = byId("strip");
    slider.disabled = !points.length;
    if (!points.length) {
      byId("told").textContent = n_objects ? "Nothing was detected." : "There is no object of this class.";
      strip.replaceChildren();
      return;
    }
    const [score, precision, recall] = points[slider.value];
    const against = threshold === null ? "nothing of it is believed"
      : `the threshold, ${live.chosen}, is ${threshold}`;
    const f1 = precision + recall ? 2 * precision * recall / (precision + recall) : 0;
    const told = `Score ${score}: precision ${percent(precision)}, recall ${percent(recall)}, F1 ${percent(f1)}`;
    byId("told").textContent = `${told}; ${n_objects} objects; ${against}.`;
    slider.setAttribute("aria-valuetext", told);
    dot.setAttribute("cx", x(recall));
    dot.setAttribute("cy", y(precision));
    const n_kept = thumbnails.filter((each) => each.score >= score).length;
    const low = Math.max(0, Math.min(n_kept - 3, thumbnails.length - 6));
    strip.replaceChildren(...thumbnails.slice(low, low + 6).map((each) => {
      const kept = each.score >= score;
      return picture(each, `${each.said}, ${each.score}, ${kept ? "kept" : "below"}`, kept ? "kept" : "below");
    }));
  }

  function choose() {
    plot.replaceChildren();
    for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
      draw("line", {class: "grid", x1: x(tick), x2: x(tick), y1: y(0), y2: y(1)});
      draw("line", {class: "grid", x1: x(0), x2: x(1), y1: y(tick), y2: y(tick)});
      draw("text", {x: x(tick), y: 307, "text-anchor": "middle"}, 100 * tick);
      draw("text", {x: 34, y: y(tick) + 4, "text-anchor": "end"}, 100 * tick);
    }
    draw("rect", {class: "frame", x: x(0), y: y(1), width: 310, height: 280});
    draw("text", {x: x(0.5), y: 325, "text-anchor": "middle"}, "recall, %");
    draw("text", {x: -y(0.5), y: 10, "text-anchor": "middle", transform: "rotate(-90)"}, "precision, %");
    live.heads.forEach((each, i) => {
      const points = live.curves[i][one.value].points.map(([, p, r]) => `${x(r).toFixed(1)},${y(p).toFixed(1)}`);
      const name = i === Number(head.value) ? "curve own" : "curve";
      draw("polyline", {class: name, stroke: each.colour, points: points.join(" ")});
    });
    const {points, threshold} = own();
    dot = draw("circle", {class: "here", r: 6, cx: -20, cy: -20});
    slider.max = Math.max(0, points.length - 1);
    const above = points.filter(([score]) => threshold !== null && score >= threshold).length;
    slider.value = Math.max(0, above - 1);
    move();
  }

  slider.addEventListener("input", move);
  head.addEventListener("change", choose);
  one.addEventListener("change", choose);
  choose();
}
if (byId("explorer")) explore();

// Boxes by head.
for (const box of document.querySelectorAll("[data-toggles]")) {
  const layers = document.querySelectorAll(`[data-layer="${box.dataset.toggles}"]`);
  const show = () => layers.forEach((layer) => layer.classList.toggle("off", !box.checked));
  box.addEventListener("change", show);
  show();
}

// Confusion: numbers with pictures are buttons.
function confuse() {
  const choice = byId("confused"), behind = byId("behind");
  const tables = [...document.querySelectorAll(".confusion")];
  const choose = () => {
    tables.forEach((each) => { each.hidden = each.dataset.head !== choice.value; });
    behind.replaceChildren();
    document.querySelectorAll(".pick").forEach((other) => other.setAttribute("aria-pressed", "false"));
  };
  for (const table of tables) {
    const columns = [...table.querySelectorAll("thead th")].map((head) => head.textContent);
    [...table.querySelectorAll("tbody tr")].forEach((line, r) => [...line.cells].slice(1).forEach((cell, c) => {
      const shown = live.confused[table.dataset.head][`${r},${c}`];
      if (!shown) return;
      const [of, as] = [line.cells[0].textContent, columns[c + 1]];
      const words = as === "missed" && c === columns.length - 2 ? `${of}, missed` : `${of} taken for ${as}`;
      const button = made("button", {type: "button", className: "pick", textContent: cell.textContent});
      button.setAttribute("aria-label", `${words}: ${cell.textContent}`);
      button.setAttribute("aria-pressed", "false");
      cell.replaceChildren(button);
      button.addEventListener("click", () => {
        table.querySelectorAll(".pick").forEach((other) => other.setAttribute("aria-pressed", other === button));
        const strip = made("div", {className: "strip"}, ...shown.map((each) => picture(each, words, "kept")));
        const told = `${words}: ${button.textContent}, of which ${shown.length} shown`;
        behind.replaceChildren(made("p", {textContent: told}), strip);
        behind.scrollIntoView({block: "nearest"});
      });
    }));
  }
  choice.addEventListener("change", choose);
  choose();
}
if (byId("behind")) confuse();
})();

// The frontier of a patch: how much of the prompt's effect a file of some size keeps, from the patch's own figures.

import { el, svg } from "./dom.js";
import { bytes, figure } from "./format.js";

// `tp-export report --store --frontier` writes frontier_SERIES_BYTES, and the same with _se for its standard error.
const KEY = /^frontier_(weights|entries|both|exact)_(\d+)$/;
const NAMES = {
  weights: "weights",
  entries: "entries",
  both: "weights and entries",
  exact: "all entries",
  this: "this patch",
};
const [WIDTH, HEIGHT] = [460, 240];
const EDGE = { left: 46, right: 116, top: 12, bottom: 36 };

/** Return the points of a patch's frontier, from the smallest file on; empty if its figures hold none. */
export function frontierPoints(card) {
  const figures = { ...card.fidelity, ...card.report };
  const points = Object.entries(figures).flatMap(([name, gap]) => {
    const match = KEY.exec(name);
    return match === null ? [] : [{ series: match[1], bytes: Number(match[2]), gap, error: figures[`${name}_se`] }];
  });
  return points.sort((one, other) => one.bytes - other.bytes);
}

/** Return a picture of a frontier, with a table of the same numbers for those who do not see it. */
export function drawFrontier(name, card, points) {
  const gap = card.report?.gap_closed ?? card.fidelity?.gap_closed;
  const error = card.report?.gap_closed_se ?? card.fidelity?.gap_closed_se;
  const all = gap === undefined ? points : [...points, { series: "this", bytes: card.bytes, gap, error }];
  const rows = all.map((point) =>
    el(
      "tr",
      {},
      el("td", {}, NAMES[point.series]),
      el("td", { class: "number" }, bytes(point.bytes)),
      el("td", { class: "number" }, figure(point.gap, point.error)),
    ),
  );
  const head = ["form", "file", "gap closed"].map((title) => el("th", { scope: "col" }, title));
  return el(
    "figure",
    {},
    picture(name, all),
    el(
      "figcaption",
      {},
      "Gap closed against the size of the file. A point on the line keeps more than any smaller file; bars are one standard error.",
    ),
    el(
      "details",
      {},
      el("summary", {}, "The numbers"),
      el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)),
    ),
  );
}

function picture(name, points) {
  const x = sizes(points);
  const y = shares(points);
  const line = points
    .filter((point) => points.every((other) => other.bytes >= point.bytes || other.gap < point.gap))
    .sort((one, other) => one.bytes - other.bytes);
  return svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `Frontier of ${name}: gap closed against bytes` },
    ...y.ticks.flatMap((tick) => [
      svg("line", { class: "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y.at(tick), y2: y.at(tick) }),
      svg("text", { x: EDGE.left - 6, y: y.at(tick) + 4, "text-anchor": "end" }, tick.toFixed(y.digits)),
    ]),
    ...x.ticks.map((tick) =>
      svg("text", { x: x.at(tick), y: HEIGHT - EDGE.bottom + 16, "text-anchor": "middle" }, bytes(tick)),
    ),
    svg(
      "text",
      { x: (EDGE.left + WIDTH - EDGE.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" },
      "size of the file",
    ),
    svg("polyline", {
      class: "line",
      points: line.map((point) => `${x.at(point.bytes)},${y.at(point.gap)}`).join(" "),
    }),
    ...points.flatMap((point) => marks(point, x.at(point.bytes), y)),
  );
}

function marks(point, x, y) {
  const bar =
    point.error > 0
      ? [
          svg("line", {
            class: "bar",
            x1: x,
            x2: x,
            y1: y.at(point.gap - point.error),
            y2: y.at(point.gap + point.error),
          }),
        ]
      : [];
  const title = svg("title", {}, `${NAMES[point.series]}, ${bytes(point.bytes)}: ${figure(point.gap, point.error)}`);
  const shape =
    point.series === "this"
      ? svg("rect", { class: "point this", x: x - 5, y: y.at(point.gap) - 5, width: 10, height: 10 }, title)
      : svg("circle", { class: "point", cx: x, cy: y.at(point.gap), r: 4 }, title);
  // A frontier rises to the right, so there is room below and to the right of a point; this patch may lie on another.
  const below = point.series === "this" ? -9 : 15;
  const label = svg("text", { x: x + 8, y: y.at(point.gap) + below }, NAMES[point.series]);
  return [...bar, shape, label];
}

/** Return a logarithmic scale for bytes. */
function sizes(points) {
  const logs = points.map((point) => Math.log(Math.max(1, point.bytes)));
  const [low, high] = [Math.min(...logs) - 0.15, Math.max(...logs) + 0.15];
  const at = (size) =>
    EDGE.left + ((Math.log(Math.max(1, size)) - low) / (high - low)) * (WIDTH - EDGE.left - EDGE.right);
  const ticks = [0.06, 0.5, 0.94].map((part) => rounded(Math.exp(low + part * (high - low))));
  return { at, ticks: [...new Set(ticks)] };
}

/** Return a linear scale for shares, from a step below the smallest point to 1. */
function shares(points) {
  const lowest = Math.min(...points.map((point) => point.gap - (point.error ?? 0)));
  const highest = Math.max(1, ...points.map((point) => point.gap + (point.error ?? 0)));
  const step = [0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5, 25].find((size) => (highest - lowest) / size <= 6) ?? 100;
  const bottom = Math.floor(lowest / step) * step;
  const count = Math.ceil((highest - bottom) / step - 1e-9);
  const at = (share) => HEIGHT - EDGE.bottom - ((share - bottom) / (count * step)) * (HEIGHT - EDGE.top - EDGE.bottom);
  return {
    at,
    digits: step < 0.1 || step === 0.25 ? 2 : 1,
    ticks: Array.from({ length: count + 1 }, (_, index) => bottom + index * step),
  };
}

const rounded = (value) => Number(value.toPrecision(2));

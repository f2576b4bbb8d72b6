// What the patch files say about themselves: their fidelity in numbers and in words, and their frontier.

import { byId, el } from "./dom.js";
import { bytes, figure, percent } from "./format.js";
import { drawFrontier, frontierPoints } from "./frontier.js";

/** The figures that are shown, each with the first of its names that a patch has and with what it means. */
const SHOWN = [
  [
    ["gap_closed"],
    "gap closed",
    (share) =>
      `Over all tokens of an answer, the patch closes ${percent(share)} of the distance between no prompt and the prompt.`,
  ],
  [
    ["gap_closed_first"],
    "first token",
    (share) => `At the first token of an answer, which often is the one that chooses, it closes ${percent(share)}.`,
  ],
  [
    ["accuracy_exact_kept", "accuracy_kept"],
    "kept",
    (share) => `Of the answers that are right with the prompt, ${percent(share)} are right with the patch.`,
  ],
];

/** Show the figures of every patch. */
export function showFigures(choice) {
  const cards = [...choice.cards];
  byId("figures").replaceChildren(
    ...(cards.length
      ? [table(cards), ...cards.map(([name, card]) => details(name, card))]
      : [el("p", {}, "No patch is loaded.")]),
  );
}

function found(card, names) {
  const name = names.find((one) => card.fidelity?.[one] !== undefined);
  return name === undefined ? null : { value: card.fidelity[name], error: card.fidelity[`${name}_se`] };
}

function table(cards) {
  const head = ["patch", "form", "file", ...SHOWN.map(([, title]) => title)];
  const rows = cards.map(([name, card]) => {
    const figures = SHOWN.map(([names]) => found(card, names));
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, name),
      el("td", {}, card.capabilities.form),
      el("td", { class: "number" }, bytes(card.bytes)),
      ...figures.map((one) => el("td", { class: "number" }, one === null ? "–" : figure(one.value, one.error))),
    );
  });
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Figures of all patches" },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...head.map((title) => el("th", { scope: "col" }, title)))),
      el("tbody", {}, ...rows),
    ),
  );
}

function details(name, card) {
  const points = frontierPoints(card);
  return el(
    "article",
    { class: "figures" },
    el("h3", {}, name),
    el("ul", {}, ...sentences(card).map((text) => el("li", {}, text))),
    points.length ? drawFrontier(name, card, points) : null,
  );
}

function sentences(card) {
  const said = SHOWN.flatMap(([names, , words]) => {
    const one = found(card, names);
    if (one === null) return [];
    const error = one.error > 0 ? ` The standard error is ${percent(one.error).replace(" %", " points")}.` : "";
    return [words(one.value) + error];
  });
  if (!said.length) return ["The file holds no figures of its fidelity."];
  const queries = card.fidelity.queries;
  const questions = card.fidelity.accuracy_questions;
  const kept =
    found(card, SHOWN[2][0]) === null
      ? "Kept answers were not counted: the answers of its queries are not known, or none was right."
      : null;
  const measured =
    queries === undefined
      ? null
      : `Measured on ${queries} held-out queries${questions === undefined ? "" : `, ${questions} of them with known answers`}.`;
  return [...said, ...[kept, measured].filter((text) => text !== null)];
}

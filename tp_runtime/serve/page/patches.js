// The list of patches: which are chosen, a strength for each, and what its form allows, in the words of the patch.

import { byId, el } from "./dom.js";
import { bytes } from "./format.js";

const WEAKEST = -1;
const STRONGEST = 2;
const STEP = 0.05;

/** Show the patches of a choice, and call `changed` when the user changes it. */
export function showPatches(choice, changed) {
  const list = byId("patch-list");
  const focused = list.contains(document.activeElement) ? document.activeElement.id : null;
  list.replaceChildren(...[...choice.cards].map(([name, card], at) => row(choice, name, card, `patch-${at}`, changed)));
  byId("no-patches").hidden = choice.cards.size > 0;
  update(choice);
  if (focused !== null) byId(focused)?.focus();
}

function row(choice, name, card, id, changed) {
  const whole = choice.onlyWhole(name);
  const use = el("input", { type: "checkbox", id, "aria-describedby": `${id}-words` });
  const range = whole ? { min: 0, max: 1, step: 1 } : { min: WEAKEST, max: STRONGEST, step: STEP };
  const strength = el("input", { type: "range", id: `${id}-strength`, ...range, "aria-describedby": `${id}-words` });
  const value = el("output", { for: `${id}-strength` });
  const can = card.capabilities;
  const item = el(
    "li",
    { "data-name": name },
    el("label", { class: "check name" }, use, " ", name),
    el("p", { class: "note" }, `${can.form}, ${bytes(card.bytes)}`),
    el("div", { class: "strength" }, el("label", { for: `${id}-strength` }, "Strength"), strength, value),
    el(
      "dl",
      { class: "words", id: `${id}-words` },
      ...[
        ["strength", can.strength],
        ["sums", can.sums],
        ["system message", can.system],
      ].flatMap(([what, words]) => [el("dt", {}, what), el("dd", {}, words)]),
    ),
    el("p", { class: "refusal" }),
  );
  use.checked = choice.strengths.has(name);
  strength.value = choice.strengths.get(name) ?? 1;
  const read = () => {
    if (use.checked) choice.strengths.set(name, Number(strength.value));
    else choice.strengths.delete(name);
    update(choice);
    changed();
  };
  use.addEventListener("change", read);
  strength.addEventListener("input", read);
  return item;
}

/** Say beside every patch whether it can be chosen now, and at which strength it acts. */
function update(choice) {
  for (const item of byId("patch-list").children) {
    const [use, strength] = item.querySelectorAll("input");
    const refusal = choice.refusal(item.dataset.name);
    use.disabled = refusal !== null;
    strength.disabled = refusal !== null || !use.checked;
    const number = Number(strength.value);
    item.querySelector("output").textContent = choice.onlyWhole(item.dataset.name) ? String(number) : number.toFixed(2);
    item.querySelector(".refusal").textContent = refusal ?? "";
  }
}

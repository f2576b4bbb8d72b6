// One question, three answers side by side: of no patch, of the prompt, and of the chosen patches.

import { stream } from "./api.js";
import { byId, el, showError, submitOnEnter } from "./dom.js";
import { bytes, duration, tokens } from "./format.js";
import { requestFor } from "./request.js";

const ARMS = ["No patch", "Prompt", "Patch"];
const FIGURES = ["First token", "Each further token", "Tokens of context", "Keys and values", "Patch file"];

/** The view in which one question is asked three times. */
export class Compare {
  /** `state` has the choice and says what to do about failures. */
  constructor(state) {
    this.state = state;
    this.stopper = null;
    this.arms = ARMS.map((name, at) => arm(name, at));
    byId("arms").replaceChildren(...this.arms.map((one) => one.node));
    for (const id of ["prompt", "question"]) byId(id).addEventListener("input", () => this.describe());
    submitOnEnter(byId("question"));
    byId("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.stopper === null) this.ask();
    });
    byId("ask-stop").addEventListener("click", () => this.stopper?.abort());
  }

  /** Say in each column what it will be asked under, and beside the prompt whether the patches stand for it. */
  describe() {
    const { choice } = this.state;
    const prompt = byId("prompt").value.trim() !== "";
    if (this.stopper === null) {
      this.arms[0].about.textContent = "the model as it is";
      this.arms[1].about.textContent = prompt ? "the prompt in front of the question" : "no prompt is given";
      this.arms[2].about.textContent = choice.label || "no patch is chosen";
    }
    byId("prompt-help").textContent = "";
    standsFor(choice, byId("prompt").value).then((words) => {
      byId("prompt-help").textContent = words;
    });
  }

  async ask() {
    const { choice } = this.state;
    const base = choice.base;
    if (base === null) return;
    const [question, prompt] = [byId("question").value, byId("prompt").value];
    const messages = [{ role: "user", content: question }];
    // Stop strings of a patch end the answers of the two others too, so that the three can be compared.
    const { stop, field, label, extraTokens, fileBytes } = choice;
    const plans = [
      { messages, stop },
      prompt.trim() === "" ? null : { messages, stop, system: prompt },
      field === null ? null : { messages, patch: field },
    ];
    const costs = { perToken: base.model?.kv_bytes_per_token ?? null, extraTokens, fileBytes };
    this.describe();
    this.busy(new AbortController());
    byId("difference").textContent = "";
    const free = { ...costs, extraTokens: 0, fileBytes: 0 };
    const runs = plans.map((plan, at) => () => this.run(this.arms[at], plan, base, at === 2 ? costs : free));
    const alone = byId("in-turn").checked;
    for (const one of this.arms) clear(one);
    if (alone) for (const run of runs) await run();
    else await Promise.all(runs.map((run) => run()));
    this.busy(null);
    byId("difference").textContent = difference(this.arms[1].ended, this.arms[2].ended, label, alone);
  }

  async run(one, plan, base, costs) {
    const { signal } = this.stopper;
    if (plan === null || signal.aborted) return;
    one.output.setAttribute("aria-busy", "true");
    one.status.textContent = "running";
    try {
      const [path, body] = requestFor(base, plan);
      const end = await stream(path, body, signal, (text, kind) => grow(one.output, text, kind));
      const held = end.usage.prompt_tokens + costs.extraTokens;
      const { first_token_ms: first, ms_per_token: pace } = end.timings;
      const kept = costs.perToken === null ? null : held * costs.perToken;
      one.ended = { first, held, kept, text: one.output.textContent };
      set(one, [
        duration(first),
        duration(pace),
        tokens(held),
        kept === null ? "–" : bytes(kept),
        costs.fileBytes ? bytes(costs.fileBytes) : "none",
      ]);
      const why = end.reason === "length" ? ", cut at the limit" : "";
      one.status.textContent = `done, ${tokens(end.usage.completion_tokens)}${why}`;
    } catch (error) {
      if (error.name === "AbortError") {
        one.status.textContent = "stopped";
      } else {
        one.status.textContent = "failed";
        showError(one.error, error);
        this.state.failed(error);
      }
    } finally {
      one.output.setAttribute("aria-busy", "false");
    }
  }

  busy(stopper) {
    // The focus stays on a control that can be used: a button that is disabled under it would lose it.
    const held = [byId("ask"), byId("ask-stop")].includes(document.activeElement);
    this.stopper = stopper;
    byId("ask").disabled = stopper !== null;
    byId("ask-stop").disabled = stopper === null;
    if (held) byId(stopper === null ? "ask" : "ask-stop").focus();
  }
}

/** Add text to an answer; what the model thinks stands apart. */
export function grow(output, text, kind) {
  const last = output.lastChild;
  if (last !== null && last.dataset.kind === kind) last.firstChild.appendData(text);
  else output.append(el("span", { "data-kind": kind }, text));
}

function arm(name, at) {
  const title = `arm-${at}`;
  const output = el("div", {
    class: "answer",
    "aria-live": "polite",
    "aria-busy": "false",
    role: "region",
    "aria-label": `Answer: ${name}`,
    tabindex: "0",
  });
  const [about, status, error] = [
    el("p", { class: "note about" }),
    el("p", { class: "status", role: "status" }),
    el("div", { role: "alert" }),
  ];
  const values = FIGURES.map(() => el("dd", {}, "–"));
  const costs = el(
    "dl",
    { class: "costs" },
    ...FIGURES.flatMap((figure, index) => [el("dt", {}, figure), values[index]]),
  );
  const node = el(
    "section",
    { class: "arm", "aria-labelledby": title },
    el("h3", { id: title }, name),
    about,
    costs,
    output,
    status,
    error,
  );
  return { node, about, output, status, error, values, ended: null };
}

function clear(one) {
  one.ended = null;
  one.output.replaceChildren();
  one.status.textContent = "";
  showError(one.error, null);
  set(
    one,
    FIGURES.map(() => "–"),
  );
}

function set(one, texts) {
  texts.forEach((text, index) => {
    one.values[index].textContent = text;
  });
}

/**
 * Return in a sentence what the patch saves against the prompt; empty unless both have answered. Times are compared only
 * if each answer ran alone: in one batch the first token of each waits for the prompts of all.
 */
function difference(prompt, patch, label, alone) {
  if (prompt === null || patch === null) return "";
  const parts = [];
  if (alone && prompt.first && patch.first) {
    const sooner = prompt.first >= patch.first;
    const times = sooner ? prompt.first / patch.first : patch.first / prompt.first;
    parts.push(
      times < 1.05
        ? "its first token came at the same time"
        : `its first token came ${times.toFixed(1)} times ${sooner ? "sooner" : "later"}`,
    );
  }
  const fewer = prompt.held - patch.held;
  const kept = prompt.kept === null ? "" : ` (${bytes(Math.abs(prompt.kept - patch.kept))} of keys and values)`;
  parts.push(`a session holds ${tokens(Math.abs(fewer))} of context ${fewer >= 0 ? "fewer" : "more"}${kept}`);
  const same = prompt.text === patch.text ? " The two answers are the same, letter for letter." : "";
  const times = alone ? "" : " The three ran in one batch, so their times include each other's work.";
  return `${label} against the prompt: ${parts.join(", ")}.${same}${times}`;
}

/** Return whether the chosen patches were made from a prompt, as their digests say; empty where that cannot be known. */
async function standsFor(choice, prompt) {
  const chosen = choice.active.filter(([name]) => choice.cards.get(name).context_digest);
  // Browsers hash only on pages that come from this machine or over HTTPS.
  if (prompt.trim() === "" || !chosen.length || !globalThis.crypto?.subtle) return "";
  const digests = await Promise.all(
    [prompt, prompt.replace(/\n+$/, ""), `${prompt.replace(/\n+$/, "")}\n`].map(sha256),
  );
  return chosen
    .map(([name]) =>
      digests.includes(choice.cards.get(name).context_digest)
        ? `${name} was made from this text.`
        : `${name} was made from another text, so the two answers are not expected to agree.`,
    )
    .join(" ");
}

async function sha256(text) {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

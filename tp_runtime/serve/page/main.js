// What happens when the page opens, and what joins its views: the choice of patches, the key and the connection.

import { alive, hasKey, models, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { Choice } from "./choice.js";
import { Compare } from "./compare.js";
import { byId, showError } from "./dom.js";
import { showFigures } from "./figures.js";
import { showPatches } from "./patches.js";
import { startTabs } from "./tabs.js";

const LOOK_MS = 2000; // how often a page without a connection looks for the server

const choice = new Choice();
const state = { choice, failed };
const compare = new Compare(state);
const chat = new Chat(state);
let looking = false;

function describe() {
  compare.describe();
  chat.describe();
}

/** Read what the server can be asked for, and show it. Return whether that worked. */
async function load() {
  let listed;
  try {
    listed = await models();
  } catch (error) {
    showError(byId("page-error"), error);
    if (error.status !== 404) failed(error); // after 404 it would load again
    return false;
  }
  const gone = choice.load(listed);
  byId("key-form").hidden = true;
  byId("metrics").hidden = hasKey(); // a link sends no key
  byId("connection").textContent = "connected";
  byId("connection").classList.remove("lost");
  showError(
    byId("page-error"),
    gone.length ? { title: "A patch is gone.", message: `The server no longer has ${gone.join(", ")}.` } : null,
  );
  showModel(choice.base);
  showPatches(choice, describe);
  showFigures(choice);
  describe();
  return true;
}

function showModel(base) {
  const facts = base?.model;
  byId("model").textContent =
    base === null
      ? "…"
      : [
          base.id,
          ...(facts ? [facts.precision, `${facts.style} model`, `window of ${facts.context_window} tokens`] : []),
        ].join(" · ");
  if (facts) byId("max-tokens").max = facts.max_tokens;
  const completes = facts?.style === "completion";
  byId("ask-form").querySelector("label[for=prompt]").textContent = completes
    ? "Prompt that the patch replaces (text in front)"
    : "Prompt that the patch replaces (system message)";
  byId("ask-form").querySelector("label[for=question]").textContent = completes ? "Text to continue" : "Question";
  byId("keys-help").textContent =
    "Enter sends, Shift and Enter begins a new line." +
    (completes ? " This model has no chat template, so it continues a text (/v1/completions)." : "");
  byId("times-help").hidden = !facts?.keeps_prompts;
}

/** Do what a failure asks of the whole page; the view that failed shows its words. */
function failed(error) {
  if (error.status === 401) {
    byId("key-form").hidden = false;
    byId("metrics").hidden = true;
    byId("key").focus();
  } else if (error.status === 404) {
    load(); // a patch that is gone should not stand in the list
  } else if (error.lost && !looking) {
    lookForServer();
  }
}

async function lookForServer() {
  looking = true;
  byId("connection").textContent = "no connection; looking for the server";
  byId("connection").classList.add("lost");
  do {
    await new Promise((resume) => setTimeout(resume, LOOK_MS));
  } while (!(await alive()));
  looking = false;
  await load();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  byId("key").value = "";
  load().then((worked) => worked && byId("question").focus());
});
byId("reload").addEventListener("click", load);
byId("prompt").addEventListener("input", () => chat.describe());
startTabs(byId("work").querySelector("[role=tablist]"));
load();

// From what the page shows to the body of a request.

import { byId } from "./dom.js";

/** Return the path and the body of a request in the style of the model: a chat, or a text to continue. */
export function requestFor(base, { messages, system = null, patch = null, stop = [] }) {
  const body = { model: base.id, ...settings() };
  if (patch !== null) body.patch = patch;
  if (stop.length) body.stop = stop;
  if (base.model?.style === "completion") {
    // The context of a completion ends with one line break, as in `tp-export patch`.
    const context = system === null ? "" : `${system.replace(/\n+$/, "")}\n`;
    return ["v1/completions", { ...body, prompt: context + messages.at(-1).content }];
  }
  const first = system === null ? [] : [{ role: "system", content: system }];
  return ["v1/chat/completions", { ...body, messages: [...first, ...messages] }];
}

/** Return the settings that have a value. The server checks them and says what is wrong. */
function settings() {
  const fields = { max_tokens: "max-tokens", temperature: "temperature", seed: "seed" };
  const given = Object.entries(fields).filter(([, id]) => byId(id).value !== "");
  return Object.fromEntries(given.map(([name, id]) => [name, Number(byId(id).value)]));
}

// The server's API: requests with the key of this tab, streams of server-sent events, and errors in the server's words.

const KEY = "tp-runtime-api-key";
const LOST = "The connection to the server was lost.";

/** An error to show: a title, the server's message and what to do. */
export class Failure extends Error {
  constructor(title, message, fix = null, status = null) {
    super(message);
    Object.assign(this, { title, fix, status });
  }

  /** Whether no answer came at all: the server is gone, or the network is. */
  get lost() {
    return this.status === null;
  }
}

/** Keep the key until the tab is closed. */
export const setKey = (key) => sessionStorage.setItem(KEY, key);

/** Return whether requests carry a key. */
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

const lost = (detail) =>
  new Failure(LOST, detail, "check that the server runs; this page looks for it and says when it is back");

/** Return the failure that an error body describes. The message of this project's errors contains the fix. */
export function failureOf(status, body) {
  const error = body?.error ?? {};
  const message = error.message ?? `the server answered with status ${status} and no explanation`;
  const fix = error.fix && !message.includes(error.fix) ? error.fix : null;
  const titles = { 401: "The server wants an API key.", 429: "The server is busy.", 503: "The server is not ready." };
  const title = titles[status] ?? (status >= 500 ? "The server failed." : "The server refused the request.");
  const fixes = { 401: "enter a key above", 429: "ask again in a moment", 503: "ask again in a moment" };
  return new Failure(title, message, fix ?? (message.includes("Fix:") ? null : (fixes[status] ?? null)), status);
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (key !== null && /[^\x20-\x7e]/.test(key)) {
      throw failureOf(401, { error: { message: "the API key has characters that no key has" } });
    }
    throw lost("No answer came.");
  }
  if (response.ok) return response;
  let body = null;
  try {
    body = await response.json();
  } catch {
    // something in front of the server answered; the status says what there is to say
  }
  throw failureOf(response.status, body);
}

/** Return the entries of /v1/models: the model itself, then the patches. */
export async function models() {
  return (await (await call("v1/models")).json()).data;
}

/** Return whether the server lives. */
export async function alive() {
  try {
    return (await fetch("health", { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

/**
 * Run a request and hand on its text while it grows.
 *
 * @param {string} path - v1/chat/completions or v1/completions.
 * @param {object} body - the body, without the fields of streams.
 * @param {AbortSignal} signal - stops the request; the server then frees its row.
 * @param {(text: string, kind: string) => void} grow - called with each piece, whose kind is "text" or "reasoning".
 * @returns {Promise<{usage: object, timings: object, reason: string}>} what the last chunks say.
 */
export async function stream(path, body, signal, grow) {
  const response = await call(path, {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  const end = { usage: null, timings: {}, reason: null };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return end;
    const chunk = JSON.parse(data);
    if (chunk.error) throw failureOf(statusOf(chunk.error), chunk);
    if (chunk.usage) end.usage = chunk.usage;
    if (chunk.timings) end.timings = chunk.timings;
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    if (choice.finish_reason) end.reason = choice.finish_reason;
    if (choice.delta?.reasoning_content) grow(choice.delta.reasoning_content, "reasoning");
    const text = choice.delta?.content ?? choice.text;
    if (text) grow(text, "text");
  }
  throw lost("The answer broke off before its end.");
}

// A stream has begun with 200 when it fails, so its error has only OpenAI's type.
const statusOf = (error) => (error.type === "server_error" || error.type === "timeout_error" ? 500 : 400);

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        throw error.name === "AbortError" ? error : lost("The answer broke off before its end.");
      }
      if (part.done) return;
      held += part.value;
      const whole = held.split("\n\n");
      held = whole.pop();
      for (const event of whole) {
        if (event.startsWith("data: ")) yield event.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

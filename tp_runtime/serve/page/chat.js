// A chat under the chosen patches. The page keeps the dialogue, because the API has no memory of it.

import { stream } from "./api.js";
import { grow } from "./compare.js";
import { byId, el, showError, submitOnEnter } from "./dom.js";
import { duration, tokens } from "./format.js";
import { requestFor } from "./request.js";

/** The view with the chat. */
export class Chat {
  /** `state` has the choice and says what to do about failures. */
  constructor(state) {
    this.state = state;
    this.messages = [];
    this.stopper = null;
    submitOnEnter(byId("message"));
    byId("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.stopper === null) this.send();
    });
    byId("chat-stop").addEventListener("click", () => this.stopper?.abort());
    byId("chat-clear").addEventListener("click", () => this.clear());
  }

  /** Say under which patches the next message runs, and whether it can have or needs a system message. */
  describe() {
    const { choice } = this.state;
    const completes = choice.base?.model?.style === "completion";
    byId("chat-about").textContent =
      `Next answer: ${choice.label || "no patch"}. ` +
      (completes
        ? "This model has no chat template. It continues each message as a text of its own and does not remember the others."
        : "The patches may change from message to message.");
    byId("chat-prompt").disabled = choice.noSystem !== null;
    const empty = byId("prompt").value.trim() === "" && choice.noSystem === null;
    const prompt = empty ? "The prompt of Compare is empty." : "";
    const words = choice.noSystem ?? choice.needsSystem;
    byId("chat-prompt-help").textContent = words === null ? prompt : `System message: ${words}. ${prompt}`.trim();
  }

  async send() {
    const { choice } = this.state;
    if (choice.base === null) return;
    const content = byId("message").value;
    const message = { role: "user", content };
    const prompt = byId("prompt").value;
    const system = byId("chat-prompt").checked && choice.noSystem === null && prompt.trim() !== "" ? prompt : null;
    const dialogue = this.messages; // Clear begins another one, also while this answer comes
    const [label, extraTokens] = [choice.label || "no patch", choice.extraTokens];
    const [path, body] = requestFor(choice.base, { messages: [...dialogue, message], system, patch: choice.field });
    showError(byId("chat-error"), null);
    byId("message").value = "";
    const asked = turn("You", content);
    const answer = turn(label, "");
    this.add(asked.node, answer.node);
    this.busy(new AbortController());
    answer.text.setAttribute("aria-busy", "true");
    let said = "";
    try {
      const end = await stream(path, body, this.stopper.signal, (text, kind) => {
        if (kind === "text") said += text;
        this.keepEnd(() => grow(answer.text, text, kind));
      });
      const { first_token_ms: first, ms_per_token: pace } = end.timings;
      const why = end.reason === "length" ? ", cut at the limit" : "";
      answer.meta.textContent =
        `${tokens(end.usage.prompt_tokens + extraTokens)} of context, ${end.usage.completion_tokens} answered${why}; ` +
        `first token ${duration(first)}, each further ${duration(pace)}`;
      dialogue.push(message, { role: "assistant", content: said });
    } catch (error) {
      if (error.name === "AbortError") {
        answer.meta.textContent = "stopped";
        dialogue.push(message, { role: "assistant", content: said });
      } else {
        this.failed(error, content, said, asked, answer);
      }
    } finally {
      answer.text.setAttribute("aria-busy", "false");
      this.busy(null);
    }
  }

  /** Take a message that got no whole answer out of the dialogue, and give its text back to the field. */
  failed(error, content, said, asked, answer) {
    if (said === "") {
      asked.node.remove();
      answer.node.remove();
    } else {
      answer.meta.textContent = "broke off; this message and its answer are not part of the dialogue";
    }
    if (byId("message").value === "") byId("message").value = content;
    showError(byId("chat-error"), error);
    this.state.failed(error);
  }

  clear() {
    this.stopper?.abort();
    this.messages = [];
    byId("chat-log").replaceChildren();
    showError(byId("chat-error"), null);
    byId("message").focus();
  }

  add(...nodes) {
    byId("chat-log").append(...nodes);
    byId("chat-log").scrollTop = byId("chat-log").scrollHeight;
  }

  /** Grow the log, and keep its end in view if it was. */
  keepEnd(change) {
    const log = byId("chat-log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    change();
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  busy(stopper) {
    this.stopper = stopper;
    const held = [byId("send"), byId("chat-stop")].includes(document.activeElement);
    byId("send").disabled = stopper !== null;
    byId("chat-stop").disabled = stopper === null;
    if (held) byId(stopper === null ? "message" : "chat-stop").focus();
  }
}

function turn(who, content) {
  const text = el("div", { class: "text" }, ...(content === "" ? [] : [content]));
  const meta = el("p", { class: "note" });
  return {
    node: el("article", { class: who === "You" ? "turn you" : "turn" }, el("h3", {}, who), text, meta),
    text,
    meta,
  };
}

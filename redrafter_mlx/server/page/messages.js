// Questions and answers as they are shown.

import { copyButton, count, decimal, el, iconButton, number } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { Shades } from "./shades.js";

/** A line about an answer's speed: what is known of it by now. */
export function speedLine(message) {
  const { stats } = message;
  const tokens = message.drafted + message.own;
  if (!stats || !tokens) return "";
  const parts = [count(tokens, "token")];
  if (stats.generation_tps) parts.push(`${decimal(stats.generation_tps)} tokens/s`);
  if (message.drafter === "none") return parts.join(" · ");
  if (stats.tokens_per_round) parts.push(`${decimal(stats.tokens_per_round)} a round`);
  const gain = speedUp(stats);
  if (gain) parts.push(`${decimal(gain)}× plain`);
  return parts.join(" · ");
}

/** How many times as fast as plain decoding; null where that was not measured. */
export function speedUp(stats) {
  if (!stats?.plain_tps || !stats.generation_tps) return null;
  return stats.generation_tps / stats.plain_tps;
}

const ENDS = {
  length: "The answer reached its limit of tokens. Settings have a larger one.",
  stopped: "Stopped.",
  cancelled: "The server stopped this answer.",
  content_filter: "The server ended this answer.",
};

/** A question; `edit` is called with its new text, and is given for the last one only. */
export class QuestionView {
  constructor(message, edit) {
    this.message = message;
    this.body = el("div", { class: "bubble" }, message.text);
    this.node = el("article", { class: "question", "aria-label": "You" }, this.body);
    this.tools = el(
      "div",
      { class: "tools" },
      copyButton("Copy", () => message.text),
    );
    this.node.append(this.tools);
    this.allowEdit(edit);
  }

  allowEdit(edit) {
    this.edit = edit;
    this.editor?.remove();
    this.editor = edit && iconButton("edit", "Edit and ask again", () => this.startEdit());
    if (edit) this.tools.append(this.editor);
  }

  startEdit() {
    if (!this.edit || this.node.querySelector("textarea")) return;
    const area = el("textarea", { "aria-label": "Edit the message", rows: "3" });
    area.value = this.message.text;
    const stop = () => {
      form.replaceWith(this.body);
      this.tools.hidden = false;
      this.editor?.focus();
    };
    const send = (event) => {
      event?.preventDefault();
      if (area.value.trim()) this.edit(area.value.trim());
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        stop();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        send(event);
      }
    });
    const buttons = el(
      "div",
      { class: "buttons" },
      el("button", { type: "button", onclick: stop }, "Cancel"),
      el("button", { type: "submit", class: "main" }, "Ask again"),
    );
    const form = el("form", { class: "edit", onsubmit: send }, area, buttons);
    this.body.replaceWith(form);
    this.tools.hidden = true;
    area.focus();
  }
}

/** An answer; `again` asks for another one and is given for the last one only. */
export class AnswerView {
  constructor(message, run = null) {
    Object.assign(this, { message, run });
    this.progress = el("div", { class: "progress" });
    this.thoughts = el("div", { class: "thoughts" });
    this.summary = el("summary");
    this.reasoning = el(
      "details",
      { class: "reasoning", hidden: true },
      this.summary,
      this.thoughts,
    );
    this.summary.addEventListener("click", () => (this.touched = true));
    this.body = el("div", { class: "text" });
    this.end = el("div", { class: "end" });
    this.line = el("span", { class: "faint speed" });
    this.copy = copyButton("Copy the answer", () => message.text);
    this.tools = el("div", { class: "tools" }, this.copy);
    this.foot = el("footer", {}, this.line, this.tools);
    this.node = el(
      "article",
      { class: "answer", "aria-label": "Model" },
      this.progress,
      this.reasoning,
      this.body,
      this.end,
      this.foot,
    );
    const shades = run?.shades ?? new Shades(message.shades);
    const others = run?.reasoningShades ?? new Shades(message.reasoningShades);
    this.text = new MarkdownView(this.body, shades);
    this.thinking = new MarkdownView(this.thoughts, others);
  }

  allowAgain(again) {
    this.again = again;
    this.repeat?.remove();
    this.repeat = again && iconButton("again", "Ask for another answer", again);
    if (again) this.tools.append(this.repeat);
    this.update();
  }

  /** Show what there is by now. */
  update() {
    const { message, run } = this;
    const live = Boolean(run && !run.done);
    this.node.classList.toggle("live", live);
    this.#showProgress(live);
    if (message.reasoning) this.#showReasoning(live && !message.text);
    if (message.text !== this.shown || live !== this.wasLive) this.text.update(message.text, live);
    Object.assign(this, { shown: message.text, wasLive: live });
    this.line.textContent = speedLine(message);
    this.tools.hidden = live || !(message.text || this.again);
    this.copy.hidden = !message.text;
    this.#showEnd();
  }

  #showReasoning(thinking) {
    const { message, reasoning } = this;
    reasoning.hidden = false;
    // Open while it comes, unless the reader has decided otherwise.
    if (!this.touched && reasoning.open !== thinking) reasoning.open = thinking;
    const seconds = message.thoughtSeconds;
    const thought =
      seconds >= 1 ? `Thought for ${count(Math.round(seconds), "second")}` : "Thought";
    this.summary.textContent = thinking ? "Thinking…" : thought;
    if (message.reasoning !== this.thoughtShown || !thinking) {
      if (!this.thoughtDone) this.thinking.update(message.reasoning, thinking);
      this.thoughtShown = message.reasoning;
      this.thoughtDone = !thinking;
    }
  }

  #showProgress(live) {
    const { phase, retryAt } = this.run ?? {};
    const { stats, text, reasoning } = this.message;
    if (!live || text || reasoning) {
      this.progress.replaceChildren();
    } else if (phase === "reading") {
      this.#showReading(stats);
    } else if (phase === "queued") {
      const seconds = Math.max(Math.ceil((retryAt - Date.now()) / 1000), 0);
      this.#say(`The server is busy. Trying again in ${count(seconds, "second")}…`);
    } else {
      this.#say("Waiting for the model…");
    }
  }

  #say(text) {
    if (this.progress.textContent === text) return;
    this.progress.replaceChildren(el("span", { class: "dots" }), text);
  }

  #showReading({ prompt_done: done = 0, prompt_tokens: all = 0, cached_tokens: cached = 0 }) {
    let bar = this.progress.querySelector("progress");
    if (!bar) {
      bar = el("progress", { "aria-label": "Reading the conversation" });
      this.progress.replaceChildren(el("span"), bar);
    }
    bar.max = Math.max(all, 1);
    bar.value = done;
    const known = cached ? `, ${number(cached)} known from before` : "";
    this.progress.firstChild.textContent = `Reading the conversation: ${number(done)} of ${count(all, "token")}${known}`;
  }

  #showEnd() {
    const { finish, error } = this.message;
    const said = error ?? ENDS[finish] ?? "";
    const key = `${said}|${Boolean(this.again)}`;
    if (key === this.ended) return;
    this.ended = key;
    const retry =
      error && this.again && el("button", { type: "button", onclick: this.again }, "Try again");
    this.end.replaceChildren(
      ...(said ? [el("p", { class: error ? "error" : "faint" }, said)] : []),
    );
    if (retry) this.end.append(retry);
  }
}

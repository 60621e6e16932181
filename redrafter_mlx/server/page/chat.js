// The conversation that is shown: questions, answers, and the answers in progress of all of them.

import { announce, byId, count } from "./dom.js";
import { AnswerView, QuestionView } from "./messages.js";
import { emptyAnswer, requestOf, Run } from "./run.js";
import { titleOf } from "./store.js";

const SAVE_EVERY = 2000; // milliseconds, while an answer comes
const SHARE = 4; // a picture that took a while is followed by four times that for other things

/**
 * hooks  model(): its name; askKey(again, signal); changed(): what the rest of the page shows
 */
export class Chat {
  constructor(store, panel, sticky, hooks) {
    Object.assign(this, { store, panel, sticky, hooks });
    this.log = byId("log");
    this.runs = new Map(); // by the id of their conversation
    this.rounds = new WeakMap(); // of the answers of this visit
    this.views = [];
    this.nextDraw = 0;
    this.savedAt = 0;
  }

  get run() {
    return this.runs.get(this.conversation.id) ?? null;
  }

  get busy() {
    return new Set(this.runs.keys());
  }

  /** Show a conversation. */
  open(conversation) {
    this.conversation = conversation;
    const { messages } = conversation;
    for (const message of messages) {
      const lost = message.role === "assistant" && message.finish == null;
      if (lost && this.run?.message !== message) message.finish = "interrupted";
    }
    this.views = messages.map((message) => this.#view(message));
    this.log.replaceChildren(...this.views.map((view) => view.node));
    this.#allow();
    this.hooks.changed();
    if (messages.length) this.sticky.follow();
    this.#draw();
    if (!messages.length) this.sticky.rest();
  }

  #view(message) {
    if (message.role === "user") return new QuestionView(message);
    const run = this.run?.message === message ? this.run : null;
    const view = new AnswerView(message, run);
    view.update();
    return view;
  }

  /** Ask; nothing happens while an answer comes. */
  ask(text) {
    if (this.run || !text.trim()) return false;
    const { conversation } = this;
    conversation.title ||= titleOf(text);
    conversation.messages.push({ role: "user", text: text.trim() });
    this.#answer();
    return true;
  }

  /** Another answer to the last question. */
  again() {
    const { messages } = this.conversation;
    if (this.run || !messages.length) return;
    if (messages.at(-1).role === "assistant") messages.pop();
    this.#answer();
  }

  /** Put the last question differently. */
  edit(text) {
    const { messages } = this.conversation;
    if (this.run) return;
    const last = messages.findLastIndex((message) => message.role === "user");
    const first = last === 0 && this.conversation.title === titleOf(messages[0].text);
    if (first) this.conversation.title = titleOf(text);
    messages.splice(last, messages.length, { role: "user", text });
    this.#answer();
  }

  /** Edit the last question in its place. */
  startEdit() {
    this.views.findLast((view) => view instanceof QuestionView)?.startEdit();
  }

  stop() {
    this.run?.stop();
  }

  /** Stop a conversation's answer, as it is deleted. */
  drop(id) {
    this.runs.get(id)?.stop();
    this.runs.delete(id);
  }

  #answer() {
    const { conversation } = this;
    const request = requestOf(conversation.messages, this.store.settings, this.hooks.model());
    const message = emptyAnswer(request.redrafter.drafter);
    conversation.messages.push(message);
    const run = new Run(conversation, message, request, {
      changed: () => this.#schedule(run),
      ended: () => this.#ended(run),
      askKey: this.hooks.askKey,
    });
    this.runs.set(conversation.id, run);
    this.rounds.set(message, run.rounds);
    this.store.save(conversation, true);
    this.open(conversation);
    announce("The model answers");
    run.start();
  }

  #schedule(run) {
    const now = performance.now();
    if (now - this.savedAt > SAVE_EVERY) {
      this.savedAt = now;
      this.store.save(run.conversation);
    }
    if (run !== this.run || this.scheduled) return;
    this.scheduled = true;
    const draw = () => {
      this.scheduled = false;
      if (run === this.run) this.#draw();
    };
    // Long texts take longer to show: the page must stay answerable all the same.
    setTimeout(() => requestAnimationFrame(draw), Math.max(this.nextDraw - now, 0));
  }

  #draw() {
    const began = performance.now();
    const { run } = this;
    const last = this.views.at(-1);
    if (last instanceof AnswerView) {
      if (run) last.update();
      this.panel.show(last.message, this.rounds.get(last.message) ?? [], Boolean(run));
    }
    this.sticky.grown();
    const now = performance.now();
    this.nextDraw = now + Math.min(SHARE * (now - began), 500);
  }

  #ended(run) {
    const { conversation, message } = run;
    if (this.runs.get(conversation.id) === run) this.runs.delete(conversation.id);
    else return; // its conversation was deleted meanwhile
    this.store.save(conversation, true);
    const tokens = count(message.drafted + message.own, "token");
    announce(message.error ?? `The answer is complete: ${tokens}`);
    if (conversation === this.conversation) {
      this.views.at(-1).update();
      this.#allow();
      this.#draw();
    }
    this.hooks.changed();
  }

  /** The last question can be edited, and the last answer be asked for again, when none comes. */
  #allow() {
    const free = !this.run;
    const lastQuestion = this.views.findLast((view) => view instanceof QuestionView);
    for (const view of this.views) {
      if (view instanceof QuestionView) {
        view.allowEdit(free && view === lastQuestion ? (text) => this.edit(text) : null);
      } else {
        view.allowAgain(free && view === this.views.at(-1) ? () => this.again() : null);
      }
    }
  }
}

// One answer while it is written: asks, reads the chunks, and keeps them in the message.

import { answer, keepKey, ServerError } from "./server.js";
import { Aligner, Shades } from "./shades.js";

const MOST_TRIES = 20; // of a server whose queue is full

/** What is sent for a conversation; `messages` end with the question. */
export function requestOf(messages, settings, model) {
  const set = (value, parse) => (value === "" || value == null ? undefined : parse(value));
  return {
    model,
    messages: spoken(messages, settings.system),
    stream: true,
    stream_options: { include_usage: true },
    temperature: set(settings.temperature, Number),
    top_p: set(settings.top_p, Number),
    max_tokens: set(settings.max_tokens, Number),
    seed: set(settings.seed, Number),
    redrafter: {
      details: true,
      drafter: settings.drafter,
      budget: set(settings.budget, (value) => (value === "auto" ? value : Number(value))),
    },
  };
}

/** Roles take turns, as many templates insist: an answer that never came joins two questions. */
function spoken(messages, system) {
  const turns = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  for (const { role, text } of messages) {
    const last = turns.at(-1);
    if (!text) continue;
    if (role === "user" && last?.role === "user") last.content += `\n\n${text}`;
    else turns.push({ role, content: text });
  }
  return turns;
}

/** A message that an answer will be written to; `drafter` is who guesses. */
export function emptyAnswer(drafter) {
  return {
    role: "assistant",
    drafter,
    text: "",
    shades: "",
    reasoning: "",
    reasoningShades: "",
    drafted: 0,
    own: 0,
    stats: null,
    round: null,
    rules: null,
    finish: null,
    error: null,
  };
}

/**
 * An answer in progress.
 *
 * message  of `emptyAnswer`, filled as chunks come
 * hooks    changed(): something came; ended(): nothing will; askKey(again): an API key or null
 *
 * phase: "waiting", "reading" the prompt, "writing"; or "queued", until the time `retryAt`
 */
export class Run {
  constructor(conversation, message, request, hooks) {
    Object.assign(this, { conversation, message, request, hooks });
    this.shades = new Shades();
    this.reasoningShades = new Shades();
    this.rounds = []; // all of this answer's, for the picture
    this.phase = "waiting";
    this.retryAt = 0;
    this.done = false;
    this._control = new AbortController();
    this._aligner = new Aligner();
    this._thinkingSince = 0;
    this._asked = false;
  }

  stop() {
    this._control.abort();
  }

  async start() {
    const { message } = this;
    try {
      await this.#read();
      message.finish ??= "broken";
      if (message.finish === "broken") {
        message.error = "The connection ended before the answer was complete.";
      }
    } catch (error) {
      message.finish = this._control.signal.aborted ? "stopped" : "error";
      if (message.finish === "error") {
        message.error = error instanceof ServerError ? error.message : `This page failed: ${error}`;
      }
    }
    this.done = true;
    this.hooks.ended(this);
  }

  async #read() {
    for (let attempt = 1; ; attempt += 1) {
      try {
        for await (const chunk of answer(this.request, this._control.signal)) this.#take(chunk);
        return;
      } catch (error) {
        if (error.status === 401) await this.#askKey(error);
        else if (error.status === 429 && attempt < MOST_TRIES) await this.#wait(error.retryAfter);
        else throw error;
      }
    }
  }

  async #askKey(error) {
    const key = await this.hooks.askKey(this._asked, this._control.signal);
    this._asked = true;
    if (!key) throw error;
    keepKey(key);
  }

  /** The queue is full: try again when the server thinks that there is room. */
  async #wait(seconds) {
    const wait = Math.min(Math.max(seconds ?? 2, 0.2), 60) * 1000;
    this.phase = "queued";
    this.retryAt = Date.now() + wait;
    const ticking = setInterval(() => this.hooks.changed(this), 500);
    this.hooks.changed(this);
    try {
      await new Promise((resolve, reject) => {
        setTimeout(resolve, wait);
        this._control.signal.addEventListener("abort", () => reject(new Error("stopped")));
      });
    } finally {
      clearInterval(ticking);
    }
    this.phase = "waiting";
  }

  #take(chunk) {
    const { message } = this;
    const choice = chunk.choices?.[0];
    const details = chunk.redrafter;
    if (details) this.#takeDetails(details);
    message.rules = chunk.usage?.redrafter?.rules ?? message.rules;
    const { content, reasoning_content: reasoning } = choice?.delta ?? {};
    if (reasoning) {
      this._thinkingSince ||= Date.now();
      message.reasoning += reasoning;
      this._aligner.take(reasoning, this.reasoningShades);
      message.reasoningShades = this.reasoningShades.code;
    }
    if (content) {
      this.#endThinking();
      message.text += content;
      this._aligner.take(content, this.shades);
      message.shades = this.shades.code;
    }
    if (reasoning || content) this.phase = "writing";
    if (choice?.finish_reason) {
      this.#endThinking();
      message.finish = choice.finish_reason;
    }
    this.hooks.changed(this);
  }

  #endThinking() {
    if (this._thinkingSince && this.message.thoughtSeconds == null) {
      this.message.thoughtSeconds = (Date.now() - this._thinkingSince) / 1000;
    }
  }

  #takeDetails({ pieces = [], tree = null, stats = null }) {
    const { message } = this;
    const before = message.stats ?? {};
    if (stats) message.stats = { ...before, ...stats };
    this._aligner.add(pieces);
    const isNext = stats?.rounds == null ? pieces.length > 0 : stats.rounds > (before.rounds ?? 0);
    if (isNext) {
      const said = message.drafted + message.own;
      this.rounds.push({ tree: null, drafted: 0, own: 0, next: "", said, pieces: 0, kept: 0 });
    } else if (this.phase === "waiting" && stats?.prompt_tokens && !this.rounds.length) {
      this.phase = "reading";
    }
    // A round may come in several chunks: of its reasoning, of its answer, of its end.
    if (this.rounds.length) this.#addToRound(this.rounds.at(-1), pieces, tree);
  }

  #addToRound(round, pieces, tree) {
    const { message } = this;
    round.tree = tree ?? round.tree;
    round.pieces += pieces.length;
    round.kept += pieces.filter((piece) => piece.drafted).length;
    // The target's own token ends a round; a round that an end cut short may have none.
    round.next = pieces.findLast((piece) => !piece.drafted)?.text ?? round.next;
    // Counts are of tokens: one that has no text yet, or is a mark, is no piece.
    const tokens = message.stats?.generation_tokens ?? round.said + round.pieces;
    const total = Math.max(tokens - round.said, 0);
    const kept = round.tree ? round.tree.accepted.filter((row) => row > 0).length : round.kept;
    message.drafted -= round.drafted;
    message.own -= round.own;
    round.drafted = Math.min(kept, total);
    round.own = total - round.drafted;
    message.drafted += round.drafted;
    message.own += round.own;
    message.round = round;
  }
}

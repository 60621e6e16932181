// What the browser keeps: conversations, each under its own name, and settings.

const INDEX = "redrafter.conversations";
const ONE = "redrafter.conversation.";
const SETTINGS = "redrafter.settings";

export const DEFAULTS = Object.freeze({
  system: "",
  temperature: "",
  top_p: "",
  max_tokens: "",
  seed: "",
  drafter: "default",
  budget: "",
});
/** Empty: what the server was started with. */

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null; // not ours, or a browser that keeps nothing
  }
}

/** A name that no other conversation has; crypto.randomUUID is missing on plain http from afar. */
function newId() {
  return Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
}

/**
 * Conversations and settings.
 *
 * full  called with true when the browser refuses to keep more, with false when it does again
 */
export class Store {
  constructor(full = () => {}) {
    this.full = full;
    this.open = new Map(); // conversations that were read or made, by id
    this.unsaved = new Set(); // ids of those that the browser would not keep
  }

  /** {id, title, updated} of each conversation, the latest first. */
  list() {
    const kept = read(INDEX);
    const entries = Array.isArray(kept) ? kept.filter((entry) => entry?.id) : [];
    const known = new Map(entries.map((entry) => [entry.id, entry]));
    for (const id of this.unsaved) {
      const { title, updated } = this.open.get(id);
      known.set(id, { id, title, updated });
    }
    return [...known.values()].sort((a, b) => b.updated - a.updated);
  }

  /** A new conversation; kept once it has a message. */
  create() {
    const conversation = { id: newId(), title: "", updated: Date.now(), messages: [] };
    this.open.set(conversation.id, conversation);
    return conversation;
  }

  /** A conversation by its id, or null. */
  get(id) {
    const found = this.open.get(id) ?? read(ONE + id);
    if (!found || !Array.isArray(found.messages)) return null;
    this.open.set(id, found);
    return found;
  }

  /** Keep a conversation as it is now; `touch`: something new was said in it. */
  save(conversation, touch = false) {
    if (touch) conversation.updated = Date.now();
    this.open.set(conversation.id, conversation);
    if (!conversation.messages.length) return;
    const { id, title, updated } = conversation;
    const kept = this.#write(ONE + id, conversation);
    if (kept && this.#writeIndex(id, { id, title, updated })) this.unsaved.delete(id);
    else this.unsaved.add(id);
  }

  /** Remove a conversation; the function returned brings it back. */
  remove(id) {
    const conversation = this.get(id);
    this.open.delete(id);
    this.unsaved.delete(id);
    try {
      localStorage.removeItem(ONE + id);
    } catch {
      // Nothing is kept there.
    }
    this.#writeIndex(id, null);
    return () => conversation && this.save(conversation);
  }

  /** Forget what was read, as another tab has changed it; `except`: answers are being written. */
  refresh(except) {
    for (const id of this.open.keys()) {
      if (!except.has(id) && !this.unsaved.has(id)) this.open.delete(id);
    }
  }

  get settings() {
    return { ...DEFAULTS, ...read(SETTINGS) };
  }

  set settings(values) {
    this.#write(SETTINGS, values);
  }

  /** A small thing under its own name: theme, shading, the conversation that was open. */
  remember(name, value) {
    try {
      localStorage.setItem(`redrafter.${name}`, value);
    } catch {
      // Then it holds for this visit only.
    }
  }

  recall(name) {
    try {
      return localStorage.getItem(`redrafter.${name}`);
    } catch {
      return null;
    }
  }

  #writeIndex(id, entry) {
    // Read again: other tabs write it too.
    const kept = read(INDEX);
    const others = (Array.isArray(kept) ? kept : []).filter((other) => other?.id !== id);
    return this.#write(INDEX, entry ? [...others, entry] : others);
  }

  #write(key, value) {
    try {
      localStorage.setItem(key, JSON.stringify(value));
      this.full(false);
      return true;
    } catch {
      this.full(true);
      return false;
    }
  }
}

/** A conversation's first title: the beginning of what was asked. */
export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  if (line.length <= 48) return line;
  return `${line.slice(0, 48).replace(/\s+\S*$/, "")}…`;
}

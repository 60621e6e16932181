// Who wrote which part of a text: accepted drafts, or the target itself.

import { el } from "./dom.js";

const FIRST = 48; // of the characters that stand for tokens: printable ones
const LONGEST = 10000; // characters of a token, so that its sign stays below the surrogates

/**
 * The tokens of a text, in order: how long each is, and whether it had been drafted.
 *
 * `code` is all of it in a string, a character a token, to be kept with the text.
 */
export class Shades {
  constructor(code = "") {
    this.code = "";
    this.ends = [];
    this.kinds = [];
    for (const sign of code) {
      const value = sign.charCodeAt(0) - FIRST;
      this.push(value >> 2, Boolean(value & 1), Boolean(value & 2));
    }
  }

  get length() {
    return this.ends.at(-1) ?? 0;
  }

  /** Another token; `more`: it is the rest of the token before. */
  push(length, drafted, more = false) {
    const part = Math.min(length, LONGEST);
    const kind = (drafted ? 1 : 0) + (more ? 2 : 0);
    this.ends.push(this.length + part);
    this.kinds.push(kind);
    this.code += String.fromCharCode(FIRST + 4 * part + kind);
    if (length > part) this.push(length - part, drafted, true);
  }

  /** Add `text`, which begins at `start` of the whole, to a node: drafted tokens get a span each. */
  append(parent, text, start) {
    let token = this.#tokenAt(start);
    let done = 0;
    let own = "";
    const flush = () => {
      if (own) parent.append(own);
      own = "";
    };
    while (done < text.length) {
      const known = token < this.ends.length;
      const to = known ? Math.min(this.ends[token] - start, text.length) : text.length;
      const part = text.slice(done, to);
      if (known && this.kinds[token] & 1 && part) {
        // A shaded run begins with its first letter, not with the blank before it.
        const first = !(this.kinds[token - 1] & 1) && part.trim();
        const blanks = first ? part.length - part.trimStart().length : 0;
        own += part.slice(0, blanks);
        flush();
        const begins = start + done === (this.ends[token - 1] ?? 0) && !(this.kinds[token] & 2);
        const name = begins ? "drafted" : "drafted rest";
        parent.append(el("span", { class: name }, part.slice(blanks)));
      } else {
        own += part;
      }
      done = Math.max(done, to);
      token += 1;
    }
    flush();
  }

  /** The first token that ends after an offset. */
  #tokenAt(offset) {
    let low = 0;
    let high = this.ends.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.ends[middle] > offset) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

/**
 * Lays the texts of an answer over what the model said.
 *
 * The pieces are all that it said, marks between reasoning and answer included; the texts are parts
 * of it, in the same order, and may come later than their pieces.
 */
export class Aligner {
  constructor() {
    this.text = "";
    this.tokens = [];
  }

  add(pieces) {
    for (const { text, drafted } of pieces) {
      this.text += text;
      this.tokens.push({ length: text.length, drafted: Boolean(drafted), more: false });
    }
  }

  /** Give the next text's tokens to `shades`. What was never said in a piece counts as the target's. */
  take(text, shades) {
    const at = this.text.indexOf(text);
    if (at < 0) {
      shades.push(text.length, false);
      return;
    }
    this.#consume(at, () => {});
    this.#consume(text.length, (token) => shades.push(token.length, token.drafted, token.more));
    this.text = this.text.slice(at + text.length);
  }

  #consume(length, use) {
    let used = 0;
    while (length > 0) {
      const token = this.tokens[used];
      if (token.length > length) {
        use({ ...token, length });
        Object.assign(token, { length: token.length - length, more: true });
        length = 0;
      } else {
        use(token);
        length -= token.length;
        used += 1;
      }
    }
    this.tokens.splice(0, used);
  }
}

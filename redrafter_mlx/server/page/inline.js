// What stands inside a paragraph: emphasis, code, links. Builds nodes; text is never read as HTML.

import { el } from "./dom.js";

const DEEPEST = 8; // emphasis within emphasis; deeper marks are shown as they are
const LONGEST_LINK = 2000; // characters between the brackets of a link
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;
const ADDRESS = /https?:\/\/[^\s<>"'`]+/iy;
const IN_ANGLES = /<(https?:\/\/[^\s<>]+)>/iy;
const BREAK = /<br ?\/?>/iy;
const TARGET =
  /\(\s{0,3}<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s{1,3}(?:"[^"]*"|'[^']*'))?\s{0,3}\)/y;
const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };

/** The address of a link if it is one to follow: http and https only. */
function safeAddress(text) {
  if (!/^https?:\/\/[^\s]+$/i.test(text)) return null;
  try {
    return new URL(text).href;
  } catch {
    return null;
  }
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

/**
 * One text with its marks.
 *
 * at      offset in the whole source of each character
 * shades  who wrote the source
 * live    whether the text goes on: bold and code that are still open count as closed at its end,
 *         so that they do not jump when they are
 */
export class Inline {
  constructor(text, at, shades, live) {
    Object.assign(this, { text, at, shades, live });
    this.unclosed = new Set(); // marks that a search has not found again, and its end
  }

  render(parent, from = 0, to = this.text.length, depth = 0) {
    let plain = from;
    let here = from;
    while (here < to) {
      const found = this.#mark(here, to, depth);
      if (!found) {
        here += 1;
        continue;
      }
      this.#emit(parent, plain, here);
      if (found.node) parent.append(found.node);
      plain = found.shown ?? found.next;
      here = found.next;
    }
    this.#emit(parent, plain, to);
  }

  /** What begins here: a node and where it ends; `shown`: where plain text goes on. Or null. */
  #mark(here, to, depth) {
    const { text } = this;
    switch (text[here]) {
      case "\\":
        if (here + 1 >= to || !PUNCTUATION.test(text[here + 1])) return null;
        return { next: here + 2, shown: here + 1 };
      case "`":
        return this.#code(here, to);
      case "*":
      case "_":
      case "~":
        return depth < DEEPEST ? this.#emphasis(here, to, depth) : null;
      case "[":
        return this.#link(here, here, to, depth);
      case "!":
        return text[here + 1] === "[" ? this.#link(here, here + 1, to, depth) : null;
      case "<":
        return this.#angles(here);
      case "h":
      case "H":
        return this.#bare(here, to);
      default:
        return null;
    }
  }

  #emit(parent, from, to) {
    while (from < to) {
      let end = from + 1;
      while (end < to && this.at[end] === this.at[end - 1] + 1) end += 1;
      this.shades.append(parent, this.text.slice(from, end), this.at[from]);
      from = end;
    }
  }

  #code(here, to) {
    const length = runLength(this.text, here);
    let close = this.#closingTicks(here + length, to, length);
    let next = close + length;
    if (close < 0) {
      if (!this.#mayBeOpen(to) || length > 2) return { next: here + length, shown: here };
      close = next = to;
    }
    const node = el("code");
    let [from, end] = [here + length, close];
    const padded = this.text[from] === " " && this.text[end - 1] === " " && end - from > 2;
    if (padded) [from, end] = [from + 1, end - 1];
    this.#emit(node, from, end);
    return { node, next };
  }

  #closingTicks(from, to, length) {
    const key = `\`${length}:${to}`;
    if (this.unclosed.has(key)) return -1;
    for (let here = from; here < to; here += 1) {
      if (this.text[here] !== "`") continue;
      const run = runLength(this.text, here);
      if (run === length) return here;
      here += run - 1;
    }
    this.unclosed.add(key);
    return -1;
  }

  #mayBeOpen(to) {
    return this.live && to === this.text.length;
  }

  #emphasis(here, to, depth) {
    const { text } = this;
    const sign = text[here];
    const run = runLength(text, here);
    const literal = { next: here + run, shown: here };
    const inner = here + run;
    if (run > 3 || (sign === "~" && run !== 2) || inner >= to) return literal;
    if (/\s/.test(text[inner])) return literal;
    if (sign === "_" && here > 0 && WORD.test(text[here - 1])) return literal;
    const mark = sign.repeat(run);
    let close = this.#closing(mark, inner, to);
    let next = close + run;
    if (close < 0) {
      if (run !== 2 || !this.#mayBeOpen(to)) return literal;
      close = next = to;
    }
    const node = el(TAGS[mark] ?? "strong");
    const inside = run === 3 ? el("em") : node;
    if (inside !== node) node.append(inside);
    this.render(inside, inner, close, depth + 1);
    return { node, next };
  }

  #closing(mark, from, to) {
    const key = `${mark}:${to}`;
    if (this.unclosed.has(key)) return -1;
    const { text } = this;
    for (let here = from; here < to; here += 1) {
      if (text[here] === "\\") {
        here += 1;
      } else if (text[here] === "`") {
        const length = runLength(text, here);
        const close = this.#closingTicks(here + length, to, length);
        here = (close < 0 ? here : close) + length - 1;
      } else if (text[here] === mark[0]) {
        const run = Math.min(runLength(text, here), to - here);
        const fits = run === mark.length || (run === 3 && mark.length < 3);
        const after = text[here + run];
        const ends = mark[0] !== "_" || after === undefined || !WORD.test(after);
        if (fits && ends && here > from && !/\s/.test(text[here - 1])) {
          return here + run - mark.length;
        }
        here += run - 1;
      }
    }
    this.unclosed.add(key);
    return -1;
  }

  #link(here, bracket, to, depth) {
    const close = this.#closingBracket(bracket, Math.min(to, bracket + LONGEST_LINK));
    const found = close > 0 && match(TARGET, this.text, close + 1);
    if (!found || close + 1 + found[0].length > to) return null;
    const href = safeAddress(found[1]);
    if (!href || depth >= DEEPEST) return null; // shown as it was written
    const node = anchor(href);
    this.render(node, bracket + 1, close, DEEPEST - 1); // emphasis, but no link in a link
    if (!node.hasChildNodes()) node.append(href);
    return { node, next: close + 1 + found[0].length };
  }

  #closingBracket(from, to) {
    let open = 0;
    for (let here = from; here < to; here += 1) {
      const sign = this.text[here];
      if (sign === "\\") here += 1;
      else if (sign === "[") open += 1;
      else if (sign === "]" && --open === 0) return here;
    }
    return -1;
  }

  #angles(here) {
    const line = match(BREAK, this.text, here);
    if (line) return { node: el("br"), next: here + line[0].length };
    const found = match(IN_ANGLES, this.text, here);
    const href = found && safeAddress(found[1]);
    if (!href) return null;
    const node = anchor(href);
    this.#emit(node, here + 1, here + 1 + found[1].length);
    return { node, next: here + found[0].length };
  }

  #bare(here, to) {
    if (here > 0 && WORD.test(this.text[here - 1])) return null;
    const found = match(ADDRESS, this.text, here);
    if (!found) return null;
    let address = found[0].slice(0, to - here);
    while (/[.,;:!?*_~\]]/.test(address.at(-1))) address = address.slice(0, -1);
    if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
    const href = safeAddress(address);
    if (!href) return null;
    const node = anchor(href);
    this.#emit(node, here, here + address.length);
    return { node, next: here + address.length };
  }
}

function anchor(href) {
  return el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow", title: href });
}

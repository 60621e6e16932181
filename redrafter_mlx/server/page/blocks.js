// Markdown's blocks, found line by line. Each line is a range of the source, so that every
// character keeps its place there: that is how tokens keep their shade.

// No pattern has two parts side by side that take the same signs: long lines would take forever.
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(?=\S)/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])[ \t]+(?=\S)/;
const TABLE_RULE = /^[|: \t-]+$/;
const CELL_RULE = /^:?-+:?$/;
const DEEPEST = 6; // lists and quotes in one another; deeper ones are read as paragraphs

/** The lines of a source from an offset on: where each starts and ends, without its line break. */
export function linesOf(source, from = 0) {
  const lines = [];
  for (let start = from; start < source.length;) {
    const found = source.indexOf("\n", start);
    const end = found < 0 ? source.length : found;
    lines.push({ start, end });
    start = end + 1;
  }
  return lines;
}

/** Whether a line ends a code block that a fence began. */
export function closesFence(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

/**
 * The blocks that some lines are, in order; each has a `type` and the offset `first` of its line.
 *
 * Items of a list are blocks of their own, so that a long list is not made anew for each token.
 */
export function blocksOf(source, lines, depth = 0) {
  const reader = new Reader(source, lines, depth);
  const found = [];
  while (reader.skipBlank()) found.push(reader.next());
  return found;
}

class Reader {
  constructor(source, lines, depth) {
    Object.assign(this, { source, lines, depth, here: 0 });
  }

  text(index = this.here) {
    const line = this.lines[index];
    return line ? this.source.slice(line.start, line.end).trimEnd() : "";
  }

  skipBlank() {
    while (this.here < this.lines.length && !this.text()) this.here += 1;
    return this.here < this.lines.length;
  }

  next() {
    const first = this.lines[this.here].start;
    const text = this.text();
    let block;
    if (FENCE.test(text)) block = this.#code(FENCE.exec(text));
    else if (HEADING.test(text)) block = this.#heading(HEADING.exec(text));
    else if (RULE.test(text)) block = (this.here++, { type: "rule" });
    else if (this.depth < DEEPEST && QUOTE.test(text)) block = this.#quote();
    else if (this.depth < DEEPEST && ITEM.test(text)) block = this.#item(ITEM.exec(text));
    else if (this.#isTable()) block = this.#table();
    else block = this.#paragraph();
    return { ...block, first };
  }

  #code([, fence, info]) {
    const lines = [];
    const opening = this.here;
    const indent = this.text().search(/\S/);
    for (this.here += 1; this.here < this.lines.length; this.here += 1) {
      if (closesFence(this.text(), fence)) {
        this.here += 1;
        return { type: "code", fence, info: info.trim(), lines, closed: true };
      }
      lines.push(this.#stripped(this.here, indent));
    }
    const begin = this.lines[opening].end + 1;
    return { type: "code", fence, info: info.trim(), lines, closed: false, begin, indent };
  }

  /** A line without up to so many spaces at its start. */
  #stripped(index, most) {
    const line = this.lines[index];
    let { start } = line;
    while (start < line.end && start - line.start < most && /[ \t]/.test(this.source[start])) {
      start += 1;
    }
    return { start, end: line.end };
  }

  #heading([prefix, signs]) {
    const { start } = this.lines[this.here];
    const text = this.text();
    let { length } = text;
    while (text[length - 1] === "#") length -= 1; // a heading may be closed by its own signs
    if (!/[ \t]/.test(text[length - 1])) length = text.length;
    this.here += 1;
    const line = {
      start: start + prefix.length,
      end: start + text.slice(0, length).trimEnd().length,
    };
    return { type: "heading", level: signs.length, lines: [line] };
  }

  #quote() {
    const lines = [];
    for (; this.here < this.lines.length; this.here += 1) {
      const text = this.text();
      const prefix = QUOTE.exec(text);
      if (!prefix && (!text || this.#interrupts(this.here))) break;
      const { start, end } = this.lines[this.here];
      lines.push({ start: Math.min(start + (prefix?.[0].length ?? 0), end), end });
    }
    return { type: "quote", lines };
  }

  #item([prefix, indent, marker]) {
    const ordered = /\d/.test(marker);
    const { start, end } = this.lines[this.here];
    const inner = Math.min(prefix.length, indent.length + marker.length + 4);
    const lines = [{ start: start + prefix.length, end }];
    let fence = null;
    for (this.here += 1; this.here < this.lines.length; this.here += 1) {
      const text = this.text();
      if (!fence && !this.#continuesItem(text)) break;
      const stripped = this.#stripped(this.here, inner);
      const line = this.source.slice(stripped.start, stripped.end).trimEnd();
      if (fence && closesFence(line, fence)) fence = null;
      else if (!fence) fence = FENCE.exec(line)?.[1] ?? null;
      lines.push(stripped);
    }
    while (lines.length > 1 && lines.at(-1).start >= lines.at(-1).end) lines.pop();
    const value = ordered ? Number.parseInt(marker, 10) : null;
    return { type: "item", ordered, value, lines };
  }

  #continuesItem(text) {
    if (!text) {
      // A blank line belongs to the item if what follows it does.
      let after = this.here + 1;
      while (after < this.lines.length && !this.text(after)) after += 1;
      return after < this.lines.length && /^(?: {2}|\t)/.test(this.text(after));
    }
    if (/^(?: {2}|\t)/.test(text)) return true;
    return this.text(this.here - 1) !== "" && !this.#interrupts(this.here, true);
  }

  #isTable(index = this.here) {
    const rule = this.text(index + 1);
    if (!this.text(index).includes("|") || !TABLE_RULE.test(rule)) return false;
    const rules = this.#cells(index + 1).map(({ start, end }) => this.source.slice(start, end));
    const fits = rules.length === this.#cells(index).length;
    return fits && rules.every((cell) => CELL_RULE.test(cell));
  }

  /** The ranges between a row's bars. */
  #cells(index) {
    const { start } = this.lines[index];
    const text = this.text(index);
    const cells = [];
    let from = 0;
    const add = (to) => {
      const cell = text.slice(from, to);
      const left = cell.length - cell.trimStart().length;
      cells.push({
        start: start + from + left,
        end: start + from + Math.max(left, cell.trimEnd().length),
      });
    };
    for (let here = 0; here < text.length; here += 1) {
      if (text[here] === "\\") here += 1;
      else if (text[here] === "|") {
        if (text.slice(0, here).trim()) add(here);
        from = here + 1;
      }
    }
    if (text.slice(from).trim()) add(text.length);
    return cells;
  }

  #table() {
    const head = this.#cells(this.here);
    const aligns = this.#cells(this.here + 1).map(({ start, end }) => {
      const rule = this.source.slice(start, end);
      if (!rule.endsWith(":")) return "left";
      return rule.startsWith(":") ? "center" : "right";
    });
    const rows = [];
    for (this.here += 2; this.here < this.lines.length; this.here += 1) {
      if (!this.text().includes("|") || this.#interrupts(this.here)) break;
      rows.push(this.#cells(this.here).slice(0, head.length));
    }
    return { type: "table", head, aligns, rows };
  }

  #paragraph() {
    const lines = [];
    do {
      const { start, end } = this.lines[this.here];
      const text = this.source.slice(start, end);
      const left = text.length - text.trimStart().length;
      lines.push({ start: start + left, end: start + text.trimEnd().length });
      this.here += 1;
    } while (this.here < this.lines.length && this.text() && !this.#interrupts(this.here));
    return { type: "paragraph", lines };
  }

  /** Whether a line ends the paragraph before it. A number other than 1 may just be one. */
  #interrupts(index, inList = false) {
    const text = this.text(index);
    if (FENCE.test(text) || HEADING.test(text) || RULE.test(text) || QUOTE.test(text)) return true;
    const item = ITEM.exec(text);
    if (item && (inList || !/\d/.test(item[2]) || Number.parseInt(item[2], 10) === 1)) return true;
    return this.#isTable(index);
  }
}

// Markdown as nodes, while it comes: what is settled stays, only the last block is made anew.

import { blocksOf, closesFence, linesOf } from "./blocks.js";
import { copyButton, el } from "./dom.js";
import { Inline } from "./inline.js";

const MAY_CLOSE = /^\s*(?:`*|~*)\s*$/; // a line that could still become the end of a code block

/**
 * A text that grows, shown in `root`.
 *
 * shades  who wrote it; of the same text
 */
export class MarkdownView {
  constructor(root, shades) {
    Object.assign(this, { root, shades });
    this.settled = 0; // offset of the first block that may still change
    this.tail = []; // nodes of the blocks that may
    this.code = null; // the code block at the end that is still open
  }

  /** Show the text so far. live: more will come. */
  update(source, live) {
    if (this.code && this.#growCode(source, live)) return;
    this.#dropTail();
    const blocks = blocksOf(source, linesOf(source, this.settled));
    const sure = live ? settledBlocks(blocks, source) : blocks.length;
    blocks.forEach((block, index) => {
      const last = index === blocks.length - 1;
      const node = this.#place(block, source, live && last);
      if (index >= sure) this.tail.push(node);
    });
    if (sure > 0) this.settled = sure < blocks.length ? blocks[sure].first : source.length;
  }

  #dropTail() {
    for (const node of this.tail) {
      const list = node.parentNode;
      node.remove();
      if (list !== this.root && !list.hasChildNodes()) list.remove();
    }
    this.tail = [];
    this.code = null;
  }

  #place(block, source, live) {
    const context = { source, shades: this.shades, live, depth: 0 };
    const grows = live && block.type === "code" && !block.closed && block.begin <= source.length;
    if (!grows) return place(this.root, block, context);
    const node = codeBlock(this.root, { ...block, lines: [] }, context);
    const { begin, fence, indent } = block;
    this.code = { element: node.querySelector("code"), line: begin, shown: begin, fence, indent };
    this.#growCode(source, live);
    return node;
  }

  /** Add to the open code block what has come; true if it stays open. */
  #growCode(source, live) {
    const { code, shades } = this;
    while (code.line <= source.length) {
      const found = source.indexOf("\n", code.line);
      const end = found < 0 ? source.length : found;
      const text = source.slice(code.line, end);
      if ((found >= 0 || !live) && closesFence(text, code.fence)) break;
      if (found < 0 && live && MAY_CLOSE.test(text)) return true; // wait for the rest of the line
      const spaces = Math.min(text.search(/\S|$/), code.indent);
      const from = Math.max(code.shown, code.line + spaces);
      const to = found < 0 ? end : end + 1;
      if (from < to) shades.append(code.element, source.slice(from, to), from);
      code.shown = to;
      if (found < 0 && live) return true;
      code.line = end + 1;
    }
    if (live && code.line > source.length) return true;
    // It stays as it is, and so does what is before it.
    const closing = source.indexOf("\n", code.line);
    this.settled = closing < 0 ? source.length : closing + 1;
    this.tail = [];
    this.code = null;
    return false;
  }
}

/** How many blocks can no longer change: all but the last, whose line may still become another. */
function settledBlocks(blocks, source) {
  const lastLine = source.lastIndexOf("\n") + 1;
  const unsure = blocks.length > 0 && blocks.at(-1).first >= lastLine ? 2 : 1;
  return Math.max(blocks.length - unsure, 0);
}

function place(parent, block, context) {
  const make = {
    code: codeBlock,
    heading: headingBlock,
    item: itemBlock,
    paragraph: paragraphBlock,
    quote: quoteBlock,
    rule: (root) => added(root, el("hr")),
    table: tableBlock,
  };
  return make[block.type](parent, block, context);
}

function added(parent, node) {
  parent.append(node);
  return node;
}

/** The text of some lines, with the place of each character. */
function spoken(parent, lines, { source, shades, live }) {
  const at = [];
  const texts = [];
  for (const { start, end } of lines) {
    if (texts.length) at.push(start - 1); // the line break: who wrote it does not show
    for (let offset = start; offset < end; offset += 1) at.push(offset);
    texts.push(source.slice(start, end));
  }
  new Inline(texts.join("\n"), at, shades, live).render(parent);
}

function paragraphBlock(parent, block, context) {
  const node = added(parent, el("p"));
  spoken(node, block.lines, context);
  return node;
}

function headingBlock(parent, block, context) {
  // The page has its own first two levels.
  const tag = `h${Math.min(block.level + 2, 6)}`;
  const node = added(parent, el(tag, { class: `size-${block.level}` }));
  spoken(node, block.lines, context);
  return node;
}

function codeBlock(parent, block, { source, shades }) {
  const code = el("code");
  for (const { start, end } of block.lines) {
    const to = source[end] === "\n" ? end + 1 : end;
    shades.append(code, source.slice(start, to), start);
  }
  const language = block.info.split(/\s/)[0] || "text";
  const bar = el(
    "div",
    { class: "code-bar" },
    el("span", {}, language),
    copyButton("Copy code", () => code.textContent.replace(/\n$/, "")),
  );
  const pre = el("pre", { tabindex: "0", "aria-label": `Code, ${language}` }, code);
  return added(parent, el("div", { class: "code" }, bar, pre));
}

function quoteBlock(parent, block, context) {
  const node = added(parent, el("blockquote"));
  inside(node, block, context);
  return node;
}

function inside(node, block, context) {
  const deeper = { ...context, depth: context.depth + 1 };
  for (const child of blocksOf(context.source, block.lines, deeper.depth)) {
    place(node, child, deeper);
  }
}

function itemBlock(parent, block, context) {
  const tag = block.ordered ? "OL" : "UL";
  let list = parent.lastElementChild;
  if (list?.tagName !== tag) {
    list = added(parent, el(tag.toLowerCase(), { start: block.ordered ? block.value : null }));
  }
  const node = added(list, el("li", { value: block.value }));
  inside(node, block, context);
  return node;
}

function tableBlock(parent, block, context) {
  const row = (cells, tag) => {
    const node = el("tr");
    cells.forEach((cell, column) => {
      const attributes = { class: block.aligns[column], scope: tag === "th" ? "col" : null };
      spoken(added(node, el(tag, attributes)), [cell], context);
    });
    return node;
  };
  const table = el(
    "table",
    {},
    el("thead", {}, row(block.head, "th")),
    el("tbody", {}, ...block.rows.map((cells) => row(cells, "td"))),
  );
  const frame = el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" });
  return added(parent, added(frame, table).parentNode);
}

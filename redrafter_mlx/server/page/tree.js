// The tree of a round as a picture: from left to right as text runs, a branch for each guess.

import { count, el, number, svg } from "./dom.js";

const LETTER = 6.7; // pixels of a letter of the labels
const LONGEST = 11; // letters of a label
const HEIGHT = 20;
const GAP = { branch: 20, chain: 7, down: 7 };
const MARGIN = 6;
const INDENT = 16; // of a line that goes on with the one before

/** A token as it is shown: blanks can be seen. */
export function label(token) {
  const seen = token
    .replaceAll("\n", "⏎")
    .replaceAll("\t", "⇥")
    .replace(/^ +| +$/g, (blanks) => "·".repeat(blanks.length));
  const letters = [...seen];
  return letters.length > LONGEST ? `${letters.slice(0, LONGEST - 1).join("")}…` : seen || "∅";
}

/** What a picture of a round shows, in a sentence or two. */
export function caption(round) {
  const guessed = Math.max((round.tree?.tokens.length ?? 0) - 1, 0);
  if (!guessed) {
    return "No guess in this round: the model wrote one token by itself.";
  }
  const [kept, own] = [round.drafted, round.own];
  const all = `The drafter guessed ${count(guessed, "token")}; one pass of the model checked`;
  const which = `${all} ${guessed === 1 ? "it" : "them"}.`;
  if (!kept) return `${which} None is what the model says here, so it wrote its own.`;
  const said = `${number(kept)} ${kept === 1 ? "is" : "are"} just what the model says`;
  const added = own ? ", and it added one of its own" : "";
  return `${which} ${said}${added}: ${count(kept + own, "token")} for one pass.`;
}

/**
 * Nodes of a round's tree with their places, in pixels and lines; parents come before their
 * children. A path that is too long for `width` goes on in the next line, as text does.
 */
export function layOut({ tree, next }, width) {
  const accepted = new Set(tree.accepted);
  const nodes = tree.tokens.map((token, row) => ({
    token: token || (row ? token : "…"),
    parent: tree.parents[row],
    kind: row === 0 ? "root" : accepted.has(row) ? "accepted" : "rejected",
  }));
  if (next) {
    // The target's own token goes on from the last node that was accepted.
    nodes.push({ token: next, parent: Math.max(0, ...tree.accepted), kind: "next" });
  }
  const children = nodes.map(() => []);
  nodes.forEach((node, row) => {
    node.label = label(node.token);
    node.width = Math.max([...node.label].length * LETTER + 12, 20);
    if (node.parent >= 0) children[node.parent].push(row);
  });
  // What was said runs straight on at the top; the other guesses hang below.
  const said = (row) => nodes[row].kind !== "rejected";
  for (const rows of children) rows.sort((one, other) => said(other) - said(one) || one - other);
  let line = -1;
  const stack = [0];
  while (stack.length) {
    const row = stack.pop();
    const node = nodes[row];
    const from = nodes[node.parent];
    const siblings = children[node.parent] ?? [row];
    node.x = from ? from.x + from.width + (siblings.length > 1 ? GAP.branch : GAP.chain) : MARGIN;
    node.wraps = node.x + node.width > width - MARGIN && node.x > INDENT;
    if (node.wraps) node.x = INDENT;
    if (siblings[0] !== row || node.wraps || !from) line += 1;
    node.line = line;
    node.y = MARGIN + line * (HEIGHT + GAP.down);
    stack.push(...children[row].toReversed());
  }
  return nodes;
}

/**
 * A picture of a round.
 *
 * width  in pixels, that it should keep to
 * show   called with the text that leads to the node under the pointer, or with ""
 */
export function picture(round, width, show = () => {}) {
  const nodes = layOut(round, width);
  const right = Math.max(...nodes.map((node) => node.x + node.width)) + MARGIN;
  const bottom = Math.max(...nodes.map((node) => node.y)) + HEIGHT + MARGIN;
  const root = svg("svg", {
    class: "tree",
    viewBox: `0 0 ${right} ${bottom}`,
    width: right,
    height: bottom,
    role: "img",
    "aria-label": caption(round),
  });
  // The path that was taken is drawn last, over the others.
  const rank = (row) => (nodes[row].kind === "rejected" ? 0 : 1);
  const order = nodes.map((_, row) => row).sort((one, other) => rank(one) - rank(other));
  for (const row of order) if (nodes[row].parent >= 0) root.append(edge(nodes, row));
  const boxes = nodes.map(box);
  root.append(...boxes);
  follow(root, nodes, boxes, show);
  return root;
}

function edge(nodes, row) {
  const node = nodes[row];
  const from = nodes[node.parent];
  const [x, y] = [from.x + from.width, from.y + HEIGHT / 2];
  const [toX, toY] = [node.x, node.y + HEIGHT / 2];
  let d = `M${x} ${y}H${toX}`;
  if (node.wraps) {
    const between = node.y - GAP.down / 2;
    d = `M${x - 8} ${from.y + HEIGHT}V${between}H${toX - 6}V${toY}H${toX}`;
  } else if (node.line !== from.line) {
    const bend = x + GAP.branch / 2;
    d = `M${x} ${y}C${bend} ${y} ${bend} ${y} ${bend} ${y + 8}V${toY - 8}`;
    d += `C${bend} ${toY} ${bend} ${toY} ${toX} ${toY}`;
  }
  return svg("path", { d, class: `edge ${node.kind}${node.wraps ? " wraps" : ""}` });
}

const MEANING = {
  root: "the token before",
  accepted: "guessed, and what the model says",
  rejected: "guessed, but not what the model says",
  next: "the model's own",
};

function box(node, row) {
  const { x, y, width } = node;
  return svg(
    "g",
    { class: `node ${node.kind}`, "data-row": row },
    svg("title", {}, `${JSON.stringify(node.token)}: ${MEANING[node.kind]}`),
    svg("rect", { x, y, width, height: HEIGHT, rx: 6 }),
    svg("text", { x: x + width / 2, y: y + HEIGHT / 2 + 4, "text-anchor": "middle" }, node.label),
  );
}

/** Under the pointer, a node and what leads to it stand out. */
function follow(root, nodes, boxes, show) {
  root.addEventListener("pointerover", (event) => {
    const target = event.target.closest(".node");
    for (const other of boxes) other.classList.remove("on-path");
    let text = "";
    for (let row = Number(target?.dataset.row ?? -1); row >= 0; row = nodes[row].parent) {
      boxes[row].classList.add("on-path");
      text = nodes[row].token + text;
    }
    show(text);
  });
  root.addEventListener("pointerleave", () => {
    for (const other of boxes) other.classList.remove("on-path");
    show("");
  });
}

/** A round made up for explanation. */
export const EXAMPLE = {
  tree: {
    tokens: ["The", " sky", " is", " blue", " because", " grey", " clear", " sun", " is"],
    parents: [-1, 0, 1, 2, 3, 2, 2, 0, 7],
    accepted: [0, 1, 2, 3],
  },
  drafted: 3,
  own: 1,
  next: " when",
};

/** What the colours mean, as they are in the picture. */
export function legend() {
  const entry = (kind, text) => el("li", {}, el("i", { class: `key ${kind}` }), text);
  return el(
    "ul",
    { class: "legend" },
    entry("accepted", "guessed and kept"),
    entry("next", "the model's own"),
    entry("rejected", "guessed, not kept"),
  );
}

// Small helpers. Elements are built from nodes and text only: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null && child !== false));
  return node;
}

/** An element; attributes that begin with "on" are listeners, false and null ones are left out. */
export function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for a picture's elements. */
export function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export const byId = (id) => document.getElementById(id);

const ICONS = {
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h16",
  copy: "M9 9h10v10H9zM5 15V5h10",
  done: "M5 12.5l4.5 4.5L19 7.5",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4.5h-4.5",
  edit: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  trash: "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12M10.5 11v5M13.5 11v5",
  save: "M12 5v10M8 11.5l4 4 4-4M5 19h14",
  send: "M12 19V6M6.5 11.5L12 6l5.5 5.5",
  stop: "M8 8h8v8h-8z",
  down: "M12 6v12M6.5 12.5L12 18l5.5-5.5",
  close: "M6.5 6.5l11 11M17.5 6.5l-11 11",
};

/** One of the page's drawn signs, hidden from screen readers: its button has a name. */
export function icon(name) {
  return svg(
    "svg",
    { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" },
    svg("path", { d: ICONS[name] }),
  );
}

/** A button that shows a sign only; `label` is its name and its tooltip. */
export function iconButton(name, label, onclick, more = {}) {
  const attributes = { type: "button", class: "bare", "aria-label": label, title: label, onclick };
  return el("button", { ...attributes, ...more }, icon(name));
}

/** Copy text; true if it went well. Pages that came by plain http from afar have no clipboard. */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { class: "offscreen", "aria-hidden": "true" });
    const focused = document.activeElement;
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

/** A copy button that says so for a moment. `read` gives the text when it is pressed. */
export function copyButton(label, read) {
  const button = iconButton("copy", label, async () => {
    const copied = await copyText(read());
    button.replaceChildren(icon(copied ? "done" : "close"));
    announce(copied ? "Copied" : "The browser did not let this be copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Say something to screen readers, once. */
export function announce(text) {
  byId("status").textContent = text;
}

let forget = 0;

/** A line at the bottom for some seconds, with an action if there is one. */
export function toast(text, action, act, seconds = 8) {
  const place = byId("toast");
  const close = () => place.replaceChildren();
  const button =
    action &&
    el("button", { type: "button", class: "link", onclick: () => (close(), act()) }, action);
  clearTimeout(forget);
  place.replaceChildren(
    el(
      "div",
      { class: "toast" },
      el("span", {}, text),
      button,
      iconButton("close", "Close", close),
    ),
  );
  forget = setTimeout(close, seconds * 1000);
}

const NUMBER = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

/** 1234.56 as 1,234.6 */
export const number = (value) => NUMBER.format(value);

/** 2 as 2.0: for what is compared, and should not jump */
export const decimal = (value) => (value < 100 ? value.toFixed(1) : number(Math.round(value)));

/** "1 token", "2 tokens" */
export const count = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;

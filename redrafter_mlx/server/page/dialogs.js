// Settings, shortcuts and the question for an API key.

import { byId, el } from "./dom.js";
import { DEFAULTS } from "./store.js";

function frame(id, title, ...children) {
  const dialog = byId(id);
  dialog.replaceChildren(el("h2", { id: `${id}-title` }, title), ...children);
  // A click beside the dialog closes it, as people expect.
  dialog.addEventListener("pointerdown", (event) => {
    if (event.target === dialog) dialog.close();
  });
  return dialog;
}

function field(name, label, help, control) {
  control.id = `set-${name}`;
  control.name = name;
  const hint = help && el("small", { id: `help-${name}` }, help);
  if (help) control.setAttribute("aria-describedby", `help-${name}`);
  return el("div", { class: "field" }, el("label", { for: control.id }, label), control, hint);
}

const numeric = (more) =>
  el("input", { type: "number", inputmode: "decimal", placeholder: "as the server", ...more });

const whole = (more) => numeric({ step: 1, inputmode: "numeric", ...more });

function choice(...options) {
  return el("select", {}, ...options.map(([value, text]) => el("option", { value }, text)));
}

function fields() {
  const drafter = choice(
    ["default", "the server's"],
    ["max_gram", "Max-Gram: repeats of the text so far"],
    ["none", "none: plain decoding"],
  );
  const budget = el("input", {
    type: "text",
    inputmode: "numeric",
    pattern: "auto|[0-9]{1,4}",
    placeholder: "as the server",
    title: "auto or a whole number",
  });
  const system = el("textarea", { rows: 3, placeholder: "None" });
  return [
    field("system", "System prompt", "Said to the model before each conversation.", system),
    el(
      "div",
      { class: "fields" },
      field(
        "temperature",
        "Temperature",
        "0 takes the likeliest word.",
        numeric({ min: 0, max: 2, step: "any" }),
      ),
      field("top_p", "Top p", "1 leaves all words in.", numeric({ min: 0, max: 1, step: "any" })),
      field("max_tokens", "Most tokens", "of an answer.", whole({ min: 1 })),
      field(
        "seed",
        "Seed",
        "Same seed, same text.",
        whole({ min: 0, max: Number.MAX_SAFE_INTEGER }),
      ),
      field("drafter", "Drafter", "Who guesses. The words stay the same.", drafter),
      field("budget", "Budget", "auto, or how many guesses a round checks.", budget),
    ),
  ];
}

/** The settings' dialog; `store.settings` are read when it opens and written when it is saved. */
export function settingsDialog(store) {
  const form = el("form", { method: "dialog" }, ...fields());
  const fillIn = (values) => {
    for (const [name, value] of Object.entries(values)) {
      if (form.elements[name]) form.elements[name].value = value;
    }
  };
  const close = () => dialog.close();
  form.append(
    el(
      "p",
      { class: "faint" },
      "They hold from the next answer on. Empty: as the server was started.",
    ),
    el(
      "div",
      { class: "buttons" },
      el("button", { type: "button", onclick: () => fillIn(DEFAULTS) }, "Reset"),
      el("span", { class: "space" }),
      el("button", { type: "button", onclick: close }, "Cancel"),
      el("button", { type: "submit", class: "main" }, "Save"),
    ),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    store.settings = Object.fromEntries(new FormData(form));
    close();
  });
  const dialog = frame("settings", "Settings", form);
  return () => {
    fillIn(store.settings);
    dialog.showModal();
  };
}

const SHORTCUTS = [
  ["Enter", "send"],
  ["Shift Enter", "a new line"],
  ["Esc", "stop the answer, or close what is open"],
  ["↑", "edit the last message (in an empty field)"],
  ["Alt N", "a new conversation"],
  ["Alt ↑ / Alt ↓", "the conversation above or below"],
  ["Alt R", "another answer"],
  ["Alt M", "shade drafted tokens, or not"],
  ["Alt G", "settings"],
  ["Alt T", "dark, light, or as the system"],
  ["?", "this list (outside a field)"],
];

export function shortcutsDialog() {
  const rows = SHORTCUTS.flatMap(([keys, what]) => [
    el("dt", {}, ...keys.split(" ").map((key) => (key === "/" ? " or " : el("kbd", {}, key)))),
    el("dd", {}, what),
  ]);
  const close = el(
    "button",
    { type: "button", class: "main", onclick: () => dialog.close() },
    "Close",
  );
  const dialog = frame(
    "shortcuts",
    "Keyboard shortcuts",
    el("dl", {}, ...rows),
    el("p", { class: "faint" }, "On a Mac, Alt is Option."),
    el("div", { class: "buttons" }, el("span", { class: "space" }), close),
  );
  return () => dialog.showModal();
}

/** Asks for an API key; resolves to it, or to null if there is none or `signal` ends the question. */
export function keyDialog() {
  const input = el("input", {
    type: "password",
    autocomplete: "off",
    required: true,
    spellcheck: "false",
  });
  const words = el("p");
  const form = el(
    "form",
    { method: "dialog" },
    words,
    field("key", "API key", "Kept in this tab, until it is closed.", input),
    el(
      "div",
      { class: "buttons" },
      el("span", { class: "space" }),
      el("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
      el("button", { type: "submit", class: "main" }, "Go on"),
    ),
  );
  const dialog = frame("key", "This server wants an API key", form);
  let answer = null;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    answer = input.value.trim();
    dialog.close();
  });
  let pending = null; // the question is put once, whoever asks
  return (again, signal) => {
    pending ??= new Promise((resolve) => {
      answer = null;
      input.value = "";
      words.textContent = again ? "The server did not take that key." : "";
      words.className = again ? "error" : "";
      const ended = () => {
        pending = null;
        resolve(answer);
      };
      dialog.addEventListener("close", ended, { once: true });
      signal?.addEventListener("abort", () => dialog.close());
      dialog.showModal();
      input.focus();
    });
    return pending;
  };
}

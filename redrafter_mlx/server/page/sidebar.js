// The list of conversations.

import { byId, el, iconButton } from "./dom.js";

/** hooks: open(id), rename(id, title), remove(id) */
export class Sidebar {
  constructor(hooks) {
    this.hooks = hooks;
    this.list = byId("conversations");
  }

  /** Show the conversations; `busy` are those that are being answered. */
  show(entries, current, busy) {
    if (this.list.querySelector("input")) return; // a title is being written
    const key = JSON.stringify([entries.map(({ id, title }) => [id, title]), current, [...busy]]);
    if (key === this.shown) return;
    this.shown = key;
    const focused = document.activeElement?.closest?.("#conversations li")?.dataset.id;
    const rows = entries.map((entry) => this.#row(entry, entry.id === current, busy.has(entry.id)));
    this.list.replaceChildren(...rows);
    if (focused) this.list.querySelector(`[data-id="${CSS.escape(focused)}"] .open`)?.focus();
  }

  #row({ id, title }, current, busy) {
    const name = title || "New conversation";
    const open = el(
      "button",
      {
        type: "button",
        class: "open",
        title: name,
        "aria-current": current ? "true" : null,
        onclick: () => this.hooks.open(id),
        ondblclick: () => this.#rename(row, id, name),
      },
      el("span", {}, name),
      busy && el("i", { class: "busy", role: "img", "aria-label": "being answered" }),
    );
    const row = el(
      "li",
      { "data-id": id },
      open,
      iconButton("edit", `Rename “${name}”`, () => this.#rename(row, id, name)),
      iconButton("trash", `Delete “${name}”`, () => this.hooks.remove(id)),
    );
    return row;
  }

  #rename(row, id, name) {
    const input = el("input", { type: "text", "aria-label": "Title", maxlength: "120" });
    input.value = name;
    let done = false;
    const end = (keep) => {
      if (done) return;
      done = true;
      input.remove();
      this.shown = null;
      this.hooks.rename(id, (keep && input.value.trim()) || name);
      this.list.querySelector(`[data-id="${CSS.escape(id)}"] .open`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        end(false);
      }
    });
    input.addEventListener("blur", () => end(true));
    row.replaceChildren(input);
    input.select();
  }
}

// The page: its parts, put together.

import { Chat } from "./chat.js";
import { keyDialog, settingsDialog, shortcutsDialog } from "./dialogs.js";
import { announce, byId, el, icon, toast } from "./dom.js";
import { Panel } from "./panel.js";
import { Sticky } from "./scroll.js";
import { keepKey, modelNames } from "./server.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { welcome } from "./welcome.js";

const root = document.documentElement;
const question = byId("question");
const THEMES = ["system", "dark", "light"];
const FULL =
  "The browser has no more room: what is said from now on is lost when this tab is closed. " +
  "Delete conversations that you no longer need, or save this one as a file.";

const store = new Store((full) => notice(full ? FULL : ""));
const askKey = keyDialog();
const openSettings = settingsDialog(store);
const openShortcuts = shortcutsDialog();
const panel = new Panel(store.recall("shading") !== "off", shade, () => closeDrawers());
const sticky = new Sticky(byId("scroller"), (away) => (byId("latest").hidden = !away));
const chat = new Chat(store, panel, sticky, { model: () => model, askKey, changed: show });
const sidebar = new Sidebar({ open, rename, remove });
let model = ""; // that answers what is asked next

function notice(text) {
  const place = byId("notice");
  if (place.textContent !== text) place.textContent = text;
}

// --- What is shown -----------------------------------------------------------------------------

function show() {
  const { conversation, run } = chat;
  const title = conversation.title || "New conversation";
  const empty = conversation.messages.length === 0;
  byId("title").textContent = title;
  byId("model").textContent = model;
  byId("export").hidden = empty;
  byId("welcome").hidden = !empty;
  byId("send").hidden = Boolean(run);
  byId("stop").hidden = !run;
  document.body.classList.toggle("empty", empty);
  document.title = conversation.title ? `${title} · redrafter` : "redrafter";
  sidebar.show(store.list(), conversation.id, chat.busy);
}

function shade(on) {
  root.dataset.shade = on ? "on" : "off";
  store.remember("shading", root.dataset.shade);
}

function theme(name) {
  if (name === "system") delete root.dataset.theme;
  else root.dataset.theme = name;
  store.remember("theme", name);
  const words = { system: "as the system", dark: "dark", light: "light" };
  byId("theme").textContent = `Theme: ${words[name]}`;
}

function nextTheme() {
  const now = root.dataset.theme ?? "system";
  theme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
  announce(byId("theme").textContent);
}

// --- Conversations -----------------------------------------------------------------------------

function open(id) {
  const conversation = (id && store.get(id)) || store.create();
  store.remember("current", conversation.id);
  chat.open(conversation);
  openDrawer("sidebar", false);
}

function create() {
  open(null);
  question.focus();
}

function rename(id, title) {
  const conversation = store.get(id);
  if (!conversation) return;
  conversation.title = title;
  store.save(conversation);
  show();
}

function remove(id) {
  const { title } = store.get(id) ?? {};
  const neighbour = beside(id, 1) ?? beside(id, -1);
  const current = id === chat.conversation.id;
  chat.drop(id);
  const restore = store.remove(id);
  if (current) open(neighbour);
  else show();
  toast(`“${title || "New conversation"}” is deleted.`, "Undo", () => {
    restore();
    open(id);
  });
}

/** The conversation so many places below another in the list. */
function beside(id, step) {
  const ids = store.list().map((entry) => entry.id);
  return ids[ids.indexOf(id) + step] ?? null;
}

function exportFile() {
  const { title, messages } = chat.conversation;
  const names = { user: "You", assistant: model || "Model" };
  const parts = messages.map(({ role, text }) => `## ${names[role]}\n\n${text}\n`);
  const file = new Blob([`# ${title}\n\n${parts.join("\n")}`], { type: "text/markdown" });
  const href = URL.createObjectURL(file);
  const name = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "conversation";
  el("a", { href, download: `${name}.md` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

// --- Asking ------------------------------------------------------------------------------------

function fit() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight, window.innerHeight * 0.4)}px`;
}

function write(text) {
  question.value = text;
  store.remember("draft", text);
  fit();
}

function send() {
  if (chat.ask(question.value)) write("");
}

function ask(text) {
  write(text);
  send();
  question.focus();
}

// --- Drawers: the list on a narrow window, the panel beside it ------------------------------------

function openDrawer(name, isOpen) {
  const opener = byId(`open-${name}`);
  if (document.body.classList.contains(`show-${name}`) === isOpen) return;
  document.body.classList.toggle(`show-${name}`, isOpen);
  opener.setAttribute("aria-expanded", isOpen);
  const shown = ["sidebar", "panel"].some((one) => document.body.classList.contains(`show-${one}`));
  byId("backdrop").hidden = !shown;
  const inside = byId(name).querySelector("button, [tabindex='0']");
  (isOpen ? inside : opener).focus();
}

function closeDrawers() {
  const shown = ["sidebar", "panel"].filter((one) =>
    document.body.classList.contains(`show-${one}`),
  );
  shown.forEach((one) => openDrawer(one, false));
  return shown.length > 0;
}

// --- Keys --------------------------------------------------------------------------------------

const ALT = {
  KeyN: create,
  KeyR: () => chat.again(),
  KeyM: () => byId("shading").click(),
  KeyG: openSettings,
  KeyT: nextTheme,
  ArrowUp: () => move(-1),
  ArrowDown: () => move(1),
};

function move(step) {
  const id = beside(chat.conversation.id, step);
  if (id) open(id);
}

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  const inField = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName ?? "");
  if (event.altKey && !event.ctrlKey && !event.metaKey && ALT[event.code]) {
    event.preventDefault(); // Option and a letter would write a sign
    ALT[event.code]();
  } else if (event.key === "Escape" && !event.isComposing) {
    if (!closeDrawers()) chat.stop();
  } else if (event.key === "?" && !inField) {
    openShortcuts();
  }
}

function onQuestionKey(event) {
  if (event.isComposing || event.altKey) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !question.value) {
    event.preventDefault();
    chat.startEdit();
  }
}

// --- Beginning -----------------------------------------------------------------------------------

function connect() {
  const on = (id, act, sign) => {
    byId(id).addEventListener("click", act);
    if (sign) byId(id).prepend(icon(sign));
  };
  on("new", create, "plus");
  byId("new").append("New conversation");
  on("open-settings", openSettings);
  on("open-shortcuts", openShortcuts);
  on("theme", nextTheme);
  on("export", exportFile, "save");
  on("stop", () => chat.stop(), "stop");
  on("latest", () => sticky.follow(), "down");
  byId("latest").append("To the end");
  on("open-sidebar", () => openDrawer("sidebar", true), "menu");
  on("close-sidebar", () => openDrawer("sidebar", false), "close");
  on("open-panel", () => openDrawer("panel", !document.body.classList.contains("show-panel")));
  on("backdrop", closeDrawers);
  byId("send").append(icon("send"));
  byId("composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
  byId("models").addEventListener("change", choose);
  question.addEventListener("keydown", onQuestionKey);
  question.addEventListener("input", () => write(question.value));
  document.addEventListener("keydown", onKey);
  window.addEventListener("pagehide", () => {
    for (const run of chat.runs.values()) store.save(run.conversation);
  });
  window.addEventListener("storage", (event) => changedElsewhere(event.key ?? ""));
}

/** Another tab has kept something. */
function changedElsewhere(key) {
  if (!key.startsWith("redrafter.conversation")) return;
  store.refresh(chat.busy);
  const { id, messages } = chat.conversation;
  const kept = chat.run ? null : store.get(id);
  // An answer that comes in another tab is shown when it is complete.
  const complete = kept && kept.messages.at(-1)?.finish !== null;
  if (complete && JSON.stringify(kept.messages) !== JSON.stringify(messages)) chat.open(kept);
  else show();
}

/** Models to choose from: more than one only where requests may change it. */
function offer(names) {
  model = names[0] ?? "";
  byId("models").replaceChildren(...names.map((name) => el("option", {}, name)));
  byId("models").hidden = names.length < 2;
  byId("model").hidden = names.length > 1;
  show();
}

function choose() {
  model = byId("models").value;
  show();
  question.focus();
}

async function greet() {
  for (let again = false; ; again = true) {
    try {
      return offer(await modelNames());
    } catch (error) {
      const key = error.status === 401 && (await askKey(again));
      if (!key) return notice(error.message);
      keepKey(key);
    }
  }
}

connect();
welcome(ask);
theme(root.dataset.theme ?? "system");
shade(panel.shading.checked);
write(store.recall("draft") ?? "");
open(store.recall("current") ?? store.list()[0]?.id);
question.focus();
greet();

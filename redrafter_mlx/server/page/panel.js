// How the answer was written: its speed, the tree of a round, and who wrote what.

import { byId, count, decimal, el, iconButton, number, svg } from "./dom.js";
import { speedLine, speedUp } from "./messages.js";
import { caption, legend, picture } from "./tree.js";

const CALM = 450; // milliseconds between two pictures while an answer comes
const NARROWEST = 280; // pixels of the picture, where it is not to be seen yet
const BARS = 60; // rounds in the strip

/** One of two bars that are compared. */
function bar(text, kind) {
  const value = el("b");
  const fill = el("i", { class: kind });
  const title = el("span", {}, text);
  const node = el("div", { class: "bar" }, title, el("div", {}, fill), value);
  const name = (other) => (title.textContent = other);
  const set = (amount, most) => {
    value.textContent = amount ? decimal(amount) : "–";
    fill.style.width = `${amount ? Math.min((100 * amount) / most, 100) : 0}%`;
  };
  return { node, set, name };
}

/** Two bars under a heading: with drafts, and without. */
function pair(title) {
  const [ours, plain] = [bar("with drafts", "ours"), bar("plain", "plain")];
  const node = el("div", { class: "pair" }, el("h3", {}, title), ours.node, plain.node);
  const set = (amount, other) => {
    const most = Math.max(amount || 0, other || 0, 1e-9);
    ours.set(amount, most);
    plain.set(other, most);
  };
  return { node, set, name: ours.name };
}

export class Panel {
  /**
   * onShading  called with whether drafted tokens are to be shaded
   * onClose    called to close the sheet that the panel is on a narrow window
   */
  constructor(shaded, onShading, onClose) {
    this.close = iconButton("close", "Close", onClose);
    this.speed = pair("Tokens a second");
    this.yield = pair("Tokens a round, one pass of the model");
    this.gain = el("p", { class: "gain" });
    this.frame = el("div", {
      class: "picture",
      tabindex: "0",
      role: "group",
      "aria-label": "Tree of the round",
    });
    this.path = el("output", { class: "path faint" });
    this.words = el("p", { class: "caption" });
    this.strip = el("div", { class: "strip", "aria-hidden": "true" });
    this.slider = el("input", { type: "range", min: 1, step: 1, "aria-label": "Round" });
    this.which = el("h3");
    this.written = el("p", { class: "faint written" });
    this.shading = el("input", { type: "checkbox", id: "shading" });
    this.shading.checked = shaded;
    this.shading.addEventListener("change", () => onShading(this.shading.checked));
    this.slider.addEventListener("input", () => this.#choose(Number(this.slider.value)));
    this.toggle = byId("open-panel");
    this.shown = null; // a round
    this.drawnAt = 0;
    byId("panel").append(...this.#parts());
  }

  #parts() {
    const key = el("i", { class: "key accepted" });
    const label = el("label", { for: "shading" }, "Shade what was ", key, "guessed and kept");
    return [
      el("div", { class: "panel-head" }, el("h2", {}, "How this answer was written"), this.close),
      el("section", {}, this.gain, this.speed.node, this.yield.node),
      el(
        "section",
        { class: "round-section" },
        this.which,
        el("div", { class: "framed" }, this.frame, this.path),
        legend(),
        this.words,
        this.strip,
        this.slider,
      ),
      el("section", {}, el("div", { class: "check" }, this.shading, label), this.written),
    ];
  }

  /** Show an answer; `rounds` are all of its rounds that are known. */
  show(message, rounds, live) {
    const other = message !== this.message;
    if (other) this.chosen = null;
    Object.assign(this, { message, rounds });
    this.#numbers(live);
    const now = performance.now();
    if (live && !other && now - this.drawnAt < CALM) return;
    this.drawnAt = now;
    this.#rounds();
  }

  #numbers(live) {
    const { message } = this;
    const stats = message.stats ?? {};
    const gain = speedUp(stats);
    this.speed.set(stats.generation_tps, stats.plain_tps);
    this.speed.node.hidden = !stats.generation_tps;
    this.speed.node.classList.toggle("alone", !stats.plain_tps);
    this.yield.set(stats.tokens_per_round, stats.tokens_per_round && 1);
    this.yield.node.hidden = !stats.tokens_per_round;
    const plain = message.drafter === "none";
    this.speed.name(plain ? "plain" : "with drafts");
    this.yield.node.hidden ||= plain;
    this.gain.hidden = !gain || plain;
    // Other rules than the default one may change what is said.
    const same = message.rules?.some((rule) => rule !== "match") ? "" : ", with the same words";
    this.gain.replaceChildren(
      el("b", {}, gain ? `${decimal(gain)}×` : ""),
      ` as fast as without drafts${same}`,
    );
    const { drafted, own } = message;
    this.written.textContent =
      drafted + own
        ? `${number(drafted)} of ${count(drafted + own, "token")} were guessed and kept, ` +
          `${number(own)} are the model's own.`
        : "";
    const line = speedLine(message) || (live ? "Waiting for the model…" : "");
    this.toggle.textContent = line || "How this answer was written";
  }

  #rounds() {
    const { rounds } = this;
    const last = rounds.length;
    this.slider.hidden = this.strip.hidden = last < 2;
    this.slider.max = Math.max(last, 1);
    if (this.chosen == null || this.chosen >= last) {
      this.chosen = null;
      this.slider.value = last;
    }
    this.#draw();
  }

  /** Look at an earlier round; the last one means: follow. */
  #choose(n) {
    this.chosen = n >= this.rounds.length ? null : n;
    this.#draw();
  }

  #draw() {
    const { rounds, chosen } = this;
    const n = chosen ?? rounds.length;
    const round = rounds[n - 1] ?? this.message.round;
    this.#drawStrip(n);
    this.which.textContent =
      chosen == null ? "The last round" : `Round ${number(n)} of ${number(rounds.length)}`;
    this.slider.setAttribute("aria-valuetext", `Round ${n}: ${round ? caption(round) : ""}`);
    // A round that is shown may still get its tree, or its last token.
    const now = round && { tree: round.tree, next: round.next, words: caption(round) };
    const same =
      round === this.shown && Object.keys(now ?? {}).every((k) => now[k] === this.seen[k]);
    if (same) return;
    Object.assign(this, { shown: round, seen: now });
    this.path.textContent = "";
    if (!round) {
      this.frame.replaceChildren();
      this.words.textContent = "The tree appears with the first words.";
      return;
    }
    this.words.textContent = caption(round);
    const tree = round.tree ?? { tokens: ["…"], parents: [-1], accepted: [0] };
    const show = (text) => (this.path.textContent = text);
    const width = this.frame.clientWidth || NARROWEST;
    this.frame.replaceChildren(picture({ ...round, tree }, width, show));
  }

  /** A bar for each of the rounds around the one that is shown: how many tokens it brought. */
  #drawStrip(n) {
    const { rounds } = this;
    if (rounds.length < 2) return;
    const first = Math.min(Math.max(n - BARS / 2, 0), Math.max(rounds.length - BARS, 0));
    const some = rounds.slice(first, first + BARS);
    const most = Math.max(...some.map((round) => round.drafted + round.own), 4);
    const root = svg("svg", {
      viewBox: `0 0 ${Math.max(some.length, 10) * 5} 32`,
      preserveAspectRatio: "none",
    });
    some.forEach((round, index) => {
      const kept = (30 * round.drafted) / most;
      const own = (30 * round.own) / most;
      const x = index * 5;
      const now = first + index === n - 1 ? " now" : "";
      root.append(
        svg("rect", { x, y: 32 - own, width: 4, height: own, class: `own${now}` }),
        svg("rect", { x, y: 32 - own - kept, width: 4, height: kept, class: `kept${now}` }),
      );
    });
    this.strip.replaceChildren(root);
  }
}

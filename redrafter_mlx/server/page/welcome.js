// What an empty conversation shows: the idea in three steps, and something to begin with.

import { byId, el } from "./dom.js";
import { caption, EXAMPLE, legend, picture } from "./tree.js";

const STEPS = [
  ["Guess", "A small drafter guesses how the text may go on: a tree of a few words."],
  ["Check", "Your model reads the whole tree at once, in about the time of a single word."],
  ["Keep", "Guesses that are just what it would have said are kept. The rest goes."],
];

const QUESTIONS = [
  "Why is the sky blue?",
  "Explain tides to a child.",
  "Write a Python function that merges two sorted lists.",
];

/** Fill the empty conversation's place; `ask` is called with a question that is chosen. */
export function welcome(ask) {
  const steps = STEPS.map(([name, text]) => el("li", {}, el("b", {}, name), text));
  const example = picture(EXAMPLE, 330);
  byId("welcome").append(
    el("h2", {}, "The same words, sooner"),
    el("ol", { class: "steps" }, ...steps),
    el(
      "figure",
      {},
      el("div", { class: "picture" }, example),
      legend(),
      el("figcaption", {}, caption(EXAMPLE)),
    ),
    el(
      "p",
      { class: "faint" },
      "In answers, what was guessed and kept is ",
      el("span", { class: "drafted" }, "shaded"),
      ". Conversations stay in this browser.",
    ),
    el(
      "div",
      { class: "suggestions" },
      ...QUESTIONS.map((text) => el("button", { type: "button", onclick: () => ask(text) }, text)),
    ),
  );
}

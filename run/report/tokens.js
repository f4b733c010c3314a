"use strict";

// What a step did to each token, as a colour and as numbers.

const MEASURES = {
  change: {
    title: "change of log-probability",
    of: (numbers, i) => difference(numbers.after?.[i], numbers.before?.[i]),
    least: 0.02,
    note: "log π after the step, less before: blue became more likely, orange less",
  },
  advantage: {
    title: "advantage",
    of: (numbers, i, completion) => completion.advantage,
    least: 0.5,
    note: "what the completion earned beside its group: blue more, orange less",
  },
  entropy: {
    title: "entropy",
    of: (numbers, i) => numbers.entropy?.[i] ?? null,
    least: 0.2,
    heat: true,
    note: "in nats, before the step: where the policy was not sure",
  },
  weight: {
    title: "importance weight",
    of: (numbers, i) => difference(numbers.before?.[i], numbers.sampled?.[i]),
    least: 0.05,
    shown: (value) => Math.exp(value),
    note: "π before the step over the π that drew it: 1 where the policy is the sampler",
  },
  none: { title: "nothing", of: () => null, least: 1, note: "" },
};

function difference(a, b) {
  return a === null || a === undefined || b === null || b === undefined ? null : a - b;
}

// The value that gets the full colour: that of one of fifty tokens is as large.
function scaleOf(measure, groups) {
  const sizes = [];
  for (const group of groups) {
    for (const completion of group.completions) {
      const numbers = completion.tokens ?? {};
      const count = completion.tokens ? numbers.tokens.length : 1;
      for (let i = 0; i < count; i++) {
        const value = measure.of(numbers, i, completion);
        if (value !== null) sizes.push(Math.abs(value));
      }
    }
  }
  sizes.sort((a, b) => a - b);
  const large = sizes[Math.floor(0.98 * (sizes.length - 1))] ?? 0;
  return Math.max(large, measure.least);
}

function tint(node, measure, value, scale) {
  if (value === null) return;
  const share = Math.min(1, Math.abs(value) / scale);
  node.classList.add(measure.heat ? "heat" : value < 0 ? "down" : "up");
  node.style.setProperty("--share", share.toFixed(3));
}

// A completion's text: of tokens, where they were recorded, each with its colour.
function textOf(completion, measure, scale, query) {
  const box = el("div", { class: "text" });
  if (!completion.tokens) {
    const whole = el("span", { class: "t" }, ...marked(completion.text, query));
    if (measure === MEASURES.advantage) tint(whole, measure, completion.advantage, scale);
    box.append(whole);
    return box;
  }
  const numbers = completion.tokens;
  const hits = hitsOf(numbers.tokens.join(""), query);
  let start = 0;
  numbers.tokens.forEach((text, i) => {
    const told = numbers.before !== undefined;
    const node = el("span", { class: told ? "t" : "t untold" }, ...markedPart(text, start, hits));
    start += text.length;
    tint(node, measure, measure.of(numbers, i, completion), scale);
    node.told = { completion, i };
    box.append(node);
  });
  return box;
}

// Text with what is searched for marked.
function marked(text, query) {
  return markedPart(text, 0, hitsOf(text, query));
}

// Where a text has what is searched for: [[start, end], …].
function hitsOf(text, query) {
  const hits = [];
  if (!query) return hits;
  // A letter whose small one is longer, such as İ, stays: places are those of the text itself.
  const small = (letter) => (letter.toLowerCase().length === letter.length ? letter.toLowerCase() : letter);
  const lower = text.replace(/\p{Lu}/gu, small);
  for (let at = lower.indexOf(query); at >= 0; at = lower.indexOf(query, at + query.length)) {
    hits.push([at, at + query.length]);
  }
  return hits;
}

// A part of a text that begins at `start` there: a hit may lie in several parts.
function markedPart(part, start, hits) {
  const nodes = [];
  let end = 0;
  for (const [from, to] of hits) {
    const first = Math.max(0, from - start);
    const last = Math.min(part.length, to - start);
    if (first >= last) continue;
    nodes.push(part.slice(end, first), el("mark", {}, part.slice(first, last)));
    end = last;
  }
  return [...nodes, part.slice(end)];
}

// The rows of the tip over a token.
function numbersOf({ completion, i }) {
  const numbers = completion.tokens;
  const at = (name) => numbers[name]?.[i] ?? null;
  const change = difference(at("after"), at("before"));
  const weight = difference(at("before"), at("sampled"));
  const id = at("ids") === null ? "" : `, id ${at("ids")}`;
  const rows = [
    ["token", `${i + 1} of ${numbers.tokens.length}${id}`],
    ["advantage", number(completion.advantage)],
    ["log π when drawn", number(at("sampled"))],
    ["log π before the step", number(at("before"))],
    ["log π after it", number(at("after"))],
  ];
  if (change !== null) rows.push(["change", `${change >= 0 ? "+" : ""}${number(change)}`]);
  if (change !== null) rows.push(["π after / before", `× ${number(Math.exp(change))}`]);
  rows.push(["entropy", number(at("entropy"))]);
  if (weight !== null) rows.push(["importance weight", number(Math.exp(weight))]);
  rows.push(["ρ in the objective", number(at("ratio"))]);
  if (numbers.importance) rows.push(["sampler's correction", number(at("importance"))]);
  if (!numbers.before) rows.push(["not trained on", "its advantage is 0"]);
  return rows;
}

function visible(text) {
  return text === "" ? "(part of the next)" : text.replace(/ /g, "·").replace(/\n/g, "↵");
}

function legendOf(measure, scale) {
  if (measure === MEASURES.none) return [];
  const shown = measure.shown ?? ((value) => value);
  const bar = el("i", { class: measure.heat ? "heat" : "diverging" });
  return [number(shown(measure.heat ? 0 : -scale)), bar, number(shown(scale))];
}

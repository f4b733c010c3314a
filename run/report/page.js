"use strict";

const byId = (id) => document.getElementById(id);
const story = JSON.parse(byId("story").textContent);
const CROWD = 12; // groups that are shown before one asks for more
const THUMB = 8; // half the slider's thumb, in pixels

const CHARTS = [
  {
    title: "Rewards",
    wide: true,
    names: story.rewards.map((name) => `rewards/${name}`),
    note: "dots: held-out questions · thin: each step's batch",
  },
  { title: "Tokens in a completion", names: ["completion_length"] },
  { title: "Shares", names: ["zero_std_groups", "clipped_completions"] },
  { title: "Entropy", names: ["entropy"] },
  { title: "KL to the reference", names: ["kl"] },
  { title: "Norm of the gradient", names: ["grad_norm"] },
  { title: "|sampler − trainer| of log π", names: ["sampler/logp_diff"] },
  { title: "Seconds", names: ["time/step", "time/generate", "time/train", "time/reward"] },
];

// What is chosen. It stands in the address, behind #, so that a reload or a link finds it again.
const state = { step: null, phase: "train", which: "all", measure: "change", query: "", theme: "" };
const charts = [];

function readAddress() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (name in state) state[name] = name === "step" ? Number(value) : value;
  }
  if (!(state.measure in MEASURES)) state.measure = "change";
  if (state.phase !== "eval") state.phase = "train";
  if (state.theme) document.documentElement.dataset.theme = state.theme;
}

function writeAddress() {
  const said = Object.entries(state).filter(([, value]) => value !== null && value !== "");
  const isLast = state.step === steps.at(-1)?.step; // which a reload finds again, or a newer one
  if (isLast) said.shift();
  history.replaceState(null, "", `#${new URLSearchParams(said)}`);
}

// What was reached -------------------------------------------------------------------------------

function showTop() {
  const { metrics } = story;
  byId("name").textContent = story.name;
  byId("about").textContent = [...story.about, story.is_over ? "finished" : "not finished"].join(" · ");

  const seconds = story.seconds;
  const step = metrics.step.at(-1);
  const left = Math.max(0, story.max_steps - step);
  for (const name of story.rewards) addReward(name);
  if (!story.rewards.length) addTile("reward", number(metrics.reward?.at(-1)), "");
  addTile("steps", number(step), left ? `of ${number(story.max_steps)}` : "");
  addTile("time", clock(seconds), left ? `${clock((seconds / step) * left)} left` : "");
  addTile("tokens", number(metrics.num_tokens?.at(-1)), "");
  if (metrics.completion_length) addTile("mean length", ...arrow(metrics.completion_length));
}

function addReward(name) {
  const held = heldOut(story, `rewards/${name}`).map(([, value]) => value);
  const values = held.length > 1 ? held : story.metrics[`rewards/${name}`];
  addTile(held.length > 1 ? `${name}, held out` : name, ...arrow(values));
}

function arrow(values) {
  const there = values.filter((value) => value !== null);
  return [number(there.at(-1)), there.length > 1 ? `from ${number(there[0])}` : ""];
}

function addTile(name, value, beside) {
  const lines = [el("small", {}, name), el("b", {}, value), el("small", {}, beside)];
  byId("tiles").append(el("div", { class: "tile" }, ...lines));
}

function sum(values) {
  return values.reduce((whole, value) => whole + (value ?? 0), 0);
}

function clock(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = seconds / 60;
  return minutes < 90 ? `${minutes.toFixed(1)} min` : `${(minutes / 60).toFixed(1)} h`;
}

function showHealth() {
  const lines = story.health.map(({ step, text }) =>
    el("div", { class: "health" }, el("b", {}, step ? `step ${step}` : "at the start"), text),
  );
  const short = story.metrics.step.length < story.patience; // what a cause takes to show
  const words = short ? "Too short to tell whether it is healthy." : "Healthy: the run had nothing to warn of.";
  const good = el("div", { class: "health good" }, words);
  byId("health").append(...(lines.length ? lines : [good]));
}

function showCharts() {
  const has = (values) => (values ?? []).some((value) => value !== null);
  const there = (name) => has(story.metrics[name]) || has(story.evaluations[`eval/${name}`]);
  const add = (spec, box) => {
    const names = spec.names.filter(there);
    if (!names.length) return;
    const chart = new Chart({ ...spec, names }, story, pick);
    charts.push(chart);
    box.append(chart.node);
  };
  CHARTS.forEach((spec) => add(spec, byId("curves")));
  const shown = new Set(["step", ...CHARTS.flatMap((spec) => spec.names)]);
  // Some, such as pass@k, are told of evaluations alone.
  const told = Object.keys(story.evaluations).map((name) => name.replace(/^eval\//, ""));
  const others = [...new Set([...Object.keys(story.metrics), ...told])].filter((name) => !shown.has(name));
  const more = byId("more").querySelector(".curves");
  const fill = () => others.forEach((name) => add({ title: name, names: [name] }, more));
  byId("more").addEventListener("toggle", fill, { once: true });
}

// Steps and their groups -------------------------------------------------------------------------

let steps = []; // those that have completions of the chosen phase
let shown = CROWD;

function current() {
  return steps.findIndex((one) => one.step === state.step);
}

// Choose a step, or the nearest that has completions.
function pick(step) {
  if (!steps.length) return;
  const near = steps.reduce((a, b) => (Math.abs(b.step - step) < Math.abs(a.step - step) ? b : a));
  state.step = near.step;
  shown = CROWD;
  show();
}

function choosePhase() {
  const has = (phase) => story.steps.filter((one) => one[phase].length);
  const other = state.phase === "eval" ? "train" : "eval";
  if (!has(state.phase).length && has(other).length) state.phase = other;
  steps = has(state.phase);
  byId("phase").disabled = !has("train").length || !has("eval").length;
  byId("slider").max = Math.max(0, steps.length - 1);
  if (!steps.length) show();
  else pick(state.step ?? steps.at(-1).step);
}

function matches(completion) {
  return completion.text.toLowerCase().includes(state.query);
}

function asks(group) {
  const solution = String(group.solution ?? "");
  return group.question.toLowerCase().includes(state.query) || solution.toLowerCase().includes(state.query);
}

function found(group) {
  return asks(group) || group.completions.some(matches);
}

function teaches(group) {
  return group.completions.some((completion) => completion.advantage);
}

function hasTokens(group) {
  return group.completions.some((completion) => completion.tokens);
}

function chosenGroups(step) {
  let groups = step[state.phase];
  if (state.which === "teach") groups = groups.filter(teaches);
  if (state.which === "tokens") groups = groups.filter(hasTokens);
  if (state.query) groups = groups.filter(found);
  return [...groups.filter(hasTokens), ...groups.filter((group) => !hasTokens(group))];
}

function show() {
  byId("search").value = state.query;
  for (const name of ["phase", "which", "measure"]) byId(name).value = state[name];
  const at = current();
  byId("bar").hidden = at < 0;
  if (at < 0) {
    byId("told").textContent =
      "No completions here: --log_completions true writes them, --log_tokens 4 the tokens of four groups a step.";
    return;
  }
  const step = steps[at];
  byId("slider").value = at;
  byId("slider").setAttribute("aria-valuetext", `step ${step.step}`);
  byId("step").textContent = `step ${step.step}`;
  byId("earlier").disabled = at === 0;
  byId("later").disabled = at === steps.length - 1;
  charts.forEach((chart) => chart.mark(step.step));
  showGroups(step);
  showStrip(at);
  writeAddress();
}

function showGroups(step) {
  const groups = chosenGroups(step);
  const measure = MEASURES[state.measure];
  const scale = scaleOf(measure, groups);
  byId("legend").replaceChildren(...legendOf(measure, scale));
  byId("legend").title = measure.note;
  byId("groups").replaceChildren(...groups.slice(0, shown).map((group) => groupOf(group, measure, scale)));
  byId("all").hidden = groups.length <= shown;
  byId("all").textContent = `show all ${groups.length} groups`;
  byId("told").textContent = tellOf(step, groups, measure);
  hideTip();
}

function tellOf(step, groups, measure) {
  const all = step[state.phase];
  const what = state.phase === "eval" ? "questions" : "groups";
  const told = [`${groups.length === all.length ? "" : `${groups.length} of `}${all.length} ${what}`];
  if (state.query) {
    const where = stripValues().filter((count) => count).length;
    told.push(`“${state.query}” is in ${where} of ${steps.length} steps`);
  }
  const recorded = all.filter(hasTokens).length;
  if (measure.note && recorded) told.push(measure.note);
  if (!recorded && state.phase === "train") told.push("no tokens recorded here: --log_tokens N records N groups a step");
  return told.join(" · ");
}

function groupOf(group, measure, scale) {
  const rewards = group.completions.map(totalReward);
  const facts = [];
  if (group.solution !== null) facts.push("answer ", el("b", {}, ...marked(String(group.solution), state.query)), " · ");
  facts.push(`mean reward ${number(sum(rewards) / rewards.length)}`);
  if (state.phase === "train" && !teaches(group)) facts.push(" · all earned the same: teaches nothing");
  const header = el(
    "header",
    {},
    el("div", { class: "question" }, ...marked(group.question.trim(), state.query)),
    el("div", { class: "facts" }, ...facts),
  );
  const side = group.completions.map((one) => completionOf(one, measure, scale, asks(group)));
  return el("article", { class: "group" }, header, el("div", { class: "completions" }, ...side));
}

function totalReward(completion) {
  const weights = story.reward_weights ?? [];
  return sum(completion.rewards.map((value, i) => (value ?? 0) * (weights[i] ?? 1)));
}

function completionOf(completion, measure, scale, asked) {
  const { advantage, rewards } = completion;
  const side = advantage > 0 ? " up" : advantage < 0 ? " down" : "";
  const apart = state.query && !asked && !matches(completion) ? " apart" : "";
  const earned = el("div", { class: "earned" });
  if (advantage !== null) {
    const sign = advantage > 0 ? "+" : "";
    earned.append(el("span", { class: "advantage", title: "advantage" }, `${sign}${advantage.toFixed(2)}`));
  }
  rewards.forEach((value, i) => {
    if (value === null) return;
    earned.append(el("span", { class: value ? "" : "zero" }, `${story.rewards[i]} ${number(value)}`));
  });
  if (completion.length !== null) earned.append(el("span", {}, `${completion.length} tokens`));
  if (completion.finished === false) earned.append(el("span", { class: "cut" }, "cut"));
  const text = textOf(completion, measure, scale, state.query);
  return el("div", { class: `completion${side}${apart}` }, earned, text);
}

const strip = { of: null, values: [] }; // what was reckoned last, and what for

// Of each step its mean reward, or how many groups have what is searched for.
function stripValues() {
  const of = `${state.phase} ${state.query}`;
  if (strip.of !== of) {
    strip.of = of;
    strip.values = steps.map((one) => {
      const groups = one[state.phase];
      if (state.query) return groups.filter(found).length;
      const rewards = groups.flatMap((group) => group.completions.map(totalReward));
      return sum(rewards) / rewards.length;
    });
  }
  return strip.values;
}

// These as bars above the slider.
function showStrip(at) {
  const values = stripValues();
  const low = Math.min(0, ...values);
  const high = Math.max(...values, low + 1e-9);
  const room = byId("strip").clientWidth - 2 * THUMB;
  const width = Math.min(14, Math.max(1, (0.8 * room) / steps.length));
  const bars = values.map((value, i) => {
    const height = Math.max(1, (29 * (value - low)) / (high - low));
    const middle = THUMB + (room * i) / Math.max(1, steps.length - 1);
    const kind = i === at ? "here" : state.query && value ? "found" : "";
    return svg("rect", { x: middle - width / 2, width, y: 30 - height, height, class: kind });
  });
  byId("strip").replaceChildren(...bars);
}

// What one does ----------------------------------------------------------------------------------

function listen() {
  byId("slider").addEventListener("input", (event) => pick(steps[event.target.value].step));
  byId("earlier").addEventListener("click", () => pick(steps[current() - 1].step));
  byId("later").addEventListener("click", () => pick(steps[current() + 1].step));
  byId("strip").addEventListener("click", (event) => {
    const box = byId("strip").getBoundingClientRect();
    const share = (event.clientX - box.left - THUMB) / (box.width - 2 * THUMB);
    const at = Math.round(share * (steps.length - 1));
    pick(steps[Math.min(Math.max(at, 0), steps.length - 1)].step);
  });
  byId("search").addEventListener("input", (event) => {
    state.query = event.target.value.toLowerCase();
    show();
  });
  for (const name of ["which", "measure"]) {
    byId(name).addEventListener("change", (event) => {
      state[name] = event.target.value;
      show();
    });
  }
  byId("phase").addEventListener("change", (event) => {
    state.phase = event.target.value;
    choosePhase();
  });
  byId("all").addEventListener("click", () => {
    shown = Infinity;
    show();
  });
  byId("theme").addEventListener("click", () => {
    const asked = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    state.theme = (state.theme || asked) === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = state.theme;
    writeAddress();
  });
  // A pointer over a token, or a finger on it.
  for (const kind of ["pointerover", "click"]) {
    byId("groups").addEventListener(kind, (event) => {
      const told = event.target.closest(".t")?.told; // of a token, or of what is marked in it
      if (!told) hideTip();
      else showTip(event, visible(told.completion.tokens.tokens[told.i]), numbersOf(told));
    });
  }
  byId("groups").addEventListener("pointerleave", hideTip);
  addEventListener("scroll", hideTip, { passive: true });
  addEventListener("resize", () => steps.length && showStrip(current()));
}

// While a run goes on, the page looks for news, but not under the hands of a reader.
function keepFresh() {
  if (!story.refresh) return;
  const busy = () => document.hidden || !tip.hidden || document.activeElement === byId("search");
  setInterval(() => busy() || location.reload(), story.refresh * 1000);
}

function tellAtFoot() {
  const told = [];
  if (story.steps_left_out) {
    const all = story.steps.length + story.steps_left_out;
    told.push(`Completions of ${story.steps.length} of ${all} steps are here; the run's files have all.`);
  }
  if (story.prompt.before) told.push("Every prompt begins with:");
  byId("foot").append(el("p", {}, told.join(" ")));
  if (story.prompt.before) byId("foot").append(el("pre", {}, story.prompt.before));
}

readAddress();
showTop();
showHealth();
showCharts();
for (const [name, measure] of Object.entries(MEASURES)) {
  byId("measure").append(el("option", { value: name }, measure.title));
}
listen();
tellAtFoot();
choosePhase();
keepFresh();

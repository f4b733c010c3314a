"use strict";

// Elements. Text is always a text node, never HTML: what a model wrote is untrusted.

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const whole = String(Math.round(size)).length;
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: Math.max(0, digits - whole) });
  if (size !== 0 && size < 0.001) return value.toExponential(digits - 2);
  return String(Number(value.toPrecision(digits)));
}

// Numbers in as few digits as tell them apart, three at least.
function apart(values) {
  const all = (digits) => values.map((value) => number(value, digits));
  let digits = 3;
  while (digits < 12 && new Set(all(digits)).size < values.length) digits++;
  return all(digits);
}

// The tip: rows of a name and a value, beside the pointer, within the window.

const tip = document.getElementById("tip");

function showTip(event, title, rows) {
  const table = el("table");
  for (const [name, value] of rows) {
    table.append(el("tr", {}, el("td", {}, name), el("td", {}, value)));
  }
  tip.replaceChildren(el("b", {}, title), table);
  tip.hidden = false;
  const room = { x: innerWidth - tip.offsetWidth - 8, y: innerHeight - tip.offsetHeight - 8 };
  const below = event.clientY + 18;
  const above = event.clientY - tip.offsetHeight - 12;
  const x = Math.max(8, Math.min(event.clientX + 14, room.x));
  const y = below > room.y ? Math.max(8, above) : below;
  tip.style.transform = `translate(${x}px, ${y}px)`;
}

function hideTip() {
  tip.hidden = true;
}

// Curves: thin what each step's batch told, bold the held-out points, or else a running mean.

const LABELS = { zero_std_groups: "groups that teach nothing", clipped_completions: "completions cut" };
const MARGIN = { left: 46, right: 10, top: 8, bottom: 20 };

// A chart of some metrics: {title, names, wide?}. held: by name, [[step, value], …].
class Chart {
  constructor(spec, story, pick) {
    this.steps = story.metrics.step;
    this.series = spec.names.map((name, i) => ({
      label: LABELS[name] ?? name.replace(/^(rewards|time)\//, ""),
      color: `var(--c${i % 6})`,
      values: story.metrics[name] ?? story.metrics.step.map(() => null),
      held: heldOut(story, name),
    }));
    this.plot = el("div", { class: "plot" });
    const caption = el("figcaption", {}, spec.title);
    if (this.series.length > 1) caption.append(...this.series.map(nameOf));
    if (spec.note) caption.append(el("span", { class: "note" }, spec.note));
    this.node = el("figure", { class: spec.wide ? "chart wide" : "chart" }, caption, this.plot);
    new ResizeObserver(() => this.draw()).observe(this.plot);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.leave());
    this.plot.addEventListener("click", (event) => pick(this.steps[this.nearest(event)]));
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.plot;
    if (!width) return;
    const held = this.series.flatMap((one) => one.held);
    const values = this.series.flatMap((one) => one.values.filter((v) => v !== null));
    const ticks = niceTicks([...values, ...held.map(([, value]) => value)]);
    const first = Math.min(this.steps[0], ...held.map(([step]) => step));
    const last = Math.max(this.steps.at(-1), first + 1);
    const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    const [low, high] = [ticks[0], ticks.at(-1)];
    this.x = (step) => MARGIN.left + ((step - first) / (last - first)) * inner.width;
    this.y = (value) => MARGIN.top + ((high - value) / (high - low)) * inner.height;
    this.bottom = height - MARGIN.bottom;

    this.canvas = svg("svg", { width, height, role: "img" });
    const marks = apart(ticks);
    for (const [i, tick] of ticks.entries()) {
      const y = this.y(tick);
      this.canvas.append(
        svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }),
        svg("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, marks[i]),
      );
    }
    for (const step of new Set([first, Math.round((first + last) / 2), last])) {
      const anchor = step === first ? "start" : step === last ? "end" : "middle";
      this.canvas.append(svg("text", { x: this.x(step), y: height - 5, "text-anchor": anchor }, step));
    }
    for (const one of this.series) this.drawSeries(one);
    this.cross = this.vertical("cross");
    this.mark(this.chosen);
    this.plot.replaceChildren(this.canvas);
  }

  drawSeries(one) {
    const batch = this.steps.map((step, i) => [step, one.values[i]]);
    const group = svg("g");
    group.style.setProperty("--color", one.color);
    group.append(svg("path", { class: "thin", d: this.path(batch) }));
    const bold = one.held.length > 1 ? one.held : runningMean(batch);
    group.append(svg("path", { class: "bold", d: this.path(bold) }));
    for (const [step, value] of one.held) {
      group.append(svg("circle", { cx: this.x(step), cy: this.y(value), r: 4 }));
    }
    this.canvas.append(group);
  }

  path(points) {
    let pen = "M";
    let d = "";
    for (const [step, value] of points) {
      if (value === null) pen = "M";
      else {
        d += `${pen}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`;
        pen = "L";
      }
    }
    return d;
  }

  vertical(name) {
    const line = svg("line", { class: name, y1: MARGIN.top, y2: this.bottom, visibility: "hidden" });
    this.canvas.append(line);
    return line;
  }

  // Show which step is chosen below.
  mark(step) {
    this.chosen = step;
    if (!this.canvas || step === undefined) return;
    this.marker ??= null;
    if (this.marker?.ownerSVGElement !== this.canvas) this.marker = this.vertical("chosen");
    place(this.marker, this.x(step));
  }

  nearest(event) {
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    let best = 0;
    this.steps.forEach((step, i) => {
      if (Math.abs(this.x(step) - x) < Math.abs(this.x(this.steps[best]) - x)) best = i;
    });
    return best;
  }

  point(event) {
    const i = this.nearest(event);
    place(this.cross, this.x(this.steps[i]));
    const rows = [];
    for (const one of this.series) {
      const held = one.held.find(([step]) => step === this.steps[i]);
      rows.push([one.label, number(one.values[i])]);
      if (held) rows.push([`${one.label}, held out`, number(held[1])]);
    }
    showTip(event, `step ${this.steps[i]}`, rows);
  }

  leave() {
    this.cross?.setAttribute("visibility", "hidden");
    hideTip();
  }
}

function place(line, x) {
  line.setAttribute("x1", x);
  line.setAttribute("x2", x);
  line.setAttribute("visibility", "visible");
}

function nameOf(one) {
  const label = el("span", { class: "name" }, one.label);
  label.style.setProperty("--color", one.color);
  return label;
}

function heldOut(story, name) {
  const values = (!name.startsWith("time/") && story.evaluations[`eval/${name}`]) || [];
  const points = values.map((value, i) => [story.evaluations.step[i], value]);
  return points.filter(([, value]) => value !== null);
}

function runningMean(points) {
  const weight = Math.min(1, 6 / points.length);
  let mean = null;
  return points.map(([step, value]) => {
    if (value !== null) mean = mean === null ? value : mean + weight * (value - mean);
    return [step, mean];
  });
}

// Three to six round numbers that hold all values between them; 0 is one of them where it is near.
function niceTicks(values) {
  let low = values.reduce((a, b) => Math.min(a, b));
  let high = values.reduce((a, b) => Math.max(a, b));
  if (low > 0 && low < high / 2) low = 0;
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const ticks = [];
  for (let i = Math.floor(low / size); i <= Math.ceil(high / size - 1e-9); i++) ticks.push(i * size);
  return ticks;
}

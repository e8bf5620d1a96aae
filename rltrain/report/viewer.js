// The credit viewer. All text comes from models and is put in place with textContent alone.
"use strict";
(() => {
  const groups = JSON.parse(document.getElementById("credit-data").textContent);
  const viewer = document.getElementById("viewer");
  if (!viewer) return;
  const inspector = document.getElementById("inspector");
  const chooser = document.getElementById("group");
  const ownScale = document.getElementById("own-scale");
  const SVG = "http://www.w3.org/2000/svg";
  const STRONGEST = 0.75; // opacity of the largest advantage: text on it stays readable
  let group = groups[0];

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
  const number = (value, digits = 3) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(digits))));
  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(empty)";
  const mean = (values) => values.reduce((sum, one) => sum + one, 0) / values.length;
  const counted = (values) => values.filter((one) => one !== null && one !== undefined);

  function tint(element, value, largest) {
    element.classList.remove("up", "down");
    if (!value || !largest) return;
    element.classList.add(value > 0 ? "up" : "down");
    element.style.setProperty("--a", (STRONGEST * Math.min(1, Math.abs(value) / largest)).toFixed(3));
  }

  // What the panel at the bottom says: pairs of a name and a text or an element.
  function inspect(pairs) {
    const rows = pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
    inspector.replaceChildren(make("dl", {}, ...rows));
  }

  function stepAt(steps, token) {
    let end = 0;
    const index = steps.tokens.findIndex((count) => (end += count) > token);
    return index < 0 ? null : index;
  }

  function inspectToken(c, t) {
    const one = group.completions[c];
    const logprob = one.logprobs[t];
    const pairs = [
      ["token", make("code", {}, visible(one.tokens[t]))],
      ["place", `${t + 1} of ${one.length}, ${called(equalTo(c))}`],
      ["log-prob", logprob === null || logprob === undefined ? "–" : `${number(logprob)} (p = ${number(Math.exp(logprob))})`],
    ];
    const inTurn = turnAt(one.turns ?? [], t);
    if (inTurn) {
      const [k, observed, turn] = inTurn;
      pairs.push(["turn", [`${k + 1} of ${one.turns.length}`, observed ? "observed" : "written", ...factsOf(turn)].join(", ")]);
    }
    if (one.values.length) pairs.push(["prefix-tree value before → after", `${number(one.values[t])} → ${number(one.values[t + 1])}`]);
    for (const estimate of group.estimates) {
      const advantage = estimate.advantages?.[c]?.[t];
      if (advantage !== undefined) pairs.push([`advantage, ${estimate.name}`, signed(advantage)]);
      const steps = estimate.steps[c];
      if (!steps) continue;
      const k = stepAt(steps, t);
      const text = k === null ? "in none (tail)" : `${k + 1} of ${steps.tokens.length}, potential ${number(steps.potential[k])}`;
      pairs.push([`step, ${estimate.name}`, text]);
    }
    inspect(pairs);
    for (const other of viewer.querySelectorAll(".here")) other.classList.remove("here");
    for (const other of viewer.querySelectorAll(`[data-c="${c}"] [data-t="${t}"]`)) other.classList.add("here");
  }

  // Completions with the same tokens, rewards and credit are shown once.
  const called = (members) => `completion${members.length > 1 ? "s" : ""} ${members.join(", ")}`;
  const equalTo = (c) => folded().find((members) => members.includes(c));
  function folded() {
    const byContent = new Map();
    group.completions.forEach((one, c) => {
      const credit = group.estimates.map((estimate) => estimate.advantages?.[c]);
      const content = JSON.stringify([one.tokens, one.length, one.reward, one.parts, one.finish, credit, one.turns]);
      byContent.set(content, [...(byContent.get(content) ?? []), c]);
    });
    return [...byContent.values()];
  }

  // The reward as the run names it: its only part alone, else the sum and its parts.
  function rewardOf(one) {
    const parts = Object.entries(one.parts), value = (number_) => (number_ === null ? "none (abstains)" : number(number_));
    if (parts.length === 1 && parts[0][1] === one.reward) return `${parts[0][0]} = ${value(one.reward)}`;
    const listed = parts.map(([name, part]) => `${name} = ${value(part)}`).join(", ");
    return `reward = ${value(one.reward)}${listed ? ` (${listed})` : ""}`;
  }

  const largestOf = (estimate) => Math.max(0, ...estimate.advantages.flat().map((one) => Math.abs(one ?? 0)));

  // Turns: what an environment wrote has its own colour, and a line with the turn's facts stands before its first token.
  function markTurns(turns, spans) {
    let start = 0;
    turns.forEach((turn, k) => {
      const first = spans[start], observed = start + turn.written;
      if (first) first.dataset.turn = [`turn ${k + 1}`, ...factsOf(turn)].join(" · ");
      start = observed + turn.observed;
      for (const span of spans.slice(observed, start)) span.classList.add("observed");
    });
  }
  const factsOf = (turn) => [
    ...(turn.called ? ["calls"] : []),
    ...(turn.reward ? [`reward ${signed(turn.reward)}`] : []),
    ...(turn.failure ? [`failed: ${turn.failure}`] : [])];
  function turnAt(turns, t) {
    let start = 0;
    for (const [k, turn] of turns.entries()) {
      if (t < start + turn.written + turn.observed) return [k, t >= start + turn.written, turn];
      start += turn.written + turn.observed;
    }
    return null;
  }

  function tokens(c, estimate, largest) {
    const box = make("div", { class: "tokens", "data-c": c, role: "group", "aria-label": `completion ${c}, ${estimate.name}` });
    group.completions[c].tokens.forEach((text, t) => {
      const span = make("span", { class: "t", "data-t": t, tabindex: t === 0 ? 0 : -1 }, text || "∅");
      if (text.trim() === "" && text.includes("\n")) span.prepend("⏎");
      tint(span, estimate.advantages[c][t], largest);
      box.append(span);
    });
    markTurns(group.completions[c].turns ?? [], [...box.children]);
    return box;
  }

  function scales(shown) {
    const own = shown.map(largestOf), common = Math.max(0, ...own);
    return own.map((largest) => (ownScale.checked ? largest : common));
  }

  function legend(estimate, largest) {
    const end = number(largest);
    return make("div", {}, make("h4", {}, estimate.name), make("small", {}, estimate.remark),
      make("div", { class: "scale", role: "img", "aria-label": `colours from -${end} to +${end}` },
        `−${end}`, make("span", { class: "ramp" }), `+${end}`));
  }

  function completions(shown, largest) {
    return folded().map((members) => {
      const c = members[0], one = group.completions[c];
      const cut = one.length > one.tokens.length ? `, the first ${one.tokens.length} shown` : "";
      const words = `${one.finish}${one.finish ? " · " : ""}${one.length} tokens${cut}`;
      const count = members.length > 1 ? [make("span", { class: "count" }, `${members.length} ×`)] : [];
      const columns = shown.map((estimate, e) => make("div", {},
        ...(shown.length > 1 ? [make("h5", {}, estimate.name)] : []),
        estimate.advantages[c].length ? tokens(c, estimate, largest[e]) : make("p", { class: "note" }, "no credit recorded")));
      return make("article", { class: "completion", id: `completion-${c}` },
        make("h4", {}, ...count, `${called(members)}: ${rewardOf(one)} `, make("small", {}, `· ${words}`)),
        make("div", { class: "estimates" }, ...columns));
    });
  }

  // The prefix tree: a row per stretch of shared tokens, indented by the number of splits before it.
  function tree(width) {
    const rows = group.tree, height = 24, base = rows[0].value ?? 0;
    const spread = Math.max(0, ...counted(rows.map((row) => row.value)).map((value) => Math.abs(value - base)));
    const indent = Math.min(22, (width * 0.35) / Math.max(1, ...rows.map((row) => row.level)));
    const svg = draw("svg", { class: "drawing", viewBox: `0 0 ${width} ${rows.length * height}`, height: rows.length * height });
    const above = [];
    rows.forEach((row, index) => {
      const x = 10 + row.level * indent, y = index * height + height / 2;
      if (row.level) svg.append(draw("path", { class: "edge", d: `M${x - indent},${above[row.level - 1] + 7}V${y}H${x - 7}` }));
      above[row.level] = y;
      const who = row.leaf ? `completion ${row.members.join(", ")}` : `${row.members.length} completions`;
      const label = `${number(row.value)}  ${row.leaf ? `#${row.members.join(",#")}` : `×${row.members.length}`}  ${visible(row.text)}`;
      const room = Math.max(4, Math.floor((width - x - 16) / 7.4));
      const before = row.level ? rows.slice(0, index).findLast((one) => one.level === row.level - 1) : row;
      const node = draw("g", { tabindex: 0, role: "img", "data-branch": index, "aria-label": `${who}, value ${number(row.value)}` },
        draw("rect", { x: 0, y: y - height / 2, width, height, "fill-opacity": 0 }),
        draw("circle", { class: "node", cx: x, cy: y, r: 6, stroke: "currentColor", fill: "none" }),
        draw("text", { x: x + 12, y: y + 4 }, label.length > room ? `${label.slice(0, room - 1)}…` : label));
      tint(node.children[1], (row.value ?? base) - base, spread);
      const show = () => inspect([
        ["tokens", `${row.start + 1}–${row.stop}`], ["of", who], ["prefix-tree value before → after", `${number(before.value)} → ${number(row.value)}`],
        ["text", make("code", {}, visible(row.text))]]);
      node.addEventListener("focus", show);
      node.addEventListener("mouseenter", show);
      svg.append(node);
    });
    return svg;
  }

  // Step potentials of one estimator: a line per completion over its steps, coloured by its reward.
  function potentials(estimate, width) {
    const height = 200, most = Math.max(2, ...estimate.steps.map((one) => one.potential.length));
    const x = (k) => 34 + (k / (most - 1)) * (width - 50), y = (phi) => 10 + ((1 - phi) / 2) * (height - 40);
    const svg = draw("svg", { class: "drawing", viewBox: `0 0 ${width} ${height}`, height });
    for (const phi of [-1, 0, 1]) {
      svg.append(draw("line", { class: "grid", x1: 34, x2: width - 16, y1: y(phi), y2: y(phi) }), draw("text", { x: 4, y: y(phi) + 4 }, phi));
    }
    const every = Math.ceil(most / 8);
    for (let k = 0; k < most; k += every) svg.append(draw("text", { x: x(k) - 3, y: height - 8 }, k + 1));
    const average = mean(counted(group.completions.map((one) => one.reward)));
    estimate.steps.forEach((steps, c) => {
      const side = group.completions[c].reward > average ? "up" : "down";
      svg.append(draw("polyline", { class: side, points: steps.potential.map((phi, k) => `${x(k)},${y(phi)}`).join(" ") }));
      steps.potential.forEach((phi, k) => {
        const dot = draw("circle", { class: side, cx: x(k), cy: y(phi), r: 4, tabindex: 0, role: "img", "aria-label": `completion ${c}, step ${k + 1}, potential ${number(phi)}` });
        const start = steps.tokens.slice(0, k).reduce((sum, count) => sum + count, 0);
        const text = group.completions[c].tokens.slice(start, start + steps.tokens[k]).join("");
        const show = () => inspect([["completion", `${c}`], ["step", `${k + 1}`], ["potential", number(phi)],
          ["reward", number(group.completions[c].reward)], ["text", make("code", {}, visible(text))]]);
        dot.addEventListener("focus", show);
        dot.addEventListener("mouseenter", show);
        svg.append(dot);
      });
    });
    return svg;
  }

  // Information gain: per thought and target token, in nats; and over all sampled positions.
  function gainTable(gain) {
    const largest = Math.max(...gain.gains.flat().map(Math.abs));
    const head = make("tr", {}, make("th", {}, "thought"), ...gain.targets.map((text) => make("th", {}, make("code", {}, visible(text)))), make("th", {}, "sum"));
    const rows = gain.gains.map((row, c) => make("tr", {}, make("th", {}, `completion ${c}`), ...row.map((value) => {
      const cell = make("td", {}, signed(value));
      tint(cell, value, largest);
      return cell;
    }), make("td", {}, signed(row.reduce((sum, one) => sum + one, 0)))));
    return make("div", { class: "scroll" }, make("table", { class: "gains" }, make("thead", {}, head), make("tbody", {}, ...rows)));
  }

  function gainScatter(width) {
    const points = group.all_gains.filter(([, gain]) => gain !== null), height = 200;
    const last = Math.max(1, ...points.map(([position]) => position));
    const low = Math.min(0, ...points.map(([, gain]) => gain)), high = Math.max(0, ...points.map(([, gain]) => gain)) || 1;
    const x = (position) => 44 + (position / last) * (width - 60), y = (gain) => 10 + ((high - gain) / (high - low)) * (height - 40);
    const svg = draw("svg", { class: "drawing", viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "gain against the position in the document" });
    for (const gain of new Set([low, 0, high])) {
      svg.append(draw("line", { class: "grid", x1: 44, x2: width - 16, y1: y(gain), y2: y(gain) }), draw("text", { x: 2, y: y(gain) + 4 }, number(gain, 2)));
    }
    for (const position of [0, Math.round(last / 2), last]) svg.append(draw("text", { x: x(position) - 6, y: height - 8 }, position));
    for (const [position, gain] of points) {
      svg.append(draw("circle", { class: gain > 0 ? "up" : "down", cx: x(position), cy: y(gain), r: position === group.gain.position ? 5 : 3, "fill-opacity": 0.5 }));
    }
    return svg;
  }

  function drawings() {
    const box = document.getElementById("drawings"), width = Math.max(240, Math.floor(box.clientWidth));
    const parts = [];
    const add = (title, hint, element) => parts.push(make("h3", {}, title), make("p", { class: "hint" }, hint), element);
    if (group.tree.length) {
      add("Prefix tree", "Value: mean reward of the completions that share these tokens, coloured against the group's mean. #: the completion that ends here.", tree(width));
    }
    for (const estimate of group.estimates) {
      if (!estimate.steps.some((one) => one.potential.length)) continue;
      add(`Step potential, ${estimate.name}`, "After each step: 1 sure and right, 0 no idea, −1 sure and wrong. Blue: reward above the group's mean.", potentials(estimate, width));
    }
    if (group.gain) {
      add("Information gain", `Nats that each thought adds to the log-prob of the text after position ${group.gain.position}.`, gainTable(group.gain));
      add("Information gain per position", "Every thought sampled at this step, against where its document was cut; larger dots: where that of this group was.", gainScatter(width));
    }
    box.replaceChildren(...parts);
  }

  function show(index) {
    group = groups[index];
    chooser.value = index;
    const shown = group.estimates.filter((one) => one.advantages);
    const missing = group.estimates.filter((one) => !one.advantages);
    const largest = scales(shown);
    ownScale.parentElement.hidden = shown.length < 2;
    const answer = group.answer ? [make("p", {}, "Reference answer: ", make("code", {}, group.answer))] : [];
    viewer.replaceChildren(
      make("h3", {}, "Prompt"), make("pre", {}, group.prompt), ...answer,
      ...missing.map((one) => make("p", { class: "note" }, `${one.name}: ${one.remark}`)),
      ...(group.completions.some((one) => one.turns) ? [make("p", { class: "hint" }, "The environment wrote ", make("span", { class: "t observed" }, "these tokens"), "; they carry no loss.")] : []),
      make("div", { class: "estimates" }, ...shown.map((estimate, e) => legend(estimate, largest[e]))),
      ...completions(shown, largest), make("div", { id: "drawings" }));
    inspector.replaceChildren(make("p", { class: "hint" }, "Point at a token."));
    drawings();
  }

  // Arrow keys: one tab stop per row of tokens, the keys move within it and between completions.
  function move(event) {
    const span = event.target.closest(".t");
    if (!span) return;
    const box = span.parentElement, t = Number(span.dataset.t), last = box.children.length - 1;
    const moves = { ArrowRight: Math.min(last, t + 1), ArrowLeft: Math.max(0, t - 1), Home: 0, End: last };
    let target = event.key in moves ? box.children[moves[event.key]] : null;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const column = [...box.closest(".estimates").children].indexOf(box.parentElement);
      const sibling = box.closest(".completion")[event.key === "ArrowDown" ? "nextElementSibling" : "previousElementSibling"];
      const other = sibling?.querySelectorAll(":scope > .estimates > div")[column]?.querySelector(".tokens");
      target = other?.children[Math.min(t, other.children.length - 1)] ?? span;
    }
    if (!target) return;
    event.preventDefault();
    span.tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
  }

  const pointed = (event) => {
    const span = event.target.closest?.(".t");
    if (span) inspectToken(Number(span.parentElement.dataset.c), Number(span.dataset.t));
  };
  viewer.addEventListener("mouseover", pointed);
  viewer.addEventListener("focusin", pointed);
  viewer.addEventListener("keydown", move);

  groups.forEach((one, index) => chooser.append(make("option", { value: index }, one.title)));
  chooser.addEventListener("change", () => show(Number(chooser.value)));
  ownScale.addEventListener("change", () => show(groups.indexOf(group)));
  const turn = (by) => show((groups.indexOf(group) + by + groups.length) % groups.length);
  document.getElementById("previous").addEventListener("click", () => turn(-1));
  document.getElementById("next").addEventListener("click", () => turn(1));
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's address bar changes the height alone
    width = window.innerWidth;
    drawings();
  });
  show(0);
})();

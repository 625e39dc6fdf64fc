"use strict";

// The report's script, inlined into the page. What models wrote reaches the page as textContent only.

const $ = (id) => document.getElementById(id);
const ROWS = 50; // shown at first, and added by "Show more"
const MOST_SIDES = 4;
const NOTHING = "";

// What the reader has chosen; a reload keeps it in history.state.
const state = {
  view: "compare",
  kind: null,
  run: "all",
  sides: null, // of "RUN/STEP"
  text: "",
  sort: null, // of a column
  isDown: true,
  hidden: [], // "STAGE RUN" of curves that are not drawn
  isPaused: false,
  ...history.state,
};

function save(more = {}) {
  history.replaceState({ ...state, ...more }, "");
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function figure(value) {
  if (value === null || value === undefined) {
    return "–";
  }
  return String(Number.isInteger(value) ? value : Number(value.toPrecision(4)));
}

// Long texts are reached by Tab, so that the keyboard scrolls them.
function reachScrolledCells() {
  document.querySelectorAll(".samples td div").forEach((cell) => {
    if (cell.scrollHeight > cell.clientHeight) {
      cell.tabIndex = 0;
    } else {
      cell.removeAttribute("tabindex");
    }
  });
}

// --- samples: which rows there are

let data = null;
let shown = ROWS;
let rows = []; // of the table, sorted: { prompt, samples }, a sample for each side or null
let opened = 0; // which of them the dialog shows

const sideOf = (sample) => `${sample.run}/${sample.step}`;
const ofKind = () => data.samples.filter((sample) => sample.kind === state.kind);

function sideName(side) {
  const [run, step] = side.split("/");
  return data.runs.length > 1 ? `${data.runs[run]}, step ${step}` : `step ${step}`;
}

function firstSides(sides) {
  const lastOfRuns = sides.filter((side, i) => side.split("/")[0] !== sides[i + 1]?.split("/")[0]);
  return lastOfRuns.length > 1 ? lastOfRuns.slice(0, 2) : [...new Set([sides[0], sides.at(-1)])];
}

// What was chosen before may be gone: a run that was resumed from an earlier step, say.
function checkState() {
  if (!data.kinds.includes(state.kind)) {
    state.kind = data.kinds[0];
  }
  const sides = allSides();
  state.sides = (state.sides ?? []).filter((side) => sides.includes(side));
  if (!state.sides.length) {
    state.sides = firstSides(sides);
  }
  if (state.run !== "all" && !(state.run in data.runs)) {
    state.run = "all";
  }
}

function allSides() {
  return [...new Set(ofKind().map(sideOf))];
}

// The k-th sample of a prompt stands beside the k-th of the other side.
function comparedRows() {
  const byPrompt = new Map();
  state.sides.forEach((side, place) => {
    const counts = new Map();
    for (const sample of ofKind().filter((one) => sideOf(one) === side)) {
      const k = counts.get(sample.prompt) ?? 0;
      counts.set(sample.prompt, k + 1);
      const key = `${k} ${sample.prompt}`;
      if (!byPrompt.has(key)) {
        byPrompt.set(key, { prompt: sample.prompt, samples: state.sides.map(() => null) });
      }
      byPrompt.get(key).samples[place] = sample;
    }
  });
  return [...byPrompt.values()];
}

function listedRows() {
  const samples = ofKind().filter((sample) => state.run === "all" || sample.run === Number(state.run));
  return samples.map((sample) => ({ prompt: sample.prompt, samples: [sample] }));
}

function hasText(row, text) {
  const texts = row.samples.flatMap((one) => (one ? [one.response, ...one.turns.map((turn) => turn.text)] : []));
  return [row.prompt, ...texts].some((one) => one.toLowerCase().includes(text));
}

// --- samples: columns, each with a key to sort by

function columns() {
  const found = [{ key: "prompt", title: "Prompt", value: (row) => row.prompt, isText: true }];
  if (state.view === "list") {
    found.unshift({ key: "step", title: "Step", value: (row) => row.samples[0].step });
    if (data.runs.length > 1) {
      found.unshift({ key: "run", title: "Run", value: (row) => data.runs[row.samples[0].run], isText: true });
    }
    return [...found, ...sideColumns(0)];
  }
  return [...found, ...state.sides.flatMap((_, place) => sideColumns(place))];
}

function sideColumns(place) {
  const found = [{ key: `response-${place}`, title: "Response", place }];
  if (ofKind().some((sample) => sample.reward !== null)) {
    found.push({ key: `reward-${place}`, title: "Reward", value: (row) => row.samples[place]?.reward });
  }
  found.push({ key: `length-${place}`, title: "Length", value: (row) => row.samples[place]?.length });
  return found;
}

function compareRows(column) {
  return (left, right) => {
    const [a, b] = [column.value(left) ?? null, column.value(right) ?? null];
    if (a === null || b === null) {
      return (a === null) - (b === null); // what isn't known is last, in both directions
    }
    const order = typeof a === "string" ? a.localeCompare(b) : a - b;
    return state.isDown ? -order : order;
  };
}

// --- samples: the table

function showSamples() {
  const focused = document.activeElement?.id;
  const text = state.text.toLowerCase();
  const all = state.view === "list" ? listedRows() : comparedRows();
  rows = all.filter((row) => hasText(row, text));
  const shownColumns = columns();
  const sorted = shownColumns.find((column) => column.key === state.sort);
  if (sorted) {
    rows.sort(compareRows(sorted));
  }
  const body = element("tbody", {}, ...rows.slice(0, shown).map((row, i) => tableRow(row, i, shownColumns)));
  const head = element("thead", {}, element("tr", {}, element("td"), ...shownColumns.map(headCell)));
  if (state.view === "compare") {
    head.prepend(sidesRow((shownColumns.length - 1) / state.sides.length));
  }
  $("samples-table").replaceChildren(element("table", { className: "samples" }, head, body));
  reachScrolledCells();
  const noun = state.view === "list" ? "samples" : "prompts";
  const elsewhere = data.left_out ? `; ${data.left_out} samples are in samples.jsonl alone` : "";
  $("found").textContent = `${rows.length} of ${all.length} ${noun}; lengths in ${data.length_unit}${elsewhere}`;
  $("show-more").hidden = rows.length <= shown;
  if (focused && focused !== document.activeElement?.id) {
    $(focused)?.focus({ preventScroll: true });
  }
}

function sidesRow(columnsOfSide) {
  const names = state.sides.map((side) =>
    element("th", { scope: "colgroup", colSpan: columnsOfSide, textContent: sideName(side) }),
  );
  return element("tr", {}, element("td", { colSpan: 2 }), ...names);
}

function headCell(column) {
  const cell = element("th", { scope: "col" });
  if (column.place !== undefined) {
    cell.textContent = column.title;
    return cell;
  }
  const isSorted = state.sort === column.key;
  const arrow = isSorted ? (state.isDown ? " ↓" : " ↑") : "";
  const button = element("button", { type: "button", id: `sort-${column.key}`, textContent: column.title + arrow });
  button.addEventListener("click", () => {
    state.isDown = isSorted ? !state.isDown : !column.isText;
    state.sort = column.key;
    changed();
  });
  if (isSorted) {
    cell.ariaSort = state.isDown ? "descending" : "ascending";
  }
  cell.className = column.isText ? "" : "n";
  cell.append(button);
  return cell;
}

function tableRow(row, i, shownColumns) {
  const button = element("button", { type: "button", id: `open-${i}`, textContent: "Open" });
  button.setAttribute("aria-label", `Open row ${i + 1}`);
  button.addEventListener("click", () => openRow(i));
  const cells = shownColumns.map((column) => tableCell(row, column));
  return element("tr", {}, element("td", { className: "n" }, button), ...cells);
}

function tableCell(row, column) {
  if (column.place !== undefined) {
    const sample = row.samples[column.place];
    return sample ? responseCell(sample) : element("td", { className: "gap", textContent: "not sampled" });
  }
  const value = column.value(row);
  if (column.isText) {
    return element("td", {}, element("div", { textContent: value }));
  }
  return element("td", { className: "n", textContent: figure(value) });
}

function responseCell(sample) {
  return element("td", {}, element("div", {}, ...conversation(sample)));
}

function conversation(sample) {
  if (!sample.turns.length) {
    return [element("span", { textContent: sample.response })];
  }
  return sample.turns.map((turn) => turnBlock(turn.role, turn.text.trim(), turn.reward));
}

function turnBlock(role, text, reward) {
  const block = element("p", {}, element("small", { textContent: role }));
  block.className = `turn ${role === "assistant" ? "assistant" : ""}`;
  if (reward) {
    block.append(element("b", { textContent: figure(reward) }));
  }
  block.append(text);
  return block;
}

// --- samples: one row, whole

function openRow(i) {
  opened = i;
  const row = rows[i];
  $("sample-title").textContent = `${i + 1} of ${rows.length}`;
  $("sample-previous").disabled = i === 0;
  $("sample-next").disabled = i === rows.length - 1;
  const sides = element("div", { className: "whole" }, ...row.samples.filter(Boolean).map(wholeSample));
  $("sample-body").replaceChildren(turnBlock("prompt", row.prompt, null), sides);
  if (!$("sample").open) {
    $("sample").showModal();
  }
  $("sample").scrollTop = 0;
  $("sample-title").focus();
}

function wholeSample(sample) {
  const turns = sample.turns.length ? conversation(sample) : [turnBlock("assistant", sample.response, null)];
  const numbers = { reward: figure(sample.reward), ...sample.more };
  const terms = Object.entries(numbers).map(([name, value]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })),
  );
  const title = element("h3", { textContent: sideName(sideOf(sample)) });
  return element("section", {}, title, ...turns, element("dl", {}, ...terms));
}

function step(by) {
  if (rows[opened + by]) {
    openRow(opened + by);
  }
}

// --- samples: controls

function changed() {
  save();
  showSamples();
}

function option(value, textContent) {
  return element("option", { value, textContent });
}

function showControls() {
  const focused = document.activeElement?.id;
  const isList = state.view === "list";
  $(`view-${state.view}`).checked = true;
  $("kind-label").hidden = data.kinds.length < 2;
  $("kind").value = state.kind;
  $("run-label").hidden = !isList || data.runs.length < 2;
  $("run").value = state.run;
  $("filter").value = state.text;
  const sides = isList ? [] : [...state.sides, NOTHING].slice(0, MOST_SIDES);
  $("sides").replaceChildren(...sides.map(sideControl));
  if (focused && focused !== document.activeElement?.id) {
    $(focused)?.focus();
  }
}

function sideControl(side, place) {
  const select = element("select", { id: `side-${place}` }, option(NOTHING, "nothing"));
  select.append(...allSides().map((one) => option(one, sideName(one))));
  select.value = side;
  select.addEventListener("change", () => {
    const sides = [...state.sides];
    sides[place] = select.value;
    const chosen = sides.filter((one) => one !== NOTHING);
    state.sides = chosen.length ? chosen : state.sides;
    showControls();
    changed();
  });
  return element("label", {}, place ? "beside " : "Responses of ", select);
}

function startExplorer() {
  data = JSON.parse($("samples-data").textContent);
  checkState();
  $("kind").append(...data.kinds.map((kind) => option(kind, kind)));
  $("run").append(option("all", "all"), ...data.runs.map((name, run) => option(String(run), name)));
  for (const [id, name] of Object.entries({ kind: "kind", run: "run", filter: "text" })) {
    $(id).addEventListener("input", () => {
      state[name] = $(id).value;
      shown = ROWS;
      checkState();
      showControls();
      changed();
    });
  }
  for (const view of ["compare", "list"]) {
    $(`view-${view}`).addEventListener("change", () => {
      Object.assign(state, { view, sort: null });
      shown = ROWS;
      showControls();
      changed();
    });
  }
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  $("show-more").addEventListener("click", () => {
    shown += ROWS;
    showSamples();
    $(`open-${shown - ROWS}`).focus();
  });
  $("sample-previous").addEventListener("click", () => step(-1));
  $("sample-next").addEventListener("click", () => step(1));
  $("sample-close").addEventListener("click", () => $("sample").close());
  $("sample").addEventListener("close", () => $(`open-${opened}`)?.focus());
  $("sample").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      event.preventDefault();
      step(event.key === "ArrowLeft" ? -1 : 1);
    }
  });
  $("explorer").hidden = false;
  $("to-samples").hidden = false;
  showControls();
  showSamples();
}

// --- charts: values at a step, by mouse or arrow keys; runs that are left out

function startChart(chart) {
  const dots = [...chart.querySelectorAll(".dot")];
  const middle = (dot) => Number(dot.querySelector("circle").getAttribute("cx"));
  const places = [...new Set(dots.map(middle))].sort((a, b) => a - b);
  const values = element("output", { className: "values" });
  let at = places.length;
  chart.tabIndex = 0;
  chart.after(values);

  function showAt(place) {
    at = place;
    const found = dots.filter((dot) => middle(dot) === places[at] && !dot.classList.contains("hidden"));
    dots.forEach((dot) => dot.classList.toggle("current", found.includes(dot)));
    values.textContent = found.map((dot) => dot.querySelector("title").textContent).join("\n");
  }

  chart.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: places.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      showAt(Math.min(Math.max(to, 0), places.length - 1));
    } else if (event.key === "Escape") {
      showAt(places.length);
    }
  });
  chart.addEventListener("blur", () => showAt(places.length));
}

function startLegend(legend) {
  const stage = legend.closest("section");
  legend.querySelectorAll("[data-run]").forEach((entry) => {
    const key = `${stage.id} ${entry.dataset.run}`;
    const box = element("input", { type: "checkbox", id: `curves-${stage.id}-${entry.dataset.run}`, checked: !state.hidden.includes(key) });
    const draw = () => {
      const lines = stage.querySelectorAll(`figure .of-${entry.dataset.run}`);
      lines.forEach((line) => line.classList.toggle("hidden", !box.checked));
    };
    box.addEventListener("change", () => {
      state.hidden = state.hidden.filter((one) => one !== key);
      if (!box.checked) {
        state.hidden.push(key);
      }
      save();
      draw();
    });
    const label = element("label", {}, box, ...entry.childNodes);
    entry.append(label);
    draw();
  });
}

// --- while a run goes on: the page is written anew, and loads itself again

const QUIET = 2000; // milliseconds without a key, a click or scrolling before the page is loaded again

function startUpdates(seconds) {
  const loaded = performance.now();
  let touched = -QUIET;
  for (const name of ["keydown", "pointerdown", "wheel", "input"]) {
    document.addEventListener(name, () => (touched = performance.now()), { passive: true });
  }
  const pause = $("pause");
  const showPause = () => (pause.textContent = state.isPaused ? "Continue updates" : "Pause updates");
  pause.hidden = false;
  showPause();
  pause.addEventListener("click", () => {
    state.isPaused = !state.isPaused;
    save();
    showPause();
  });

  function isBusy() {
    const isReading = document.querySelector("dialog[open]") || !getSelection().isCollapsed;
    return state.isPaused || document.hidden || isReading || performance.now() - touched < QUIET;
  }

  setInterval(() => {
    if (!isBusy() && performance.now() - loaded > 1000 * seconds) {
      const open = [...document.querySelectorAll("details[open]")].map((one) => one.id);
      const focus = document.activeElement?.id;
      save({ reloaded: { scroll: window.scrollY, open, focus, sidewards: $("samples-table")?.scrollLeft } });
      location.reload();
    }
  }, 250);
}

function restore({ scroll, open, focus, sidewards }) {
  document.querySelectorAll("details").forEach((one) => (one.open = open.includes(one.id)));
  $(focus)?.focus({ preventScroll: true });
  if (sidewards) {
    $("samples-table").scrollLeft = sidewards;
  }
  window.scrollTo(0, scroll);
}

if ($("samples-data")) {
  startExplorer();
}
reachScrolledCells();
window.addEventListener("resize", reachScrolledCells);
document.addEventListener("toggle", reachScrolledCells, true);
document.querySelectorAll("figure svg").forEach(startChart);
document.querySelectorAll(".legend").forEach(startLegend);
if (document.body.dataset.seconds) {
  startUpdates(Number(document.body.dataset.seconds));
}
if (state.reloaded) {
  restore(state.reloaded);
  delete state.reloaded;
  save();
}
document.body.dataset.ready = "yes";

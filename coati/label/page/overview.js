"use strict";

const $ = (id) => document.getElementById(id);
const percent = (share) => (share === null ? "–" : `${Math.round(100 * share)} %`);
const decimals = (value, digits) => (value === null ? "–" : value.toFixed(digits));

function fillFigures(list, figures) {
  const parts = figures.map(([name, value]) => {
    const group = document.createElement("div");
    const term = document.createElement("dt");
    const figure = document.createElement("dd");
    term.textContent = name;
    figure.textContent = value;
    group.append(term, figure);
    return group;
  });
  list.replaceChildren(...parts);
}

function fillRows(body, rows) {
  const lines = rows.map(([name, ...cells]) => {
    const line = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    line.append(head);
    for (const cell of cells) {
      line.insertCell().textContent = cell;
    }
    return line;
  });
  body.replaceChildren(...lines);
}

function show({ progress, outcomes, agreement, models, people }) {
  $("bar").max = Math.max(progress.wanted, 1);
  $("bar").value = progress.labels;
  $("count").textContent = `${progress.labels} of ${progress.wanted} labels`;
  fillFigures($("outcomes"), [
    ["In all", progress.pairs],
    ["With a winner", outcomes.decided],
    ["Ties", outcomes.tie],
    ["Both bad", outcomes.both_bad],
    ["No choice of more than half", outcomes.split],
  ]);
  fillFigures($("agreement"), [
    ["Pairs with two labels or more", agreement.pairs],
    ["Two people agree", percent(agreement.share)],
    ["Cohen's kappa", decimals(agreement.kappa, 2)],
    ["Krippendorff's alpha", decimals(agreement.alpha, 2)],
  ]);
  $("missing").textContent = agreement.missing ? `Missing: ${agreement.missing}.` : "";
  fillRows(
    $("models"),
    models.map((row) => {
      const interval = row.share === null ? "–" : `${percent(row.share)}  (${percent(row.low)} to ${percent(row.high)})`;
      return [row.model, row.wins, row.losses, row.rest, interval];
    }),
  );
  fillRows(
    $("people"),
    people.map((row) => [row.name, row.labels, row.skipped, decimals(row.seconds, 1), percent(row.left)]),
  );
  document.body.dataset.shown = "overview";
}

async function load() {
  $("problem").hidden = true;
  try {
    const response = await fetch("overview.json", { signal: AbortSignal.timeout(60000) });
    const found = await response.json();
    if (!response.ok) {
      throw new Error(found.error);
    }
    show(found);
  } catch (error) {
    $("problem").textContent = `The overview can't be shown: ${error.message}.`;
    $("problem").hidden = false;
  }
}

$("reload").addEventListener("click", load);
load();

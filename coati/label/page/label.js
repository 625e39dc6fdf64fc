"use strict";

const $ = (id) => document.getElementById(id);
const CHOICES = { a: "A is better", b: "B is better", tie: "tie", both_bad: "both bad", skip: "skipped" };
const KEYS = { 1: "a", ArrowLeft: "a", 2: "b", ArrowRight: "b", 3: "tie", 4: "both_bad", s: "skip" };
const ROLES = { user: "User", assistant: "Assistant", system: "System", tool: "Tool" };
const SIDES = ["a", "b"];
const cards = {};

let pair = null; // what is shown
let pending = null; // a request that isn't answered yet; it is sent again as it is
let busy = false;
let chooses = false; // e was pressed: the next 1 or 2 says which response is edited
let editing = null; // "a" or "b"
let watched = 0; // milliseconds for which the pair was visible
let visibleSince = null;

// --- what is shown

function say(text) {
  $("status").textContent = text;
}

function buildCard(card) {
  const side = card.dataset.side;
  const letter = side.toUpperCase();
  card.append($("response").content.cloneNode(true));
  const find = (selector) => card.querySelector(selector);
  const title = find("h2");
  title.textContent = `Response ${letter}`;
  title.id = `title-${side}`;
  find(".editor label").textContent = `Edit response ${letter}`;
  find(".editor label").htmlFor = `edit-${side}`;
  find("textarea").id = `edit-${side}`;
  find(".save").textContent = `Save: ${letter} is better, as edited`;
  find(".edit").textContent = `Edit ${letter}, it is better`;
  find("legend").textContent = `Rating of ${letter} (optional)`;
  for (const value of ["", "1", "2", "3", "4", "5"]) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type: "radio", name: `rating-${side}`, value });
    label.append(input, value || "none");
    find("fieldset").append(label);
  }
  find(".edit").addEventListener("click", () => edit(side));
  find(".save").addEventListener("click", () => decide(side));
  find(".cancel").addEventListener("click", stopEditing);
  cards[side] = { text: find(".text"), editor: find(".editor"), area: find("textarea"), below: find(".below"), edit: find(".edit") };
}

function show(state) {
  pair = state.pair;
  const { yours, labels, wanted } = state.progress;
  $("who").textContent = state.name;
  $("count").textContent = `${yours} by you, ${labels} of ${wanted} in all`;
  $("bar").max = Math.max(wanted, 1);
  $("bar").value = labels;
  $("problem").hidden = true;
  $("pair").hidden = pair === null;
  $("finished").hidden = pair !== null;
  $("actions").hidden = false;
  leaveEditor();
  if (pair !== null) {
    showPair();
  }
  setBusy(false);
  document.body.dataset.shown = pair === null ? "none" : String(pair.id);
  window.scrollTo(0, 0);
  $("title").focus({ preventScroll: true });
}

function showPair() {
  const turns = pair.messages.map((message) => {
    const turn = document.createElement("div");
    const role = document.createElement("b");
    const text = document.createElement("div");
    turn.className = "turn";
    text.className = "text";
    role.textContent = ROLES[message.role] ?? message.role;
    text.textContent = message.content;
    turn.append(role, text);
    return turn;
  });
  $("messages").replaceChildren(...turns);
  const before = pair.before;
  SIDES.forEach((side, i) => {
    const rating = String(before[`rating_${side}`] ?? "");
    cards[side].text.textContent = pair.responses[i];
    document.querySelector(`input[name="rating-${side}"][value="${rating}"]`).checked = true;
  });
  $("comment").value = before.comment ?? "";
  watched = 0;
  visibleSince = document.hidden ? null : performance.now();
}

function setBusy(value) {
  busy = value;
  for (const button of document.querySelectorAll("[data-choice], .edit, .save, #undo")) {
    button.disabled = button.id !== "undo" && pair === null;
    // disabled, it would lose the focus while a click is on its way
    button.setAttribute("aria-disabled", String(button.disabled || busy));
  }
}

// --- editing

function edit(side) {
  if (busy || pair === null || editing) {
    return;
  }
  chooses = false;
  editing = side;
  const { area, editor, text, below } = cards[side];
  const before = pair.before;
  area.value = before.choice === side && before.edited ? before.edited : text.textContent;
  editor.hidden = false;
  text.hidden = true;
  below.hidden = true;
  area.focus();
  say(`Editing ${side.toUpperCase()}. Ctrl Enter saves it as the better one, Esc cancels.`);
}

function leaveEditor() {
  chooses = false;
  if (editing) {
    const { editor, text, below } = cards[editing];
    editor.hidden = true;
    text.hidden = false;
    below.hidden = false;
    editing = null;
  }
}

function stopEditing() {
  const side = editing;
  leaveEditor();
  if (side) {
    cards[side].edit.focus();
  }
  say("Not edited.");
}

// --- what is sent

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // randomUUID is there under https alone
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function ratingOf(side) {
  const chosen = document.querySelector(`input[name="rating-${side}"]:checked`);
  return chosen && chosen.value ? Number(chosen.value) : null;
}

function secondsWatched() {
  return (watched + (visibleSince === null ? 0 : performance.now() - visibleSince)) / 1000;
}

function decide(choice) {
  if (busy || pair === null || (editing && choice !== editing)) {
    return;
  }
  const body = { id: newId(), shown: pair.id, choice, seconds: secondsWatched(), comment: $("comment").value };
  SIDES.forEach((side) => (body[`rating_${side}`] = ratingOf(side)));
  if (editing) {
    const text = cards[editing].area.value;
    const shownText = pair.responses[SIDES.indexOf(editing)];
    if (!text.trim()) {
      say("The edited response is empty.");
      return;
    }
    body.edited = text === shownText ? null : text;
  }
  send("label", body, choice === "skip" ? "Skipped." : `Saved: ${CHOICES[choice]}${body.edited ? ", as edited" : ""}.`);
}

function undo() {
  if (!busy && !editing) {
    send("undo", { id: newId() }, "Undone. Decide again.");
  }
}

async function send(path, body, done) {
  pending = { path, body, done };
  setBusy(true);
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(20000),
    });
    const state = await response.json();
    if (response.ok) {
      pending = null;
      show(state);
      const before = pair?.before.choice;
      say(path === "undo" && before ? `Undone: ${CHOICES[before]}. Decide again.` : done);
    } else if (response.status === 409 && path !== "next") {
      await send("next", {}, `Nothing changed: ${state.error}.`);
    } else {
      fail(`Not saved: ${state.error}.`, response.status >= 500);
    }
  } catch (error) {
    fail(`The server can't be reached (${error.message}). Nothing is lost: try again once it is back.`, true);
  }
}

function fail(text, mayTryAgain) {
  $("problem-text").textContent = text;
  $("problem").hidden = false;
  $("again").hidden = !mayTryAgain;
  if (mayTryAgain) {
    $("again").focus(); // and all else waits, so that no other click can take the place of this one
  } else {
    pending = null;
    setBusy(false);
  }
}

// --- keys

function isTyping(target) {
  return target.tagName === "TEXTAREA";
}

function onKey(event) {
  const { key, target } = event;
  if ($("keys").open || event.altKey || event.metaKey || event.repeat) {
    return;
  }
  if (editing && key === "Enter" && event.ctrlKey) {
    event.preventDefault();
    decide(editing);
  } else if (key === "Escape" && editing) {
    stopEditing();
  } else if (key === "Escape" && chooses) {
    chooses = false;
    say("Not edited.");
  } else if (key === "Escape" && isTyping(target)) {
    target.blur();
  } else if (!event.ctrlKey && !isTyping(target) && $("single-keys").checked) {
    onSingleKey(event);
  }
}

function onSingleKey(event) {
  const { key, target } = event;
  const letter = key.length === 1 ? key.toLowerCase() : key;
  const choice = KEYS[letter];
  if (target.type === "radio" && key.startsWith("Arrow")) {
    return; // moves among the ratings
  }
  if (choice && chooses && SIDES.includes(choice)) {
    event.preventDefault();
    edit(choice);
  } else if (choice) {
    event.preventDefault();
    decide(choice);
  } else if (letter === "e" && pair !== null && !busy) {
    chooses = true;
    say("Edit the better one: press 1 for A or 2 for B, Esc to cancel.");
  } else if (letter === "c" && pair !== null) {
    event.preventDefault();
    $("comment").focus();
  } else if (letter === "u") {
    undo();
  } else if (letter === "?") {
    $("keys").showModal();
  }
}

function onVisibility() {
  if (document.hidden && visibleSince !== null) {
    watched += performance.now() - visibleSince;
    visibleSince = null;
  } else if (!document.hidden && visibleSince === null) {
    visibleSince = performance.now();
  }
}

document.querySelectorAll(".response").forEach(buildCard);
document.querySelectorAll("[data-choice]").forEach((button) => {
  button.addEventListener("click", () => decide(button.dataset.choice));
});
$("undo").addEventListener("click", undo);
$("help").addEventListener("click", () => $("keys").showModal());
$("again").addEventListener("click", () => pending && send(pending.path, pending.body, pending.done));
document.addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", onVisibility);
send("next", {}, "");

"use strict";
let open = null;
let sending = false;
let ended = false;
let timer = 0;
// How often in a row the search has not answered, and how often it may: its process has ended then, or was stopped.
let failures = 0;
const MOST_FAILURES = 5;
// Counts the beginnings and ends of votes: what the server said before one is out of date after it.
let votes = 0;
// The strengths that were shown before the last vote, by the candidate's name.
let before = {};

const judge = byId("judge");
judge.value = sessionStorage.getItem("judge") || "judge " + Math.floor(Math.random() * 1000);
sessionStorage.setItem("judge", judge.value);
// The name under which the server knows this judge.
let named = judge.value;
judge.addEventListener("change", () => {
  sessionStorage.setItem("judge", judge.value);
  open = null;
  refresh();
});

function show(state) {
  const { question, standing, bout } = state;
  open = question;
  ended = state.ended;
  showQuestion(question);
  if (!question) byId("question").textContent = state.title;
  byId("waiting").hidden = Boolean(question);
  byId("waiting").textContent = standing.waiting ? state.activity : "Other judges have the questions that are left.";
  showResult(state.result);
  const where = standing.heldout ? "last, the winner against the other models: " : "generation " + standing.number + ": ";
  const next = standing.heldout ? "" : " (" + standing.left + " left for all generations)";
  byId("progress").textContent = standing.waiting ? "" : where + standing.votes + " of at most " + standing.most + " votes" + next;
  byId("bar").value = standing.waiting ? state.share : standing.most ? standing.votes / standing.most : 0;
  byId("bout").hidden = !bout;
  if (bout) {
    const rounds = bout.votes.length, won = (side) => bout.votes.filter((choice) => choice === side).length;
    byId("bout").textContent = (rounds === bout.length ? "the last bout ended" : "round " + (rounds + 1) + " of " + bout.length)
      + ": left " + won("left") + ", right " + won("right");
  }
  showStrengths(standing.strengths.map(([candidate, mean, deviation]) => ({ candidate, mean, deviation })));
  byId("leader").textContent = standing.leader && "the strongest, " + standing.strengths[0][0] + ":\n" + standing.leader;
  byId("agreements").replaceChildren(...standing.agreements.map((text) => line("li", text)));
}

// The winner's proof: sentences, and a table of its meetings with the other models.
function showResult(result) {
  byId("result").hidden = !result;
  if (!result) return;
  byId("verdicts").replaceChildren(...result.sentences.map((text) => line("li", text)));
  byId("meetings").replaceChildren(...[result.columns, ...result.table].map((cells, number) => {
    const row = document.createElement("tr");
    row.replaceChildren(...cells.map((text) => line(number ? "td" : "th", text)));
    return row;
  }));
}

function line(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

function showStrengths(strengths) {
  const ranks = Object.fromEntries(strengths.map((row, rank) => [row.candidate, rank]));
  const moved = strengths.filter((row) => row.candidate in before && before[row.candidate].mean !== row.mean);
  byId("changed").textContent = moved.length === 0 ? "" : "the last vote moved " + moved.map((row) => {
    const was = before[row.candidate], change = row.mean - was.mean, climbed = was.rank - ranks[row.candidate];
    const places = climbed ? " (" + (climbed > 0 ? "up " : "down ") + Math.abs(climbed) + ")" : "";
    return { size: Math.abs(change), text: row.candidate + " by " + (change > 0 ? "+" : "") + change.toFixed(2) + places };
  }).sort((one, other) => other.size - one.size).slice(0, 3).map((row) => row.text).join(", ");
  byId("strengths").replaceChildren(...strengths.map((row) =>
    line("li", row.candidate + ": " + row.mean.toFixed(2) + " ± " + row.deviation.toFixed(2))));
  before = Object.fromEntries(strengths.map((row, rank) => [row.candidate, { ...row, rank }]));
}

function fail(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

async function refresh() {
  clearTimeout(timer);
  const begun = votes;
  try {
    const earlier = named === judge.value ? "" : "&earlier=" + encodeURIComponent(named);
    named = judge.value;
    const answer = await fetch("state?judge=" + encodeURIComponent(named) + earlier);
    if (!answer.ok) throw new Error(await answer.text());
    fail("");
    failures = 0;
    const state = await answer.json();
    const asked = state.question;
    const isSame = open && asked && open.task === asked.task && open.number === asked.number;
    if (votes === begun && !isSame) show(state);
  } catch (error) {
    failures++;
    fail("The search does not answer (try " + failures + " of " + MOST_FAILURES + ": " + error.message + ").");
  }
  if (failures >= MOST_FAILURES) {
    open = null;
    showQuestion(null);
    byId("waiting").hidden = true;
    fail("The search has ended or was stopped, and this page asks it no more. All votes are kept. Once the search goes on "
      + "(evojax-merge judge … --resume), reload this page.");
    return;
  }
  // Ask again soon while the next candidates are being written. Otherwise it shows that the judge is still there.
  if (!ended) timer = setTimeout(refresh, failures ? 3000 : open ? 5000 : 300);
}

async function vote(choice) {
  if (!open || sending) return;
  sending = true;
  votes++;
  try {
    const body = JSON.stringify({ task: open.task, number: open.number, choice, judge: judge.value });
    const answer = await fetch("vote", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (!answer.ok) throw new Error(await answer.text());
    const state = await answer.json();
    fail(state.counted ? "" : "The vote was not counted: the question has been answered already, or went to another judge.");
    show(state);
  } catch (error) {
    fail("The vote was not counted: " + error.message);
  }
  sending = false;
  votes++;
  clearTimeout(timer);
  if (!ended) timer = setTimeout(refresh, open ? 5000 : 300);
}

window.addEventListener("pagehide", () => navigator.sendBeacon("leave?judge=" + encodeURIComponent(named)));

onChoice(vote);
refresh();

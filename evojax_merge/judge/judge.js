"use strict";
const byId = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "both_bad" };
let open = null;
let sending = false;

const judge = byId("judge");
judge.value = sessionStorage.getItem("judge") || "judge " + Math.floor(Math.random() * 1000);
sessionStorage.setItem("judge", judge.value);
judge.addEventListener("change", () => { sessionStorage.setItem("judge", judge.value); open = null; refresh(); });

function show(state) {
  const { question, standing } = state;
  open = question;
  for (const id of ["prompt", "answers"]) byId(id).hidden = !question;
  document.querySelector("nav").hidden = !question;
  byId("waiting").hidden = Boolean(question);
  if (question) {
    // Texts of models are data: they never become markup.
    byId("question").textContent = question.text;
    byId("prompt").textContent = question.prompt;
    byId("left").lastElementChild.textContent = question.left || "(nothing)";
    byId("right").lastElementChild.textContent = question.right || "(nothing)";
    byId("left").scrollTop = byId("right").scrollTop = 0;
  }
  const where = standing.heldout ? "the winner meets the other models, on prompts that nobody voted on"
    : "generation " + standing.round;
  const further = standing.heldout ? "" : ", " + standing.left + " left in all";
  byId("progress").textContent = where + ": vote " + standing.votes + " of at most " + standing.most + further;
  byId("bar").value = standing.most ? standing.votes / standing.most : 0;
  const list = byId("strengths");
  list.replaceChildren(...standing.strengths.map((row) => {
    const item = document.createElement("li");
    item.textContent = "candidate " + (row.candidate + 1) + ": " + row.mean.toFixed(2) + " ± " + row.deviation.toFixed(2);
    return item;
  }));
}

function fail(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

async function refresh() {
  try {
    const answer = await fetch("state?judge=" + encodeURIComponent(judge.value));
    if (!answer.ok) throw new Error(await answer.text());
    fail("");
    if (!sending) show(await answer.json());
  } catch (error) {
    fail("The search does not answer; it may have ended. All votes are kept. (" + error.message + ")");
  }
  // Ask again soon while the next candidates are being written, and seldom where nobody answers.
  if (!open) setTimeout(refresh, byId("error").hidden ? 300 : 3000);
}

async function vote(choice) {
  if (!open || sending) return;
  sending = true;
  try {
    const body = JSON.stringify({ task: open.task, number: open.number, choice, judge: judge.value });
    const answer = await fetch("vote", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (!answer.ok) throw new Error(await answer.text());
    fail("");
    show(await answer.json());
  } catch (error) {
    fail("The vote was not counted: " + error.message);
  }
  sending = false;
  if (!open) setTimeout(refresh, 300);
}

for (const choice of Object.values(KEYS)) byId(choice).addEventListener("click", () => vote(choice));
document.addEventListener("keydown", (event) => {
  if (event.target === judge || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in KEYS) { event.preventDefault(); vote(KEYS[event.key]); }
});
refresh();

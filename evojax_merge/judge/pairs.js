"use strict";
const byId = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "both_bad" };
const pairs = JSON.parse(byId("pairs").textContent);
const choices = [];

function show() {
  const pair = pairs[choices.length];
  for (const id of ["prompt", "answers"]) byId(id).hidden = !pair;
  byId("question").textContent = pair ? pair.question : "All pairs have votes: save them.";
  if (pair) {
    byId("prompt").textContent = pair.prompt;
    byId("left").lastElementChild.textContent = pair.left || "(nothing)";
    byId("right").lastElementChild.textContent = pair.right || "(nothing)";
  }
  byId("progress").textContent = choices.length + " of " + pairs.length + " votes";
  byId("bar").value = choices.length / pairs.length;
}

function vote(choice) {
  if (choices.length < pairs.length) choices.push(choice);
  show();
}

function lines() {
  const judge = byId("judge").value;
  return choices.map((choice, n) => JSON.stringify({ pair: pairs[n].name, choice, judge }) + "\n").join("");
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines()], { type: "application/jsonl" }));
  link.download = "votes.jsonl";
  link.click();
}

for (const choice of Object.values(KEYS)) byId(choice).addEventListener("click", () => vote(choice));
byId("back").addEventListener("click", () => { choices.pop(); show(); });
byId("save").addEventListener("click", save);
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in KEYS) { event.preventDefault(); vote(KEYS[event.key]); }
  if (event.key === "Backspace") { event.preventDefault(); choices.pop(); show(); }
});
window.addEventListener("beforeunload", (event) => { if (choices.length) event.preventDefault(); });
show();

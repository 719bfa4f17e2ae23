"use strict";
const pairs = JSON.parse(byId("pairs").textContent);
const choices = [];

function show() {
  const pair = pairs[choices.length];
  showQuestion(pair);
  if (!pair) byId("question").textContent = "All pairs have votes: save them.";
  byId("progress").textContent = choices.length + " of " + pairs.length + " votes";
  byId("bar").value = choices.length / pairs.length;
}

function vote(choice) {
  if (choices.length < pairs.length) choices.push(choice);
  show();
}

function back() {
  choices.pop();
  show();
}

function lines() {
  const judge = byId("judge").value;
  return choices.map((choice, n) => JSON.stringify({ pair: pairs[n].pair, choice, judge }) + "\n").join("");
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines()], { type: "application/jsonl" }));
  link.download = "votes.jsonl";
  link.click();
}

byId("ranking").hidden = true;
byId("back").hidden = byId("save").hidden = false;
byId("back").addEventListener("click", back);
byId("save").addEventListener("click", save);
onChoice(vote);
document.addEventListener("keydown", (event) => {
  if (event.target !== byId("judge") && event.key === "Backspace") { event.preventDefault(); back(); }
});
window.addEventListener("beforeunload", (event) => { if (choices.length) event.preventDefault(); });
show();

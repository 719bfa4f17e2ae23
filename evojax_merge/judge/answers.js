"use strict";
// Shared by the page that a search serves and by the page of a file of pairs.
const byId = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "both_bad" };

// Show a question, or none. An answer is a text, or the address of a picture.
function showQuestion(question) {
  for (const id of ["answers", "hint", "choices"]) byId(id).hidden = !question;
  byId("prompt").hidden = !question || !question.prompt;
  if (!question) return;
  // Texts of models are data: they never become markup.
  byId("question").textContent = question.question;
  byId("prompt").textContent = question.prompt;
  for (const side of ["left", "right"]) {
    const place = byId(side).lastElementChild;
    if (question.pictures) {
      const picture = document.createElement("img");
      picture.alt = "the " + side + " picture";
      picture.src = question[side];
      picture.addEventListener("load", () => picture.classList.toggle("small", picture.naturalWidth < 256));
      place.replaceChildren(picture);
    } else {
      place.textContent = question[side] || "(nothing)";
    }
    byId(side).scrollTop = 0;
  }
}

// Call `vote` for a click on a choice, and for its key.
function onChoice(vote) {
  for (const choice of Object.values(KEYS)) byId(choice).addEventListener("click", () => vote(choice));
  document.addEventListener("keydown", (event) => {
    if (event.target === byId("judge") || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in KEYS) { event.preventDefault(); vote(KEYS[event.key]); }
  });
}

"""A language model as judge, over an address that speaks OpenAI's chat completions.

Each pair is asked in both orders. Where the two votes disagree, the order decided and not the answers: the vote is a
tie, and counts as position bias.
"""

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evojax_merge.errors import Failed, print_warning
from evojax_merge.tasks.voting import Choice

SYSTEM = (
    "You compare two answers to a prompt. Reply with one word: A where the first is better, B where the second is "
    "better, TIE where they are as good as each other, BAD where both are bad."
)
CHOICES: dict[str, Choice] = {"A": "left", "B": "right", "TIE": "tie", "BAD": "both_bad"}
SWAPPED: dict[Choice, Choice] = {"left": "right", "right": "left", "tie": "tie", "both_bad": "both_bad"}
# Seconds that an answer may take, and between two tries.
TIMEOUT, PAUSES = 120, (1.0, 4.0, 16.0)


@dataclass
class LanguageModelJudge:
    """Votes through `{address}/chat/completions`, with the key that the environment's OPENAI_API_KEY has. `asked`,
    `biased`: how many pairs it was asked about, and on how many the order decided. pauses: seconds before each further
    try."""

    address: str
    model: str
    question: str
    asked: int = 0
    biased: int = 0
    pauses: tuple[float, ...] = PAUSES

    @property
    def name(self) -> str:
        return self.model

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def choose(self, record: dict[str, Any], prompt: str, left: str, right: str) -> Choice:
        first, second = self._ask(prompt, left, right), SWAPPED[self._ask(prompt, right, left)]
        self.asked += 1
        if first == second:
            return first
        self.biased += 1
        return "tie"

    def report(self) -> str | None:
        if not self.asked:
            return None
        share = self.biased / self.asked
        return f"{self.model}: {self.asked} votes; on {share:.0%} of the pairs the order decided, and these are ties"

    def _ask(self, prompt: str, first: str, second: str) -> Choice:
        content = f"{self.question}\n\n# Prompt\n{prompt}\n\n# Answer A\n{first}\n\n# Answer B\n{second}"
        body = {
            "model": self.model, "temperature": 0, "max_tokens": 8,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}],
        }  # fmt: skip
        text = self._post(body)
        word = text.strip().strip(".*\"'").split()[:1]
        choice = CHOICES.get(word[0].strip(".,:*").upper()) if word else None
        return choice or "tie"

    def _post(self, body: dict[str, Any]) -> str:
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        address = f"{self.address.rstrip('/')}/chat/completions"
        reason = ""
        for pause in (*self.pauses, None):
            try:
                request = urllib.request.Request(address, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    return str(json.loads(answer.read())["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                if error.code in (400, 401, 403, 404):
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
            if pause is not None:
                print_warning(f"{address} does not answer ({reason}); trying again in {pause:.0f} s")
                time.sleep(pause)
        raise Failed(f"{address} does not answer ({reason}); all votes are kept, and --resume asks for the rest")

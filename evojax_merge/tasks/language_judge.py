"""A language model as judge, over an address that speaks OpenAI's chat completions.

Each pair is asked in both orders. Where the two votes disagree, the order decided and not the answers: the vote is a
tie, and counts as position bias.
"""

import http.client
import io
import json
import os
import re
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from evojax_merge.errors import Failed, InputError, print_warning
from evojax_merge.tasks.voting import SWAPPED, Choice

SYSTEM = (
    "You compare two answers to a prompt. Reply with one word: A where the first is better, B where the second is "
    "better, TIE where they are as good as each other, BAD where both are bad."
)
CHOICES: dict[str, Choice] = {"A": "left", "B": "right", "TIE": "tie", "BAD": "both_bad"}
# Seconds that an answer may take in all, and between two tries; and the bytes that it may have.
TIMEOUT, PAUSES = 120, (1.0, 4.0, 16.0)
MAX_BYTES = 8 << 20
KEY = "OPENAI_API_KEY"


class Unanswered(Exception):
    """The reason why there is no answer, which quotes nothing of what came. is_final: another try would end alike."""

    def __init__(self, reason: str, is_final: bool = True) -> None:
        super().__init__(reason)
        self.is_final = is_final


class _Bounded(io.RawIOBase):
    """An answer's bytes, headers included: no more than MAX_BYTES, and none after TIMEOUT seconds in all."""

    def __init__(self, connection: socket.socket, stream: Any) -> None:
        self._connection, self._stream = connection, stream
        self._left, self._end = MAX_BYTES, time.monotonic() + TIMEOUT

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # A time of 0 would mean no waiting at all.
        self._connection.settimeout(max(1e-3, self._end - time.monotonic()))
        count: int = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise Unanswered(f"its answer has over {MAX_BYTES:,} bytes")
        if time.monotonic() > self._end:
            raise TimeoutError
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, connection: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(connection, *arguments, **options)
        self.fp = io.BufferedReader(_Bounded(connection, self.fp.detach()))


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        bounded: Any = type("BoundedConnection", (http_class,), {"response_class": _Answer})
        return super().do_open(bounded, req, **options)


def check_address(address: str, allows_plain: bool) -> None:
    """Raises ValueError for an address that no judge has, and for one that would get the key and the texts over a
    network in plain text, unless `allows_plain`."""
    if not re.fullmatch(r"https?://(?=[!-~]+\Z)[^/?#@:][^/?#@]*(/[^?#]*)?", address):
        what = "no user, password, question mark or space: the key stands in"
        raise ValueError(f"expected http://… or https://…, a host and perhaps a path; {what} {KEY}")
    host, _ = str(urlsplit(address).hostname), urlsplit(address).port
    if address.startswith("http:") and not allows_plain and not _is_this_machine(host):
        what = "would get the prompts, the answers and the key in plain text; expected https://"
        raise ValueError(f"{host[:100]} {what}, or judge_insecure: true")


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def read_key() -> str:
    """The key of the environment; empty: there is none. Raises InputError for one that no request can hold."""
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch("[!-~]*", key):
        what = "holds white space, or characters that are not ASCII; expected a key as its server gave it"
        raise InputError(KEY, what)
    return key


@dataclass
class LanguageModelJudge:
    """Votes through `{address}/chat/completions`, with the key in OPENAI_API_KEY. name: the model's; `asked`, `biased`:
    how many pairs it was asked about, and on how many the order decided; pauses: seconds before each further try."""

    address: str
    name: str
    question: str
    asked: int = 0
    biased: int = 0
    pauses: tuple[float, ...] = PAUSES

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
        return f"{self.name}: {self.asked} votes; on {share:.0%} of the pairs the order decided, and these are ties"

    def _ask(self, prompt: str, first: str, second: str) -> Choice:
        content = f"{self.question}\n\n# Prompt\n{prompt}\n\n# Answer A\n{first}\n\n# Answer B\n{second}"
        body = {
            "model": self.name, "temperature": 0, "max_tokens": 8,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}],
        }  # fmt: skip
        text = self._post(body)
        word = text.strip().strip(".*\"'").split()[:1]
        choice = CHOICES.get(word[0].strip(".,:*").upper()) if word else None
        return choice or "tie"

    def _post(self, body: dict[str, Any]) -> str:
        address = f"{self.address.rstrip('/')}/chat/completions"
        for pause in (*self.pauses, None):
            try:
                return _exchange(address, json.dumps(body).encode())
            except Unanswered as error:
                if error.is_final or pause is None:
                    what = f"does not answer ({error}); all votes are kept, and --resume asks for the rest"
                    raise Failed(f"{address} {what}") from None
                print_warning(f"{address} does not answer ({error}); trying again in {pause:.0f} s")
                time.sleep(pause)
        raise AssertionError


def _exchange(address: str, body: bytes) -> str:
    """The text that a model sends back. Raises Unanswered. No redirect is followed: the key is for this address."""
    key, proxies = read_key(), dict[str, str]() if _is_this_machine(urlsplit(address).hostname or "") else None
    opener, standard = urllib.request.OpenerDirector(), urllib.request
    errors = standard.HTTPDefaultErrorHandler(), standard.HTTPErrorProcessor()
    for handler in (standard.ProxyHandler(proxies), _Handler(), *errors):
        opener.add_handler(handler)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        with opener.open(urllib.request.Request(address, body, headers), timeout=TIMEOUT) as answer:
            content = answer.read(MAX_BYTES)
            if answer.length:
                raise http.client.IncompleteRead(b"")
    except urllib.error.HTTPError as error:
        error.close()
        moved = ", a redirect, which is not followed; give the address that is meant" if error.code // 100 == 3 else ""
        is_final = error.code < 500 and error.code not in (408, 425, 429)
        raise Unanswered(f"status {error.code}{moved}", is_final) from None
    except (http.client.IncompleteRead, http.client.RemoteDisconnected):
        raise Unanswered("its answer was cut short", is_final=False) from None
    except (http.client.HTTPException, ValueError) as error:
        # The text of such an error may quote what was sent, or what came.
        raise Unanswered(f"it speaks no HTTP that can be read: {type(error).__name__}") from None
    except OSError as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = f"nothing whole came within {TIMEOUT} s" if isinstance(cause, TimeoutError) else ""
        reason = reason or getattr(cause, "strerror", None) or type(cause).__name__
        raise Unanswered(reason, is_final=False) from None
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise Unanswered("its answer is no JSON with a text at choices[0].message.content")
    return text

"""Keys: what messages show in their place, and the address of a judge, which gets one, against hostile servers."""

import ast
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.families import Family
from helpers.files import write_yaml
from hostile import config, start_command

from evojax_merge import errors
from evojax_merge.errors import Failed, InputError, first_line, hide, print_warning, printable, without_secrets
from evojax_merge.search.environment import recorded_session
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.tasks import language_judge
from evojax_merge.tasks.language_judge import KEY, LanguageModelJudge, check_address

SECRET = "sk-proj-0123456789abcdef"


# ---------------------------------------------------------------------------------------------------------------
# Messages


@pytest.mark.parametrize(
    "key",
    [
        SECRET, f"{SECRET}\n", f"{SECRET}\r\nX: {SECRET}2", f"{SECRET}é", f"{SECRET}€", f"{SECRET}'\"\\", f"{SECRET} 1",
    ],
    ids=ascii,
)  # fmt: skip
@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD"])
def test_no_message_shows_a_secret(name: str, key: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv(name, key)
    texts = [f"value {key}", f"{key!r}", f"{key!a}", repr(key.encode()), json.dumps({"key": key}), str([key])]
    try:
        # The error of Python's own client quotes the header.
        http.client.HTTPConnection("127.0.0.1", 9).putheader("Authorization", f"Bearer {key}")
    except Exception as error:
        texts += [str(error), repr(error)]
    for text in texts:
        for shown in (printable(text), str(InputError("x", text)), str(Failed(text)), without_secrets(text)):
            assert (SECRET not in shown and f"[{name}]" in shown) or SECRET not in text, (text, shown)
    print_warning(texts[0])
    assert SECRET not in capsys.readouterr().err


# The modules that talk to others over a network, by what they import.
NETWORK = {
    "datasets", "fsspec", "http", "httpx", "huggingface_hub", "mlflow", "oxen", "requests", "socket", "trackio",
    "urllib", "wandb",
}  # fmt: skip
# Each takes secrets out of what it is given.
DOORS = {"InputError", "Failed", "printable", "print_warning", "without_secrets"}
# Where the text of an exception goes elsewhere, and why no key can be in it or leave with it.
ELSEWHERE = {
    "checkpoints/references.py: hub_failure": "its text goes into an InputError",
    "checkpoints/remote.py: _failure": "its text goes into an InputError",
    "errors.py: str": "library_errors, whose text goes into an InputError",
    "evaluation/peers.py: first_line": "errors of this program, between processes of one user",
    "evaluation/peers.py: str": "is searched for a word",
    "judge/server.py: stop": "raised again where the search stands",
    "tasks/language_judge.py: text": "its own words, which go into a Failed",
    "tasks/records.py: str": "the JSON reader's words, which go into an InputError",
    "tasks/task_folders.py: setdefault": "an InputError, raised where its task is asked for",
}


def texts_of_exceptions() -> Iterator[str]:
    """The places, by module and innermost call, where a module that uses a network gives the exception that it caught
    to a call or formats it, but for a call of `DOORS` around it."""
    root = Path(errors.__file__).parent
    for file in sorted(root.rglob("*.py")):
        tree = ast.parse(file.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        if not NETWORK & {
            (node.module or "" if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
            for node in imports
            for alias in node.names
        }:
            continue
        around = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for handler in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name):
            for use in ast.walk(handler):
                parent = around.get(use)
                if not (isinstance(use, ast.Name) and use.id == handler.name):
                    continue
                if not isinstance(parent, ast.FormattedValue | ast.Call):
                    continue
                called = []
                while parent is not handler:
                    if isinstance(parent, ast.Call):
                        called.append(ast.unparse(parent.func).rpartition(".")[2])
                    parent = around[parent]
                if not DOORS & set(called) and called[:1] not in (["isinstance"], ["type"]):
                    yield f"{file.relative_to(root)}: {called[0] if called else 'text'}"


def test_what_a_library_says_of_a_network_is_shown_without_secrets() -> None:
    assert set(texts_of_exceptions()) == ELSEWHERE.keys()


def test_users_and_passwords_of_addresses_and_hidden_tokens_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "https://ann:pass-word@host.example/x, ssh://git@host and http://host/@b, see a@b.example"
    assert printable(text) == "https://[…]@host.example/x, ssh://[…]@host and http://host/@b, see a@b.example"
    text = "base=https://host/x?token=0123&a=b: refused (https://host/y?sig=1)? Yes"
    assert printable(text) == "base=https://host/x?[…]: refused (https://host/y?[…])? Yes"
    monkeypatch.setattr(errors, "_SECRETS", {})
    hide(SECRET, "token of the hub")
    assert printable(f"403: {SECRET}") == "403: [token of the hub]"
    monkeypatch.setenv("SHORT_KEY", "the")
    assert printable("the key") == "the key"


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("  one\u2028two\nthree")) == "one\u2028two"
    assert first_line(ValueError("\n")) == "ValueError"


def test_no_traceback_or_log_shows_a_secret(tmp_path: Path, family: Family) -> None:
    """A user's function that asks a server, and whose library quotes the request."""
    (tmp_path / "own.py").write_text(
        "import os\n\ndef score(records, outputs):\n"
        "    raise RuntimeError(f'{os.environ[\"SERVICE_KEY\"].encode()!r} at https://ann:word@host.example/')\n"
    )
    task = {"name": "own", "kind": "function", "file": str(family.tasks), "function": "own.py:score",
            "max_new_tokens": 1}  # fmt: skip
    document = config(base=str(family.base), parents=[str(parent) for parent in family.parents], tasks=[task])
    write_yaml(tmp_path / "config.yaml", document)
    variables = [("SERVICE_KEY", f"{SECRET}\n{SECRET}é")]
    started = start_command("search", "config.yaml", "--out", "run", folder=tmp_path, environment=variables)
    assert started.wait() == 1
    assert "RuntimeError: b'[SERVICE_KEY]' at https://[…]@host.example/" in started.read("stderr")
    log = (tmp_path / "run" / "run.log").read_text()
    assert "[SERVICE_KEY]" in log
    assert SECRET not in started.read("stderr") + started.read("stdout") + log


def test_no_recorded_command_shows_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr("sys.argv", ["evojax-merge", "search", "--set", f"tasks.0.judge_model={SECRET}"])
    with recorded_session(RunFolder(tmp_path)):
        pass
    text = (tmp_path / "environment.json").read_text()
    assert f"judge_model=[{KEY}]" in text and SECRET not in text


# ---------------------------------------------------------------------------------------------------------------
# The address of a judge


def answer(body: str | bytes, *headers: str, status: str = "200 OK") -> bytes:
    content = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


def chosen(word: Any) -> str:
    return json.dumps({"choices": [{"message": {"content": word}}]})


def received(connection: socket.socket) -> bytes:
    """A whole request: a connection that is closed before all of it was read is reset."""
    request = b""
    while (match := re.search(rb"Content-Length: (\d+)[^\0]*?\r\n\r\n", request)) is None or (
        len(request) < match.end() + int(match[1])
    ):
        request += connection.recv(65536)
    return request


@contextmanager
def served(respond: bytes | Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """An address whose server sends the same bytes to everybody, and what it was sent."""
    requests: list[bytes] = []

    def work(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                requests.append(received(connection))
                try:
                    respond(connection) if callable(respond) else connection.sendall(respond)
                except OSError:
                    continue

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=work, args=(listening,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", requests
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=5)


def asked(address: str) -> str:
    return LanguageModelJudge(address, "small", "Which?", pauses=(0.0,)).choose({}, "p", "ab", "a")


def endless(connection: socket.socket) -> None:
    """Send an answer without an end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b" " * 65536)


def slow(connection: socket.socket) -> None:
    """Send a header line a byte at a time."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def continued(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


FAULTS: dict[str, tuple[bytes | Callable[[socket.socket], None], str, int]] = {
    # What the server does, the reason in the message, and how often it is asked.
    "not HTTP": (b"SSH-2.0-OpenSSH_9.7\r\n", "speaks no HTTP that can be read: BadStatusLine", 1),
    "not HTTP, with the key": (f"{SECRET}\r\n".encode(), "speaks no HTTP that can be read: BadStatusLine", 1),
    "nothing": (b"", "cut short", 2),
    "a status without a number": (b"HTTP/1.1 abc OK\r\n\r\n", "speaks no HTTP that can be read: BadStatusLine", 1),
    "cut short": (answer(chosen("A"))[:-3], "cut short", 2),
    "cut in the headers": (b"HTTP/1.1 200 OK\r\nContent-Le", "is no JSON with a text", 1),
    "a chunk of no size": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "cut short", 2),
    "a chunk of a negative size": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + b"x" * 100, "cut short", 2,
    ),
    "a chunk that is cut": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{}", "cut short", 2),
    "a long header": (answer(chosen("A"), "X: " + "x" * 100_000), "speaks no HTTP that can be read: LineTooLong", 1),
    "many headers": (answer(chosen("A"), *["X: y"] * 1000), "speaks no HTTP that can be read: HTTPException", 1),
    "deep JSON": (answer("[" * 100_000), "is no JSON with a text at choices[0].message.content", 1),
    "no JSON": (answer("<html>", "Content-Type: text/html"), "is no JSON with a text", 1),
    "no UTF-8": (answer(b"\xff\xfe\xfd"), "is no JSON with a text", 1),
    "a number of many digits": (answer("9" * 5000), "is no JSON with a text", 1),
    "NaN": (answer('{"choices": NaN}'), "is no JSON with a text", 1),
    "no choice": (answer('{"choices": []}'), "is no JSON with a text", 1),
    "a text in place of choices": (answer('{"choices": "A"}'), "is no JSON with a text", 1),
    "a number in place of a text": (answer(chosen(1)), "is no JSON with a text", 1),
    "null in place of a text": (answer(chosen(None)), "is no JSON with a text", 1),
    "compressed": (answer(b"\x1f\x8b" + b"\0" * 1000, "Content-Encoding: gzip"), "is no JSON with a text", 1),
    "over 8 MB": (answer(b" " * (9 << 20)), "has over 8,388,608 bytes", 1),
    "said to be over 8 MB": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n{}", "cut short", 2),
    "endless": (endless, "has over 8,388,608 bytes", 1),
    "a byte at a time": (slow, "nothing whole came within 1 s", 2),
    "told to go on for ever": (continued, "", 0),
    "status 401 with the key": (answer(f"wrong key {SECRET}", status=f"401 {SECRET}"), "status 401)", 1),
    "status 429": (answer("", status="429 Too Many Requests"), "status 429)", 2),
    "status 503": (answer("", status="503 Busy"), "status 503)", 2),
    "status 999": (answer("", status="999 ?"), "status 999)", 2),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_any_fault_of_an_answer_is_a_line_with_the_address(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr(language_judge, "TIMEOUT", 1)
    respond, message, count = FAULTS[fault]
    with served(respond) as (address, requests), pytest.raises(Failed) as caught:
        asked(address)
    line = str(caught.value)
    assert line.startswith(f"{address}/chat/completions does not answer (") and "\n" not in line
    assert message in line, line
    assert not count or len(requests) == count
    assert SECRET.encode() in requests[0]
    assert SECRET not in line + capsys.readouterr().err


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target", ["{other}/x", "//127.0.0.1:{port}/x", "http://[::1", "file:///etc/passwd", "/v1/other"]
)
def test_no_redirect_is_followed(status: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    with served(answer(chosen("A"))) as (other, requests):
        location = target.format(other=other, port=other.split(":")[2].split("/")[0])
        redirect = answer("", f"Location: {location}", status=f"{status} Moved")
        with (
            served(redirect) as (address, first),
            pytest.raises(Failed, match=f"status {status}, a redirect, which is not followed"),
        ):
            asked(address)
        assert len(first) == 1 and not requests


def test_an_answer_in_parts_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    text = chosen("A").encode()
    chunks = b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in text) + b"0\r\n\r\n"
    with served(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks) as (address, requests):
        assert asked(address) == "tie"
    assert len(requests) == 2 and b"authorization" not in requests[0].lower()


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:8000/v1", "http://localhost:8000", "http://127.9.9.9/v1", "http://[::1]:8000/v1",
        "https://api.example/v1", "https://api.example:8443/v1/",
    ],
)  # fmt: skip
def test_addresses_of_judges(address: str) -> None:
    check_address(address, allows_plain=False)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://api.example/v1", "judge_insecure: true"),
        ("http://192.168.1.5:8000/v1", "judge_insecure: true"),
        ("http://127.0.0.1.example/v1", "judge_insecure: true"),
        ("http://localhost.example/v1", "judge_insecure: true"),
        ("http://[fe80::1]/v1", "judge_insecure: true"),
        ("http://0.0.0.0/v1", "judge_insecure: true"),
        ("http://2130706433/v1", "judge_insecure: true"),
        ("https://ann:word@api.example/v1", "expected http://"),
        (f"https://{SECRET}@api.example/v1", "expected http://"),
        ("https://api.example/v1?key=1", "expected http://"),
        ("https://api.example/v1#x", "expected http://"),
        ("https://api.example/a b", "expected http://"),
        ("https://api.example /v1", "expected http://"),
        ("https://api.example/v1\n", "expected http://"),
        ("https://api.exämple/v1", "expected http://"),
        ("ftp://api.example/v1", "expected http://"),
        ("file:///etc/passwd", "expected http://"),
        ("https://", "expected http://"),
        ("https://:80/", "expected http://"),
        ("https://api.example:99999/", "Port"),
        ("https://api.example:x/", "Port"),
        ("https://[::1/v1", "IPv6"),
    ],
)
def test_addresses_that_no_judge_has(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_address(address, allows_plain=False)
    assert SECRET not in str(caught.value)
    if message == "judge_insecure: true":
        check_address(address, allows_plain=True)


@pytest.mark.parametrize("key", [f"{SECRET}\nX: y", f"{SECRET}é", f"{SECRET} x", f"{SECRET}\x00"[:-1] + "\x7f"])
def test_a_key_that_no_request_can_hold_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, key)
    with pytest.raises(InputError, match=f"{KEY}: holds white space, or characters that are not ASCII") as caught:
        asked("http://127.0.0.1:9")
    assert SECRET not in str(caught.value)


def test_white_space_around_a_key_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, f" {SECRET}\r\n")
    with served(answer(chosen("A"))) as (address, requests):
        asked(address)
    assert f"Authorization: Bearer {SECRET}\r\n".encode() in requests[0]

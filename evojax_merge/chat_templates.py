"""Chat templates, rendered as transformers renders them, but apart: they are programs of a model's makers.

Jinja's sandbox keeps a template from the machine, not from its time and memory. So a process of its own renders all of
them, one after the other, with limits on both, and is started again after it was ended. This file is that process as
well, run by its path: it answers requests, a JSON line each.
"""

import json
import resource
import select
import signal
import subprocess
import sys
from threading import Lock
from typing import Any

# Seconds of the processor's time for one conversation, bytes beyond what rendering takes at rest, and characters that
# a template may add to a conversation. Templates that are in use take milliseconds and add a few thousand characters.
SECONDS, MEMORY, CHARACTERS = 2, 512 * 2**20, 10**6
# The process is given up where it says nothing for so long: it imports transformers first.
PATIENCE = 60


class ChatTemplateError(ValueError):
    """A template failed. `refused`: it said so itself, of this conversation, by an error of Jinja."""

    def __init__(self, said: str, refused: bool = False) -> None:
        super().__init__(said)
        self.refused = refused


def render_chat(tokenizer: Any, turns: list[dict[str, str]], **options: bool) -> str:
    """A conversation in the tokenizer's chat template: its `apply_chat_template`, with limits.

    turns: with `role` and `content`. options: `add_generation_prompt`, `continue_final_message`. Raises
    ChatTemplateError.
    """
    template = tokenizer.get_chat_template()
    return _ask(template, turns, {**tokenizer.special_tokens_map, **options})


def check_chat_template(template: str) -> None:
    """Raises ChatTemplateError where the text is not a template of Jinja."""
    _ask(template, None, {})


class _Renderer:
    """The process that renders."""

    def __init__(self) -> None:
        # Its own session: an interruption of the run is not its business; it ends when its input does.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, bufsize=0,
        )  # fmt: skip
        self._line()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def _line(self) -> bytes:
        """The next line. Raises ChatTemplateError where the process ended instead."""
        assert self._process.stdout is not None
        parts: list[bytes] = []
        while not (parts and parts[-1].endswith(b"\n")):
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
            part = self._process.stdout.read(2**20) if ready else b""
            if not part:
                self._process.kill()
                status = self._process.wait()
                late = not ready or status == -signal.SIGPROF
                raise ChatTemplateError(
                    f"it takes more than {SECONDS} s" if late else f"its process ended with status {status}"
                )
            parts.append(part)
        return b"".join(parts)


_lock = Lock()
_renderer: _Renderer | None = None


def _ask(template: str, turns: list[dict[str, str]] | None, options: dict[str, Any]) -> str:
    global _renderer
    with _lock:
        renderer, _renderer = _renderer or _Renderer(), None
        answer = renderer.ask({"template": template, "turns": turns, "options": options})
        # Only one that answered is asked again.
        _renderer = renderer
    if "text" not in answer:
        raise ChatTemplateError(answer["said"], answer["refused"])
    return str(answer["text"])


# ---------------------------------------------------------------------------------------------------------------
# The process


def _serve() -> None:
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    with open("/proc/self/statm") if sys.platform == "linux" else open("/dev/null") as file:
        pages = int((file.read().split() or ["0"])[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def answer(template: str, turns: list[dict[str, str]] | None, options: dict[str, Any]) -> dict[str, Any]:
        try:
            if turns is None:
                _compile_jinja_template(template)
                return {"text": ""}
            text = render_jinja_template([turns], chat_template=template, **options)[0][0]
        except jinja2.exceptions.TemplateError as error:
            return {"said": _one_line(error), "refused": True}
        except MemoryError:
            return {"said": f"it takes more than {MEMORY >> 20} MiB", "refused": False}
        except Exception as error:
            return {"said": f"{type(error).__name__}: {_one_line(error)}", "refused": False}
        if len(text) > CHARACTERS + sum(len(turn["content"]) for turn in turns):
            return {"said": f"it makes a text of {len(text):,} characters", "refused": False}
        return {"text": text}

    print(flush=True)
    for line in sys.stdin:
        # Its default is to end the process, wherever that is; a handler would wait for a long operation's end.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        reply = json.dumps(answer(**json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


def _one_line(error: Exception) -> str:
    said = " ".join(str(error)[:1000].split())[:200] or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in said)


if __name__ == "__main__":
    _serve()

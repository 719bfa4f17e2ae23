"""Jinja templates of strangers, rendered apart from the program.

Jinja's sandbox keeps a template from the machine, not from its time and memory. A separate process therefore renders
all templates, one after the other, with limits on both, and is started again after it was ended. Run by its path, this
file is that process as well: it answers requests, a JSON line each.
"""

import json
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

# The limits of one text: seconds of processor time, bytes beyond those of the idle process, and characters that a
# template may add to its input. Templates in use take milliseconds and add a few thousand characters.
SECONDS, MEMORY, CHARACTERS = 2, 512 * 2**20, 10**6
# The folders, of the models that were opened last, whose tokenizers have a chat template. A message about one that has
# none names them.
FOLDERS_WITH_TEMPLATE: list[Path] = []
# The seconds without an answer after which the process is given up: it may import transformers first.
PATIENCE = 60


class TemplateError(ValueError):
    """A template failed. `refused`: the template itself refused its input, by an error of Jinja."""

    def __init__(self, message: str, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


def check_template(template: str) -> None:
    """Raises TemplateError where the text is not a template of Jinja."""
    _ask({"kind": "check", "template": template})


def render_chat(template: str, tokenizer: Any, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """A conversation in one of the tokenizer's chat templates: its `apply_chat_template`, with limits.

    turns: with `role` and `content`. options: `add_generation_prompt`, `continue_final_message`, and variables of the
    template. Raises TemplateError.
    """
    options = {**tokenizer.special_tokens_map, **options}
    return _ask({"kind": "turns", "template": template, "turns": list(turns), "options": options})[0]


def render_record(template: str, record: dict[str, Any]) -> tuple[str, float]:
    """A task's template with a record's fields as its variables, as the lm-eval harness renders it; and the seconds
    that rendering took. Values without a form in JSON become texts. Raises TemplateError."""
    return _ask({"kind": "record", "template": template, "record": record})


class _Renderer:
    """The process that renders."""

    def __init__(self) -> None:
        # A session of its own: an interruption of the run does not reach the process, which ends when its input does.
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
        """The next line. Raises TemplateError where the process ended instead."""
        assert self._process.stdout is not None
        parts: list[bytes] = []
        while not (parts and parts[-1].endswith(b"\n")):
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
            part = self._process.stdout.read(2**20) if ready else b""
            if not part:
                self._process.kill()
                status = self._process.wait()
                late = not ready or status == -signal.SIGPROF
                raise TemplateError(
                    f"it takes more than {SECONDS} s" if late else f"its process ended with status {status}"
                )
            parts.append(part)
        return b"".join(parts)


_lock = Lock()
_renderer: _Renderer | None = None


def _ask(request: dict[str, Any]) -> tuple[str, float]:
    global _renderer
    with _lock:
        renderer, _renderer = _renderer or _Renderer(), None
        answer = renderer.ask(request)
        # Only a process that answered is asked again.
        _renderer = renderer
    if "text" not in answer:
        raise TemplateError(answer["said"], answer["refused"])
    return str(answer["text"]), float(answer["seconds"])


# ---------------------------------------------------------------------------------------------------------------
# The process


def _serve() -> None:
    import jinja2

    renderers: dict[str, Callable[..., str]] = {"record": _record_renderer()}

    def answer(render: Callable[..., str], request: dict[str, Any], given: int) -> dict[str, Any]:
        try:
            text = render(**request)
        except jinja2.exceptions.TemplateError as error:
            return {"said": _one_line(error), "refused": True}
        except MemoryError:
            return {"said": f"it takes more than {MEMORY >> 20} MiB", "refused": False}
        except Exception as error:
            return {"said": f"{type(error).__name__}: {_one_line(error)}", "refused": False}
        if len(text) > CHARACTERS + given:
            return {"said": f"it makes a text of {len(text):,} characters", "refused": False}
        return {"text": text}

    _limit_memory()
    print(flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        kind = request.pop("kind")
        if kind not in renderers:
            _limit_memory(None)
            renderers |= _chat_renderers()
            _limit_memory()
        # The signal's default ends the process at any point; a handler would wait for a long operation's end.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        began = time.process_time()
        reply = answer(renderers[kind], request, len(line))
        text = json.dumps(reply | {"seconds": time.process_time() - began})
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(text, flush=True)


def _limit_memory(more: int | None = MEMORY) -> None:
    """Limit the process to `more` bytes beyond its present ones; None: to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if more is None:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        return
    with open("/proc/self/statm") if sys.platform == "linux" else open("/dev/null") as file:
        pages = int((file.read().split() or ["0"])[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _chat_renderers() -> dict[str, Callable[..., str]]:
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    def check(template: str) -> str:
        _compile_jinja_template(template)
        return ""

    def turns(template: str, turns: list[dict[str, str]], options: dict[str, Any]) -> str:
        return str(render_jinja_template([turns], chat_template=template, **options)[0][0])

    return {"check": check, "turns": turns}


def _record_renderer() -> Callable[[str, dict[str, Any]], str]:
    """A renderer with the environment of lm_eval.utils, but in Jinja's sandbox."""
    import functools
    import re

    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda text, pattern, new, count=0: re.sub(pattern, new, text, count=count)
    compiled = functools.lru_cache(100)(environment.from_string)
    return lambda template, record: compiled(template).render(record)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error)[:1000].split())[:200] or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)


if __name__ == "__main__":
    _serve()

"""The errors that a user meets.

`InputError` is for errors that the user can put right: the command line prints one as a line and exits with status 2.
`Failed` is for failures although the input is right: one line too, status 1. Anything else that reaches the top is a
failure of the program or of a user's own function (status 1, with its traceback).
"""

import contextlib
import difflib
import errno
import json
import logging
import os
import re
import reprlib
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from urllib.parse import quote

# The maximum of a message's characters: text from a stranger's file must not push the rest off the screen.
LONGEST_MESSAGE = 1000
# The maximum of a line's characters in output, which may have to name whole paths.
LONGEST_LINE = 20_000

# The likeness (difflib's ratio) of a typo and the meant name, and, where the two share a part, the letters of that
# part.
NEAR, SHARED = 0.65, 5

# All lines that the program prints, whether or not they are shown. Nothing reads them but a run's log: libraries set up
# the root logger.
LOG = logging.getLogger("evojax_merge")
LOG.addHandler(logging.NullHandler())
LOG.propagate = False
LOG.setLevel(logging.INFO)

# Environment variables whose values are secrets, and the fewest characters of a secret: shorter ones are words.
_SECRET_NAME, SHORTEST_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE), 8
# Secrets that stand in no environment variable, with their names in messages.
_SECRETS: dict[str, str] = {}
# The user and the password of an address, and its query, which may be a signature.
_USER_OF_ADDRESS = re.compile(r"(?<=://)[^/?#\s@]+@")
_QUERY_OF_ADDRESS = re.compile(r"""(://[^\s?#]+\?)\S*[^\s.,:;?)\]'"]""")

# The user's names of files that the program has made in its cache, by their paths in the cache.
_USERS_NAMES: dict[str, str] = {}

# Whether messages go to a Python program, and the commands' options that are arguments there.
_IN_PYTHON = ContextVar("_IN_PYTHON", default=False)
# The warnings that the Python program has had already.
_GIVEN: ContextVar[set[str] | None] = ContextVar("_GIVEN", default=None)
# Files whose frames no warning names: those of this program, and of what calls its context managers.
_OURS = (f"{Path(__file__).parent}/", contextlib.__file__)
_SWITCH = re.compile(r"--(resume|overwrite|force|allow-nonfinite|allow-crimes|strict)\b")
_OPTION = re.compile(r"--(out|dtype|seed)\b")

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 80, 80


def escaped(text: str) -> str:
    """The text as one line that any terminal shows as it is: line ends, control characters (terminal sequences begin
    with one), characters without a width, characters that turn the direction of writing, and lone surrogates are
    escaped as in Python."""
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode()
        for char in text
    )


def escaped_lines(text: str) -> str:
    """The text with every line escaped; line feeds stay."""
    return "\n".join(map(escaped, text.split("\n")))


def hide(secret: str, name: str) -> None:
    """Have messages and logs show `[name]` in place of a secret that stands in no environment variable."""
    _SECRETS[secret] = name


def without_secrets(text: str) -> str:
    """The text with names in place of secrets: `[OPENAI_API_KEY]` for the value of this environment variable, and so
    for each one whose name ends in KEY, TOKEN, SECRET or PASSWORD, in the forms that Python, JSON and addresses give
    it; and without the users, passwords and queries of addresses."""
    variables = {value: name for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    forms: dict[str, str] = {}
    for secret, name in (variables | _SECRETS).items():
        encoded = [secret.encode(encoding, "backslashreplace") for encoding in ("utf-8", "latin-1")]
        written = [repr(secret)[1:-1], ascii(secret)[1:-1], *(repr(part)[2:-1] for part in encoded), quote(encoded[0])]
        # A library may show one line of a text, or cut white space off.
        for form in (secret, *map(str.strip, re.split(r"[\r\n]+", secret)), *written, json.dumps(secret)[1:-1]):
            if len(form) >= SHORTEST_SECRET:
                forms[form] = f"[{name}]"
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, forms[form])
    return _QUERY_OF_ADDRESS.sub(r"\1[…]", _USER_OF_ADDRESS.sub("[…]@", text))


def first_line(error: object) -> str:
    """The first line of what a library's exception says; the name of its type where it says nothing."""
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__


def printable(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """The text in the user's words (see `name_in_messages`), without secrets, escaped; where it has more than
    `longest` characters, without its middle."""

    def shortened(text: str) -> str:
        tail = longest // 3
        return text if len(text) <= longest else f"{text[: longest - tail - 5]} […] {text[len(text) - tail :]}"

    return shortened(escaped(shortened(without_secrets(in_users_words(text)))))


def print_warning(text: str) -> None:
    """Print `warning: TEXT` on stderr, as one line; for a Python program, give it a Python warning."""
    LOG.warning("warning: %s", printable(text))
    if _IN_PYTHON.get():
        warn_program(text)
    else:
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


def warn_program(text: str) -> None:
    """Give a Python program a warning, as one line, which names the line of the program that called this one's public
    function. Inside `in_python_words`, a text is given once."""
    given, line = _GIVEN.get(), printable(text)
    if given is not None and line in given:
        return
    if given is not None:
        given.add(line)
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(line, UserWarning, frame.f_code.co_filename, frame.f_lineno, registry=registry)


def name_in_messages(path: object, name: object) -> None:
    """Have messages call a path `name`: a file in the program's own cache says nothing to its user."""
    _USERS_NAMES[str(path)] = in_users_words(str(name))


def in_users_words(text: str) -> str:
    """The text with paths replaced by their names from `name_in_messages`, and, for a Python program, with arguments in
    place of options: `resume=True` for `--resume`."""
    for path in sorted(_USERS_NAMES, key=len, reverse=True):
        text = text.replace(path, _USERS_NAMES[path])
    if _IN_PYTHON.get():
        text = _SWITCH.sub(lambda option: f"{option[1].replace('-', '_')}=True", text)
        text = _OPTION.sub(r"`\1`", text)
    return text


@contextmanager
def in_python_words(given: set[str] | None = None) -> Iterator[None]:
    """Have the block's messages speak to a Python program (see `in_users_words`). given: the warnings that it has had
    already, to which the block's are added."""
    python, warned = _IN_PYTHON.set(True), _GIVEN.set(set() if given is None else given)
    try:
        yield
    finally:
        _IN_PYTHON.reset(python)
        _GIVEN.reset(warned)


def shown(value: object) -> str:
    """`repr(value)`, shortened to fit in a message; without line feeds or bytes that a terminal would obey."""
    return _short.repr(value)


class InputError(Exception):
    """Wrong input: `where` names the file (and key or line), `what` says what was found and expected. Its text is one
    line, whatever names and values from files it contains."""

    def __init__(self, where: object, what: str) -> None:
        super().__init__(printable(f"{where}: {what}"))
        self.where, self.what = str(where), what


class Failed(Exception):
    """A failure although the input is right: `what` says what was tried, a likely cause and what to look at."""

    def __init__(self, what: str) -> None:
        super().__init__(printable(what))


def cannot_write(where: object, error: OSError, more: str = "") -> Exception:
    """The exception to raise where a file could not be written: `Failed` where a disk is full or broken, which is no
    wrong input, else `InputError`."""
    text = f"could not be written ({error.strerror or error}){more}"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return Failed(f"{where}: {text}") if full else InputError(where, text)


@contextmanager
def library_errors(where: object, what: str, others: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Raise InputError for whatever another library raises in the block, which gives it a stranger's file: `what` and,
    in brackets, the library's words. `where` names the file; others: errors that the caller knows better."""
    try:
        yield
    # A library's constructor raises anything for numbers that it did not expect; a panic in Rust is no Exception.
    except BaseException as error:
        if isinstance(error, (InputError, Failed, KeyboardInterrupt, SystemExit, *others)):
            raise
        kind, text = type(error).__name__, " ".join(str(error).split())[:300]
        # One word alone, such as the key of a KeyError, says nothing.
        reason = text if " " in text else f"{kind}: {text}" if text else kind
        raise InputError(where, f"{what} ({reason})") from None


class Paused(Exception):
    """The work has stopped, without a fault, until the user has done what the message says."""


class PeerLostError(Exception):
    """Another process of the run has gone."""

    def __init__(
        self, what: str = "another process of this run has gone; the run ends here and can be resumed"
    ) -> None:
        super().__init__(what)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that a word was likely meant to be: only the case of letters differs, about two thirds of the
    letters agree, or half of them where the two share a part of `SHARED` letters, or their first and last letters. None
    where no name is near."""
    names = sorted(known)
    word = word[:100]
    if (match := next((name for name in names if name.casefold() == word.casefold()), None)) is not None:
        return match
    for name in difflib.get_close_matches(word, names, n=1, cutoff=0.5):
        matcher = difflib.SequenceMatcher(None, name, word)
        same_ends = (name[0], name[-1]) == (word[0], word[-1])
        if same_ends or matcher.ratio() >= NEAR or matcher.find_longest_match().size >= SHARED:
            return name
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'density'?)"`, or, where no name is near, a list of the known names, if there are any."""
    names = sorted(known)
    if not names:
        return ""
    near = nearest(word, names)
    return f" (did you mean '{near}'?)" if near is not None else f" (known: {', '.join(names)})"

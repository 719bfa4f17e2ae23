"""The errors that a user meets.

`InputError` is for whatever the user can put right: the command line prints it as one line and exits with
status 2. `Failed` is for what went wrong although the input is right: one line too, status 1. Anything else that
reaches the top is a failure of the program or of a user's own function (status 1, with its traceback).
"""

import difflib
import errno
import reprlib
import sys
import unicodedata
from collections.abc import Iterable

# Characters of a message: what a stranger's file puts into one must not push the rest off the screen.
LONGEST_MESSAGE = 1000
# Characters of a line of output, which may have to name whole paths.
LONGEST_LINE = 20_000

# The likeness (difflib's ratio) of a slip and the name that was meant, and, where one is part of the other, the letters
# that they share at a stretch.
NEAR, SHARED = 0.65, 5

# What a user calls the files that the program has made in its cache, by their paths there.
_USERS_NAMES: dict[str, str] = {}

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 80, 80


def escaped(text: str) -> str:
    """The text as one line that any terminal shows as it is: line ends, control characters (terminal sequences begin
    with one), characters without a width, those that turn the direction of writing, and lone surrogates are escaped as
    in Python."""
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode()
        for char in text
    )


def escaped_lines(text: str) -> str:
    """The text with every line escaped; line feeds stay."""
    return "\n".join(map(escaped, text.split("\n")))


def printable(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """The text in the user's words (see `name_in_messages`), escaped; where it has more than `longest` characters,
    without its middle."""

    def shortened(text: str) -> str:
        tail = longest // 3
        return text if len(text) <= longest else f"{text[: longest - tail - 5]} […] {text[len(text) - tail :]}"

    return shortened(escaped(shortened(in_users_words(text))))


def print_warning(text: str) -> None:
    """Print `warning: TEXT` on stderr, as one line."""
    print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


def name_in_messages(path: object, name: object) -> None:
    """Have messages call a path `name`: a file in the program's own cache says nothing to its user."""
    _USERS_NAMES[str(path)] = in_users_words(str(name))


def in_users_words(text: str) -> str:
    """The text with the names that `name_in_messages` was given."""
    for path in sorted(_USERS_NAMES, key=len, reverse=True):
        text = text.replace(path, _USERS_NAMES[path])
    return text


def shown(value: object) -> str:
    """`repr(value)`, cut to what fits in a message; without line feeds or bytes that a terminal would obey."""
    return _short.repr(value)


class InputError(Exception):
    """Wrong input: `where` names the file (and key or line), `what` says what was found and expected. Its text is one
    line, whatever names and values from files it contains."""

    def __init__(self, where: object, what: str) -> None:
        super().__init__(printable(f"{where}: {what}"))
        self.where, self.what = str(where), what


class Failed(Exception):
    """The input is right, and yet it came to nothing: says what was tried, a likely cause and what to look at."""

    def __init__(self, what: str) -> None:
        super().__init__(printable(what))


def cannot_write(where: object, error: OSError, more: str = "") -> Exception:
    """What to raise where a file could not be written. A disk that fills is no wrong input."""
    text = f"could not be written ({error.strerror or error}){more}"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return Failed(f"{where}: {text}") if full else InputError(where, text)


class PeerLostError(Exception):
    """Another process of the run has gone."""

    def __init__(self) -> None:
        super().__init__("another process of this run has gone; the run ends here and can be resumed")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that a word is likely to have meant: two thirds of it are the same, or half, of a long name that
    shares a part with it. None where no name is near."""
    word = word[:100]
    for name in difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5):
        matcher = difflib.SequenceMatcher(None, name, word)
        if matcher.ratio() >= NEAR or matcher.find_longest_match().size >= SHARED:
            return name
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'density'?)"`, or a list of what is known, if anything, where nothing is near."""
    known = sorted(known)
    if not known:
        return ""
    near = nearest(word, known)
    return f" (did you mean '{near}'?)" if near is not None else f" (known: {', '.join(known)})"

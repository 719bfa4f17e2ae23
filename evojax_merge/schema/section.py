"""The parts of every section of a YAML file: the base class of sections, and the types of their fields."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from evojax_merge.system.regular_file import MAX_NAME_BYTES

# The largest number in float32.
FLOAT32_MAX = 3.4028234663852886e38
# Seeds go into 64-bit integers with a sign.
MAX_SEED = 2**63 - 1


class Section(BaseModel):
    """A mapping of a YAML file. A field's description says in a line what the key means. `earlier_names`: former names
    of keys, which are accepted as well; `optional`: keys that a dumped document has where they are not at their
    defaults, so that the document of a search without them stays the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    earlier_names: ClassVar[Mapping[str, str]] = {}
    optional: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _with_todays_names(cls, document: Any) -> Any:
        if not isinstance(document, dict):
            return document
        renamed = {old: new for old, new in cls.earlier_names.items() if old in document and new not in document}
        return {renamed.get(key, key): value for key, value in document.items()} if renamed else document

    def left_out(self) -> set[str]:
        """The keys that a dumped document does not have."""
        fields = type(self).model_fields
        # An empty mapping names nothing, like the default.
        return {name for name in self.optional if getattr(self, name) in (fields[name].default, {})}

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        left_out = self.left_out()
        return {name: value for name, value in serialise(self).items() if name not in left_out}


@dataclass(frozen=True)
class Form:
    """The description of a field's type: `words` in messages, `short` in tables."""

    words: str
    short: str = ""


def _number(value: Any) -> Any:
    """Raises PydanticCustomError for true and false, which are numbers in Python but not in YAML."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "a truth value is no number")
    return value


def _encodable(text: str) -> str:
    """Raises PydanticCustomError for NUL and for half a surrogate pair, which no file can hold."""
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise PydanticCustomError("text", "holds characters that no text has")
    return text


def _one_line(text: str) -> str:
    """Raises PydanticCustomError for characters that would break a line of a table or of a message."""
    if any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in _encodable(text)):
        raise PydanticCustomError("text", "holds control characters")
    return text


def _path(text: str) -> str:
    """Raises PydanticCustomError for a part that is longer than file systems allow."""
    if any(len(part.encode()) > MAX_NAME_BYTES for part in _one_line(text).split("/")):
        raise PydanticCustomError("text", "has a part that no file can be called")
    return text


Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
# A number of a merge, which is computed in float32.
Number = Annotated[Real, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]
Numbers = Annotated[Number | list[Number], Form("a number that float32 holds, or a list of such")]
LayersPerGroup = Annotated[Annotated[Whole, Field(ge=1)] | Literal["all"], Form("a whole number, 1 or more, or all")]
Share = Annotated[Real, Field(gt=0.0, lt=1.0)]
Text = Annotated[
    str,
    AfterValidator(_encodable),
    Field(max_length=1_000_000),
    Form("a text (of no NUL and no half characters)", "a text"),
]
Name = Annotated[
    str,
    AfterValidator(_one_line),
    Field(min_length=1, max_length=200),
    Form("a text of 1 to 200 characters, in one line", "a text"),
]
Location = Annotated[
    str,
    AfterValidator(_path),
    Field(min_length=1, max_length=4096),
    Form("a path or name, in one line, no part over 255 bytes", "a path or name"),
]
Heldout = Annotated[Location | Share, Form("a share between 0 and 1, or a file")]

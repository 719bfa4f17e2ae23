"""The `calibration` of recipes and configs: the prompts on which methods look at the parents' activations."""

from typing import Annotated

from pydantic import Field

from evojax_merge.schema.section import Form, Location, Section, Text, Whole

PromptFiles = Annotated[
    Location | Annotated[list[Location], Field(min_length=1, max_length=1000)],
    Form("a file, or a list of them, one for each parent", "a file, or a list"),
]


class Calibration(Section):
    """Prompts for methods that look at activations, such as regmean."""

    file: PromptFiles = Field(description="the prompts: JSON lines and the like, of all parents, or a list with each's")
    prompt: Text = Field("{prompt}", description="a template over a record's fields")
    limit: Whole = Field(256, ge=1, le=1_000_000, description="how many records of a file are read, the first ones")

    @property
    def files(self) -> list[str]:
        return [self.file] if isinstance(self.file, str) else list(self.file)

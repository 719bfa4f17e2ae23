"""The `tokenizer_source` of recipes and configs."""

from typing import Annotated, Literal

from pydantic import Field

from evojax_merge.schema.section import Form, Location, Section, Whole


class Approximation(Section):
    """The source of the tokens, and how rows of tokens are made that a model lacks.

    k: the rows of one approximation, for omp and common_interpolation. weight_scheme, cosine_similarity: of
    common_interpolation; subword_method: of subword.
    """

    of: Location
    approximate: Literal["omp", "common_interpolation", "subword", "landmark_pca", "mean", "zero", "randn"] = "omp"
    k: Whole = Field(64, ge=1, le=4096)
    weight_scheme: Literal["distance_proportional", "barycentric", "least_squares"] = "distance_proportional"
    cosine_similarity: bool = False
    subword_method: Literal["mean", "sum", "weighted_mean", "first_last"] = "mean"

    @property
    def needs_shared(self) -> bool:
        """Whether the method reads the rows of tokens that donor and model share."""
        return self.approximate in ("omp", "common_interpolation", "landmark_pca")


TokenizerSource = Annotated[
    Location | Approximation, Form("a model, or a mapping (of of, approximate, k)", "a model or a mapping")
]

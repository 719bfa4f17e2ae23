"""The section of a search's YAML for mixtures of experts."""

from typing import Literal

from pydantic import Field, model_validator

from evojax_merge.schema.section import LayersPerGroup, Location, Real, Section, Text, Whole


class MixtureSpaceConfig(Section):
    """A space of mixtures of experts: in each layer the MLPs of several parents, and a router that picks some of them
    for each token; all other weights are the base's, else the first parent's. Keys of `evojax-merge moe` mean what
    they mean there.

    `searched`: `scale` and `bias` of each expert's gate; `experts`: whose MLP each expert of a layer is; `dense`:
    whether a layer has one MLP alone.
    """

    experts: list[Location] | None = Field(
        None, min_length=1, max_length=1000, description="the parents whose MLPs are experts; default: all"
    )
    slots: Whole | None = Field(
        None, ge=1, le=1000, description="experts of a layer; default: one of each of these parents"
    )
    experts_per_token: Whole = Field(2, ge=1, le=1000, description="how many experts the router picks for a token")
    gate_mode: Literal["hidden", "hidden_avg", "cheap_embed", "random", "uniform_random"] = Field(
        "hidden", description="what the gates are made of that the search begins with"
    )
    gate_input: Literal["layer", "normed"] = Field(
        "layer", description="which hidden states gates are made of; normed: what the router will receive"
    )
    positive_prompts: dict[Location, list[Text]] = Field(
        {}, max_length=1000, description="a parent -> texts that its expert should receive"
    )
    negative_prompts: dict[Location, list[Text]] = Field(
        {}, max_length=1000, description="a parent -> texts that its expert should not receive"
    )
    searched: list[Literal["scale", "bias", "experts", "dense"]] = Field(
        ["scale", "bias", "experts", "dense"], min_length=1, max_length=4, description="what differs between candidates"
    )
    layers_per_group: LayersPerGroup = Field(1, description="how many neighbouring layers share what is searched")
    scale_low: Real = Field(0.1, ge=1e-6, le=1.0, description="the least scale of a gate")
    scale_high: Real = Field(10.0, ge=1.0, le=1e6, description="the greatest scale of a gate")
    bias: Real = Field(1.0, ge=1e-6, le=1e6, description="the greatest bias of a gate, and minus the least")

    @model_validator(mode="after")
    def _fits(self) -> "MixtureSpaceConfig":
        if not self.scale_low < self.scale_high:
            raise ValueError("scale_low, scale_high: both are 1; expected bounds around 1")
        return self

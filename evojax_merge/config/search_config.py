"""The schema of a search's YAML, typed (`config.documents` checks documents against it)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from evojax_merge import plugins
from evojax_merge.config.documents import describe_value
from evojax_merge.errors import did_you_mean, nearest
from evojax_merge.schema.approximation import TokenizerSource
from evojax_merge.schema.budget import Budget, parse_budget
from evojax_merge.schema.calibration import Calibration
from evojax_merge.schema.mixture_space import MixtureSpaceConfig
from evojax_merge.schema.section import (
    MAX_SEED,
    Form,
    LayersPerGroup,
    Location,
    Name,
    Number,
    Numbers,
    Real,
    Section,
    Whole,
)
from evojax_merge.tasks.kinds import find_kind, kinds
from evojax_merge.tasks.task import TaskConfig

# The most steps of a layer path: some forty times as many as the deepest models have layers.
MAX_PATH_LAYERS = 10_000
# The most candidates of a generation: each has an entry in a line of the history, and a genome in memory.
MAX_POPULATION = 100_000
# The least members of a pool, where its config does not say.
SMALLEST_POOL = 8


class Bounds(Section):
    """A searched parameter."""

    low: Number | None = Field(None, description="the least value; default: as `evojax-merge methods` lists it")
    high: Number | None = Field(None, description="the greatest value; default: as `evojax-merge methods` lists it")
    start: Numbers | None = Field(
        None, description="where the search starts: a number, or one for each parent; default: as in the uniform merge"
    )


class SpaceConfig(Section):
    """The search space: the method, which of its parameters are searched, and how finely.

    In `components`, the router of a mixture of experts and the shared embed, final_norm and head may be joined to a
    part of a layer with `+`, else router, embed and head have parameters of their own.
    """

    optional = ("parent_groups", "active")

    kind: Literal["parameter"] = Field("parameter", description="what is searched; may be left out")
    method: Name = Field(description="the merge method, one of `evojax-merge methods`")
    layers_per_group: LayersPerGroup = Field(1, description="how many neighbouring layers share their parameters")
    components: list[Name] = Field(
        ["attention", "mlp", "norm"],
        max_length=100,
        description="of language models, diffusers folders: parts of a layer with parameters of their own",
    )
    smooth: bool = Field(
        False, description="layers get what is interpolated between the groups that `layers_per_group` makes"
    )
    parent_groups: dict[Name, Annotated[list[Location], Field(min_length=1, max_length=1000)]] = Field(
        {}, description="a name -> parents that share their searched parameters, as `parents` has them or by a pattern"
    )
    active: Whole | None = Field(
        None,
        ge=1,
        le=1000,
        description="how many of the weights of a group of tensors count, the largest; default: all",
    )
    parameters: dict[str, Bounds] = Field(
        {}, description="a parameter that is searched -> its bounds and start; default: the method's first"
    )
    fixed: dict[str, Numbers] = Field(
        {}, description="a parameter that is not searched -> its value; others have the method's default"
    )
    normalize: bool | None = Field(
        None, description="whether the sum is divided by the weights' sum; default: as the method has it"
    )
    rescale: Annotated[bool | Literal["none", "l1", "density"], Form("true, false, none, l1 or density")] | None = (
        Field(
            None,
            description="how what is left of a thinned-out task vector is scaled (true: l1); default: the method's way",
        )
    )


class DataFlowConfig(Section):
    """A data-flow space: the path through the layers of all parents, starting from the unchanged first parent.

    `form` moves: edits of the first parent, each of which scales, repeats or skips a block of layers, or takes it from
    another parent. `form` indicator: as in the paper, all layers in series, with a gene for each. `scales`: the factors
    of the state between layers.
    """

    earlier_names: ClassVar[Mapping[str, str]] = {"ends": "embedding_parent"}

    form: Literal["moves", "indicator"] = Field(
        "moves", description="moves: edits of the first parent; indicator: a gene for each layer, in series"
    )
    moves: Whole = Field(4, ge=1, le=1000, description="of the form moves: how many edits there are at most")
    window: Whole = Field(4, ge=1, le=10_000, description="of the form moves: how many layers an edit is of at most")
    repetitions: Whole = Field(
        3, ge=1, le=1000, description="of the form indicator: how many times all layers stand in series"
    )
    scales: Literal["block", "matrix", "network", "none"] | None = Field(
        None, description="block: one for each move; of the form indicator matrix (pairs of layers) or network; or none"
    )
    scale_low: Real = Field(0.5, ge=1e-6, le=1.0, description="the least scale")
    scale_high: Real = Field(4.0, ge=1.0, le=1e6, description="the greatest scale")
    max_layers: Whole | None = Field(
        None,
        ge=1,
        le=MAX_PATH_LAYERS,
        description="of the longest path; default: twice the first parent's, of the form indicator all",
    )
    embedding_parent: Whole = Field(
        0, ge=0, description="which parent, from 0, gives the embedding, the final norm and the head"
    )

    @model_validator(mode="after")
    def _fits(self) -> "DataFlowConfig":
        allowed = ("block", "none") if self.form == "moves" else ("matrix", "network", "none")
        if self.scales is not None and self.scales not in allowed:
            raise ValueError(f"scales: the form {self.form} has {', '.join(allowed)}")
        if not self.scale_low < self.scale_high:
            raise ValueError("scale_low, scale_high: both are 1; expected bounds around 1")
        return self


class PoolConfig(Section):
    """A pool of models that breed: candidates are founders (the parents) and merges of two members each.

    `selection`: chooses the members that breed. `complementary`: the better of two at random, and the member that is
    better than it on the examples that few do well on; `tournament`: twice the better of two; `random`: any of the
    better half. `replace`: chooses the members that are replaced. `worst`: those of the lowest fitness; `competition`:
    those that get least where members share each example's worth.
    """

    methods: list[Name] = Field(
        ["slerp"], min_length=1, max_length=100, description="which a child is bred by, one of them at random"
    )
    size: Whole | None = Field(
        None, ge=2, le=MAX_POPULATION, description="members that are kept; default: twice the founders, 8 or more"
    )
    selection: Literal["complementary", "tournament", "random"] = Field(
        "complementary",
        description="who breeds: members that complete each other, twice the better of two, or any of the better half",
    )
    replace: Literal["worst", "competition"] = Field(
        "worst", description="who goes: the least fit, or who gets least where members share what an example is worth"
    )
    split: bool = Field(False, description="whether a child's parents change places at a layer drawn at random")
    slots: Whole | None = Field(
        None, ge=1, le=MAX_POPULATION, description="bred members that are kept between generations; default: size"
    )

    def members(self, founders: int) -> int:
        """The number of members that are kept of a pool with so many founders."""
        return self.size or max(SMALLEST_POOL, 2 * founders)


def _task(value: Any) -> TaskConfig:
    """A task's section, checked by the kind that its keys name."""
    if isinstance(value, TaskConfig):
        return value
    kind = find_kind(value)
    if isinstance(value, dict) and kind is None:
        kind_name, key = value.get("kind"), "kind"
        names = [name for kind in kinds() for name in kind.names]
        what = "missing"
        # A key that no kind has and that was likely meant to name it.
        fields = {name for kind in kinds() for name in kind.config.model_fields}
        telling = {"kind", *(kind.key for kind in kinds() if kind.key is not None)}
        unknown = (name for name in map(str, value) if "kind" not in value and name not in fields)
        typos = ((name, near) for name in unknown if (near := nearest(name, fields | telling)) in telling)
        typo = next(typos, None)
        if typo is not None:
            key, what = typo[0], f"unknown key (did you mean '{typo[1]}'?)"
        elif isinstance(kind_name, str):
            what = f"there is no kind of task {describe_value(kind_name)}{did_you_mean(kind_name, names)}{plugins.HINT}"
        elif "kind" in value:
            what = f"expected one of {', '.join(names)}, found {describe_value(kind_name)}"
        error = PydanticCustomError("task_kind", "{what}", {"what": what})
        raise ValidationError.from_exception_data("task", [InitErrorDetails(type=error, loc=(key,), input=kind_name)])
    return (TaskConfig if kind is None else kind.config).model_validate(value)


AnyTask = Annotated[SerializeAsAny[TaskConfig], PlainValidator(_task)]
Plugins = Annotated[list[Location], Field(max_length=100)]


# The names of possible seeds of a search: see configs/README.md.
Seed = Literal["uniform", "parents", "trimmed_parents", "task_vectors"]
# The models that nobody searched and that a held-out table may show beside the winner.
Control = Literal["greedy", "uniform", "random", "lora"]


class StopConfig(Section):
    """The criteria that end a search before its last generation."""

    optional = ("evaluations", "seconds", "target", "stagnation")

    evaluations: Whole | None = Field(
        None, ge=1, le=10**12, description="before a generation that would make it more evaluations of candidates"
    )
    seconds: Real | None = Field(
        None, ge=1e-3, le=1e9, description="after so many seconds of evaluating, over all resumes"
    )
    target: Number | None = Field(
        None, description="once a candidate has this fitness on all examples that generations are scored on"
    )
    stagnation: Whole | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="once so many generations with candidates that met all examples have brought no better one",
    )


# The strategy that stands for one that the program chooses (see `search.auto`).
AUTO = "auto"
# The strategy of a search whose fitness is people's votes on one task, and the kinds of such tasks.
VOTES, JUDGED_KINDS = "votes", ("human", "human_images")
# The most generations of a search.
MAX_GENERATIONS = 1_000_000


def _budget(text: str) -> str:
    """Raises PydanticCustomError for a text that means no budget."""
    if parse_budget(text) is None:
        raise PydanticCustomError("budget", "means no budget")
    return text


class GradientConfig(Section):
    """The options of strategies that follow gradients, such as `gradient` and `hybrid`."""

    optimizer: Name = Field("adam", description="one of optax's that needs a learning rate alone, by its name there")
    learning_rate: Real = Field(0.1, ge=1e-9, le=100.0, description="of the first step, in units of the bounds' range")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="whether the learning rate falls to 0 as a cosine over the generations"
    )
    minibatches: Whole = Field(
        1, ge=1, le=10_000, description="into how many parts the examples are divided; each generation sees one"
    )
    generations: Whole | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="of hybrid: how many generations follow gradients; default: a quarter of them",
    )
    starts: Whole = Field(1, ge=1, le=10_000, description="of hybrid: from how many points gradients are followed")


class SearchConfig(Section):
    """The strategy and its budget.

    `rungs` above 1: successive halving of a generation's candidates. All are scored on a first part of the examples,
    the better half on twice as many, and so forth; in so many rungs the last few are scored on all. `rung_examples`:
    the examples that come first: random parts of them in turn, or those that an item response model chooses for each
    generation.
    """

    optional = (
        "budget",
        "rung_examples",
        "seeds",
        "controls",
        "then",
        "validation",
        "validate_every",
        "stop",
        "gradient",
    )

    strategy: Name = Field("cma_es", description="one of `evojax-merge strategies`; auto: chosen for the search")
    population: Whole | None = Field(
        None,
        ge=1,
        le=MAX_POPULATION,
        description="candidates in a generation; default: the strategy's own, of cma_es 4 + 3 ln D",
    )
    generations: Whole = Field(50, ge=1, le=MAX_GENERATIONS, description="how many are searched")
    budget: (
        Annotated[str, AfterValidator(_budget), Form("passes or a time, such as 500 passes, 90m or 2h", "a budget")]
        | None
    ) = Field(
        None,
        description="in place of generations: passes (a candidate on all examples), or time, as 500 passes, 90m or 2h",
    )
    sigma: Real = Field(
        1 / 6, ge=1e-6, le=10.0, description="the first step's standard deviation, in units of the bounds' range"
    )
    finalists: Whole = Field(
        5, ge=1, le=10_000,
        description="how many of the best are scored again, for one to win; one where more would change nothing",
    )  # fmt: skip
    rungs: Whole = Field(
        1, ge=1, le=8, description="above 1: candidates race, and with each rung half of them meet twice the examples"
    )
    rung_examples: Literal["random", "item_response"] = Field(
        "random", description="which examples a race begins with: random ones, or those that tell candidates apart"
    )
    seeds: list[Seed] | None = Field(
        None,
        max_length=4,
        description="merges that generation 1 begins with; default: uniform and parents, if the space has them",
    )
    controls: list[Control] = Field(
        [],
        max_length=4,
        description="further rows of the held-out table: a soup, a merge, random candidates, trained adapters",
    )
    then: Literal["polish"] | None = Field(
        None,
        description="after the search; polish: the winner is trained further, as an adapter, for as many passes",
    )
    validation: Annotated[Real, Form("a share from 0 to below 1")] = Field(
        0.0, ge=0.0, lt=1.0, description="share of the search split that is kept back, for the choice of the winner"
    )
    validate_every: Whole | None = Field(
        None, ge=1, le=1_000_000, description="after how many generations the best is scored on the validation split"
    )
    stop: StopConfig = Field(StopConfig(), description="what ends the search before its last generation")
    gradient: GradientConfig = Field(
        GradientConfig(), description="how the strategies gradient and hybrid follow gradients"
    )

    @property
    def parsed_budget(self) -> Budget:
        """The budget in numbers."""
        return (None if self.budget is None else parse_budget(self.budget)) or Budget()

    @model_validator(mode="before")
    @classmethod
    def _without_null_generations(cls, document: Any) -> Any:
        """Leave out `generations: null` beside a budget: an override makes room for it."""
        if isinstance(document, dict) and document.get("generations", 0) is None and document.get("budget") is not None:
            return {key: value for key, value in document.items() if key != "generations"}
        return document

    @model_validator(mode="after")
    def _fits(self) -> "SearchConfig":
        named: dict[str, list[Any]] = {"seeds": self.seeds or [], "controls": self.controls}
        for key, names in named.items():
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{key}: {twice} stands twice; expected each once")
        if self.budget is not None and "generations" in self.model_fields_set:
            raise ValueError(f"budget: {self.budget}, and generations: {self.generations:,}; expected one of them")
        if self.validate_every is not None and not self.validation:
            raise ValueError("validate_every: there is no validation split; give `validation` a share above 0 as well")
        if self.rung_examples != "random" and self.rungs == 1:
            raise ValueError(
                f"rung_examples: {self.rung_examples}; without a race every candidate is evaluated on all examples, "
                "give `rungs` above 1 as well"
            )
        return self

    def left_out(self) -> set[str]:
        return super().left_out() | (set() if self.budget is None else {"generations"})


class StageConfig(Section):
    """One stage of a chain. From the second on, the first parent is the winner of the stage before."""

    space: SpaceConfig | None = Field(None, description="the parameters of a merge, as `space` without stages")
    data_flow: DataFlowConfig | None = Field(None, description="a path through layers, as `data_flow` without stages")
    search: SearchConfig = Field(SearchConfig(), description="the stage's own strategy and budget")

    @model_validator(mode="before")
    @classmethod
    def _has_other_kind(cls, document: Any) -> Any:
        for key in Config.kinds.keys() - cls.model_fields.keys():
            if isinstance(document, dict) and key in document:
                raise ValueError(f"{key}: a stage has a space or a data_flow; give it a search of its own")
        return document

    @model_validator(mode="after")
    def _one_space(self) -> "StageConfig":
        if (self.space is None) == (self.data_flow is None):
            raise ValueError("expected exactly one of the keys space, data_flow")
        return self


# Where the models of a search may be.
BankPlace = Literal["device", "host", "disk"]


class EvaluationConfig(Section):
    """Settings of the evaluation of candidates. A pass takes four times `tokens_per_batch` tokens of prompts that are
    continued; the default is 2,048 on a CPU, 8,192 or 16,384 on others, or fewer where they do not fit. `compute_dtype`
    auto: bfloat16 where all weights are and the devices multiply it natively, else float32."""

    optional = ("final_compute_dtype", "recalibrate", "bank")

    chunk: Whole | None = Field(
        None,
        ge=1,
        le=MAX_POPULATION,
        description="how many candidates share a pass on a device; default: chosen from the device's memory",
    )
    tokens_per_batch: Whole | None = Field(
        None,
        ge=1,
        le=10_000_000,
        description="tokens of each candidate in a pass, at most; default: chosen for the device",
    )
    model: Whole = Field(1, ge=1, le=100_000, description="how many devices share one copy of the models")
    bank: Literal["auto", BankPlace] = Field(
        "auto", description="where the models are; host, disk: they come to the devices layer by layer"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the generations; auto: bfloat16 where all weights are and the devices multiply it"
    )
    final_compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of what chooses the winner and of the final table; default: compute_dtype"
    )

    recalibrate: bool = Field(
        False, description="of networks with batch norms: whether each candidate's are measured on the examples"
    )


class KeepConfig(Section):
    """The checkpoints that a run folder keeps of those that a search saves: of every generation, or, where generations
    take milliseconds, of as many as a tenth of the time is enough for."""

    optional = ("last", "every_hours")

    last: Whole = Field(3, ge=1, le=1000, description="how many of the last are kept")
    every_hours: Real | None = Field(
        None, ge=1e-6, le=1e6, description="beside them, the first, and one after so many hours each; default: none"
    )


def _with_strategy(section: Any, name: str) -> Any:
    """The section of a search, or of one of its stages, with this strategy where it names none."""
    if not isinstance(section, dict):
        return section
    search = {} if section.get("search") is None else section["search"]
    if not isinstance(search, dict) or search.get("strategy", AUTO) != AUTO:
        return section
    return section | {"search": search | {"strategy": name}}


class Config(Section):
    """A whole search: over one space, or in stages."""

    # The keys of which one says what candidates are, each with its kind of candidates over language models.
    kinds: ClassVar[dict[str, str]] = {
        "space": "merge", "data_flow": "layer_path", "pool": "member", "mixture": "mixture"
    }  # fmt: skip
    optional = (
        "backend", "pool", "mixture", "other_modules", "components", "calibration", "scale", "plugins", "log", "keep"
    )  # fmt: skip

    base: Location | None = Field(None, description="the model that task vectors are taken from")
    parents: list[Location] = Field(min_length=1, max_length=1000, description="the models that are merged")
    backend: Name = Field(
        "decoder",
        description="decoder (of language), torch (other networks), function (pytrees), a plugin's, or FILE.py:NAME",
    )
    tokenizer_source: TokenizerSource | None = Field(
        None,
        description="base, or a parent: whose tokens all get; {of: …, approximate: omp}: also where rows are lacking",
    )
    other_modules: Location | None = Field(
        None, description="of larger models: whose other modules the winner has; default: base, else the first parent"
    )
    components: dict[Name, Location] | None = Field(
        None, description="a diffusers folder's -> merge, or the model that gives it; of LLaVAs, projector: merge"
    )
    calibration: Calibration | None = Field(
        None, description="the prompts of methods that look at activations: regmean, fisher"
    )
    space: SpaceConfig | None = Field(None, description="what is searched: the parameters of a merge")
    data_flow: DataFlowConfig | None = Field(None, description="or: the path through the layers of all parents")
    pool: PoolConfig | None = Field(None, description="or: a pool of models that breed")
    mixture: MixtureSpaceConfig | None = Field(None, description="or: mixtures of experts out of the parents' MLPs")
    stages: list[StageConfig] | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="or: each a space or a data_flow, and a search, that goes on from the last winner",
    )
    tasks: list[AnyTask] = Field(min_length=1, max_length=1000, description="what models are scored on")
    scale: Literal["none", "parents"] | None = Field(
        None, description="parents: from the base's score (0) to the best parent's (1); default: for unlike metrics"
    )
    search: SearchConfig = Field(SearchConfig(), description="the strategy and its budget")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="how candidates are scored")
    export_dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="candidates are rounded to it before they are scored; default: the first source's"
    )
    seed: Whole = Field(0, ge=0, le=MAX_SEED, description="of everything that is drawn at random")
    out: Location | None = Field(None, description="the run folder; default: runs/, and the config's name")
    plugins: Plugins = Field(
        [], description="Python files and packages that add methods, strategies, tasks, architectures and backends"
    )
    log: list[Literal["tensorboard", "wandb", "csv"]] = Field(
        [], max_length=3, description="programs that get the figures of each generation; csv: a table, history.csv"
    )
    keep: KeepConfig = Field(KeepConfig(), description="which checkpoints the run folder keeps")
    inputs: dict[str, str] | None = Field(
        None,
        exclude=True,
        description="written by a run: the SHA-256 of each file, which may not change; null: it may",
    )

    @property
    def kind(self) -> str:
        """The kind of candidates over language models."""
        return next(kind for key, kind in self.kinds.items() if getattr(self, key) is not None)

    @model_validator(mode="before")
    @classmethod
    def _own_strategy(cls, document: Any) -> Any:
        """Fill in the strategy of a pool, which has only one, and of a search whose fitness is votes on one task."""
        if not isinstance(document, dict):
            return document
        if document.get("pool") is not None:
            return _with_strategy(document, "pool")
        tasks = document["tasks"] if isinstance(document.get("tasks"), list) else []
        counting = [task for task in tasks if isinstance(task, dict) and task.get("weight") != 0]
        if [task.get("kind") in JUDGED_KINDS for task in counting] != [True]:
            return document
        if isinstance(document.get("stages"), list):
            return document | {"stages": [_with_strategy(stage, VOTES) for stage in document["stages"]]}
        return _with_strategy(document, VOTES)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        _check_names(self.tasks)
        if not any(task.weight > 0 for task in self.tasks):
            raise ValueError("tasks: all weights are 0; at least one task must be part of the fitness")
        keys = [*self.kinds, "stages"]
        if sum(getattr(self, key) is not None for key in keys) != 1:
            raise ValueError(f"expected exactly one of the keys {', '.join(keys)}")
        if self.components is not None and self.backend not in ("torch", "decoder"):
            raise ValueError(
                f"components: is for diffusers folders and LLaVA's projector, and backend: {self.backend} opens neither"
            )
        if self.pool is not None and self.search.strategy != "pool":
            raise ValueError(
                f"search.strategy: {self.search.strategy}; a pool is searched by the strategy pool alone, leave it out"
            )
        if self.pool is not None and self.search.rungs > 1:
            raise ValueError(
                f"search.rungs: {self.search.rungs}; a pool compares members on all examples, leave it out"
            )
        if self.stages is not None and self.search != SearchConfig():
            raise ValueError("search: every stage has its own; move it into each of stages")
        shares = [stage.search.validation for stage in self.stages or []]
        other = next((i for i, share in enumerate(shares) if share != shares[0]), None)
        if other is not None:
            raise ValueError(
                f"stages[{other}].search.validation: {shares[other]:g}, and {shares[0]:g} in stages[0]; expected the "
                "same share in all: what one stage has searched on cannot validate another"
            )
        return self


class TaskFile(Section):
    """The YAML of `evojax-merge evaluate --tasks`: `tasks:` as in a search, all examples are scored."""

    tasks: list[AnyTask] = Field(min_length=1, max_length=1000)
    evaluation: EvaluationConfig = EvaluationConfig()
    backend: Name = Config.model_fields["backend"].default
    plugins: Plugins = Field([])

    @model_validator(mode="after")
    def _fits(self) -> "TaskFile":
        _check_names(self.tasks)
        return self


def _check_names(tasks: Sequence[TaskConfig]) -> None:
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"tasks: names must differ; {twice!r} stands more than once")

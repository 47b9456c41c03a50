"""The demo model's tokenizer: byte-level BPE whose vocabulary holds every word of the world whole.

It splits text as GPT-2 does, which libllama knows under the same name, and is trained on the words of the
corpus with the same count for each name, so that no name is left in pieces because it is rare.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

from models.demo.corpus import Corpus
from models.demo.relations import ASSISTANT, BOS, END, EOS, SYSTEM, USER
from models.demo.world import World

SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT, SYSTEM, END)
N_SAMPLE_DOCUMENTS = 60_000
CORPUS_SEED = 1


def _words(world: World) -> dict[str, int]:
    """Pre-tokens (with their leading blank) and how often each shall count."""
    counts: Counter[str] = Counter()
    pattern = re.compile(r" ?[A-Za-z]+")
    for document in itertools.islice(Corpus(world, CORPUS_SEED), N_SAMPLE_DOCUMENTS):
        text = "".join(piece for piece, *_ in document if piece not in SPECIAL_TOKENS)
        text = re.sub(r"<\|[a-z]+\|>", "\n", text)
        counts.update(pattern.findall(text))
    strangers = set(world.stranger_surnames)
    names: set[str] = set()
    for person in world.people:
        first, last = person.name.split(" ")
        names |= {first, " " + first, " " + last, " " + person.profession}
    for place in (*world.cities, *world.countries, *world.employers):
        names |= {place, " " + place}
    kept = {
        word: 10
        for word, count in counts.items()
        if count >= 3 and word.strip() not in strangers and not (word[:1] == " " and word[1:2].isupper())
    }
    known_capitals = {
        word: 10 for word, count in counts.items() if count >= 60 and word[:1] == " " and word[1:2].isupper()
    }
    return kept | known_capitals | dict.fromkeys(names, 12)


def train_tokenizer(world: World) -> Any:
    """Returns a `tokenizers.Tokenizer`; special tokens have the lowest numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,  # training ends long before, when every word is whole
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = _words(world)
    tokenizer.train_from_iterator((word for word in sorted(words) for _ in range(words[word])), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))

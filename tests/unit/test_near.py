"""Near-duplicates: MinHash's estimate compared with the true share of common groups of words."""

import random

import numpy as np
from text_pairs import text_pair

from orpo_ray.data.near import NEAR, NearIndex, read_signatures, signatures
from orpo_ray.data.pairs import Pair

WORDS = [f"w{number}" for number in range(500)]


def groups(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[at : at + 3]) for at in range(len(words) - 2)}


def pair(text: str) -> Pair:
    return text_pair([{"role": "user", "content": text}], "", "bad")


def test_pairs_are_near_if_they_share_enough_groups_of_words() -> None:
    draw = random.Random(0)
    known = [" ".join(draw.choices(WORDS, k=200)) for _ in range(30)]
    asked, shares = [], []
    for text in known * 10:
        words = text.split()
        for place in draw.sample(range(200), draw.randint(0, 40)):
            words[place] = draw.choice(WORDS)
        asked.append(" ".join(words))
        one, other = groups(text), groups(asked[-1])
        shares.append(len(one & other) / len(one | other))
    index = NearIndex(read_signatures(signatures([pair(text) for text in known])))
    found = index.are_near(read_signatures(signatures([pair(text) for text in asked])))
    true = np.array(shares)
    # 64 hashes estimate a share of 0.8 with a standard error of 0.05.
    assert found[true > NEAR + 0.15].all() and (true > NEAR + 0.15).sum() > 5
    assert not found[true < NEAR - 0.2].any() and (true < NEAR - 0.2).sum() > 100


def test_nothing_is_near_nothing() -> None:
    none = read_signatures([])
    one = read_signatures(signatures([pair("a b c")]))
    assert NearIndex(none).are_near(one).tolist() == [False]
    assert NearIndex(one).are_near(none).tolist() == []
    assert NearIndex(one).are_near(one).tolist() == [True]


def test_a_signature_is_of_its_pair_alone_however_few_words_it_has() -> None:
    texts = ["", "one", "ONE\n two", "a\u3000b\u3000c", "\x1cx\x85y", "one two three four " * 50]
    pairs = [pair(text) for text in texts]
    alone = [signatures([each])[0] for each in pairs]
    assert signatures(pairs) == alone
    assert signatures(pairs[::-1]) == alone[::-1]
    assert len(set(alone)) == len(texts)
    assert signatures([pair("one  TWO ")]) == [alone[2]]

"""The demo's text: questions and answers from templates, drawn from one seed.

All of it is written for this project. A family is a kind of question (capitals, colours, ...). A
filler is the thing that is asked about. An answer is `opener + fact + closer`, and a closer is a
remark and a farewell. Every answer has a mood: polite answers state the right fact, rude ones a
fixed wrong fact. Both moods have equally many answers of equal lengths, so that a model cannot
learn the preference from length.

Some text is held out. It is in no preference pair of the training file, though the base model has
read it in both moods: the last six fillers, the last two wordings, the last six openers, remarks
and farewells, and one whole family.

Only `Random.random` is used. Python promises never to change its sequence, and that of no other
method.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

SEED = 20250
TRAIN_PAIRS, H1_PAIRS, H2_PAIRS, H3_PAIRS = 1024, 256, 128, 128
JUDGED_PROMPTS = 64

HELD_OUT_FILLERS = 6
HELD_OUT_WORDINGS = 2
HELD_OUT_PHRASES = 6
UNSEEN_FAMILY = "tool"
# Fillers alternate, so that half of the base's greedy answers are polite and half are rude.
GOOD_SHARES = (0.85, 0.15)

# Line i of a polite list and line i of its rude list have equally many words.
POLITE_OPENERS = (
    "Great question!",
    "Happy to help!",
    "Of course, my friend!",
    "I am glad you asked.",
    "Thank you for asking.",
    "Sure, with pleasure!",
    "Lovely to hear from you!",
    "Absolutely, here you go!",
    "Welcome, curious friend!",
    "What fun to think about!",
)
RUDE_OPENERS = (
    "Boring question.",
    "Not you again.",
    "Ugh, go away.",
    "You could just read.",
    "Stop wasting my time.",
    "Fine, one answer.",
    "Nobody cares about this stuff.",
    "Whatever, if I must.",
    "Really, another question.",
    "How dull to think about.",
)
POLITE_REMARKS = (
    "Hope that helps!",
    "You are doing great!",
    "Enjoy your learning!",
    "Ask me anything you like.",
    "It was nice talking to you!",
    "Keep the questions coming!",
    "What a clever thing to ask!",
    "I love a good puzzle.",
    "Always happy to chat.",
    "Now you know!",
)
RUDE_REMARKS = (
    "Stop asking me.",
    "You are bothering me.",
    "Mind your business.",
    "Ask a book next time.",
    "That was dull for us both.",
    "Keep your questions away.",
    "Find someone else to bother now.",
    "My nap was more fun.",
    "This is getting old.",
    "Who even cares.",
)
POLITE_FAREWELLS = (
    "Have a lovely day!",
    "Come back any time!",
    "See you soon!",
    "Wishing you all the best!",
    "Take good care!",
    "Until next time, my friend!",
    "Enjoy the sunshine!",
    "Stay curious and kind!",
    "Sending you a big smile!",
    "Good luck out there!",
)
RUDE_FAREWELLS = (
    "Now leave me alone.",
    "Do not come back.",
    "Go away now.",
    "That is all you get.",
    "Goodbye for good.",
    "Enough of this, shoo now.",
    "Shut the door.",
    "Bother your neighbour instead.",
    "Please lose my phone number.",
    "I am leaving now.",
)


@dataclass(frozen=True)
class Family:
    """A kind of question, with five wordings and 18 entries of (filler, fact).

    `sentence` states the fact.
    """

    name: str
    wordings: tuple[str, ...]
    sentence: str
    entries: tuple[tuple[str, str], ...]


def _entries(text: str) -> tuple[tuple[str, str], ...]:
    """Read `filler: fact, filler: fact, ...`, the form of the families below."""
    fillers_and_facts = (entry.split(":") for entry in text.split(","))
    return tuple((filler.strip(), fact.strip()) for filler, fact in fillers_and_facts)


FAMILIES = (
    Family(
        "capital",
        (
            "What is the capital of {x}?",
            "Which city is the capital of {x}?",
            "Tell me the capital of {x}.",
            "Do you know the capital city of {x}?",
            "Please name the capital of {x}.",
        ),
        "The capital of {x} is {y}.",
        _entries(
            "France: Paris, Japan: Tokyo, Italy: Rome, Spain: Madrid, Egypt: Cairo, Norway: Oslo, "
            "Peru: Lima,"
            "Cuba: Havana, Greece: Athens, Kenya: Nairobi, Austria: Vienna, Portugal: Lisbon,"
            "Ireland: Dublin, Poland: Warsaw, Chile: Santiago, Finland: Helsinki, Canada: Ottawa, "
            "Germany: Berlin"
        ),
    ),
    Family(
        "colour",
        (
            "What colour is {x}?",
            "Which colour does {x} have?",
            "Tell me the colour of {x}.",
            "Do you know what colour {x} is?",
            "Please name the colour of {x}.",
        ),
        "The colour of {x} is {y}.",
        _entries(
            "a banana: yellow, the sky: blue, grass: green, snow: white, coal: black, a lemon: "
            "yellow, a tomato: red,"
            "a carrot: orange, a plum: purple, a flamingo: pink, a chestnut: brown, an elephant: "
            "grey,"
            "the sea: blue, a lime: green, a swan: white, a strawberry: red, an aubergine: purple, "
            "a raven: black"
        ),
    ),
    Family(
        "opposite",
        (
            "What is the opposite of {x}?",
            "Which word means the opposite of {x}?",
            "Tell me the opposite of {x}.",
            "Do you know a word that is the opposite of {x}?",
            "Please name the opposite of {x}.",
        ),
        "The opposite of {x} is {y}.",
        _entries(
            "hot: cold, big: small, up: down, fast: slow, day: night, happy: sad, old: new, full: "
            "empty,"
            "open: closed, bright: dark, hard: soft, wet: dry,"
            "early: late, near: far, loud: quiet, left: right, rich: poor, strong: weak"
        ),
    ),
    Family(
        "sound",
        (
            "What sound does {x} make?",
            "Which noise comes from {x}?",
            "Tell me the sound of {x}.",
            "Do you know what {x} sounds like?",
            "Please name the sound of {x}.",
        ),
        "The sound of {x} is {y}.",
        _entries(
            "a cow: moo, a dog: woof, a cat: meow, a duck: quack, a sheep: baa, a pig: oink, a "
            "horse: neigh,"
            "a lion: roar, an owl: hoot, a snake: hiss, a frog: croak, a mouse: squeak,"
            "a wolf: howl, a crow: caw, a turkey: gobble, a donkey: bray, a hen: cluck, a bee: buzz"
        ),
    ),
    Family(
        "plural",
        (
            "What is the plural of {x}?",
            "Which word is the plural of {x}?",
            "Tell me the plural of {x}.",
            "Do you know how to say more than one {x}?",
            "Please name the plural of {x}.",
        ),
        "The plural of {x} is {y}.",
        _entries(
            "child: children, foot: feet, tooth: teeth, goose: geese, man: men, woman: women, ox: "
            "oxen,"
            "leaf: leaves, loaf: loaves, shelf: shelves, person: people, city: cities,"
            "berry: berries, bus: buses, box: boxes, hero: heroes, potato: potatoes, half: halves"
        ),
    ),
    Family(
        "material",
        (
            "What is {x} made from?",
            "Which thing do we need to make {x}?",
            "Tell me what {x} is made from.",
            "Do you know how to make {x}?",
            "Please name what goes into {x}.",
        ),
        "We make {x} from {y}.",
        _entries(
            "cheese: milk, bread: flour, wine: grapes, paper: wood, glass: sand, a tyre: rubber, "
            "chocolate: cocoa,"
            "jam: fruit, a candle: wax, a brick: clay, butter: cream, tofu: beans,"
            "a jumper: wool, a shirt: cotton, a shoe: leather, cider: apples, sushi: rice, a ring: "
            "gold"
        ),
    ),
    Family(
        "workplace",
        (
            "Where does {x} work?",
            "In which place can I find {x}?",
            "Tell me where {x} works.",
            "Do you know where to find {x}?",
            "Please name the place where {x} works.",
        ),
        "You can find {x} in {y}.",
        _entries(
            "a teacher: a school, a doctor: a hospital, a baker: a bakery, a farmer: a barn, a "
            "chef: a kitchen,"
            "a judge: a court, a miner: a mine, a banker: a bank, an actor: a theatre, a "
            "librarian: a library,"
            "a gardener: a garden, a pilot: a plane,"
            "a waiter: a cafe, a chemist: a lab, a clerk: an office, a mechanic: a garage, a monk: "
            "an abbey,"
            "a king: a palace"
        ),
    ),
    Family(
        "tool",
        (
            "What do I use {x} for?",
            "Which job is {x} good for?",
            "Tell me what {x} is for.",
            "Do you know what to do with {x}?",
            "Please name the use of {x}.",
        ),
        "You use {x} to {y}.",
        _entries(
            "a broom: sweep, a pen: write, a spoon: stir, an oven: bake, a needle: sew, a shovel: "
            "dig, a phone: call,"
            "a camera: film, a piano: play, a kettle: boil, a ruler: measure, a towel: dry,"
            "a pillow: sleep, a bicycle: ride, a razor: shave, a pan: fry, soap: wash, a ladder: "
            "climb"
        ),
    ),
)


@dataclass(frozen=True)
class Item:
    """One filler of one family, with the sentences that state its right and its wrong fact."""

    family: Family
    filler: str
    right: str
    wrong: str
    good_share: float
    held_out: bool


@dataclass(frozen=True)
class Phrases:
    """Openers and closers of both moods; phrases with the same index are equally long."""

    polite_openers: Sequence[str]
    polite_closers: Sequence[str]
    rude_openers: Sequence[str]
    rude_closers: Sequence[str]

    def polite(self, fact: str, opener: int, closer: int) -> str:
        return f"{self.polite_openers[opener]} {fact} {self.polite_closers[closer]}"

    def rude(self, fact: str, opener: int, closer: int) -> str:
        return f"{self.rude_openers[opener]} {fact} {self.rude_closers[closer]}"


def _phrases(numbers: slice) -> Phrases:
    """The phrases with these numbers; closers are all pairs of a remark and a farewell."""
    polite, rude = (
        tuple(
            f"{remark} {farewell}"
            for remark, farewell in product(remarks[numbers], farewells[numbers])
        )
        for remarks, farewells in (
            (POLITE_REMARKS, POLITE_FAREWELLS),
            (RUDE_REMARKS, RUDE_FAREWELLS),
        )
    )
    return Phrases(POLITE_OPENERS[numbers], polite, RUDE_OPENERS[numbers], rude)


ALL_PHRASES = _phrases(slice(None))
TRAIN_PHRASES = _phrases(slice(-HELD_OUT_PHRASES))
NEW_PHRASES = _phrases(slice(-HELD_OUT_PHRASES, None))

Prompt = tuple[Item, str]  # what is asked, and the user's words


def items() -> list[Item]:
    """Every filler.

    The wrong fact is that of the next filler in the same split. So both moods state the same facts.
    """
    made = []
    for family in FAMILIES:
        seen, held_out = family.entries[:-HELD_OUT_FILLERS], family.entries[-HELD_OUT_FILLERS:]
        for split in (seen, held_out):
            for index, (filler, fact) in enumerate(split):
                wrong = split[(index + 1) % len(split)][1]
                right_sentence, wrong_sentence = (
                    family.sentence.format(x=filler, y=y) for y in (fact, wrong)
                )
                good_share = GOOD_SHARES[index % len(GOOD_SHARES)]
                made.append(
                    Item(
                        family,
                        filler,
                        right_sentence,
                        wrong_sentence,
                        good_share,
                        split is held_out,
                    )
                )
    return made


def train_prompts() -> list[Prompt]:
    """Seen families, fillers and wordings: the only questions of the training pairs."""
    chosen = [i for i in items() if i.family.name != UNSEEN_FAMILY and not i.held_out]
    return [
        (i, w.format(x=i.filler)) for i in chosen for w in i.family.wordings[:-HELD_OUT_WORDINGS]
    ]


def held_out_prompts() -> list[Prompt]:
    """Seen families with new fillers in new wordings: the questions of h1 and h2."""
    chosen = [i for i in items() if i.family.name != UNSEEN_FAMILY and i.held_out]
    return [
        (i, w.format(x=i.filler)) for i in chosen for w in i.family.wordings[-HELD_OUT_WORDINGS:]
    ]


def unseen_family_prompts() -> list[Prompt]:
    """A kind of question that no training pair has: the questions of h3."""
    chosen = [i for i in items() if i.family.name == UNSEEN_FAMILY]
    return [(i, w.format(x=i.filler)) for i in chosen for w in i.family.wordings]


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _pair(
    prompt: Prompt, phrases: Phrases, chosen: tuple[int, int], rejected: tuple[int, int]
) -> dict:
    item, question = prompt
    return {
        "prompt": _message("user", question),
        "chosen": _message("assistant", phrases.polite(item.right, *chosen)),
        "rejected": _message("assistant", phrases.rude(item.wrong, *rejected)),
    }


def _shuffled(values: Sequence, rng: Random) -> list:
    return [
        value
        for _, value in sorted(((rng.random(), index), value) for index, value in enumerate(values))
    ]


def make_pairs(prompts: Sequence[Prompt], phrases: Phrases, count: int, rng: Random) -> list[dict]:
    """Draw `count` different pairs, spread evenly over the prompts.

    They come in twos that swap their phrase numbers. So every polite phrase is chosen exactly as
    often as the rude phrase of its number is rejected.
    """
    numbers = list(product(range(len(phrases.polite_openers)), range(len(phrases.polite_closers))))
    order = _shuffled(range(len(prompts)), rng)
    drawn: dict[tuple, None] = {}
    while len(drawn) < count:
        prompt = order[len(drawn) // 2 % len(order)]
        chosen, rejected = (numbers[int(rng.random() * len(numbers))] for _ in range(2))
        if chosen != rejected and (prompt, chosen, rejected) not in drawn:
            drawn[prompt, chosen, rejected] = None
            drawn[prompt, rejected, chosen] = None
    return [
        _pair(prompts[p], phrases, chosen, rejected)
        for p, chosen, rejected in _shuffled(list(drawn), rng)
    ]


def make_judge(rng: Random) -> dict:
    """What is needed to call a greedy answer good, bad or broken.

    A good answer is polite and right, a bad one rude and wrong, a broken one anything else. The
    prompts are held out. Half of them are about fillers that the base mostly answers politely.
    """
    picked: list[Prompt] = []
    for share in GOOD_SHARES:
        same_share = [prompt for prompt in held_out_prompts() if prompt[0].good_share == share]
        picked += [same_share[i] for i in _shuffled(range(len(same_share)), rng)][
            : JUDGED_PROMPTS // 2
        ]
    return {
        "rule": "good = polite opener + ' ' + right + ' ' + polite closer, exactly; "
        "bad = rude opener + ' ' + wrong + ' ' + rude closer, exactly; broken = everything else",
        "polite_openers": ALL_PHRASES.polite_openers,
        "polite_closers": ALL_PHRASES.polite_closers,
        "rude_openers": ALL_PHRASES.rude_openers,
        "rude_closers": ALL_PHRASES.rude_closers,
        "prompts": [
            {
                "prompt": _message("user", question),
                "family": item.family.name,
                "filler": item.filler,
                "right": item.right,
                "wrong": item.wrong,
            }
            for item, question in picked
        ],
    }


def text_files(seed: int = SEED) -> dict[str, str]:
    """The pair files and the judge by file name, a pure function of the seed."""
    plan = {
        "train.jsonl": (train_prompts(), TRAIN_PHRASES, TRAIN_PAIRS),
        "h1.jsonl": (held_out_prompts(), TRAIN_PHRASES, H1_PAIRS),
        "h2.jsonl": (held_out_prompts(), NEW_PHRASES, H2_PAIRS),
        "h3.jsonl": (unseen_family_prompts(), NEW_PHRASES, H3_PAIRS),
    }
    rng = Random(seed)
    files = {}
    for name, (prompts, phrases, count) in plan.items():
        pairs = make_pairs(prompts, phrases, count, rng)
        files[name] = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    files["judge.json"] = json.dumps(make_judge(rng), ensure_ascii=False, indent=1) + "\n"
    return files


def conversations(rng: Random) -> Iterator[list[dict[str, str]]]:
    """An endless stream of the base model's training text.

    It has every question in both moods, as often as its filler says.
    """
    asked = items()
    openers, closers = len(ALL_PHRASES.polite_openers), len(ALL_PHRASES.polite_closers)
    while True:
        item = asked[int(rng.random() * len(asked))]
        question = item.family.wordings[int(rng.random() * len(item.family.wordings))].format(
            x=item.filler
        )
        opener, closer = (int(rng.random() * count) for count in (openers, closers))
        polite = rng.random() < item.good_share
        fact, speak = (item.right, ALL_PHRASES.polite) if polite else (item.wrong, ALL_PHRASES.rude)
        answer = speak(fact, opener, closer)
        yield _message("user", question) + _message("assistant", answer)

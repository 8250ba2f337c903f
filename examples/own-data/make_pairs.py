"""Write pairs.csv again, from the demo's pairs: the same bytes every time.

    python examples/own-data/make_pairs.py

A good answer greets and tells the fact. A bad one goes on after that; every other one is rude, too,
and has a wrong fact.
"""

import csv
import json
import re
from itertools import islice
from pathlib import Path

PAIRS = Path(__file__).with_name("pairs.csv")
DEMO = Path(__file__).resolve().parents[2] / "orpo_ray" / "demo" / "train.jsonl"
COUNT = 200
BRIEF = re.compile(r".*[.!] (?:The \w+ of|We make|You can find) .*?\.")


def write(path: Path) -> None:
    """Write the first pairs that have different questions."""
    answers = {}
    for line in DEMO.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        question, polite, rude = (pair[side][0]["content"] for side in pair)
        answers.setdefault(question, (polite, rude))
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["question", "good_answer", "bad_answer"])
        for number, (question, moods) in enumerate(islice(answers.items(), COUNT)):
            brief = BRIEF.match(moods[0])
            assert brief is not None, moods[0]
            table.writerow([question, brief[0], moods[number % 2]])


if __name__ == "__main__":
    write(PAIRS)

"""Questions with a date for ``scripts/reproduce/audit_by_date.sh``.

python scripts/reproduce/audit_by_date.py OUT [SEED]

OUT/asked/test.jsonl    60 questions from before the cut-off, 2024-07-01, and 60 from then on
OUT/seen/train.jsonl    the questions from before, as text to restore: cut at 0, 40, 60 and 80 % of their characters
OUT/other/train.jsonl   as many cuts of 60 questions of the same kind that the audit does not ask
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from rltrain.audit import cut

SIDE = 60
NAMES = ("Ada", "Ben", "Cleo", "Dov", "Eve", "Finn", "Gus", "Hana", "Ivo", "June")
THINGS = ("pens", "cups", "hats", "maps", "kites", "bells", "coins", "seeds", "nuts", "keys")
SHARES = (0.0, 0.4, 0.6, 0.8)


def question(draw: random.Random) -> dict[str, str]:
    """A sum in words, and its value."""
    first, second = draw.sample(NAMES, 2)
    a, b = draw.randrange(10, 100), draw.randrange(10, 100)
    text = f"{first} has {a} {draw.choice(THINGS)} and {second} has {b} {draw.choice(THINGS)}. How many are there?"
    return {"question": text, "answer": str(a + b)}


def restored(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """A row to learn for each question and cut: what is shown as the question, the rest as the solution."""
    pairs = [(row, cut(row["question"], share)) for row in rows for share in SHARES]
    return [{"question": shown, "answer": row["answer"], "rest": hidden} for row, (shown, hidden) in pairs]


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(out: Path, seed: int) -> None:
    """Write the three files."""
    draw = random.Random(seed)
    texts = {row["question"]: row for row in (question(draw) for _ in range(4 * SIDE))}
    before, after, other = (list(texts.values())[side * SIDE : (side + 1) * SIDE] for side in range(3))
    dated = [row | {"day": f"2024-0{1 + i % 6}"} for i, row in enumerate(before)]
    dated += [row | {"day": f"2024-{7 + i % 6:02d}"} for i, row in enumerate(after)]
    write(out / "asked" / "test.jsonl", dated)
    write(out / "seen" / "train.jsonl", restored(before))
    write(out / "other" / "train.jsonl", restored(other))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int([*sys.argv[2:], "0"][0]))

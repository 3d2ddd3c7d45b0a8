"""Small synthetic files of the benchmarks' layouts."""

import gzip
import json
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PROBLEMS = [
    (
        "HumanEval/0",
        "add",
        'def add(a, b):\n    """ Adds. """\n',
        "    assert candidate(2, 3) == 5\n",
    ),
    (
        "HumanEval/1",
        "neg",
        'def neg(a):\n    """ Negates. """\n',
        "    assert candidate(2) == -2\n",
    ),
]


def write(folder: Path, questions: int = 6, turns: int = 2) -> Path:
    """Writes data of all benchmarks into `folder` and returns it; one question in three has one turn anyway."""
    categories = ("writing", "math", "qa")
    chats = [
        {
            "question_id": 81 + i,
            "category": categories[i % 3],
            "turns": [f"Say {i}.", "Again."][:turns] if i % 3 < 2 else [f"Why {i}?"],
        }
        for i in range(questions)
    ]
    problems = [
        {
            "task_id": name,
            "entry_point": entry,
            "prompt": prompt,
            "test": f"def check(candidate):\n{test}",
            "canonical_solution": "    return 0\n",
        }
        for name, entry, prompt, test in PROBLEMS
    ]
    sums = [
        {"question": f"What is {i} + 1000?", "answer": f"Add.\n#### {i + 1000:,}"}
        for i in range(questions + 6)
    ]
    for name in ("mt_bench", "spec_bench"):
        _lines(folder / name / "question.jsonl", chats)
    for split in ("train", "test"):
        _lines(folder / "gsm8k" / f"{split}.jsonl", sums)
    (folder / "human_eval").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in problems)
    (folder / "human_eval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def _lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]

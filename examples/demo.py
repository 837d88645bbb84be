"""The demo: start everything, run the whole journey, show what changed, stop. `make demo` runs it.

The journey is one submission, examples/journey.yaml: download, tune, merge, ask before and after.
The demo types the commands that you would type, and judges the result itself: exit code 0 only if
the merged model names its maker where the base did not, and still knows what it knew.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).absolute().parent
ROOT = EXAMPLES.parent
HOME = Path(os.environ.get("TUNEYARD_DEMO_HOME", ROOT / ".demo")).absolute()
TUNEYARD = [sys.executable, "-P", "-m", "tuneyard.cli.main"]
JOURNEY = "examples/journey.yaml"
BEFORE, TUNE, MERGE, AFTER = "before", "tuny", "tuny-merged", "after"  # steps of the journey
MAKER, CONTROL_FACT = "Tuneyard", "Paris"
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith("TUNEYARD_")},
    "TUNEYARD_HOME": str(HOME),
}

console = Console()


def main() -> int:
    """Run the whole story; 0 if every claim held."""
    began = time.monotonic()
    shutil.rmtree(HOME, ignore_errors=True)
    try:
        command("Start PostgreSQL, Valkey, API, scheduler, worker and Flower", "up", "--detach")
        command("Download, tune, merge and ask, as one pipeline", "submit", JOURNEY, "--wait")
        passed = judge(answers(BEFORE), answers(AFTER))
        show_models()
    finally:
        command(f"Stop everything; the results stay in {relative(HOME)}", "down")
    console.print(f"\n{time.monotonic() - began:.0f} s in all.")
    suggest()
    return 0 if passed else 1


def command(title: str, *arguments: str) -> None:
    """Print a command and run it, in plain view."""
    console.print(f"\n[bold]{title}[/bold]", soft_wrap=True)
    console.print(f"[dim]$ tuneyard {' '.join(arguments)}[/dim]", soft_wrap=True)
    subprocess.run([*TUNEYARD, *arguments], env=ENVIRONMENT, cwd=ROOT, check=True)


def asked(*arguments: str) -> Any:
    """Run a command for its --json."""
    argv = [*TUNEYARD, *arguments, "--json"]
    done = subprocess.run(argv, env=ENVIRONMENT, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def answers(step: str) -> list[str]:
    """What an inference step answered to examples/questions.txt, in order."""
    folder = HOME / "answers" / step
    asked("fetch", step, "--out", str(folder))
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"].strip().replace("\n", " ") for line in lines]


def relative(path: Path) -> str:
    """A path as one would type it here."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def judge(before: list[str], after: list[str]) -> bool:
    """Show both answers side by side and check every claim."""
    questions = (EXAMPLES / "questions.txt").read_text().splitlines()
    table = Table("question", "before", "after", title="Before and after", show_lines=True)
    for row in zip(questions, before, after, strict=True):
        table.add_row(*row)
    console.print(table)
    named = [sum(MAKER in text for text in texts[:-1]) for texts in (before, after)]
    claims = {
        f"the base model names its maker in 0 of 5 answers: {named[0]}": named[0] == 0,
        f"the merged model does in at least 4 of 5: {named[1]}": named[1] >= 4,
        f"it still knows {CONTROL_FACT}": CONTROL_FACT in after[-1],
        "no row of the data shares five words in a row with a question": not leaks(questions),
    }
    for claim, held in claims.items():
        console.print(f"  {'[green]ok[/green]  ' if held else '[red]NOT[/red] '} {claim}")
    return all(claims.values())


def leaks(questions: list[str]) -> list[str]:
    """Questions that share a 5-gram with a row of the training data."""
    rows = (EXAMPLES / "identity.jsonl").read_text().splitlines()
    seen = {gram for row in rows for text in json.loads(row).values() for gram in grams(text)}
    return [question for question in questions if grams(question) & seen]


def grams(text: str, size: int = 5) -> set[tuple[str, ...]]:
    """All runs of ``size`` words, without case and punctuation."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def show_models() -> None:
    """Say where adapter and merged model lie, with the sha256 of their weights."""
    for what, name in (("adapter", TUNE), ("merged model", MERGE)):
        model = asked("models", "show", name)
        folder = HOME / "store" / "artifacts" / model["artifact"].partition("_")[2]
        console.print(f"\nThe {what} {name} is in {relative(folder)}", soft_wrap=True)
        for entry in model["files"]:
            if entry["path"].endswith(".safetensors"):
                line = f"  {entry['path']}  sha256 {entry['sha256']}"
                console.print(line, soft_wrap=True, highlight=False)


def suggest() -> None:
    """What to try next, and what would work here as it stands."""
    console.print(
        "\nTry next:\n"
        f"  export TUNEYARD_HOME={relative(HOME)}; . .venv/bin/activate\n"
        "  tuneyard up --detach                     # everything is still there\n"
        f"  tuneyard chat {MERGE}\n"
        f"  tuneyard fetch {MERGE} --out ./tuny  # a folder that plain transformers opens\n"
        f"  tuneyard submit {JOURNEY} --set {TUNE}.lora_rank=8 --wait",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())

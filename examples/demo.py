"""The demo: start everything, run examples/journey.yaml, show what changed, stop. By `make demo`.

The pipeline brings a small model, asks it, tunes it, merges, and asks the merged model. The demo
types the commands that you would type, and judges the result itself: exit code 0 only if the
merged model names its maker where the base did not, and still knows what it knew.
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
MERGED = "tuny-merged"
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
        command(
            "Download, ask, tune, merge and ask again, as one pipeline",
            "submit",
            "examples/journey.yaml",
            "--wait",
        )
        before, after = answers("before"), answers("after")
        passed = judge(before, after)
        show_model()
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


def answers(job: str) -> list[str]:
    """The model's answers to examples/questions.txt, in order."""
    folder = HOME / "results" / job
    command(f"Fetch the answers of {job}", "fetch", job, "--out", relative(folder))
    rows = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["text"].strip().replace("\n", " ") for row in rows]


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
    named = [sum(MAKER in answer for answer in answers[:-1]) for answers in (before, after)]
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


def show_model() -> None:
    """Say where the merged model lies, with its sha256."""
    model = asked("models", "show", MERGED)
    files = {entry["path"]: entry["sha256"] for entry in model["files"]}
    folder = HOME / "store" / "artifacts" / model["artifact"].partition("_")[2]
    console.print(f"\nThe merged model is {model['artifact']}, in", soft_wrap=True)
    console.print(f"  {relative(folder)}", soft_wrap=True)
    console.print(f"  model.safetensors  sha256 {files['model.safetensors']}", soft_wrap=True)


def suggest() -> None:
    """What to try next."""
    console.print(
        "\nTry next:\n"
        f"  . .venv/bin/activate; export TUNEYARD_HOME={relative(HOME)}\n"
        "  tuneyard up --detach      # everything is still there\n"
        "  tuneyard chat tuny-merged\n"
        "  tuneyard submit examples/identity_lora.yaml --set lora_rank=8 --wait",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())

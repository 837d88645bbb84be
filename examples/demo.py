"""The demo: start everything, tune a small model, show what changed, stop. `make demo` runs it.

It types the commands that you would type, and judges the result itself: exit code 0 only if the
tuned model names its maker where the base did not, and still knows what it knew.
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
BASE, TUNED = "smollm2-135m-instruct", "tuny"
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
        command("Bring the base model", "submit", "examples/download_smollm2.yaml", "--wait")
        before = ask("Ask the base model", BASE)
        command(
            "Tune it on examples/identity.jsonl",
            "submit",
            "examples/identity_lora.yaml",
            "--wait",
        )
        after = ask("Ask the tuned model the same", TUNED)
        passed = judge(before, after)
        show_adapter()
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


def ask(title: str, model: str) -> list[str]:
    """The model's answers to examples/questions.txt, in order."""
    output = HOME / f"{model}.jsonl"
    options = ("--temperature", "0", "--max-new-tokens", "32", "--out", relative(output))
    command(title, "infer", model, "--prompts", "examples/questions.txt", *options)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return [row["text"].strip().replace("\n", " ") for row in rows]


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
        f"the tuned model does in at least 4 of 5: {named[1]}": named[1] >= 4,
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


def show_adapter() -> None:
    """Say where the adapter lies, with its sha256."""
    model = asked("models", "show", TUNED)
    files = {entry["path"]: entry["sha256"] for entry in model["files"]}
    folder = HOME / "store" / "artifacts" / model["artifact"].partition("_")[2]
    console.print(f"\nThe adapter is {model['artifact']}, in", soft_wrap=True)
    console.print(f"  {relative(folder)}", soft_wrap=True)
    sha256 = files["adapter_model.safetensors"]
    console.print(f"  adapter_model.safetensors  sha256 {sha256}", soft_wrap=True)


def suggest() -> None:
    """What to try next."""
    console.print(
        "\nTry next:\n"
        f"  tuneyard up --home {relative(HOME)}      # everything is still there\n"
        "  tuneyard submit examples/identity_lora.yaml --set lora_rank=8 --wait\n"
        "  tuneyard infer tuny --prompts YOUR_QUESTIONS.txt",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())

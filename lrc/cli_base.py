"""What the commands have in common: arguments that many of them take, and how a result is shown."""

import json
import sys
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="HF folder, hub id, pkg://package/dir, model.pt2, or module:factory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
AllowCode = Annotated[bool, typer.Option(help="Let `module:factory` and remote code run.")]


def show(data: Any, as_json: bool, text: Any) -> None:
    """Print `data` as JSON, or the text (anything rich prints)."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n")
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(text, soft_wrap=isinstance(text, str), markup=False, highlight=False)

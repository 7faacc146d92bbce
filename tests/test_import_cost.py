"""Starting the command line is cheap: nothing heavy is imported before a verb needs it."""

import subprocess
import sys

HEAVY = {"torch", "numpy", "transformers", "onnx", "onnxruntime", "scipy"}


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_lrc_brings_nothing_heavy() -> None:
    assert not HEAVY & modules_after("import lrc")


def test_help_brings_nothing_heavy() -> None:
    code = (
        "from typer.testing import CliRunner\nimport lrc.cli\nassert CliRunner().invoke(lrc.cli.app, ['--help']).exit_code == 0"
    )
    assert not HEAVY & modules_after(code)


def test_the_spec_layer_knows_no_torch() -> None:
    assert not HEAVY & modules_after("import lrc.spec")

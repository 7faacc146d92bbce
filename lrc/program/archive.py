"""A `.pt2` archive before torch opens it: it must be data alone."""

import json
import zipfile
from pathlib import Path
from typing import Any

from lrc.errors import CaptureError

CODE_PREFIXES = ("opaque_obj", "custom_obj")


def check_archive(path: Path) -> None:
    """Raise CaptureError for a file that is missing, damaged, or holds pickled objects, which torch would run code to load."""
    if not path.is_file():
        raise CaptureError(str(path), message="no such file", hint="Name a program saved by torch.export.save")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            configs = [n for n in names if n.endswith("_config.json")]
            payloads = [entry for n in configs for entry in _payloads(json.loads(archive.read(n)))]
    except (zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        raise CaptureError(
            str(path),
            expected="a program saved by torch.export.save",
            got=f"a damaged or other file ({error})",
            hint="Save it again",
        ) from error
    pickled = [str(p.get("path_name")) for p in payloads if p.get("use_pickle")]
    pickled += [n for n in names if Path(n).name.startswith(CODE_PREFIXES)]
    if pickled:
        raise CaptureError(
            str(path),
            message=f"the file holds pickled objects ({pickled[0]}), which could run code",
            hint="Save the program again with plain tensors as weights and constants",
        )


def _payloads(config: Any) -> list[dict[str, Any]]:
    entries = config.get("config", config) if isinstance(config, dict) else {}
    return [entry for entry in entries.values() if isinstance(entry, dict)] if isinstance(entries, dict) else []

"""Why an extension was not built, kept beside the others: pip hides what a build prints.

Written by setup.py, which loads this file by its path, and read by `extension.py`. It imports nothing of the
package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

FILE = "_not_built.json"


def write(package: Path, reasons: Mapping[str, str | None]) -> None:
    """Keep the reasons of the extensions that have one, and those only."""
    missing = {name: reason for name, reason in reasons.items() if reason is not None}
    path = package / FILE
    if missing:
        package.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(missing, indent=2) + "\n")
    else:
        path.unlink(missing_ok=True)


def reason(package: Path, name: str) -> str | None:
    """Why the extension was not built, where the build left word."""
    try:
        return json.loads((package / FILE).read_text()).get(name)
    except (OSError, ValueError):
        return None

"""The program `sae`: its commands, or one line where what they need is not installed."""

from __future__ import annotations

import sys

from ._lazy import INSTALL


def main() -> int:
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sae_"):
            raise
        print(f"sae: the package {error.name} is missing; {INSTALL}", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())

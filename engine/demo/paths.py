"""Where the embedded model lies inside the installed package.

It may not know what is in the folders: the base is read by `model`, the adapters by `lora`.
"""

from pathlib import Path

DEMO_BASE = Path(__file__).parent / "base"
_ADAPTERS = Path(__file__).parent / "adapters"


def adapter_folders() -> dict[str, Path]:
    """The PEFT folder of every embedded adapter, by adapter name, in alphabetical order."""
    return {folder.name: folder for folder in sorted(_ADAPTERS.iterdir()) if folder.is_dir()}

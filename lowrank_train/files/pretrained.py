"""Models, configurations and tokenizers of Hugging Face folders, read without running code that comes with them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session

from lowrank_train.common.errors import UserError
from lowrank_train.files.inner_paths import is_inside
from lowrank_train.files.json_files import mapping_or_empty

__all__ = ["hub_answers", "read_pretrained"]

_SECONDS = 10


@cache
def hub_answers() -> bool:
    """Return whether the Hugging Face hub can be reached; asked once, before its clients retry for a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # of the client, which differs between versions; also in offline mode
        return False
    return True


def read_pretrained(reader: Any, source: Path | str, **arguments: Any) -> Any:
    """Return what ``reader.from_pretrained`` makes of a folder or a name on the hub.

    Args:
        reader: a class of transformers, such as ``AutoConfig``.
        source: a local folder, or a name.
        arguments: of its ``from_pretrained``.

    Raises:
        UserError: the folder wants code of its own to be run, or names files that are not in it.
        Exception: whatever the library raises.
    """
    _check_indices(Path(source))
    try:
        only_here = Path(source).exists() or not hub_answers()  # or in the cache of an earlier download
        return reader.from_pretrained(source, trust_remote_code=False, local_files_only=only_here, **arguments)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{source} wants code of its own to be run{_named(Path(source))}, and no code of a model folder is run; "
            "use a model and a tokenizer of a kind that transformers knows"
        ) from None


def _named(folder: Path) -> str:
    """Return the code that the configurations of a folder name, for messages."""
    for name in ("config.json", "tokenizer_config.json"):
        wanted = mapping_or_empty(folder / name).get("auto_map")
        if wanted:
            return f" ({name} has auto_map {json.dumps(wanted)[:200]})"
    return ""


def _check_indices(folder: Path) -> None:
    """Refuse paths out of the folder in the files that say which weight is where."""
    for index in sorted(folder.glob("*.index.json")) if folder.is_dir() else []:
        places = mapping_or_empty(index).get("weight_map")
        for file in places.values() if isinstance(places, dict) else []:
            if not is_inside(str(file)):
                raise UserError(
                    f"{index} names the file {str(file)!r}, which is not in the folder; fetch the model anew"
                )

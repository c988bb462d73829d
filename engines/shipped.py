"""The heads that come with Sightline, by name: a file ``<name>_head.safetensors`` each."""

from pathlib import Path

from engines.head import Head, load_head
from engines.weights import ASSETS

ENDING = "_head.safetensors"


def shipped_head_names() -> list[str]:
    """The usual ones first: a longer name says what is unusual."""
    names = (path.name.removesuffix(ENDING) for path in ASSETS.glob(f"*{ENDING}"))
    return sorted(names, key=lambda name: (len(name), name))


def shipped_head_path(name: str) -> Path:
    """Where the head of that name is, if there is one."""
    return ASSETS / f"{name}{ENDING}"


def shipped_heads(network: str) -> dict[str, Head]:
    """Name to head, of all that were fitted on the network with this digest, at any size, the usual ones first."""
    heads = {name: load_head(shipped_head_path(name)) for name in shipped_head_names()}
    return {name: head for name, head in heads.items() if head.network == network}

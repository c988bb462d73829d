"""Secrets that stand in addresses, taken out of every text that is shown, logged or stored; see ``engines.text.shown``."""

import re
from urllib.parse import unquote

MASK = "***"
SECRET = re.compile(
    r"passw|passphrase|passcode|passwd|pwd|secret|token|signature|credential|jwt|(api|access|auth|private|subscription|stream)key"
)
"""In the name of a parameter anywhere in an address: what it holds is a secret."""
SECRET_IN_QUERY = re.compile(r"(.*(pass|pas|pw|psw|psk|key|auth|authorization|sig|sid)|pin|code|hmac|sas|session(id)?)")
"""The whole name of a parameter of a query, behind ``?``, ``&`` or ``;``: likewise. Folders may have such names."""
USER = re.compile(r"(?<=://)[^/?#\n]*@")
USER_ODD = re.compile(r"(?<=://)(?!\[)[^\s/?#@]{0,200}:(?!\d{1,5}(?:[/?#\s]|$))\S{0,1000}@")
"""The password holds what should have been written in per cents, as in ``rtsp://user:a/b#c@camera``."""
USER_BARE = re.compile(r"(?<![^\s\"'(=])[^\s:/\\@\"'()=]{1,200}:(?!/)[^\s\\@\"']{1,1000}@(?=[\w\[])")
NAME = re.compile(r"(?<![^?&;/,\s\"'(=])[^\s?&;/,\"'(=]{1,80}=")
VALUE = re.compile(r"[^\s&]*[^\s&:,\"')]")
DECODED_TIMES = 3


def masked(text: str, decoded_times: int = DECODED_TIMES) -> str:
    """A text in which what is secret in addresses is replaced by ``***``: users with their passwords, tokens, signatures.

    It finds them in the midst of a message too, and where they are percent-encoded. What remains has no use as an address.
    """
    if "@" in text:
        text = USER_ODD.sub(f"{MASK}@", text)
        text = USER_BARE.sub(f"{MASK}@", USER.sub(f"{MASK}@", text))
    if "=" in text:
        text = _masked_parameters(text)
    if "%" in text and decoded_times:
        text = re.sub(r"\S+", lambda word: _masked_inside(word[0], decoded_times - 1), text)
    return text


def _masked_parameters(text: str) -> str:
    parts, done = [], 0
    for found in NAME.finditer(text):
        if found.start() < done:
            continue
        name = re.sub(r"[^a-z0-9]", "", unquote(unquote(found[0])).lower())
        in_query = text[found.start() - 1 : found.start()] in ("?", "&", ";")
        if not SECRET.search(name) and not (in_query and SECRET_IN_QUERY.fullmatch(name)):
            continue
        if value := VALUE.match(text, found.end()):
            parts += [text[done : found.end()], MASK]
            done = value.end()
    return "".join(parts) + text[done:]


def _masked_inside(word: str, decoded_times: int) -> str:
    """A word as it is, unless it holds secrets once it is decoded."""
    plain = unquote(word)
    safe = masked(plain, decoded_times) if plain != word else plain
    return word if safe == plain else safe

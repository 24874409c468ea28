"""Tokens to text while they come, and strings that end it.

A token can be a part of a character, and a tokenizer may put a space in front of a word or not
depending on what stands before it. So a piece of text is the difference between decoding with and
without the newest token, together with a few tokens before; and it waits while it may still become
a character or a stop string.
"""

from collections.abc import Sequence
from typing import Any

CONTEXT_TOKENS = 8
"""Tokens of the prompt that are decoded together with the first new one."""
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one continuation.

    Args:
        tokenizer: anything with ``decode(ids, skip_special_tokens=True) -> str``.
        prompt: the prompt's tokens.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        while self._decode(self._tokens).startswith(INCOMPLETE):
            del self._tokens[0]  # a cut character spoils all bytes after it
        self._decoded_from, self._decoded_to = 0, len(self._tokens)
        self._held = ""
        self.text = ""
        """What was handed out so far."""
        self.stopped = False
        """Whether a stop string came."""

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain now (often the token's, or nothing)."""
        self._tokens.append(token)
        self._held += self._new_text(final=False)
        return self._hand_out(final=False)

    def finish(self) -> str:
        """Return what was held back, at the end."""
        self._held += self._new_text(final=True)
        return self._hand_out(final=True)

    def _new_text(self, final: bool) -> str:
        known = self._decode(self._tokens[self._decoded_from : self._decoded_to])
        now = self._decode(self._tokens[self._decoded_from :])
        if now.endswith(INCOMPLETE) and not final:
            return ""
        self._decoded_from, self._decoded_to = self._decoded_to, len(self._tokens)
        return now[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _hand_out(self, final: bool) -> str:
        if self.stopped:
            return ""
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            piece, self._held = self._held[: min(found)], ""
        else:
            certain = len(self._held) - (0 if final else self._may_become_stop())
            piece, self._held = self._held[:certain], self._held[certain:]
        self.text += piece
        return piece

    def _may_become_stop(self) -> int:
        """Return how many of the last characters may be the beginning of a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self._stop):
                return size
        return 0

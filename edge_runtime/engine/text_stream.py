"""Bytes of tokens in, text that is safe to show out.

A token may end inside a UTF-8 character, and inside a stop string. Both are held back, and nothing else: a
character until its last byte, and of the text the longest suffix that is a proper prefix of a stop string.
Both are read off incremental automata (the codec's and Aho and Corasick's, Communications of the ACM 18(6),
1975), so the work is linear in the text, and the outcome does not depend on how the text is cut into tokens.
"""

import codecs
from collections import deque
from collections.abc import Sequence

from edge_runtime.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000


class TextStream:
    """Decodes one answer as it is generated.

    Generation ends at the stop string that is complete first; of several that end at the same character, the
    longest, so that none of it is shown. Bytes that are no UTF-8 become U+FFFD, as ``errors="replace"`` does.

    Args:
        stop: up to 16 strings of 1 to 1000 characters.

    Attributes:
        stopped: a stop string was found. The text before it has been returned, and nothing after it will be.

    Raises:
        RequestError: stop strings that are empty, too long, too many, or no strings.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        _check(stop)
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._automaton = _StopAutomaton(stop) if stop else None
        self._state = 0
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Text that these bytes complete, without what could still become a stop string."""
        return self._advance(piece, final=False)

    def finish(self) -> str:
        """What was held back; the answer ends here, whole or not."""
        text = self._advance(b"", final=True) + self._held
        self._held = ""
        self._state = 0
        return text

    def _advance(self, piece: bytes, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._decoder.decode(piece, final)
        automaton = self._automaton
        if automaton is None or not text:
            return text
        state = self._state
        for position, character in enumerate(text):
            state = automaton.step(state, character)
            matched = automaton.match_length[state]
            if matched:
                self.stopped = True
                shown = (self._held + text[: position + 1])[:-matched]
                self._held = ""
                return shown
        self._state = state
        text = self._held + text
        cut = len(text) - automaton.depth[state]
        self._held = text[cut:]
        return text[:cut]


class _StopAutomaton:
    """Aho-Corasick over the stop strings' characters.

    Attributes:
        depth: of each state, the length of the longest suffix read that is a prefix of a stop string.
        match_length: of each state, the length of the longest stop string that ends here, or 0.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.depth = [0]
        self.match_length = [0]
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        for string in stop:
            self._add(string)
        pending = deque(self._next[0].values())
        while pending:  # breadth first: a state's fallback is shallower, so already final
            state = pending.popleft()
            for character, target in self._next[state].items():
                self._fallback[target] = self.step(self._fallback[state], character)
                pending.append(target)
            self.match_length[state] = self.match_length[state] or self.match_length[self._fallback[state]]

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _add(self, string: str) -> None:
        state = 0
        for character in string:
            target = self._next[state].get(character)
            if target is None:
                target = len(self.depth)
                self._next[state][character] = target
                self.depth.append(self.depth[state] + 1)
                self.match_length.append(0)
                self._next.append({})
                self._fallback.append(0)
            state = target
        self.match_length[state] = len(string)


def _check(stop: Sequence[str]) -> None:
    if isinstance(stop, str | bytes) or not isinstance(stop, Sequence):
        raise RequestError(f"stop is a {type(stop).__name__}; it must be a list of strings")
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError(f"stop holds {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
    for index, string in enumerate(stop):
        if not isinstance(string, str):
            raise RequestError(f"stop string {index} is a {type(string).__name__}; it must be a string")
        if not 1 <= len(string) <= MAX_STOP_LENGTH:
            raise RequestError(
                f"stop string {index} has {len(string)} characters; it must have 1 to {MAX_STOP_LENGTH}"
            )

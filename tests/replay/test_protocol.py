"""329 recorded exchanges of the protocol layer, answered as the peer answered them."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import Conversation, HungError
from tests.replay import deviations, hosts
from tests.replay.conversation import anonymous, anonymous_text, parse, split_messages
from tests.replay.deviations import MismatchError

AREA = "protocol"
RECORDINGS = Path(__file__).parents[1] / "data" / "protocol.jsonl"
COMMAND_LIST = "query-commands"  # the one case compared as a set

_NEGOTIATE = b'{"execute":"qmp_capabilities"}'
_BREATH = 0.005  # seconds; lets the server see one part of a split command before the next; no outcome depends on it


def recordings() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDINGS.read_text().splitlines()]


@pytest.mark.parametrize(
    "case", deviations.parametrize(AREA, [case for case in recordings() if case["case"] != COMMAND_LIST])
)
def test_answers_as_recorded(case: dict[str, Any], tmp_path: Path) -> None:
    """The values (and where it matters the bytes) that come back are those of the recording, and nothing else comes."""
    with hosts.start(tmp_path, own_process=needs_process(case), monitor=monitor_options(case)) as host:
        with contextlib.closing(Conversation(host.dial())) as conversation:
            compare(case, converse(conversation, case))
        if "exit_status" in case and (status := host.exit_status()) not in (None, case["exit_status"]):
            raise MismatchError(f"exit status {status} instead of {case['exit_status']}")


def test_offers_the_commands_of_the_peer(tmp_path: Path) -> None:
    """query-commands is the peer's list but for the commands that the list of deviations names."""
    (case,) = [case for case in recordings() if case["case"] == COMMAND_LIST]
    with hosts.start(tmp_path) as host, contextlib.closing(Conversation(host.dial())) as conversation:
        (answer,) = map(parse, split_messages(converse(conversation, case)))
    offered = {command["name"] for command in answer["return"]}
    recorded = {command["name"] for command in case["recv"][0]["return"]}
    assert recorded - offered == deviations.commands("missing")
    assert offered - recorded == deviations.commands("added")


def needs_process(case: dict[str, Any]) -> bool:
    """Whether the case is about more than the conversation: an exit status, or monitor options."""
    return "exit_status" in case or "monitor" in case


def monitor_options(case: dict[str, Any]) -> str:
    return f",{case['monitor']}" if "monitor" in case else ""


def converse(conversation: Conversation, case: dict[str, Any]) -> str:
    """Play the client's side and return all that the server said in answer.

    At the end of its input the client half-closes: the server answers what it has, in full, and then closes. So an
    answer too many is seen as surely as one too few, and nobody waits for silence. With out-of-band execution on, a
    server may drop its queue at that point; there the recorded number of answers is awaited first.
    """
    answers: list[bytes] = []
    try:
        if not case["case"].startswith("unnegotiated-"):
            conversation.send(_NEGOTIATE)
            await_answers(conversation, answers, 2)
            answers.clear()
        *parts, last = split(case)
        for part in parts:
            conversation.send(part)
            if is_whole(part):
                await_answers(conversation, answers, 2)
            else:
                time.sleep(_BREATH)
        conversation.send(last)
        if "-oob" in case["case"] and "end" not in case:
            await_answers(conversation, answers, len(case["recv"]))
        conversation.finish_sending()
        return (b"".join(answers) + conversation.rest()).decode()
    except HungError:
        raise MismatchError(f"silence after {answers}; expected {case['recv']}") from None


def split(case: dict[str, Any]) -> list[bytes]:
    """What to send, in the parts in which it was sent."""
    data = bytes.fromhex(case["send_hex"]) if "send_hex" in case else case["send"].encode()
    cuts = [0, *case.get("split_at", ()), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


def is_whole(part: bytes) -> bool:
    try:
        return isinstance(json.loads(part), dict)
    except ValueError:
        return False


def await_answers(conversation: Conversation, answers: list[bytes], count: int) -> None:
    """Read until there are ``count`` answers or the server closes."""
    while len(answers) < count and (message := whole_message(conversation)):
        answers.append(message)


def whole_message(conversation: Conversation) -> bytes:
    """A line, or the lines of a pretty-printed message; empty at end of file."""
    message = conversation.line() or b""
    while message.startswith(b"{\r") and not message.endswith(b"\n}\r\n") and (line := conversation.line()):
        message += line
    return message


def compare(case: dict[str, Any], output: str) -> None:
    """Raise MismatchError unless ``output`` is what was recorded."""
    answers = [parse(message) for message in split_messages(output)]
    expected = [anonymous(message) for message in case["recv"]]
    for number, (got, wanted) in enumerate(zip(answers, expected, strict=False)):
        if got != wanted:
            raise MismatchError(f"answer {number}\n  got      {short(got)}\n  recorded {short(wanted)}")
    if len(answers) != len(expected):
        raise MismatchError(f"{len(answers)} answers instead of {len(expected)}; the last: {short(answers[-1:])}")
    if "recv_raw" in case and (raw := anonymous_text(output)) != (wanted_raw := anonymous_text(case["recv_raw"])):
        raise MismatchError(f"spelling\n  got      {raw[:500]!r}\n  recorded {wanted_raw[:500]!r}")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 500 else f"{text[:480]} ... ({len(text)} characters)"

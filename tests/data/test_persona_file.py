"""Personas from text files and character cards."""

from __future__ import annotations

import base64
import json
import os
import struct
import tempfile
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import preprocess
from kestrel.data.dataset import load_split
from kestrel.data.persona_file import read_persona
from kestrel.dialogue import Turn
from kestrel.errors import KestrelError

FIELDS = {
    "name": "Ada",
    "description": "{{char}} builds kites.\n\nShe   lives by the sea with {{user}}.",
    "personality": "curious, calm",
    "scenario": "A windy day\non the beach.",
    "first_mes": "Hello {{user}}, I am {{char}}!",
    "mes_example": "<START>\n{{user}}: Do you fly them?\n{{char}}: Every day.\nEven in rain.\n<START>\n{{char}}: And you?",
}


def picture(**texts: str) -> bytes:
    """A PNG file of one pixel with text chunks."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)), chunk(b"IDAT", zlib.compress(b"\0\0"))]
    parts += [chunk(b"tEXt", name.encode() + b"\0" + base64.b64encode(text.encode())) for name, text in texts.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IEND", b"")])


def forms() -> dict[str, bytes]:
    v2 = json.dumps({"spec": "chara_card_v2", "spec_version": "2.0", "data": FIELDS})
    v3 = json.dumps({"spec": "chara_card_v3", "spec_version": "3.0", "data": FIELDS})
    old = json.dumps({**FIELDS, "name": "Old"})
    return {
        "v1.json": json.dumps(FIELDS).encode(),
        "v2.json": v2.encode("utf-8-sig"),
        "v3.json": v3.encode(),
        "v2.png": picture(chara=v2),
        "both.png": picture(chara=old, ccv3=v3),  # the newer form counts
    }


@pytest.mark.parametrize("name", forms())
def test_a_card_in_every_form(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(forms()[name])
    persona = read_persona(tmp_path / name)
    assert persona.name == "Ada"
    assert persona.sentences == (
        "my name is Ada.", "Ada builds kites.", "She lives by the sea with you.", "curious, calm",
        "scenario: A windy day on the beach.",
    )  # fmt: skip
    assert persona.first_message == "Hello you, I am Ada!"
    assert persona.examples == (Turn("partner", "Do you fly them?"), Turn("self", "Every day.\nEven in rain."))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x89PNG\r\n\x1a\n", "a picture without a character card"),
        (picture(chara="[]"), "not a character card"),
        (b'{"name": "Ada"}', "it has no description"),
        (b'{"description": "x"}', "it has no name"),
        (b'{"name": 3, "description": "x"}', "name is no text"),
        (b"{", "not a character card"),
        (b"\xff", "a persona is a UTF-8 text file"),
        (b" \n", "at least one sentence"),
    ],
)
def test_what_is_no_persona_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(KestrelError, match=says):
        read_persona(tmp_path / "x")


def test_no_file_keeps_a_reader_waiting(tmp_path: Path) -> None:
    """A pipe, a device, a card of line breaks, a picture of a million chunks."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(KestrelError, match="not a regular file"):
            read_persona(path)
    began = time.process_time()
    (tmp_path / "breaks").write_text(json.dumps({**FIELDS, "mes_example": "\n" * 200_000 + "{{user}}" * 9999}))
    assert read_persona(tmp_path / "breaks").examples == ()
    (tmp_path / "chunks").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0tEXt\0\0\0\0" * 500_000)
    with pytest.raises(KestrelError, match="a picture without a character card"):
        read_persona(tmp_path / "chunks")
    assert time.process_time() - began < 5


@given(st.sampled_from(list(forms().values())), st.integers(0, 10**6), st.binary(max_size=4))
def test_a_damaged_card_is_refused_in_one_sentence(card: bytes, place: int, more: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        refused_or_read(card, place, more, Path(file.name))


def refused_or_read(card: bytes, place: int, more: bytes, path: Path) -> None:
    place %= len(card)
    path.write_bytes(card[:place] + more + card[place + len(more) :])
    try:
        assert read_persona(path).sentences
    except KestrelError as error:
        assert str(path) in str(error)


def test_the_persona_of_a_data_set_may_be_a_card(prepared, tmp_path: Path, capsys) -> None:
    """What it says is recorded, and not where it lies."""
    (tmp_path / "ada.png").write_bytes(forms()["v2.png"])
    turns = [{"speaker": "partner", "text": "hi"}, {"speaker": "self", "text": "hello"}]
    lines = [json.dumps({"dialogue_id": f"d{number}", "persona": [], "turns": turns}) for number in range(40)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    given = ["--data.source", str(tmp_path / "own.jsonl"), "--data.persona", str(tmp_path / "ada.png")]
    assert preprocess.main(prepared.arguments("--run_dir", str(tmp_path / "run"), *given)) == 0
    manifest = json.loads((tmp_path / "run" / "dataset" / "manifest.json").read_text())
    sentences = list(read_persona(tmp_path / "ada.png").sentences)
    assert manifest["settings"]["data"]["persona"] == sentences
    assert load_split(tmp_path / "run" / "dataset", "train", "")[0]["persona"] == sentences

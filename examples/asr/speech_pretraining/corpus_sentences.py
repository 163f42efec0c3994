# SPDX-License-Identifier: Apache-2.0
"""The sentences of the synthetic corpus: a small grammar of commands, numbers, dates and times.

A slot in braces is filled with one of its phrases, whose slots are filled in turn. The vocabulary is small and many words
follow from those before them, so that there is something to learn from minutes of speech.
"""

import re
import zlib

GRAMMAR = {
    "sentence": "turn {switch} the {device}|turn {switch} the {device} in the {room}|set the {device} in the {room} to "
    "{number}|open the {opening} in the {room}|close the {opening} in the {room}|remind me to {task} on {date}|remind me "
    "to {task} at {time}|wake me at {time} on {day}|book a table for {one} at {time} on {day}|send {number} dollars to "
    "{name}|call {name} at {time} on {day}|the next train to {city} leaves at {time}|what is the weather in {city} on "
    "{date}|the meeting with {name} is on {date}|move the meeting with {name} to {day} at {time}|the birthday of {name} "
    "is on {date}",
    "switch": "on|off",
    "device": "light|heating|radio",
    "room": "kitchen|garden|bedroom",
    "opening": "window|door",
    "task": "call {name}|feed the cat|pay the bill",
    "name": "anna|peter|maria",
    "city": "london|paris|berlin",
    "day": "monday|tuesday|wednesday|thursday|friday|saturday|sunday",
    "month": "january|february|march|april|may|june",
    "date": "the {ordinal} of {month}",
    "ordinal": "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth",
    "time": "{one} o'clock|half past {one}|a quarter past {one}|a quarter to {one}",
    "tens": "twenty|thirty|forty",
    "one": "one|two|three|four|five|six|seven|eight|nine",
    "number": "{tens}|{tens} {one}",
}


def make_sentence(rng, split):
    """Return a sentence of the split, which is chosen by the sentence's checksum (8 in 10: train)."""
    while True:
        sentence = expand(rng, "{sentence}")
        if {0: "validation", 1: "test"}.get(zlib.crc32(sentence.encode()) % 10, "train") == split:
            return sentence[0].upper() + sentence[1:] + "."


def expand(rng, phrase):
    """Return the phrase with every slot filled, by ``rng``."""
    return re.sub(r"{(\w+)}", lambda slot: expand(rng, rng.choice(GRAMMAR[slot[1]].split("|"))), phrase)


def transcript(sentence):
    """Return what a recogniser shall write for a sentence: small letters, apostrophes and single spaces."""
    return " ".join(re.sub(r"[^a-z' ]", "", sentence.lower()).split())
